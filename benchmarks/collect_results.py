"""Brings finished runs into benchmarks/results: their evaluations and what made them.

    python -m benchmarks.collect_results runs/RUN_DIR [runs/RUN_DIR ...]
    python -m benchmarks.collect_results runs/*__* --skip    # leave out what is refused: unfinished runs, wrong rows
    python -m benchmarks.collect_results runs/RUN_DIR --unfinished    # so far; again later, with more evaluations

Writes `benchmarks/results/{method}/{env_id}/{run}.csv`, the run's eval.csv, and `{run}.json`: its arguments, versions,
device, data with its hash, wall time, and the settings that are not the published ones. A run that is unfinished
(without `--unfinished`), that has no identity, or whose settings, data and seeds are there already with other numbers
is refused (exit code 2) before anything is written.
"""

import dataclasses
import hashlib
import importlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks import scores, tables
from common import arguments, envs, fail, generate, runs
from common.files import check_writable

# Arguments that name a run or its place. No number depends on them, nor on arguments.MAY_CHANGE but for its lengths.
NAMES = {"exp_name", "seed", "num_seeds", "env_id", "quick", "log_interval", "evaluate", "torch_deterministic"}
NAMES |= {"export", "export_seed"}
# Compared by the data themselves.
DATA = {"dataset_source", "generated_episodes"}
ONLINE_STEPS = {"floq": 2_000_000, "value_flows": 1_000_000, "q_flow": 1_000_000, "evor": 1_000_000}  # as published


@dataclass
class CollectResultsArgs:
    run_dirs: tyro.conf.Positional[tuple[str, ...]]
    """run directories"""
    output: str = str(scores.ROOT / "results")
    """directory of the results"""
    skip: bool = False
    """leave out runs that are refused, as unfinished ones (it is said which and why), instead of collecting nothing"""
    unfinished: bool = False
    """take unfinished runs too; they get no score and no verdict, and grow when collected again"""


def settings(args):
    """{name: value} of the arguments that change a run's numbers, besides its seeds and data."""
    ignored = (arguments.MAY_CHANGE - arguments.LENGTHS) | NAMES | DATA
    return {name: value for name, value in sorted(args.items()) if name not in ignored}


def changed_settings(info):
    """{name: value} of what differs from the method's published configuration of the environment, data included.

    Where the method has none, `env_id` is among them: always for EVOR, most of whose settings are not known.

    Args:
        info: the content of a run's args.json.
    """
    module, args = importlib.import_module(info["algorithm"]), info["args"]
    environment = scores.environment(args["env_id"])
    published = dict(module.TUNED.get(environment, {}))
    published |= module.TUNED_ONLINE.get(environment, {}) if args["online_timesteps"] else {}
    published = dataclasses.asdict(module.Args(**published))
    published["online_timesteps"] = ONLINE_STEPS[info["algorithm"]] if args["online_timesteps"] else 0
    published = json.loads(json.dumps(published))  # tuples as the lists that args.json has
    changed = {name: value for name, value in settings(args).items() if value != published.get(name)}
    if info["dataset"]["source"] == "custom":
        changed["dataset"] = info["dataset"]["file"]
    if made := re.search(r"-generated-(\d+)ep-", info["dataset"]["file"]):
        official = generate.OFFICIAL_SIZES.get(envs.dataset_name(args["env_id"]), (None,))[0]
        changed |= {"generated_episodes": int(made[1])} if int(made[1]) != official else {}
    tuned = module.TUNED_ONLINE if args["online_timesteps"] else module.TUNED
    if environment not in tuned:
        changed["env_id"] = args["env_id"]
    precisions = [part["matmul_precision"] for part in (args, *info.get("earlier", ())) if "matmul_precision" in part]
    if "medium" in precisions:  # bfloat16, at least for a while; the others are a GPU's and a CPU's own
        changed["matmul_precision"] = "medium"
    if set(changed) == {"eval_interval"} and scores.EVAL_INTERVAL % args["eval_interval"] == 0:
        return {}  # it is evaluated at the published steps, and at others too
    return changed


def read_run(run_dir, unfinished=False):
    """A run's identity, for the json file, and the bytes of its eval.csv.

    Raises:
        SystemExit: (code 2) for a directory that is no run's, one without an identity, or, unless `unfinished` runs are
            wanted, an unfinished one.
    """
    run_dir = Path(run_dir)
    try:
        info = json.loads((run_dir / "args.json").read_text())
    except (OSError, ValueError) as error:
        fail(f"{run_dir}/args.json cannot be read, so the run has no identity: {error}")
    missing = [name for name in ("algorithm", "args", "versions", "device", "dataset") if name not in info]
    if missing:
        fail(f"{run_dir}/args.json has no identity: {', '.join(missing)} missing")
    if info["algorithm"] not in scores.METHODS:
        fail(f"{run_dir} is a run of {info['algorithm']}; known: {', '.join(scores.METHODS)}")
    path = run_dir / "eval.csv"
    if not path.exists():
        fail(
            f"{run_dir} is unfinished: it has no eval.csv; go on with python {info['algorithm']}.py --resume {run_dir}"
        )
    curves = scores.read_evaluations(path, info["args"], unfinished)
    info["settings"], info["changed"] = settings(info["args"]), changed_settings(info)
    due = scores.evaluation_steps(info["args"])
    if any(due[phase] - curve.keys() for phase in due for curve in curves[phase].values()):
        info["unfinished"] = True
    columns = ["step", "updates_per_second", "seconds_training", "seconds_evaluating"]
    timed = (run_dir / "timing.csv").exists()  # a run may be too short for a row
    timing = tables.read_exactly(run_dir / "timing.csv", columns) if timed else []
    last = timing[-1][1] if timing else dict.fromkeys(columns, 0)
    info["seconds"] = {kind: float(last[f"seconds_{kind}"]) for kind in ("training", "evaluating")}
    for name in ("runs_dir", "dataset_dir", "dataset_path", "resume", "wandb_entity"):
        info["args"].pop(name, None)  # places of the machine that made it
    return info, path.read_bytes()


def run_name(info):
    """`{source}-{hash of the experiment}-seeds{first}-{last}`: the same for every copy of a run."""
    first, number = info["args"]["seed"], info["args"]["num_seeds"]
    experiment = hashlib.sha256(scores.experiment(info).encode()).hexdigest()[:8]
    return f"{info['dataset']['source']}-{experiment}-seeds{first}-{first + number - 1}"


def main(args):
    """Collects the runs; nothing is written unless all of them are good."""
    if not args.run_dirs:
        fail("no run directory given: python -m benchmarks.collect_results RUN_DIR ...")
    output = Path(args.output)
    check_writable(output, "--output")
    claimed = {}  # (experiment, seed) -> (where, evaluations)
    for run in scores.read_results(output):
        identity, found = scores.experiment(run["info"]), (run["path"], run["path"].read_bytes())
        claimed |= {(identity, seed): found for seed in run["seeds"]}
    new = {}
    for run_dir in args.run_dirs:
        try:
            info, evaluations = read_run(run_dir, args.unfinished)
            seeds = range(info["args"]["seed"], info["args"]["seed"] + info["args"]["num_seeds"])
            identity = scores.experiment(info)
            others = [claimed[identity, seed] for seed in seeds if (identity, seed) in claimed]
            for other, numbers in others:
                if not (numbers.startswith(evaluations) or evaluations.startswith(numbers)):  # one run, at two times
                    same = f"{run_dir} claims the same settings, data and seeds as {other}"
                    fail(f"{same}, with other numbers; keep one of them")
        except SystemExit:
            if not args.skip:
                raise
            print(f"{run_dir}: left out")
            continue
        path = output / info["algorithm"] / scores.canonical(info["args"]["env_id"]) / f"{run_name(info)}.csv"
        if others:
            path = others[0][0]
        if others and len(evaluations) <= len(others[0][1]):
            print(f"{run_dir}: there already, {path}")
        else:
            new[path] = info, evaluations
            claimed |= {(identity, seed): (path, evaluations) for seed in seeds}
    for path, (info, evaluations) in new.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        runs.write_text(path, evaluations.decode())  # first: beside an unfinished run's json it may have more rows
        runs.write_text(path.with_suffix(".json"), json.dumps(info, indent=1) + "\n")
        label = f"not the published settings: {', '.join(info['changed'])}" if info["changed"] else "published settings"
        label += ", so far" if "unfinished" in info else ""
        print(f"{path} ({label})")


if __name__ == "__main__":
    main(tyro.cli(CollectResultsArgs, description=__doc__))
