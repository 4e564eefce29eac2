"""Return distributions learned on a small MDP where the truth is known: 1-Wasserstein distance, modes and mean.

    python -m benchmarks.return_accuracy                                      # Value Flows, the coin chain, 3 seeds
    python -m benchmarks.return_accuracy --bcfm-lambda 0 --updates 20000      # without the bootstrapped term

The coin chain: three states in a row, no reward on the way, and a fair coin at the end: +1 or -1. With gamma = 0.9 the
return of state k is +-0.9^(2-k) with equal probability: two modes and a mean of zero. The reward range [-1, 1] allows
returns of +-10, so that the modes take up a small part of the flow's range. Writes a table, a csv and a picture.
"""

import csv
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

import numpy as np
import torch
import tyro

import value_flows
from benchmarks.figures import return_samples
from common import fail, runs

LENGTH, GAMMA = 3, 0.9


@dataclass
class AccuracyArgs:
    bcfm_lambda: Optional[tuple[float, ...]] = None
    """weights of the bootstrapped term to compare (default: 0 0.5 1 3)"""
    seeds: int = 3
    """seeds, trained side by side"""
    updates: int = 2_000
    """updates of each training"""
    output: Optional[str] = None
    """csv and PNG get this path's stem (default: no files)"""


def coin_chain(num_actions=8):
    """The MDP's transitions {observations (N, 3), actions (N, 1), ...}, as load_dataset would give them: every state with
    every action and both sides of the coin, so that actions change nothing.
    """
    eye = torch.eye(LENGTH)
    states = torch.arange(LENGTH).repeat_interleave(2 * num_actions)
    sides = torch.tensor([1.0, -1.0]).repeat(LENGTH * num_actions)
    last = states == LENGTH - 1
    return {
        "observations": eye[states],
        "next_observations": eye[(states + 1).clamp(max=LENGTH - 1)],
        "actions": torch.linspace(-1, 1, num_actions).repeat_interleave(2).repeat(LENGTH).unsqueeze(-1),
        "rewards": sides * last,
        "masks": (~last).float(),
    }


def true_quantiles(state, n):
    """n equally likely values of the return of a state, in order."""
    size = GAMMA ** (LENGTH - 1 - state)
    return np.sort(np.resize([-size, size], n))


def small_args(**changes):
    """Arguments of a Value Flows agent for the chain: small networks, one candidate (actions change nothing)."""
    small = dict(
        gamma=GAMMA, learning_rate=1e-3, tau=0.02, num_samples=1, value_hidden_dims=(64, 64), actor_hidden_dims=(8,),
        cuda=False,
    )  # fmt: skip
    return replace(value_flows.Args(), **small | changes)


def train(args, updates, seeds):
    """Trains one agent a seed on the coin chain; returns the agent, and the step of the first non-finite loss or None."""
    dataset = coin_chain()
    agent = value_flows.Agent(args, LENGTH, 1, seeds, -1.0, 1.0)
    agent.make_optimizer()
    for step in range(updates):
        if step % runs.CHUNK == 0:
            chunk = runs.draw_chunk(agent, args, seeds, len(dataset["rewards"]), step // runs.CHUNK, "cpu")
        inputs = {name: value[step % runs.CHUNK] for name, value in chunk.items()}
        batch = {key: value[inputs["indices"]] for key, value in dataset.items()}
        metrics = agent.update(batch, inputs)
        if step % runs.CHUNK == 0 and not torch.isfinite(metrics["critic/critic_loss"]).all():
            return agent, step
    return agent, None


def learned_returns(agent, state, n=2_000):
    """n sorted end points of each seed's EMA return flow at a state: (S, n), the mean of the two fields as in training."""
    noise = torch.randn(agent.critic_flow.weights[0].shape[0], n, 1, generator=torch.Generator().manual_seed(1))
    pair = torch.cat([torch.eye(LENGTH)[state], torch.zeros(1)]).unsqueeze(0)  # (1, D + A)
    returns, _ = return_samples(agent, pair, noise)  # (S, 1, n)
    return returns.squeeze(1).sort(dim=1).values.numpy()


def accuracy(agent):
    """One row a state and seed: W1 distance, error of the mean, share of samples near each mode (within half of it)."""
    rows = []
    for state in range(LENGTH):
        learned = learned_returns(agent, state)
        truth = true_quantiles(state, learned.shape[1])
        for s, samples in enumerate(learned):
            size = truth[-1]
            row = {"state": state, "seed_index": s, "wasserstein": np.abs(samples - truth).mean()}
            row |= {"mean": samples.mean(), "low_mode": (np.abs(samples + size) < size / 2).mean()}
            rows.append(row | {"high_mode": (np.abs(samples - size) < size / 2).mean()})
    return rows


def draw(output, pictures):
    """Saves histograms of the first state's learned returns, all seeds together, the truth as lines.

    Args:
        output: PNG file.
        pictures: [(bcfm_lambda, returns (S, n))].
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(pictures), figsize=(2.8 * len(pictures), 2.6), layout="constrained", squeeze=False
    )
    for axes, (bcfm_lambda, returns) in zip(panels[0], pictures):
        finite = returns[np.isfinite(returns)]
        axes.hist(np.clip(finite, -3, 3), np.linspace(-3, 3, 61), density=True, color="tab:blue")
        for value in np.unique(true_quantiles(0, 2)):
            axes.axvline(value, color="black", linestyle="--", linewidth=1)
        axes.set(title=f"bcfm_lambda {bcfm_lambda:g}", xlabel="return of the first state", yticks=[])
    figure.savefig(output, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    options = tyro.cli(AccuracyArgs, description=__doc__)
    if options.seeds < 1 or options.updates < 1 or min(options.bcfm_lambda or (0,)) < 0:
        fail("--seeds and --updates must be above zero, --bcfm-lambda at least zero")
    table, pictures = [], []
    for bcfm_lambda in options.bcfm_lambda or (0.0, 0.5, 1.0, 3.0):
        start = time.perf_counter()
        agent, diverged = train(small_args(bcfm_lambda=bcfm_lambda), options.updates, list(range(options.seeds)))
        rows = accuracy(agent)
        table += [{"bcfm_lambda": bcfm_lambda, "updates": options.updates} | row for row in rows]
        pictures.append((bcfm_lambda, learned_returns(agent, 0)))
        for state in range(LENGTH):
            here = [row for row in rows if row["state"] == state]
            mean = lambda name: np.mean([row[name] for row in here])
            print(
                f"bcfm_lambda {bcfm_lambda:g}  state {state}  W1 {mean('wasserstein'):.3f} "
                f"(worst seed {max(row['wasserstein'] for row in here):.3f})  |mean error| "
                f"{np.mean([abs(row['mean']) for row in here]):.3f}  modes {mean('low_mode'):.2f} + {mean('high_mode'):.2f}"
            )
        ended = "" if diverged is None else f", non-finite at step {diverged}"
        print(f"  {time.perf_counter() - start:.0f} s{ended}", flush=True)
    if options.output:
        path = Path(options.output)
        with open(path.with_suffix(".csv"), "w", newline="") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)
        draw(path.with_suffix(".png"), pictures)
