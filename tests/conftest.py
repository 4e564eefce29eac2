"""Shared by the tests: a small generated dataset, small networks, and runs in subprocesses as a user starts them."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

os.environ.setdefault("MUJOCO_GL", "disable")
os.environ.setdefault("MPLBACKEND", "Agg")
ROOT = Path(__file__).resolve().parent.parent

import floq  # noqa: E402

SMALL_FLAGS = (
    "--no-cuda --batch-size 16 --noise-samples 2 --critic-flow-steps 2 --actor-flow-steps 2 --block-width 16 "
    "--value-hidden-dims 16 16 --actor-hidden-dims 16 16 --eval-episodes 2 --eval-workers 1"
).split()


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def maze_data(tmp_path_factory):
    """Path of a small pointmaze-medium-navigate set made by OGBench's scripted collector (10 episodes)."""
    from common.collect import collect

    return collect("pointmaze-medium-navigate-v0", tmp_path_factory.mktemp("data"), num_episodes=10, num_workers=2)


@pytest.fixture(scope="session")
def cube_data(tmp_path_factory):
    """Path of a small cube-single-play set made by OGBench's scripted collector (2 episodes)."""
    from common.collect import collect

    return collect("cube-single-play-v0", tmp_path_factory.mktemp("data"), num_episodes=2, num_workers=2)


def run_floq(*flags, env=None, check=True, **kwargs):
    """Runs floq.py as a user does; returns the finished process with its output as text."""
    command = [sys.executable, str(ROOT / "floq.py"), *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "2"} | (env or {})
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, **kwargs)
    if check:
        assert process.returncode == 0, process.stderr[-3000:]
    return process


def small_args(**changes):
    """Arguments of a floq agent that a test can update in a millisecond."""
    small = dict(
        batch_size=6, noise_samples=3, critic_flow_steps=4, actor_flow_steps=5, block_width=16, block_depth=2,
        value_hidden_dims=(16, 16), actor_hidden_dims=(16, 16), alpha=10.0,
    )  # fmt: skip
    return replace(floq.Args(), **small | changes)


def make_agent(args, seeds=(0,), obs_dim=5, action_dim=3, min_reward=-1.0, max_reward=0.0):
    """A floq agent with its optimizer; the EMA target is made different from the online network."""
    agent = floq.Agent(args, obs_dim, action_dim, list(seeds), min_reward, max_reward)
    for s, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed + 100)
        for parameter in agent.target_floq.parameters():
            parameter.data[s] += 0.1 * torch.randn(parameter.shape[1:], generator=generator)
    agent.make_optimizer()
    return agent


def random_inputs(agent, seeds=(0,), update=0, obs_dim=5, action_dim=3):
    """A random batch and its noise, each seed's a function of (seed, update): tensors (S, rows, ...)."""
    batches, noises = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(1000 * seed + update)
        normal = lambda *shape: torch.randn(*shape, generator=generator)
        B = agent.args.batch_size
        batch = {"observations": normal(B, obs_dim), "next_observations": normal(B, obs_dim)}
        batch["actions"] = normal(B, action_dim).clamp(-1, 1)
        batch["rewards"] = -(torch.rand(B, generator=generator) > 0.3).float()
        batches.append(batch | {"masks": (torch.rand(B, generator=generator) > 0.3).float()})
        noises.append({name: value[0] for name, value in agent.draw_noise(generator, 1).items()})
    stack = lambda dictionaries: {name: torch.stack([d[name] for d in dictionaries]) for name in dictionaries[0]}
    return stack(batches), stack(noises)
