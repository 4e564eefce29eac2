"""Twins: the authors' own agents (JAX) and ours on the same data with the same settings, tested for equivalence.

    python -m benchmarks.studies.twins authors --method floq --authors CHECKOUT --python PYTHON   # their side
    python -m benchmarks.studies.twins ours --method floq                                         # our side
    python -m benchmarks.studies.twins compare                                                    # tests, tables, picture
    python -m benchmarks.studies.twins parity --method floq --authors CHECKOUT --python PYTHON    # 1,000 equal updates
    python -m benchmarks.studies.twins time --method floq --authors CHECKOUT --python PYTHON      # paired times

CHECKOUT is a clone of the authors' repository (chongyi-zheng/value-flows, CMU-AIRe/floq, jaehyeokdoo2/qflow), PYTHON an
interpreter with jax, flax, optax, distrax and ml_collections. docs/twins.md has the rule and the results.

Both sides train in four quarters, all seeds to the end of a quarter before the next one begins. After each, a side's
`benchmarks/results/twins/METHOD_SIDE_seedN.csv` (step, quantity, value) is written anew. A stopped side continues where it was.
"""

import csv
import importlib
import json
import math
import os
import platform
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

from common import datasets, fail, graphs, rollout
from common.device import setup_torch
from common.draws import Draws
from common.replay import Replay
from common.stacked import Stacked

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "twins"
METHODS = ("floq", "value_flows", "q_flow")
NEEDED = ("jax", "flax", "optax", "distrax", "ml_collections")  # in the authors' Python
AGENT_FILES = {"floq": "agents/floq.py", "value_flows": "agents/value_flows.py", "q_flow": "agents/qflow.py"}
SINGLE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

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
    """seeds per side, 0, 1, ..."""
    until: int = QUARTERS
    """last quarter to train"""
    threads: int = 1
    """threads of each side"""
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
    check = "import importlib.util as u; print(*(n for n in %r if u.find_spec(n) is None))" % (NEEDED,)
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
        if twins.threads == 1:
            environment["XLA_FLAGS"] = SINGLE_THREAD
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
        """The policy of one seed for rollout.evaluate: (1, P, D), keys (1, P, 2) -> (1, P, A)."""
        actions = self.ask("act", observations=observations[0].numpy(), keys=keys[0].numpy())
        return torch.as_tensor(actions).unsqueeze(0)

    def close(self):
        """Ends the process."""
        self.connection.close()
        self.process.wait()


def draw_keys(generator, num_steps):
    """Keys of the authors' random numbers for `num_steps` actions: (num_steps, 2)."""
    return torch.randint(2**31, (num_steps, 2), generator=generator)


def train_authors(twins, args, identity, data):
    """Trains every seed of the authors' agent, quarter by quarter."""
    side = Authors(twins, args, data)
    about = {"versions": side.ask("versions"), "commit": commit_of(twins.authors)}
    write_about(twins, "authors", about | {"settings": config_of(twins.method, args), "dataset": identity})
    quarter_length = args.total_timesteps // QUARTERS
    evaluator = None
    for quarter in range(1, twins.until + 1):
        for seed in range(twins.num_seeds):
            state = Path(twins.state_dir) / f"{twins.method}_authors_seed{seed}.pkl"
            rows = Rows(twins, "authors", seed)
            if state.exists() and rows.done(quarter):
                continue
            start = time.perf_counter()
            step = side.ask("begin", seed=seed, state=str(state) if state.exists() else None)
            rows.cut(step)
            while step < quarter * quarter_length:
                losses = side.ask("train", updates=WINDOW)
                step += WINDOW
                rows.add(step, losses)
                rows.save()  # before the agent: rows after its step are cut when it continues
                side.ask("save", state=str(state))
            evaluator, played = play(evaluator, args, [seed], EPISODES[quarter], side.policy, draw_keys, step)
            rows.add(step, played[0])
            rows.save(publish=True)
            print(
                f"{twins.method} authors seed {seed} step {step}: {played[0]} {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    side.close()
    if evaluator is not None:
        evaluator.close()


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
        one_update = lambda draws: self.module.update(self.agents, *replay.inputs(draws))
        self.update = graphs.FastUpdate(self.agents, one_update, args.compile, False)
        self.draw = Draws(self.agents.agent, args, seeds, len(dataset["rewards"]), device)
        self.values = self.agents.function(VALUES_OF[self.method])
        fixed = {name: torch.as_tensor(value) for name, value in probes(dataset).items()}
        rows = fixed.pop("probe_rows")
        self.probes = dataset["observations"][rows], dataset["actions"][rows], *fixed.values()
        self.policy, self.draw_act_noise = self.agents.function("act"), self.agents.agent.draw_act_noise

    def train(self, updates):
        """Trains by some updates; returns one dictionary per seed: losses' means over them, learned values after them."""
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
    seeds = list(range(twins.num_seeds))
    side = Ours(twins, args, dataset, seeds)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    settings = {
        name: value for name, value in asdict(args).items() if name not in ("runs_dir", "dataset_dir", "resume")
    }
    write_about(
        twins, "ours", {"versions": versions, "commit": commit_of(ROOT), "settings": settings, "dataset": identity}
    )
    state = Path(twins.state_dir) / f"{twins.method}_ours.pt"
    every_rows = [Rows(twins, "ours", seed) for seed in seeds]
    if state.exists():
        side.restore(state)
    for rows in every_rows:
        rows.cut(side.step)
    quarter_length, evaluator = args.total_timesteps // QUARTERS, None
    for quarter in range(1, twins.until + 1):
        if all(rows.done(quarter) for rows in every_rows):
            continue
        while side.step < quarter * quarter_length:
            for rows, losses in zip(every_rows, side.train(WINDOW)):
                rows.add(side.step, losses)
                rows.save()
            side.save(state)
        evaluator, played = play(evaluator, args, seeds, EPISODES[quarter], side.policy, side.draw_act_noise, side.step)
        for rows, result in zip(every_rows, played):
            rows.add(side.step, result)
            rows.save(publish=True)
        print(f"{twins.method} ours step {side.step}: success {[row['success'] for row in played]}", flush=True)
    if evaluator is not None:
        evaluator.close()


# --- Evaluations and rows ---


def play(evaluator, args, seeds, episodes, policy, draw_noise, step):
    """Evaluates seeds by common/rollout.py; returns the evaluator, and {success, episode_length} of each seed.

    The evaluator's worker process is kept for the next call.
    """
    settings = replace(args, num_seeds=len(seeds), eval_episodes=episodes, eval_workers=1)
    if evaluator is None:
        evaluator = rollout.Evaluator(settings, seeds, torch.device("cpu"), Path())
    evaluator.args, evaluator.seeds = settings, seeds
    played = evaluator(policy, draw_noise, step)
    return evaluator, [{name: row[name] for name in ("success", "episode_length")} for row in played]


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
        """Adds {quantity: value}."""
        self.rows += [(step, name, value) for name, value in values.items()]

    def save(self, publish=False):
        """Writes the rows, whole or not at all."""
        text = "step,quantity,value\n" + "".join(f"{step},{name},{value:.7g}\n" for step, name, value in self.rows)
        for path in (self.kept, self.published) if publish else (self.kept,):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(path.name + ".part").write_text(text)
            os.replace(path.with_name(path.name + ".part"), path)


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


def write_about(twins, side, about):
    """Writes METHOD_SIDE.json: versions, commit, settings, dataset."""
    Path(twins.results_dir).mkdir(parents=True, exist_ok=True)
    (Path(twins.results_dir) / f"{twins.method}_{side}.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    twins = tyro.cli(TwinsArgs, description=__doc__)
    args = settings_of(twins.method, twins.size if twins.task == "time" else "quick")
    if twins.task in ("authors", "parity", "time"):
        check_authors(twins)
    setup_torch(args)
    torch.set_num_threads(twins.threads)
    dataset, identity = load_data(twins, args)
    data = Path(twins.state_dir) / "data.npz"
    if twins.task != "ours":
        export_data(dataset, data)
    if twins.task == "authors":
        train_authors(twins, args, identity, data)
    elif twins.task == "ours":
        train_ours(twins, args, identity, dataset)
