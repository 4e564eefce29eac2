"""Twins: the authors' own agents (JAX) and ours on the same data with the same settings, tested for equivalence.

    python -m benchmarks.studies.twins authors --method floq --authors CHECKOUT --python PYTHON  # their side
    python -m benchmarks.studies.twins ours --method floq                                        # our side
    python -m benchmarks.studies.twins compare                                                   # tests, table, picture
    python -m benchmarks.studies.twins parity --method floq --authors CHECKOUT --python PYTHON   # 1,000 equal updates
    python -m benchmarks.studies.twins time --method floq --authors CHECKOUT --python PYTHON     # paired times

CHECKOUT is a clone of the authors' repository (chongyi-zheng/value-flows, CMU-AIRe/floq, jaehyeokdoo2/qflow), PYTHON an
interpreter with jax, flax, optax, distrax and ml_collections. docs/twins.md has the rule and the results.

Both sides train in four quarters, all seeds to the end of a quarter before the next one begins. After each quarter,
`benchmarks/results/twins/METHOD_SIDE_seedN.csv` (step, quantity, value) is written anew. A stopped side continues.
"""

import csv
import importlib
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from scipy import stats

from benchmarks import tables
from common import datasets, fail, graphs, rollout, runs
from common.device import setup_torch
from common.draws import Draws
from common.replay import Replay
from common.stacked import Stacked

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "twins"
METHODS = ("floq", "value_flows", "q_flow")
NEEDED = ("jax", "flax", "optax", "distrax", "ml_collections")  # in the authors' Python
AGENT_FILES = {"floq": "agents/floq.py", "value_flows": "agents/value_flows.py", "q_flow": "agents/qflow.py"}

WINDOW = 500  # updates that a loss is averaged over
QUARTERS = 4
EPISODES = {1: 25, 2: 25, 3: 100, 4: 100}  # of the evaluation after each quarter, per seed
NUM_PROBES = 1_000  # fixed pairs whose learned values are compared

# Our settings under the authors' names; those with the same name first.
SAME_NAME = {
    "floq": (
        "batch_size", "tau", "q_agg", "alpha", "actor_flow_steps", "critic_flow_steps", "normalize_q_loss",
        "flow_num_ensembles", "distill_num_ensembles", "noise_samples", "noise_coverage", "num_bins", "sigma",
        "reward_offset", "layer_norm", "actor_layer_norm", "use_prob_embed", "train_at_zero_only", "block_width",
        "block_depth", "value_hidden_dims", "actor_hidden_dims",
    ),
    "value_flows": (
        "batch_size", "tau", "ret_agg", "q_agg", "clip_flow_actions", "clip_flow_returns", "confidence_weight_temp",
        "dcfm_lambda", "bcfm_lambda", "alpha", "normalize_q_loss", "num_samples", "num_flow_steps", "actor_layer_norm",
        "value_layer_norm", "value_hidden_dims", "actor_hidden_dims",
    ),
    "q_flow": (
        "batch_size", "tau", "q_agg", "alpha", "flow_steps", "use_time_embed", "time_embed_dim", "layer_norm",
        "actor_layer_norm", "num_ensembles", "value_hidden_dims", "actor_hidden_dims",
    ),
}  # fmt: skip
RENAMED = {"gamma": "discount", "learning_rate": "lr"}

LOSSES = {  # what both sides log
    "floq": (
        "critic/critic_loss", "critic/floq_loss", "critic/distilled_critic_loss", "critic/td_error", "critic/q_mean",
        "actor/actor_loss", "actor/bc_flow_loss", "actor/distill_loss", "actor/q_loss",
    ),
    "value_flows": (
        "critic/critic_loss", "critic/bcfm_loss", "critic/dcfm_loss", "critic/weight", "critic/q_std",
        "actor/actor_loss", "actor/bc_flow_loss", "actor/distill_loss", "actor/q_loss",
    ),
    "q_flow": (
        "critic/outer_loss", "critic/distillation_loss", "critic/q_outer_mean", "critic/q_inner_mean",
        "actor/total_loss",
    ),
}  # fmt: skip
VALUES = {"floq": ("values/q", "values/flow"), "value_flows": ("values/q",), "q_flow": ("values/q",)}

MARGIN = {"success": 10.0, "ratio": math.log(1.05)}  # points; logarithm of a ratio
TESTED = (1, 2, 4)  # quarters after which losses and learned values are tested
CONFIDENCE, POWER_Z = 0.90, 1.645 + 1.282  # of the interval; normal quantiles for TOST at 5% with power 0.8


@dataclass
class TwinsArgs:
    task: tyro.conf.Positional[Literal["authors", "ours", "compare", "parity", "time"]]
    """what to do; see above"""
    method: Literal["floq", "value_flows", "q_flow"] = "floq"
    """whose agents (compare: all that have results)"""
    authors: str = "."
    """checkout of the authors' repository"""
    python: str = sys.executable
    """Python that has jax, flax, optax, distrax and ml_collections"""
    num_seeds: int = 8
    """seeds per side"""
    first_seed: int = 0
    """first of these seeds: others beside those that are there"""
    until: int = QUARTERS
    """last quarter to train"""
    threads: int = 1
    """threads of each side; time keeps both sides on as many cores, since XLA knows no limit of threads"""
    size: Literal["quick", "published"] = "quick"
    """time: sizes of --quick, or the published ones of cube-single-play"""
    repeats: int = 15
    """time: pairs"""
    updates: int = 1_000
    """parity: updates"""
    state_dir: str = "runs/twins"
    """directory of what a side needs to continue"""
    results_dir: str = str(RESULTS)
    """directory of the csv files"""
    dataset_dir: str = "~/.ogbench/data"
    """directory of the dataset files"""
    dataset_path: str | None = None
    """this dataset file instead of the one that --quick makes"""


# --- Settings and data ---


def settings_of(method, size="quick"):
    """Our arguments of a method at a size."""
    module = importlib.import_module(method)
    if size == "quick":
        return module.Args(**module.TUNED.get("cube-single-noisy", {}) | module.QUICK)
    return replace(module.Args(), **module.TUNED.get("cube-single-play", {}))


def config_of(method, args):
    """Our arguments as the authors' settings."""
    return {name: getattr(args, name) for name in SAME_NAME[method]} | {
        theirs: getattr(args, ours) for ours, theirs in RENAMED.items()
    }


def seeds_of(twins):
    """The seeds of this program's side."""
    return list(range(twins.first_seed, twins.first_seed + twins.num_seeds))


def load_data(twins, args):
    """The relabelled transitions {key: (N, ...)} on the CPU, and the file's identity."""
    args = replace(args, dataset_dir=twins.dataset_dir, dataset_path=twins.dataset_path)
    return datasets.load(args, torch.device("cpu"))


def probes(dataset):
    """Fixed pairs and noise for learned values: {probe_rows (1000,), probe_normal, probe_uniform (1000, 1)}."""
    rng = np.random.default_rng(17)
    rows = rng.integers(len(dataset["rewards"]), size=NUM_PROBES)
    normal, uniform = rng.standard_normal((NUM_PROBES, 1)), rng.random((NUM_PROBES, 1))
    return {"probe_rows": rows, "probe_normal": np.float32(normal), "probe_uniform": np.float32(uniform)}


def export_data(dataset, path):
    """Writes the transitions and the probes as a plain npz for the authors' side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part.npz")
    np.savez(part, **{name: value.numpy() for name, value in dataset.items()}, **probes(dataset))
    os.replace(part, path)


# --- The authors' side ---


def check_authors(twins):
    """Ends with exit code 2 unless the checkout has the agent and the Python has what it imports."""
    file = Path(twins.authors) / AGENT_FILES[twins.method]
    if not file.is_file():
        fail(f"--authors {twins.authors} has no {AGENT_FILES[twins.method]}; clone the authors' repository there")
    check = f"import importlib.util as u; print(*(n for n in {NEEDED!r} if u.find_spec(n) is None))"
    try:
        found = subprocess.run([twins.python, "-c", check], capture_output=True, text=True)
    except OSError as error:
        fail(f"--python {twins.python} cannot be started: {error.strerror}")
    missing = found.stdout.split() if found.returncode == 0 else NEEDED
    if missing:
        fail(f"--python {twins.python} lacks {', '.join(missing)}; pip install {' '.join(missing)} there")


class Authors:
    """The authors' agent in a process of its own; requests are the methods of twins_authors.Server."""

    def __init__(self, twins, args, data):
        self.connection, child = Pipe()
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(twins.threads)}
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(Path(twins.state_dir).resolve() / "jax_cache")}
        environment.pop("PYTHONPATH", None)
        script = str(Path(__file__).with_name("twins_authors.py"))
        self.process = subprocess.Popen(
            [twins.python, script, str(child.fileno())], env=environment, pass_fds=[child.fileno()]
        )
        child.close()
        config = config_of(twins.method, args)
        self.ask("make", authors=str(Path(twins.authors).resolve()), method=twins.method, config=config, data=str(data))

    def ask(self, kind, **arguments):
        """The reply to a request.

        Raises:
            RuntimeError: the request failed, with its traceback, or the process died.
        """
        try:
            self.connection.send((kind, arguments))
            ok, value = self.connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"the authors' side died with exit code {self.process.wait()}") from None
        if not ok:
            raise RuntimeError(f"the authors' side failed:\n{value}")
        return value

    def policy(self, observations, keys):
        """The taken seeds' policy for rollout.Evaluator: (S, P, D), keys (S, P, 2) -> (S, P, A)."""
        return torch.as_tensor(self.ask("act", observations=observations.numpy(), keys=keys.numpy()))

    def close(self):
        """Ends the process."""
        self.connection.close()
        self.process.wait()


def draw_keys(generator, num_steps):
    """Keys of the authors' random numbers for `num_steps` actions: (num_steps, 2)."""
    return torch.randint(2**31, (num_steps, 2), generator=generator)


def train_authors(twins, args, identity, data):
    """Trains every seed of the authors' agent, quarter by quarter."""
    what = {"settings": config_of(twins.method, args), "dataset": identity}
    paths = {seed: Path(twins.state_dir) / f"{twins.method}_authors_seed{seed}.pkl" for seed in seeds_of(twins)}
    check_continues(twins, "authors", what, paths.values())
    side = Authors(twins, args, data)
    about = {"versions": side.ask("versions"), "commit": commit_of(twins.authors)} | what
    quarter_length = args.total_timesteps // QUARTERS
    for quarter in range(1, twins.until + 1):
        pending, states = [], []  # seeds that are not evaluated at the quarter's end
        for seed, state in paths.items():
            rows = Rows(twins, "authors", seed)
            if state.exists() and rows.done(quarter):
                continue
            step = side.ask("begin", seed=seed, state=str(state) if state.exists() else None)
            rows.cut(step)
            while step < quarter * quarter_length:
                losses = side.ask("train", updates=WINDOW)
                step += WINDOW
                rows.add(step, losses)
                rows.save()  # before the agent: rows after its step are cut when it continues
                side.ask("save", state=str(state))
            print(f"{twins.method} authors seed {seed}: {step} updates", flush=True)
            pending.append((seed, rows))
            states.append(str(state))
        if pending:
            side.ask("take", states=states)
            seeds = [seed for seed, _ in pending]
            played = play(args, seeds, EPISODES[quarter], side.policy, draw_keys, quarter * quarter_length)
            write_about(twins, "authors", about)
            publish(pending, played, quarter * quarter_length)
            print(f"{twins.method} authors seeds {seeds}: {[row['success'] for row in played]}", flush=True)
    side.close()


# --- Our side ---


class Ours:
    """Our agents, all seeds in this process.

    Args:
        twins, args: of this program and of the method.
        dataset: the transitions.
        seeds: their numbers.
    """

    def __init__(self, twins, args, dataset, seeds):
        self.method, self.args, self.seeds, self.step = twins.method, args, seeds, 0
        self.module = importlib.import_module(twins.method)
        replay = Replay(dataset, len(seeds), 0)
        device = torch.device("cpu")
        self.agents = Stacked(
            lambda: self.module.Agent(args, **replay.agent_inputs()), seeds, device, args.learning_rate
        )
        one_update = lambda draws: self.module.update(self.agents, *split_inputs(replay, draws))
        self.update = graphs.FastUpdate(self.agents, one_update, args.compile, False)
        self.draw = Draws(self.agents.agent, args, seeds, len(dataset["rewards"]), device)
        self.values = self.agents.function(VALUES_OF[self.method])
        fixed = {name: torch.as_tensor(value) for name, value in probes(dataset).items()}
        rows = fixed.pop("probe_rows")
        self.probes = dataset["observations"][rows], dataset["actions"][rows], *fixed.values()
        self.policy, self.draw_act_noise = self.agents.function("act"), self.agents.agent.draw_act_noise

    def train(self, updates):
        """Trains by some updates; returns a dictionary per seed: losses' means over them, learned values after them."""
        sums = None
        for _ in range(updates):
            metrics = self.update(self.draw(self.step))
            sums = metrics if sums is None else {name: sums[name] + value for name, value in metrics.items()}
            self.step += 1
        means = {name: value / updates for name, value in sums.items()}
        every = lambda tensor: tensor.expand(len(self.seeds), *tensor.shape)  # (S, 1000, ...): the same for all
        means |= self.values(*(every(tensor) for tensor in self.probes))
        return [{name: value[s].item() for name, value in means.items()} for s in range(len(self.seeds))]

    def save(self, path):
        """Saves the agents, whole or not at all."""
        torch.save({"step": self.step} | self.agents.state_dict(), f"{path}.part")
        os.replace(f"{path}.part", path)

    def restore(self, path):
        """Takes over what was saved."""
        saved = torch.load(path, weights_only=True)
        self.agents.load_state_dict(saved)
        self.step = saved["step"]


def split_inputs(replay, draws):
    """An update's batch and noise: of drawn rows ("indices"), or a batch as it is given beside the noise."""
    if "indices" in draws:
        return replay.inputs(draws)
    batch = {name: value for name, value in draws.items() if name in replay.dataset}
    return batch, {name: value for name, value in draws.items() if name not in batch}


def floq_values(agent, observations, actions, normal, uniform):
    """Mean of the distilled critics, and of the flows' end points."""
    flow_q = agent.flow_q(agent.critic_flow, observations, actions, agent.start_noise(uniform))
    return {"values/q": agent.q_values(observations, actions).mean(), "values/flow": flow_q.mean()}


def value_flows_values(agent, observations, actions, normal, uniform):
    """Mean of the return fields' expectations."""
    q = agent.q_values(observations, actions.unsqueeze(1), normal.unsqueeze(1))
    return {"values/q": q.mean()}


def q_flow_values(agent, observations, actions, normal, uniform):
    """Mean of the critics."""
    return {"values/q": agent.q_values(agent.critic, observations, actions).mean()}


VALUES_OF = {"floq": floq_values, "value_flows": value_flows_values, "q_flow": q_flow_values}


def train_ours(twins, args, identity, dataset):
    """Trains every seed of our agent, side by side."""
    settings = {
        name: value for name, value in asdict(args).items() if name not in ("runs_dir", "dataset_dir", "resume")
    }
    what, seeds = {"settings": settings, "dataset": identity}, seeds_of(twins)
    first = f"_from{twins.first_seed}" if twins.first_seed else ""
    state = Path(twins.state_dir) / f"{twins.method}_ours{first}.pt"
    check_continues(twins, "ours", what, [state])
    side = Ours(twins, args, dataset, seeds)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    about = {"versions": versions, "commit": commit_of(ROOT)} | what
    every_rows = [Rows(twins, "ours", seed) for seed in seeds]
    if state.exists():
        side.restore(state)
    elif there := [seed for seed, rows in zip(seeds, every_rows) if rows.done(1)]:
        fail(f"--first-seed {twins.first_seed}: seed {there[0]} is there already, trained beside other seeds")
    for rows in every_rows:
        rows.cut(side.step)
    quarter_length = args.total_timesteps // QUARTERS
    for quarter in range(1, twins.until + 1):
        if all(rows.done(quarter) for rows in every_rows):
            continue
        while side.step < quarter * quarter_length:
            for rows, losses in zip(every_rows, side.train(WINDOW)):
                rows.add(side.step, losses)
                rows.save()
            side.save(state)
        played = play(args, seeds, EPISODES[quarter], side.policy, side.draw_act_noise, side.step)
        write_about(twins, "ours", about)
        publish(list(zip(seeds, every_rows)), played, side.step)
        print(f"{twins.method} ours step {side.step}: {[row['success'] for row in played]}", flush=True)


# --- Evaluations and rows ---


def play(args, seeds, episodes, policy, draw_noise, step):
    """Evaluates seeds side by side by common/rollout.py; returns {success, episode_length} of each."""
    settings = replace(args, num_seeds=len(seeds), eval_episodes=episodes, eval_workers=1)
    evaluator = rollout.Evaluator(settings, seeds, torch.device("cpu"), Path())
    played = evaluator(policy, draw_noise, step)
    return [{name: row[name] for name in ("success", "episode_length")} for row in played]


def publish(every_rows, played, step):
    """Adds evaluations to their seeds' rows [(seed, rows)], and writes these to the results."""
    for (_, rows), result in zip(every_rows, played):
        rows.add(step, result)
        rows.save(publish=True)


class Rows:
    """A seed's rows (step, quantity, value): kept beside its state, and in the results once a quarter is complete."""

    def __init__(self, twins, side, seed):
        name = f"{twins.method}_{side}_seed{seed}.csv"
        self.kept, self.published = Path(twins.state_dir) / name, Path(twins.results_dir) / name
        self.quarter_length = settings_of(twins.method).total_timesteps // QUARTERS
        self.rows = read_rows(self.kept) if self.kept.exists() else []

    def done(self, quarter):
        """Whether the quarter has been evaluated."""
        return any(step == quarter * self.quarter_length and name == "success" for step, name, _ in self.rows)

    def cut(self, step):
        """Drops the rows after `step`, which will come again."""
        self.rows = [row for row in self.rows if row[0] <= step]

    def add(self, step, values):
        """Adds {quantity: value}, in place of the step's values of the same name: it may be evaluated again."""
        kept = [row for row in self.rows if row[0] != step or row[1] not in values]
        self.rows = kept + [(step, name, value) for name, value in values.items()]

    def save(self, publish=False):
        """Writes the rows, whole or not at all."""
        text = "step,quantity,value\n" + "".join(f"{step},{name},{value:.7g}\n" for step, name, value in self.rows)
        for path in (self.kept, self.published) if publish else (self.kept,):
            path.parent.mkdir(parents=True, exist_ok=True)
            runs.write_text(path, text)


def read_rows(path):
    """[(step, quantity, value)] of a csv file."""
    with open(path, newline="") as file:
        return [(int(row["step"]), row["quantity"], float(row["value"])) for row in csv.DictReader(file)]


def commit_of(directory):
    """The commit that a checkout is at; None where it is none."""
    command = ["git", "-C", str(directory), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True)
    is_root = subprocess.run([*command[:3], "rev-parse", "--show-toplevel"], capture_output=True, text=True)
    return found.stdout.strip() if is_root.stdout.strip() == str(Path(directory).resolve()) else None


def check_continues(twins, side, what, states):
    """Ends with exit code 2 where a side continues with other settings or data than it began with.

    They are kept beside its states. Of states from before they were, the side's json in the results has them, if any.

    Args:
        what: {settings, dataset} of now.
        states: files that the side continues from; it begins where none is there and its first seed is 0.
    """
    name, what = f"{twins.method}_{side}.json", json.loads(json.dumps(what))  # as it is read: tuples are lists
    kept = Path(twins.state_dir) / name
    continues = twins.first_seed > 0 or any(state.exists() for state in states)
    found = next((path for path in (kept, Path(twins.results_dir) / name) if path.exists()), None)
    if continues and found:
        before = json.loads(found.read_text())
        flat = lambda about: about["settings"] | {"the dataset's sha256": about["dataset"]["sha256"]}
        old, new = flat(before), flat(what)
        others = [f"{key} {old[key]} (now {new[key]})" for key in old if key in new and old[key] != new[key]]
        if others:
            began = f"{twins.method} {side} began with {', '.join(others)}, see {found}"
            fail(f"--state-dir {twins.state_dir}: {began}; another --state-dir and --results-dir begin anew")
    if not (continues and kept.exists()):
        kept.parent.mkdir(parents=True, exist_ok=True)
        runs.write_text(kept, json.dumps(what, indent=1) + "\n")


def write_about(twins, side, about):
    """Writes METHOD_SIDE.json of a quarter that was trained: versions, commit, settings, dataset."""
    Path(twins.results_dir).mkdir(parents=True, exist_ok=True)
    runs.write_text(Path(twins.results_dir) / f"{twins.method}_{side}.json", json.dumps(about, indent=1) + "\n")


# --- Comparison ---


def curves_of(results_dir, method, side):
    """{seed: {quantity: {step: value}}} of a side's csv files."""
    curves = {}
    for path in sorted(Path(results_dir).glob(f"{method}_{side}_seed*.csv")):
        seed = curves[int(path.stem.rpartition("seed")[2])] = {}
        for step, name, value in read_rows(path):
            seed.setdefault(name, {})[step] = value
    return curves


def figures_of(curves, name, step):
    """Each seed's value of a quantity at a step, where it has one."""
    return [seed[name][step] for seed in curves.values() if step in seed.get(name, {})]


def compare_means(ours, authors, margin):
    """Tests the sides' means for equivalence by the rule of docs/twins.md.

    Args:
        ours, authors: a figure per seed.
        margin: the largest difference that counts as equivalent.

    Returns:
        {difference, low, high: of the 90% interval; verdict: equivalent, different or not resolved; seeds_needed: per
        side, None unless not resolved}. With fewer than 2 seeds on a side, or a figure that is not finite, there is no
        interval: nothing is resolved.
    """
    difference = float(np.mean(ours) - np.mean(authors)) if ours and authors else math.nan
    row = {"difference": difference, "low": math.nan, "high": math.nan, "verdict": "not resolved", "seeds_needed": None}
    if min(len(ours), len(authors)) < 2:
        return row
    if not math.isfinite(difference):  # a run has diverged
        return row
    variances = np.var(ours, ddof=1), np.var(authors, ddof=1)
    parts = variances[0] / len(ours), variances[1] / len(authors)
    half = 0.0
    if sum(parts) > 0:
        freedom = sum(parts) ** 2 / (parts[0] ** 2 / (len(ours) - 1) + parts[1] ** 2 / (len(authors) - 1))
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * math.sqrt(sum(parts)))
    row |= {"low": difference - half, "high": difference + half}
    if -margin < row["low"] and row["high"] < margin:
        row["verdict"] = "equivalent"
    elif row["low"] > margin or row["high"] < -margin:
        row["verdict"] = "different"
    else:
        row["seeds_needed"] = max(2, math.ceil(2 * (POWER_Z / margin) ** 2 * float(np.mean(variances))))
    return row


def log_ratios(ours, authors):
    """Logarithms of both sides' absolute values; None where signs differ or a value is zero."""
    signs = {math.copysign(1, value) if value else 0 for value in [*ours, *authors]}
    if len(signs) != 1 or 0 in signs:
        return None
    return [math.log(abs(value)) for value in ours], [math.log(abs(value)) for value in authors]


def compare_method(results_dir, method):
    """Every test of a method whose figures are there, as a list of rows."""
    ours, authors = (curves_of(results_dir, method, side) for side in ("ours", "authors"))
    quarter_length = settings_of(method).total_timesteps // QUARTERS
    rows = []

    def add(quantity, step, a, b, margin):
        """Adds the test of one quantity at one step; a, b: figures per seed, ours and theirs, None without a ratio."""
        seeds = {"seeds_ours": len(a or ()), "seeds_authors": len(b or ())}
        rows.append({"method": method, "quantity": quantity, "step": step} | seeds | compare_means(a, b, margin))

    last = [quarter_length * (QUARTERS - 1), quarter_length * QUARTERS]
    success = []
    for curves in (ours, authors):
        complete = [
            seed["success"] for seed in curves.values() if all(step in seed.get("success", {}) for step in last)
        ]
        success.append([100 * np.mean([seed[step] for step in last]) for seed in complete])
    if all(success):
        add("success", last[-1], *success, MARGIN["success"])
    for quarter in TESTED:
        step = quarter * quarter_length
        for name in (*LOSSES[method], *VALUES[method]):
            figures = figures_of(ours, name, step), figures_of(authors, name, step)
            if not all(figures):
                continue
            logarithms = log_ratios(*figures)
            if logarithms is None:
                rows.append({"method": method, "quantity": name, "step": step, "seeds_ours": len(figures[0])})
                rows[-1] |= {"seeds_authors": len(figures[1]), "verdict": "not resolved (signs differ)"}
            else:
                add(name, step, *logarithms, MARGIN["ratio"])
    return rows


def described(row):
    """The cells of a test's row of the table: logarithms as percent of a ratio."""
    as_text = (lambda x: f"{x:+.1f}") if row["quantity"] == "success" else (lambda x: f"{100 * math.expm1(x):+.1f}%")
    texts = [
        as_text(row[name]) if math.isfinite(row.get(name, math.nan)) else "" for name in ("difference", "low", "high")
    ]
    needed = f", {row['seeds_needed']} seeds would do" if row.get("seeds_needed") else ""
    seeds = f"{row['seeds_ours']} / {row['seeds_authors']}"
    interval = f"{texts[1]} to {texts[2]}" if texts[1] else ""
    return row["method"], row["quantity"], row["step"], seeds, texts[0], interval, row["verdict"] + needed


def compare(twins):
    """Tests all methods that have results; writes comparison.csv, prints the table, draws a picture per method."""
    rows = []
    for method in METHODS:
        new = compare_method(twins.results_dir, method)
        rows += new
        if new:
            draw_curves(twins.results_dir, method)
    if not rows:
        fail(f"--results-dir {twins.results_dir} has no step that both sides reached; run the tasks authors and ours")
    names = ("method", "quantity", "step", "seeds_ours", "seeds_authors", "difference", "low", "high", "verdict")
    digits = lambda value: f"{value:.4g}" if isinstance(value, float) else value
    written = [{name: digits(value) for name, value in row.items()} for row in rows]
    text = tables.csv_text(written, (*names, "seeds_needed"))
    runs.write_text(Path(twins.results_dir) / "comparison.csv", text)
    header = ("method", "quantity", "step", "seeds ours / theirs", "difference", "90% interval", "verdict")
    print(tables.markdown(header, map(described, rows)), end="")


def draw_curves(results_dir, method):
    """A panel per quantity: every seed of both sides, their means thick; METHOD.png among the results."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = ("success", "episode_length", *LOSSES[method], *VALUES[method])
    columns = 4
    figure, axes = plt.subplots(
        math.ceil(len(names) / columns), columns, figsize=(14, 2.6 * math.ceil(len(names) / columns))
    )
    for axis in axes.flat[len(names) :]:
        axis.remove()
    for axis, name in zip(axes.flat, names):
        for side, colour in (("authors", "tab:orange"), ("ours", "tab:blue")):
            curves = [seed[name] for seed in curves_of(results_dir, method, side).values() if name in seed]
            for curve in curves:
                axis.plot(list(curve), list(curve.values()), color=colour, alpha=0.25, linewidth=0.8)
            common = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
            means = [np.mean([curve[step] for curve in curves]) for step in common]
            axis.plot(
                common, means, color=colour, label=f"{side} ({len(curves)} seeds)", marker="." * (len(common) < 5)
            )
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
        if name.endswith("_loss") and min(axis.get_ylim()) > 0:
            axis.set_yscale("log")
    axes.flat[0].legend(fontsize=7)
    figure.suptitle(f"{method}: the authors' agents and ours, quick settings")
    figure.tight_layout()
    figure.savefig(Path(results_dir) / f"{method}.png", dpi=90)
    plt.close(figure)


# --- Long parity ---

# The authors' networks under our names; the first layer of their return fields expects [z, t, s, a], ours [s, a, z, t].
NETWORKS = {
    "floq": {"floq": "critic_flow", "target_floq": "target_critic_flow"},
    "value_flows": {},
    "q_flow": {"tc_critic": "inner_value", "actor_bc_flow": "actor_flow"},
}


def copy_weights(agents, method, weights):
    """Puts the authors' weights {"modules_NETWORK/.../LAYER/KIND": array} into every seed of ours.

    Raises:
        KeyError: a weight of theirs has no place here, or one of ours got none.
    """
    filled = set()
    for key, array in weights.items():
        if key == "rng" or "modules_target_tc_critic" in key:  # Q-Flow updates a second target that nothing reads
            continue
        network, *_, layer, kind = key.removeprefix("modules_").split("/")
        member = re.fullmatch(r"(target_critic_flow|critic_flow)([12])", network)
        network = member[1] if member else NETWORKS[method].get(network, network)
        prefix = network + (".mlp" if f"{network}.mlp.weights.0" in agents.parameters else "")
        kinds = {"kernel": "weights", "bias": "shifts" if "norm" in layer.lower() else "biases", "scale": "scales"}
        name = f"{prefix}.{kinds[kind]}.{layer.rpartition('_')[2]}"
        place = agents.parameters[name].data  # (S, ...), with an axis of ensemble members where there are several
        place = place[:, int(member[2]) - 1] if member else place
        if member and name.endswith(".weights.0"):
            array = np.roll(array, -2, axis=-2)
        place.copy_(torch.as_tensor(array).reshape(place.shape[1:]))
        filled.add((name, member and member[2]))
    missing = agents.parameters.keys() - {name for name, _ in filled}
    if missing:
        raise KeyError(f"the authors' weights lack {sorted(missing)}")


def long_parity(twins, args, dataset, data):
    """Trains ours, theirs, and theirs with each batch's rows in another order, from equal weights on equal draws.

    Writes METHOD_parity.csv: for each update and loss, how far ours and theirs reordered are from theirs, relatively.
    """
    sides = [Authors(twins, args, data) for _ in range(2)]
    first, second = sides
    first.ask("begin", seed=0)
    weights = first.ask("weights")
    rng = np.random.default_rng(23)
    order = rng.permutation(args.batch_size)
    second.ask("set_weights", weights=weights)
    second.ask("permute_noise", order=order)
    ours = Ours(twins, args, dataset, [0])
    copy_weights(ours.agents, twins.method, weights)
    rows, batch_names = [], ("observations", "next_observations", "actions", "rewards", "masks")
    for update in range(1, twins.updates + 1):
        indices = rng.integers(len(dataset["rewards"]), size=args.batch_size)
        theirs, noise = first.ask("parity_update", rows=indices)
        reordered, _ = second.ask("parity_update", rows=indices[order], with_draws=False)
        batch = {name: dataset[name][indices].unsqueeze(0) for name in batch_names}
        noise = {name: torch.as_tensor(np.array(value)).unsqueeze(0) for name, value in noise.items()}
        losses = ours.update(batch | noise)
        for name in LOSSES[twins.method]:
            relative = lambda value: abs(value - theirs[name]) / abs(theirs[name])
            rows.append((update, name, theirs[name], relative(losses[name].item()), relative(reordered[name])))
        if update % 50 == 0 or update == twins.updates:
            write_parity(twins, rows)
    for side in sides:
        side.close()
    lines = []
    for low, high in ((1, 10), (11, 100), (101, 300), (301, 1000)):
        part = [row for row in rows if low <= row[0] <= high]
        if part:
            cells = [f"{np.median(column):.1g} ({max(column):.1g})" for column in list(zip(*part))[3:]]
            lines.append((f"{low} to {part[-1][0]}", *cells))
    header = ("updates", "relative difference of ours, median (largest)", "of theirs reordered")
    print(tables.markdown(header, lines), end="")


def write_parity(twins, rows):
    """Writes METHOD_parity.csv, whole or not at all."""
    path = Path(twins.results_dir) / f"{twins.method}_parity.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "update,loss,authors,ours_relative,reordered_relative\n"
    text += "".join(f"{u},{name},{value:.7g},{a:.3g},{b:.3g}\n" for u, name, value, a, b in rows)
    runs.write_text(path, text)
    print(f"{twins.method}: {rows[-1][0]} equal updates", flush=True)


# --- Time per update ---


def keep_to_cores(number):
    """Keeps this process and those that it starts on `number` of its cores, where the system can do so."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:number])


def compare_times(twins, args, dataset, data):
    """Times updates of both sides in turn, one seed each; prints a row of JSON, and puts it into times.csv.

    It has medians in milliseconds, and of the pairs' ratios (theirs over ours), by the clock and by processor time of
    all threads. On one thread, a busy machine changes the latter little.
    """
    theirs, ours = Authors(twins, args, data), Ours(twins, args, dataset, [0])
    theirs.ask("begin", seed=0)
    count = 10 if twins.size == "quick" else 1

    def our_time():
        start, processor = time.perf_counter(), time.process_time()
        for _ in range(count):
            ours.update(ours.draw(ours.step))
            ours.step += 1
        return time.perf_counter() - start, time.process_time() - processor

    pairs = []  # ((their seconds, their processor time), (ours))
    for pair in range(-2, twins.repeats):  # two pairs warm up
        times = theirs.ask("time", updates=count), our_time()
        if pair >= 0:
            pairs.append(times)
    theirs.close()
    row = {"method": twins.method, "size": twins.size, "threads": twins.threads, "pairs": len(pairs)}
    for clock, kind in enumerate(("", "processor_")):
        their_times, our_times = ([pair[side][clock] for pair in pairs] for side in (0, 1))
        low, ratio, high = statistics.quantiles([a / b for a, b in zip(their_times, our_times)], n=4)
        row |= {f"{kind}authors_ms": 1e3 * statistics.median(their_times) / count}
        row |= {f"{kind}ours_ms": 1e3 * statistics.median(our_times) / count}
        row |= {f"{kind}times_as_fast": ratio, f"{kind}quartile_low": low, f"{kind}quartile_high": high}
    row = {name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}
    print(json.dumps(row))
    store_times(Path(twins.results_dir) / "times.csv", row)


def store_times(path, row):
    """Puts a row of times into the csv file, in place of one of the same method, size and threads."""
    key = lambda row: tuple(str(row[name]) for name in ("method", "size", "threads"))
    rows = [old for old in tables.read_rows(path) if key(old) != key(row)]
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_text(path, tables.csv_text(sorted([*rows, row], key=key)))


if __name__ == "__main__":
    twins = tyro.cli(TwinsArgs, description=__doc__)
    if twins.task == "compare":
        compare(twins)
        raise SystemExit
    args = settings_of(twins.method, twins.size if twins.task == "time" else "quick")
    if twins.task in ("authors", "parity", "time"):
        check_authors(twins)
    if twins.task == "time":
        keep_to_cores(twins.threads)
    setup_torch(args)
    torch.set_num_threads(twins.threads)
    dataset, identity = load_data(twins, settings_of(twins.method))  # at every size the file of --quick
    data = Path(twins.state_dir) / "data.npz"
    if twins.task != "ours":
        export_data(dataset, data)
    if twins.task == "authors":
        train_authors(twins, args, identity, data)
    elif twins.task == "ours":
        train_ours(twins, args, identity, dataset)
    elif twins.task == "parity":
        long_parity(twins, args, dataset, data)
    else:
        compare_times(twins, args, dataset, data)
