"""Published and measured scores, read and checked, and the statistics that compare them.

A measured run is two files, `benchmarks/results/{method}/{env_id}/{run}.csv` (its eval.csv) and `{run}.json` (what made
it), brought in by `benchmarks.collect_results`. The samples of every interval are seeds, never episodes. Scores are in
percent.
"""

import dataclasses
import importlib
import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmarks.tables import read_exactly
from common import fail

ROOT = Path(__file__).resolve().parent
METHODS = ("floq", "value_flows", "q_flow", "evor")

# A difference from a published score up to this many points is no deviation, however narrow its interval.
MARGIN = 5.0
# A 95% interval of the difference wider than plus or minus this shows neither agreement nor a drop of ten points.
RESOLUTION = 10.0

# protocol -> (phase, how many of its last evaluations are averaged).
PROTOCOLS = {
    "offline-last3": ("offline", 3),
    "offline-2m-last3": ("offline", 3),
    "pixels-last3": ("offline", 3),
    "online-start": ("offline", 1),
    "online-end": ("online", 1),
}
# Protocols of other benchmarks or settings: kept in reported.csv, compared with nothing here.
OTHER_PROTOCOLS = ("offline-2m-last3-default-settings", "offline-advanced", "offline-ablation", "offline-by-others",
                   "d4rl-offline-last", "d4rl-online-start", "d4rl-online-end")  # fmt: skip
LONG = 2_000_000  # updates of the protocol `offline-2m-last3`
EVAL_INTERVAL = 100_000  # updates between published evaluations
# The task that `...-singletask-v0` means.
DEFAULT_TASKS = {
    "pointmaze": 1, "antmaze": 1, "humanoidmaze": 1, "antsoccer": 4, "cube": 2, "scene": 2, "puzzle-3x3": 4,
    "puzzle-4x4": 4, "puzzle-4x5": 2, "puzzle-4x6": 2,
}  # fmt: skip

REPORTED_COLUMNS = ["method", "env_id", "tasks", "protocol", "mean", "std", "num_seeds", "kind", "source"]
RUN_COLUMNS = ["step", "seed", "phase", "success", "episode_return", "episode_length", "episodes"]
IDENTITY_KEYS = ("algorithm", "args", "versions", "device", "dataset", "settings", "changed", "seconds")


# --- Reading ---


def canonical(env_id):
    """The id with its task: `cube-single-play-singletask-v0` -> `cube-single-play-singletask-task2-v0`."""
    if not env_id.endswith("-singletask-v0"):
        return env_id
    name = env_id.removeprefix("visual-")
    task = next((task for family, task in DEFAULT_TASKS.items() if name.startswith(family)), None)
    return env_id if task is None else env_id.replace("-singletask-v0", f"-singletask-task{task}-v0")


def environment(env_id):
    """`cube-single-play-singletask-task2-v0` -> `cube-single-play`: the name of the five tasks together."""
    return re.sub(r"-singletask(-task\d)?-v0$", "", env_id)


def number(path, line, row, name, kind=float):
    """A field as int or float; anything else ends the program with the file and the line."""
    try:
        value = kind(row[name])
    except ValueError:
        fail(f"{path}:{line}: {name} is {row[name]!r}, not {'a whole number' if kind is int else 'a number'}")
    if not np.isfinite(value):
        fail(f"{path}:{line}: {name} is {value}")
    return value


def read_reported(path=ROOT / "reported.csv"):
    """Published scores: {(method, env_id or environment, protocol): row}, of the first primary source or the first one.

    Each row is {mean, std, num_seeds, tasks (None where not known), kind, source}; scores in percent. An environment
    whose five tasks are known has the score that follows from them (`environment_scores`). The deviation printed beside
    a mean over tasks is not used: Value Flows' page prints the mean of its tasks' deviations, others do not say what
    theirs is.

    Raises:
        SystemExit: (code 2) for a malformed row, an unknown protocol or kind, a score outside 0 to 100, or two rows of
            one source for one score; with the file and the line.
    """
    reported, lines = {}, {}
    for line, row in read_exactly(path, REPORTED_COLUMNS):
        if row["protocol"] not in (known := (*PROTOCOLS, *OTHER_PROTOCOLS)):
            fail(f"{path}:{line}: unknown protocol {row['protocol']!r}; known: {', '.join(known)}")
        if row["kind"] not in ("primary", "secondary"):
            fail(f"{path}:{line}: kind is {row['kind']!r}, not primary or secondary")
        mean = number(path, line, row, "mean")
        # D4RL's scores are normalised returns: an expert has 100, better policies more.
        if not 0 <= mean <= 100 and not row["protocol"].startswith("d4rl"):
            fail(f"{path}:{line}: mean is {mean}, outside 0 to 100")
        key = row["method"], canonical(row["env_id"]), row["protocol"]
        if (entry := (*key, row["source"])) in lines:
            fail(f"{path}:{line}: a second score of {' '.join(key)} from one source: see line {lines[entry]}")
        lines[entry] = line
        if key in reported and (reported[key]["kind"] == "primary" or row["kind"] == "secondary"):
            continue
        reported[key] = {
            "mean": mean,
            "std": number(path, line, row, "std") if row["std"] else None,
            "num_seeds": number(path, line, row, "num_seeds", int) if row["num_seeds"] else None,
            "tasks": number(path, line, row, "tasks", int) if row["tasks"] else None,
            "kind": row["kind"],
            "source": row["source"],
        }
        if reported[key]["tasks"] != 1:
            reported[key]["std"] = None
    return reported | environment_scores(reported)


def environment_scores(reported):
    """{(method, environment, protocol): row} of environments whose five tasks are published with deviations and seeds.

    The tasks' scores are taken as independent: the deviation of their mean is the root of the sum of their variances,
    divided by five. The number of seeds is the smallest of the five.
    """
    tasks = defaultdict(list)
    for (method, env_id, protocol), row in reported.items():
        if row["tasks"] == 1 and re.search(r"-singletask-task[1-5]-v0$", env_id):
            tasks[method, environment(env_id), protocol].append(row)
    return {
        key: {
            "mean": np.mean([row["mean"] for row in rows]),
            "std": np.sqrt(sum(row["std"] ** 2 for row in rows)) / 5,
            "num_seeds": min(row["num_seeds"] for row in rows),
            "tasks": 5,
            "kind": "primary" if all(row["kind"] == "primary" for row in rows) else "secondary",
            "source": "its five tasks",
        }
        for key, rows in tasks.items()
        if len(rows) == 5 and all(row["std"] is not None and row["num_seeds"] for row in rows)
    }


def read_evaluations(path, args, unfinished=False):
    """Rows of an eval.csv, checked against the arguments of its run.

    Args:
        path: of the file.
        args: the run's arguments, of args.json.
        unfinished: whether evaluations after the last one may be missing.

    Returns:
        {phase: {seed: {step: success in percent}}}.

    Raises:
        SystemExit: (code 2) with the file and the line for a malformed row, a score outside [0, 1], a row of another
            protocol (seed, phase, step or number of episodes that the arguments do not give) or one that is there
            twice; with the file for missing evaluations (an unfinished run), or where there is none at all.
    """
    steps = evaluation_steps(args)
    seeds = range(args["seed"], args["seed"] + args["num_seeds"])
    curves = {phase: {seed: {} for seed in seeds} for phase in steps}
    for line, row in read_exactly(path, RUN_COLUMNS):
        where = f"{path}:{line}"
        step, seed, episodes = (number(path, line, row, name, int) for name in ("step", "seed", "episodes"))
        success = number(path, line, row, "success")
        if not 0 <= success <= 1:
            fail(f"{where}: success is {row['success']}, outside [0, 1]")
        if row["phase"] not in steps:
            phases = " and ".join(steps)
            fail(f"{where}: phase is {row['phase']!r}, but the run has {phases} only: another protocol's row")
        if seed not in seeds:
            fail(f"{where}: seed {seed} is none of the run's ({seeds[0]} to {seeds[-1]})")
        if episodes != args["eval_episodes"]:
            expected = args["eval_episodes"]
            fail(f"{where}: {episodes} episodes, the run has --eval-episodes {expected}: another protocol's row")
        if step not in steps[row["phase"]]:
            kind = "another protocol's row, or the former end of a run that was made longer (delete the latter)"
            fail(f"{where}: no {row['phase']} evaluation is due at step {step}: {kind}")
        if step in curves[row["phase"]][seed]:
            fail(f"{where}: a second row of step {step} and seed {seed}")
        curves[row["phase"]][seed][step] = 100 * success
    reached = max((step for by_seed in curves.values() for curve in by_seed.values() for step in curve), default=1)
    for phase, due in steps.items():
        for seed, curve in curves[phase].items():
            if missing := [step for step in sorted(due - curve.keys()) if step <= reached or not unfinished]:
                fail(f"{path}: unfinished: seed {seed} has no {phase} evaluation at step {missing[0]}")
    return curves


def at_published_steps(curves, args):
    """The evaluations of a finished run that the published protocols have; it may have been evaluated more often."""
    steps = evaluation_steps(args | {"eval_interval": EVAL_INTERVAL})
    return {
        phase: {seed: {step: curve[step] for step in sorted(steps[phase])} for seed, curve in by_seed.items()}
        for phase, by_seed in curves.items()
    }


def evaluation_steps(args):
    """{phase: set of steps} at which a run with these arguments is evaluated."""
    offline, last = args["total_timesteps"], args["total_timesteps"] + args["online_timesteps"]
    due = {1, offline, last} | set(range(args["eval_interval"], last + 1, args["eval_interval"]))
    steps = {"offline": {step for step in due if step <= offline}, "online": {step for step in due if step > offline}}
    return {phase: steps[phase] for phase in steps if steps[phase]}


def read_results(directory=ROOT / "results"):
    """Every run below a directory, checked; sorted by method and environment.

    Returns:
        list of {method, env_id (with its task), source, changed, unfinished, seeds, protocols, curves, info, path};
        `curves` as from read_evaluations, of published settings at the published steps; `changed` the settings that are
        not the published ones (none: the run gets a verdict when it is finished); `source` official, generated or
        custom.

    Raises:
        SystemExit: (code 2) for a csv file without its json file or the other way round, a json file without an
            identity, one in a directory of another method or environment, or two runs with the same settings, data and
            a seed in common.
    """
    runs, claimed = [], {}
    paths = {path.with_suffix("") for pattern in ("*/*/*.csv", "*/*/*.json") for path in Path(directory).glob(pattern)}
    for stem in sorted(paths):
        path, json_path = stem.with_name(stem.name + ".csv"), stem.with_name(stem.name + ".json")
        for there, missing in ((path, json_path), (json_path, path)):
            if not missing.exists():
                fail(f"{there} has no {missing.name}: results need both; remove the file and collect the run again")
        info = read_identity(json_path)
        method, env_id = info["algorithm"], canonical(info["args"]["env_id"])
        if (method, env_id) != (path.parent.parent.name, path.parent.name):
            fail(f"{json_path} is a run of {method} on {env_id}, in the directory of another")
        seeds = range(info["args"]["seed"], info["args"]["seed"] + info["args"]["num_seeds"])
        identity = experiment(info)
        for seed in seeds:
            key = identity, seed
            if key in claimed:
                fail(f"{path} and {claimed[key]} claim the same identity: settings, data and seed {seed}; remove one")
            claimed[key] = path
        unfinished = info.get("unfinished", False)
        curves = read_evaluations(path, info["args"], unfinished)
        runs.append({
            "method": method, "env_id": env_id, "source": info["dataset"]["source"], "changed": info["changed"],
            "seeds": list(seeds), "info": info, "path": path, "protocols": protocols(info["args"]),
            "curves": curves if unfinished or info["changed"] else at_published_steps(curves, info["args"]),
            "unfinished": unfinished,
        })  # fmt: skip
    return runs


def read_identity(path):
    """A run's json file; the program ends with code 2 where it lacks what identifies a run."""
    try:
        info = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        fail(f"{path} cannot be read: {error}")
    missing = [key for key in IDENTITY_KEYS if not isinstance(info, dict) or key not in info]
    missing += [] if missing else [f"args.{key}" for key in ("env_id", "seed", "num_seeds") if key not in info["args"]]
    missing += [] if missing else [f"dataset.{key}" for key in ("source", "sha256") if key not in info["dataset"]]
    if missing:
        fail(f"{path} has no identity: {', '.join(missing)} missing; collect the run with benchmarks.collect_results")
    if info["algorithm"] not in METHODS:
        fail(f"{path}: unknown method {info['algorithm']!r}; known: {', '.join(METHODS)}")
    return info


def experiment(info):
    """What two runs share that differ in their seeds only: method, task, data, all settings that change the numbers.

    Settings at their default are left out: a run from before a flag existed has that flag's default.
    """
    defaults = dataclasses.asdict(importlib.import_module(info["algorithm"]).Args())
    defaults = json.loads(json.dumps(defaults))  # tuples as the lists that a json file has
    ignored = () if info["changed"] else ("eval_interval",)  # of published settings: the published steps count
    settings = {n: value for n, value in info["settings"].items() if value != defaults.get(n) and n not in ignored}
    identity = info["algorithm"], canonical(info["args"]["env_id"]), info["dataset"]["sha256"], settings
    return json.dumps(identity, sort_keys=True)


def protocols(args):
    """Names of the published protocols that a run with these arguments follows (its other settings aside)."""
    if args["online_timesteps"]:
        return ["online-start", "online-end"]
    if args["env_id"].startswith("visual-"):
        return ["pixels-last3"]
    return ["offline-2m-last3" if args["total_timesteps"] == LONG else "offline-last3"]


# --- Statistics ---


def seed_scores(curves, protocol):
    """{seed: score} by a protocol: the mean of the phase's last evaluations."""
    phase, last = PROTOCOLS[protocol]
    return {seed: np.mean([curve[step] for step in sorted(curve)[-last:]]) for seed, curve in curves[phase].items()}


def interval(values):
    """Mean of the seeds' values and half of its 95% interval (Student's t); NaN for one seed, which has none."""
    from scipy.stats import t

    n = len(values)
    return np.mean(values), t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n) if n > 1 else np.nan


def interval_text(values, form, unit=""):
    """Mean and half of the 95% interval as text, numbers in the format `form`: `50.0% +- 3.1`; of one seed the mean."""
    mean, half = interval(values)
    return f"{mean:{form}}{unit}" + (f" +- {half:{form.lstrip('+')}}" if len(values) > 1 else "")


def difference(values, reported):
    """Measured minus published score and half of its 95% interval (Welch's t); NaN where there is none.

    The published deviation is taken as numpy's default (over n, as the authors' scripts compute it); where a paper
    gives none, or no number of seeds, the measured one stands in for it. An environment's deviation counts as one of m
    seeds, although those of five tasks tell a little more.

    Args:
        values: scores, a seed each.
        reported: {mean, std, num_seeds}.
    """
    from scipy.stats import t

    n, m = len(values), reported["num_seeds"] or len(values)
    distance = np.mean(values) - reported["mean"]
    if n < 2:
        return distance, np.nan
    ours = np.var(values, ddof=1) / n
    known = reported["std"] is not None and m > 1
    theirs = reported["std"] ** 2 / (m - 1) if known else np.var(values, ddof=1) / m
    if ours + theirs == 0:
        return distance, 0.0
    freedom = n - 1  # where the one measured estimate stands in for both
    if known:
        freedom = (ours + theirs) ** 2 / (ours**2 / (n - 1) + theirs**2 / (m - 1))
    return distance, t.ppf(0.975, freedom) * np.sqrt(ours + theirs)


def verdict(values, reported):
    """Whether measured scores agree with a published one.

    below, above: the 95% interval of the difference excludes zero and the difference exceeds MARGIN.
    undecided: else, if the interval is wider than plus or minus RESOLUTION (or there is one seed only).
    reproduced: else.

    Args:
        values: scores in percent, a seed each.
        reported: {mean, std, num_seeds}.
    """
    distance, half = difference(values, reported)
    if abs(distance) > max(MARGIN, half) and not np.isnan(half):
        return "below" if distance < 0 else "above"
    return "reproduced" if half <= RESOLUTION else "undecided"


def iqm(samples, num_resamples=2000):
    """Interquartile mean over all tasks' seeds, and its 95% interval: a bootstrap that draws seeds within each task.

    Args:
        samples: a list of scores for each task, a seed each; at least two seeds for an interval (else NaN).
        num_resamples: of the bootstrap.

    Returns:
        (mean, low, high).
    """
    from scipy.stats import bootstrap, trim_mean

    mean = trim_mean(np.concatenate(samples), 0.25)
    if min(map(len, samples)) < 2:
        return mean, np.nan, np.nan
    result = bootstrap(
        samples, lambda *parts, axis: trim_mean(np.concatenate(parts, axis=axis), 0.25, axis=axis), vectorized=True,
        n_resamples=num_resamples, method="percentile", rng=np.random.default_rng(0),
    )  # fmt: skip
    return mean, *result.confidence_interval
