"""Shared by the tests: a small generated dataset, small networks, and runs in subprocesses as a user starts them."""

import contextlib
import functools
import gc
import io
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

# One thread a process where tests run side by side (pytest -n 2): more threads than cores are many times slower. Before
# torch is imported, which reads it. The same number here and in the runs that tests start: their numbers are compared.
THREADS = "1" if "PYTEST_XDIST_WORKER" in os.environ else os.environ.get("OMP_NUM_THREADS", "2")
os.environ["OMP_NUM_THREADS"] = THREADS

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

os.environ.setdefault("MUJOCO_GL", "disable")
os.environ.setdefault("MPLBACKEND", "Agg")
ROOT = Path(__file__).resolve().parent.parent

import evor  # noqa: E402
import floq  # noqa: E402
import q_flow  # noqa: E402
import value_flows  # noqa: E402
from benchmarks.baselines import c51, fql, iqn  # noqa: E402
from common import envs, generate  # noqa: E402
from common.files import only_one  # noqa: E402
from common.stacked import Stacked  # noqa: E402

ALGORITHMS = {"floq": floq, "value_flows": value_flows, "q_flow": q_flow, "evor": evor}
# Baselines share the tests of agents, parity and settings; tests/test_baselines.py starts them.
BASELINES = {"fql": fql, "c51": c51, "iqn": iqn}
EVERY = ALGORITHMS | BASELINES
ENV_ID = "pointmaze-medium-navigate-singletask-task4-v0"  # the shortest task
SMALL_FLAGS = {
    "floq": "--noise-samples 2 --critic-flow-steps 2 --actor-flow-steps 2 --block-width 16",
    "value_flows": "--num-samples 3 --num-flow-steps 2",
    "q_flow": "--flow-steps 2 --use-time-embed --time-embed-dim 8",
    "evor": "--flow-steps 2 --num-actions 3 --num-returns 4",
    "fql": "--actor-flow-steps 2",
    "c51": "--num-samples 3 --num-flow-steps 2",
    "iqn": "--num-samples 3 --num-flow-steps 2 --num-quantiles 4 --embedding-dim 16",
}
for name in SMALL_FLAGS:
    SMALL_FLAGS[name] += " --no-cuda --no-compile --batch-size 16 --value-hidden-dims 16 16 --actor-hidden-dims 16 16"
    SMALL_FLAGS[name] += " --eval-episodes 1 --eval-workers 1"
    SMALL_FLAGS[name] = SMALL_FLAGS[name].split()
# Sizes of an agent that a test can update in a millisecond.
SMALL_ARGS = {
    "floq": dict(alpha=10.0, noise_samples=3, critic_flow_steps=4, actor_flow_steps=5, block_width=16, block_depth=2),
    "value_flows": dict(alpha=10.0, num_samples=4, num_flow_steps=5),
    "q_flow": dict(alpha=10.0, flow_steps=5, use_time_embed=True, time_embed_dim=8),
    "evor": dict(flow_steps=5, num_actions=4, num_returns=4),
    "fql": dict(alpha=10.0, actor_flow_steps=5),
    "c51": dict(num_samples=4, num_flow_steps=5),
    "iqn": dict(num_samples=4, num_flow_steps=5, num_quantiles=8, embedding_dim=16),
}


# The longest files, which begin first: pytest's processes take whole files, and one that begins last is waited for.
LONG_FILES = ("test_launch", "test_online", "test_runs", "test_evor", "test_baselines", "test_policies", "test_rollout")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG_FILES.index(item.path.stem) if item.path.stem in LONG_FILES else len(LONG_FILES))
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    """Tests that draw from torch's global generator draw the same in every run."""
    torch.manual_seed(0)


@contextlib.contextmanager
def process_as_before():
    """What common/device.py and common/signals.py set up for a whole process is then as it was before."""
    precision, deterministic = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    hook, tf32 = sys.excepthook, torch.backends.cudnn.allow_tf32
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        sys.excepthook, torch.backends.cudnn.allow_tf32 = hook, tf32
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def a_test_leaves_the_process_as_it_was():
    with process_as_before():
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """shared(name, make): a directory that one of pytest's processes fills by make(directory), the same for all."""
    base = tmp_path_factory.getbasetemp()  # of this process; with -n they lie side by side
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def share(name, make):
        directory, made = base / f"shared-{name}", base / f"shared-{name}.made"
        with only_one(directory):
            if not made.exists():
                shutil.rmtree(directory, ignore_errors=True)  # what a maker that failed has left
                directory.mkdir()
                make(directory)
                made.touch()
        return directory

    return share


@pytest.fixture(scope="session")
def maze_data(shared):
    """Path of a small pointmaze-medium-navigate set made by OGBench's scripted collector (10 episodes)."""
    return small_set(shared, "pointmaze-medium-navigate-v0", 10)


@pytest.fixture(scope="session")
def cube_data(shared):
    """Path of a small cube-single-play set made by OGBench's scripted collector (2 episodes)."""
    return small_set(shared, "cube-single-play-v0", 2)


def small_set(shared, dataset, num_episodes):
    directory = shared(dataset, lambda path: generate.generate(dataset, path, num_episodes, num_workers=2))
    return generate.generated_path(dataset, directory, num_episodes, seed=0)


ONLINE_LENGTHS = (  # 230 updates; both phases end between two intervals
    "--total-timesteps 70 --online-timesteps 160 --eval-interval 120 "
    "--log-interval 10 --save-interval 35 --eval-episodes 1"
).split()


@pytest.fixture(scope="session")
def online_flags(maze_data):
    """{algorithm: flags} of a small run with both phases and two seeds."""
    common = ["--env-id", ENV_ID, "--dataset-path", maze_data, "--num-seeds", 2]
    return {name: [*SMALL_FLAGS[name], *common, *ONLINE_LENGTHS] for name in ALGORITHMS}


@pytest.fixture(scope="session")
def online_runs(online_flags, shared):
    """{algorithm: run directory} of each algorithm's uninterrupted run with both phases, made when it is asked for."""

    def make(name, directory):
        out = run(name, *online_flags[name], "--runs-dir", directory).stdout
        assert "at 70, where the online phase begins" in out and "at 230" in out

    class Runs(dict):
        def __missing__(self, name):
            self[name] = only_run(shared(f"online-{name}", functools.partial(make, name)))
            return self[name]

    return Runs()


@pytest.fixture(scope="session")
def opengl():
    """Skips a test on a machine that cannot render: MuJoCo's own renderer fails there, without this project."""
    code = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 8, 8).render()"
    environment = os.environ | {"MUJOCO_GL": envs.RENDERER}
    if subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).returncode:
        pytest.skip("no OpenGL on this machine")


def run(algorithm, *flags, check=True, env=None, cwd=None):
    """Runs an algorithm's file with the flags: {returncode, stdout, stderr}, the outputs as text.

    In this process, which has imported torch (3 of such a run's 9 seconds), unless an environment or a directory of its
    own is asked for. The tests that stop or kill a run start theirs as a user does.
    """
    file, flags = str(ROOT / f"{algorithm}.py"), [str(flag) for flag in flags]
    if env or cwd:
        environment = os.environ | {"OMP_NUM_THREADS": THREADS} | (env or {})
        command = [sys.executable, file, *flags]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=cwd)
    else:
        done = in_this_process(lambda: runpy.run_path(file, run_name="__main__"), [file, *flags])
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def run_module(name, *words):
    """Runs a module as `python -m` does, but in this process, without its imports: {returncode, stdout, stderr}."""
    return in_this_process(lambda: runpy.run_module(name, run_name="__main__", alter_sys=True), [name, *words])


def in_this_process(main, words):
    """{returncode, stdout, stderr} of main() with the command line `words`."""
    out, err, argv, code = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = list(map(str, words))
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            process_as_before(),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", message=".*found in sys.modules.*")  # runpy's
            main()
    except SystemExit as stop:  # as Python ends: a text goes to stderr, and the code is 1
        message, code = (stop.code, 1) if isinstance(stop.code, str) else ("", stop.code or 0)
        err.write(message)
    finally:
        sys.argv = argv
        gc.collect()  # a run's lock is held for as long as its log lives
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def assert_refused(algorithm, words, *messages):
    """An algorithm's file ends with code 2 and the messages, without a traceback; words: a list, or one text.

    A mistake that `parse_args` finds is looked for in this process, any other in a run.
    """
    words = [*(words.split() if isinstance(words, str) else map(str, words)), "--no-cuda"]
    text, code = io.StringIO(), None
    with contextlib.redirect_stderr(text), contextlib.redirect_stdout(io.StringIO()):
        try:
            parse(Path(algorithm).stem, *words)
        except SystemExit as stop:
            code = stop.code
    if code is None:
        failed = run(algorithm, *words, check=False)
        text, code = io.StringIO(failed.stderr), failed.returncode
    assert code == 2, text.getvalue()[-2000:]
    for message in messages:
        assert message in text.getvalue()
    assert "Traceback" not in text.getvalue()


def start(algorithm, flags, directory):
    """Starts a run below `directory`; returns the process."""
    command = [sys.executable, ROOT / f"{algorithm}.py", *flags, "--runs-dir", directory]
    return subprocess.Popen(
        [str(word) for word in command],
        env=os.environ | {"OMP_NUM_THREADS": THREADS},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process, condition):
    """Waits until `condition()` is true and returns its value; fails with the process' stderr if that ends before."""
    deadline = time.monotonic() + 300
    while not (value := condition()):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate()[1][-3000:] or "nothing happened in 5 minutes")
        time.sleep(0.01)
    return value


def wait_for_row(process, directory, name, row):
    """Waits until a csv file of the run has a row that begins with `row` ("step,seed"); returns the run directory."""
    written = lambda: [path.parent for path in directory.glob(f"*/{name}") if f"\n{row}," in path.read_text()]
    return wait_for(process, written)[0]


def children(process):
    """The ids of a process' children, in the order of their start."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if path.exists():
        return [int(pid) for pid in path.read_text().split()]
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)  # macOS
    return sorted(map(int, found.stdout.split()))


def only_run(directory):
    """The directory of the one run below `directory`."""
    (run_dir,) = directory.iterdir()
    return run_dir


def assert_same_csv(run_dir, other):
    for name in ("train.csv", "eval.csv"):
        assert (run_dir / name).read_bytes() == (other / name).read_bytes(), name


def parse(algorithm, *words):
    """The arguments that an algorithm makes of a command line."""
    return EVERY[algorithm].parse_args(list(words))[0]


def make_expert():
    """A policy that walks ENV_ID's shortest path, with a little noise; (S, P, 2), (S, P, 2) -> (S, P, 2)."""
    env = envs.make_env(ENV_ID)
    envs.reset_env(env, 0)
    maze, goal = env.unwrapped, np.array(env.unwrapped.cur_goal_xy)

    def policy(observations, noise):
        actions = torch.zeros(*observations.shape[:2], 2)
        for index in np.ndindex(*observations.shape[:2]):
            xy = observations[index].double().numpy()
            direction = maze.get_oracle_subgoal(xy, goal)[0] - xy
            actions[index] = torch.as_tensor(direction / (np.linalg.norm(direction) + 1e-6))
        return (actions + 0.3 * noise).clamp(-1, 1)

    return policy


def small_args(algorithm, **changes):
    """Arguments of an algorithm with small networks."""
    small = dict(compile=False, batch_size=6, value_hidden_dims=(16, 16), actor_hidden_dims=(16, 16))
    return replace(EVERY[algorithm].Args(), **small | SMALL_ARGS[algorithm] | changes)


def make_agent(args, seed=0, obs_dim=5, action_dim=3, min_reward=-1.0, max_reward=0.0):
    """One agent of `args`' algorithm; the EMA targets are made different from the online networks."""
    torch.manual_seed(seed)
    agent = sys.modules[type(args).__module__].Agent(args, obs_dim, action_dim, min_reward, max_reward)
    for name, parameter in agent.named_parameters():
        if name.startswith("target_"):
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return agent


def make_agents(args, seeds=(0,), device="cpu", **sizes):
    """The same agents, one per seed, stacked."""
    return Stacked(lambda: make_agent(args, torch.initial_seed(), **sizes), seeds, device, args.learning_rate)


def update(agents, batch, noise, **options):
    """The update of the agents' algorithm."""
    return sys.modules[type(agents.agent).__module__].update(agents, batch, noise, **options)


def gradients(agents):
    """{name: gradient} of the parameters that a backward pass has reached; agents: stacked, or one agent."""
    named = agents.parameters if isinstance(agents, Stacked) else dict(agents.named_parameters())
    return {name: p.grad for name, p in named.items() if p.grad is not None and p.grad.abs().max() > 0}


def networks(names):
    """The networks that parameters' names belong to."""
    return {name.split(".")[0] for name in names}


def random_inputs(agent, seed=0, update=0, obs_dim=5, action_dim=3):
    """A random batch and its noise for one agent, functions of (seed, update): tensors (rows, ...)."""
    generator = torch.Generator().manual_seed(1000 * seed + update)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    B = agent.args.batch_size
    batch = {"observations": normal(B, obs_dim), "next_observations": normal(B, obs_dim)}
    batch["actions"] = normal(B, action_dim).clamp(-1, 1)
    batch["rewards"] = -(torch.rand(B, generator=generator) > 0.3).float()
    batch["masks"] = (torch.rand(B, generator=generator) > 0.3).float()
    return batch, {name: value[0] for name, value in agent.draw_noise(generator, 1).items()}


def stacked_inputs(agents, seeds=(0,), update=0):
    """The batches and noise of random_inputs for several seeds: tensors (S, rows, ...)."""
    each = [random_inputs(agents.agent, seed, update) for seed in seeds]
    return [{name: torch.stack([seed[i][name] for seed in each]) for name in each[0][i]} for i in range(2)]
