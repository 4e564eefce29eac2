"""Figures in the spirit of the papers, drawn from a run's checkpoint.

    python -m benchmarks.studies.return_figures value_flows --run runs/RUN_DIR
    python -m benchmarks.studies.return_figures value_flows --run runs/RUN_DIR --output docs/returns.png --seed 1
    python -m benchmarks.studies.return_figures evor --run runs/RUN_DIR

Above, the learned return distribution at four state-action pairs of the validation data, with Monte-Carlo returns of
the data beside it (of the pair's nearest neighbours, since a state occurs once). Below left, learned returns against
the Monte-Carlo return along one validation trajectory that reaches the goal, if one does. Below right, for Value Flows
the confidence weights of that trajectory; for EVOR the mean learned return against the Monte-Carlo return of many
pairs, with their rank correlation. The data's returns are those of the behaviour policy. EVOR's should agree with them;
Value Flows' are those of the improved policy and may lie higher.
"""

import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

import evor
import value_flows
from benchmarks import tables
from common import arguments, checkpoint, datasets, envs, fail, generate, policies
from common import returns as returns_of
from common.device import setup_torch

NEIGHBOURS = 200  # data pairs whose Monte-Carlo returns stand beside a learned distribution
NUM_PAIRS = 2_000  # validation pairs whose mean learned return is compared with their Monte-Carlo return
TAIL = 0.05  # a return counts if what the trajectory's end cuts off is discounted by less than this


@dataclass
class FiguresArgs:
    algorithm: tyro.conf.Positional[Literal["value_flows", "evor"]]
    """whose figure"""
    run: str
    """run directory"""
    output: str | None = None
    """PNG file (default: figures.png in the run directory)"""
    seed: int | None = None
    """which of the run's seeds (default: its first)"""
    dataset_dir: str | None = None
    """directory of the dataset files (default: the run's)"""
    samples: int = 1_000
    """noise samples of each learned distribution"""


def nearest(data, index, candidates, num):
    """The `num` of `candidates` (row numbers) whose observation and action are nearest to row `index`, standardised."""
    pairs = torch.cat([data["observations"], data["actions"]], dim=-1)
    pairs = pairs / pairs.std(dim=0).clamp(min=1e-3)
    distances = (pairs[candidates] - pairs[index]).square().sum(dim=-1)
    return candidates[distances.argsort()[:num].numpy()]


def end_points(agent, condition, noise):
    """An agent's returns from start noises, aggregated over the fields as in training, and their confidence weights
    (zeros for EVOR): (N, D + A), (N, 1) -> (N, 1), (N, 1).
    """
    if isinstance(agent, evor.Agent):
        returns = agent.return_samples(condition, noise)
        return returns, torch.zeros_like(returns)
    flow, args = agent.target_critic_flow, agent.args
    returns = value_flows.aggregate(agent.returns(flow, condition, noise, 1.0), args.ret_agg)
    deviation = value_flows.aggregate(agent.return_derivatives(flow, condition, noise).abs(), args.q_agg)
    return returns, value_flows.confidence_weight(deviation, args.confidence_weight_temp)


def return_samples(agents, pairs, noise):
    """Each seed's samples of the target return flow, and Value Flows' confidence weights (zeros for EVOR).

    Args:
        agents: stacked agents of value_flows.py or evor.py, S seeds.
        pairs: (N, D + A), observations with their actions.
        noise: (N * n, 1), n start noises for each pair.

    Returns:
        returns and weights, (S, N, n) each.
    """
    S = len(next(iter(agents.parameters.values())))
    condition = pairs.repeat_interleave(len(noise) // len(pairs), dim=0)  # (N*n, D + A)
    samples = agents.function(end_points)(condition.expand(S, -1, -1), noise.expand(S, -1, -1))
    return [x.view(S, len(pairs), -1) for x in samples]


def learned_returns(agents, s, observations, actions, num_samples):
    """Seed s's return samples (N, num_samples) and mean confidence weights (N,), zeros for EVOR, at (N, D), (N, A)."""
    generator = torch.Generator().manual_seed(0)
    returns, weights = [], []
    for pairs in torch.cat([observations, actions], dim=-1).split(max(1, 20_000 // num_samples)):
        noise = torch.randn(len(pairs) * num_samples, 1, generator=generator)
        samples, weight = return_samples(agents, pairs, noise)
        returns.append(samples[s])
        weights.append(weight[s].mean(dim=1))
    return torch.cat(returns).numpy(), torch.cat(weights).numpy()


def agreement(learned, returns):
    """How mean learned returns (N,) agree with Monte-Carlo returns (N,): Spearman's rank correlation, mean error
    (bias), mean absolute error.
    """
    from scipy.stats import spearmanr

    error = learned - returns
    return spearmanr(learned, returns).statistic, error.mean(), np.abs(error).mean()


def cut_off_discounts(data, gamma):
    """Discount of what follows a trajectory's end, at each of its transitions (0 where a success follows): (N,)."""
    masks, ends = data["masks"].double().cpu().numpy(), returns_of.trajectory_ends(data)
    discounts, discount = np.zeros_like(masks), 1.0
    for i in reversed(range(len(masks))):
        discount = gamma * masks[i] * (1.0 if ends[i] else discount)
        discounts[i] = discount
    return discounts


def longest_way_to_success(data):
    """Row numbers of the validation trajectory's part that ends with the first success after the longest way; of the
    first trajectory where the data hold no success.
    """
    ends = returns_of.trajectory_ends(data)
    start, best = 0, range(0)
    for i, mask in enumerate(data["masks"].tolist()):
        if mask == 0:
            best = max(best, range(start, i + 1), key=len)
        if mask == 0 or ends[i]:
            start = i + 1
    return np.array(best) if len(best) else np.arange(ends.argmax() + 1)


def draw(agents, s, data, num_samples, title, output):
    """Draws the figure of seed s from validation transitions; returns what it shows, as numbers."""
    from matplotlib.figure import Figure

    gamma = agents.agent.args.gamma
    returns, known = returns_of.reward_to_go(data, gamma), cut_off_discounts(data, gamma) < TAIL
    candidates = np.flatnonzero(known)
    if len(candidates) < NEIGHBOURS:
        fail(f"only {len(candidates)} validation transitions have a known return; {NEIGHBOURS} are needed")
    by_return = candidates[returns[candidates].argsort()]
    picked = [int(by_return[int(q * (len(by_return) - 1))]) for q in (0.2, 0.6, 0.9, 0.99)]
    learned, _ = learned_returns(agents, s, data["observations"][picked], data["actions"][picked], num_samples)

    figure = Figure(figsize=(11, 6.4), layout="constrained")
    grid = figure.add_gridspec(2, 4)
    summary = []
    for column, (index, samples) in enumerate(zip(picked, learned)):
        axes = figure.add_subplot(grid[0, column])
        near = returns[nearest(data, index, candidates, NEIGHBOURS)]
        low, high = min(samples.min(), near.min()), max(samples.max(), near.max())
        bins = np.linspace(low, high + 1e-6, 40)
        axes.hist(near, bins, density=True, color="tab:grey", alpha=0.6, label="data, nearest pairs")
        axes.hist(samples, bins, density=True, color="tab:blue", alpha=0.6, label="learned")
        axes.axvline(returns[index], color="black", linestyle="--", linewidth=1, label="this pair's own")
        axes.set(title=f"validation row {index}", xlabel="return", yticks=[])
        if column == 0:
            axes.legend(fontsize="x-small")
        summary.append((returns[index], near.mean(), samples.mean(), samples.std()))

    way = longest_way_to_success(data)
    learned, weights = learned_returns(
        agents, s, data["observations"][way], data["actions"][way], max(1, num_samples // 10)
    )
    axes = figure.add_subplot(grid[1, :2])
    axes.fill_between(range(len(way)), *np.quantile(learned, (0.05, 0.95), axis=1), alpha=0.3, label="learned, 5-95%")
    axes.plot(learned.mean(axis=1), label="learned, mean")
    axes.plot(returns[way], color="black", linewidth=1, linestyle="--", label="Monte-Carlo")
    end = "until its success" if data["masks"][way[-1]] == 0 else "without a success"
    axes.set(xlabel=f"step of one trajectory, {end}", ylabel="return")
    axes.legend(fontsize="x-small")
    axes = figure.add_subplot(grid[1, 2:])
    if weights.any():
        axes.plot(weights, color="tab:orange", label="confidence weight w")
        axes.set(xlabel="step of the same trajectory", ylabel="w, in [0.5, 1)")
        deviation = axes.twinx()
        deviation.plot(learned.std(axis=1), color="tab:blue", linewidth=1)
        deviation.set_ylabel("deviation of the learned returns", color="tab:blue")
        axes.legend(fontsize="x-small", loc="upper left")
    else:
        pairs = candidates[:: max(1, len(candidates) // NUM_PAIRS)]
        means = learned_returns(agents, s, data["observations"][pairs], data["actions"][pairs], 32)[0].mean(axis=1)
        correlation, bias, error = agreement(means, returns[pairs])
        label = f"{len(pairs):,} pairs: rank correlation {correlation:.2f}, bias {bias:.1f}, "
        label += f"mean absolute error {error:.1f}"
        print(label)
        axes.scatter(returns[pairs], means, s=2, alpha=0.5)
        axes.axline((returns.min(), returns.min()), slope=1, color="black", linewidth=1, linestyle="--")
        axes.set(xlabel="Monte-Carlo return of the data", ylabel="learned, mean")
        axes.set_title(label, fontsize="small")
    figure.suptitle(title)
    figure.savefig(output, dpi=110)
    return summary


if __name__ == "__main__":
    options = tyro.cli(FiguresArgs, description=__doc__)
    payload = checkpoint.load(options.run, "--run")
    module = importlib.import_module(options.algorithm)
    args = arguments.stored_args(module.Args, payload, f"--run {options.run}")
    if envs.is_pixels(args.env_id):
        fail(f"--run {options.run} is a run on pixels; the figure is drawn for states")
    seeds = list(range(args.seed, args.seed + args.num_seeds))
    seed = seeds[0] if options.seed is None else options.seed
    if seed not in seeds:
        fail(f"--seed {seed}: the run in {options.run} has the seeds {seeds}")
    if options.samples < 10:
        fail(f"--samples {options.samples}: at least 10")
    output = tables.output_path(options.output or Path(options.run) / "figures.png")
    path = datasets.find_dataset(replace(args, dataset_dir=options.dataset_dir or args.dataset_dir))
    _, identity = datasets.load_dataset(path, args.env_id, "cpu", args.dataset_path is None)
    if identity["sha256"] != payload["dataset"]["sha256"]:
        fail(f"{path} is not the dataset of the run in {options.run}, which is {payload['dataset']}")
    validation_path = generate.val_path(Path(path))
    validation, _ = datasets.load_dataset(validation_path, args.env_id, "cpu", args.dataset_path is None)
    setup_torch(module.Args(cuda=False))
    agents = policies.rebuild(module.Agent, args, payload, torch.device("cpu"), options.run)
    title = f"{options.algorithm} on {args.env_id}, seed {seed}, after {payload['step']:,} updates"
    for own, near, mean, std in draw(agents, seeds.index(seed), validation, options.samples, title, output):
        print(f"Monte-Carlo return {own:8.2f}, of the nearest pairs {near:8.2f}; learned {mean:8.2f} +- {std:.2f}")
    print(f"saved {output}")
