"""Whether Value Flows' confidence weights follow the true spread of returns, on bets whose spread is known.

    python -m benchmarks.studies.confidence_weights                             # prints a table
    python -m benchmarks.studies.confidence_weights --output docs/value_flows_weights

The MDP: in bet i the reward is m_i times one of nine equally likely quantiles of a normal distribution, and the episode
ends. Before each bet lies a state without reward, whose return is the bet's times gamma: its spread is known by
bootstrapping only. The m_i are STAKES, so the returns' deviations span 0 to about 2.

The agent weighs a row by sigmoid(-temp / |dPhi/dz|) + 0.5, where |dPhi/dz|, of its own flow, stands for the deviation.
For each state and seed the mean of both over many noises is compared with the true deviation.

**The rule.** Per seed, the rank correlation of the mean weight with the true deviation, over the states; the weights
follow the spread where the 95% interval of its mean over seeds lies above 0.9, follow it in part where it lies above 0.
Writes OUTPUT.csv, one row per state and seed, and OUTPUT.png: learned deviation and weight against the true deviation.
"""

from dataclasses import dataclass

import numpy as np
import torch
import tyro
from scipy.stats import spearmanr
from tqdm import tqdm

import value_flows
from benchmarks import tables
from benchmarks.scores import interval
from benchmarks.studies import return_accuracy
from common import arguments

STAKES = (0.0, 0.25, 0.5, 1.0, 2.0)
QUANTILES = torch.special.ndtri((torch.arange(9) + 0.5) / 9)
GAMMA = 0.9


@dataclass
class WeightsArgs:
    temps: tuple[float, ...] = (0.3,)
    """values of --confidence-weight-temp, an agent each"""
    seeds: int = 5
    """seeds, trained side by side"""
    updates: int = 2_000
    """updates of the training"""
    compile: bool = True
    """compile the losses with torch.compile"""
    output: str | None = None
    """csv and PNG get this path's stem (default: no files)"""


def make_bets(num_actions=8):
    """The bets as a table of transitions, as `return_accuracy.make_mdp` makes them, and the true deviations (states,).

    States 0, 1, ... are the bets, in the order of STAKES; then come the states before them, in the same order.
    """
    M, R = len(STAKES), len(QUANTILES)
    stake, quantile = torch.cartesian_prod(torch.arange(M), torch.arange(R)).unbind(1)
    before = torch.arange(M).repeat_interleave(R)  # as many rows as the bets
    state = torch.cat([stake, M + before])
    following = torch.cat([stake, before])
    rewards = torch.cat([torch.tensor(STAKES)[stake] * QUANTILES[quantile], torch.zeros(M * R)])
    masks = torch.cat([torch.zeros(M * R), torch.ones(M * R)])
    state, following, rewards, masks = (x.repeat_interleave(num_actions) for x in (state, following, rewards, masks))
    eye = torch.eye(2 * M)
    mdp = {
        "observations": eye[state],
        "next_observations": eye[following],
        "actions": torch.linspace(-1, 1, num_actions).repeat(2 * M * R).unsqueeze(-1),
        "rewards": rewards,
        "masks": masks,
    }
    deviations = torch.tensor(STAKES) * QUANTILES.std(correction=0)
    return mdp, torch.cat([deviations, GAMMA * deviations])


def learned(agents, num_states, temp, noises=500):
    """Mean |dPhi/dz| and mean weight in each state: two arrays (S, states), over `noises` of z and of the action."""

    def read(agent, observations, actions, z):
        condition = torch.cat([agent.target_critic_flow.encoder(observations), actions], dim=-1)
        derivatives = agent.return_derivatives(agent.target_critic_flow, condition, z)  # (E, N, 1)
        deviation = value_flows.aggregate(derivatives.abs(), agent.args.q_agg)  # (N, 1), as in critic_loss
        return torch.cat([deviation, value_flows.confidence_weight(deviation, temp)], dim=-1)  # (N, 2)

    generator = torch.Generator().manual_seed(0)
    S, N = len(next(iter(agents.parameters.values()))), num_states * noises
    observations = torch.eye(num_states).repeat_interleave(noises, dim=0)  # (N, states)
    actions = 2 * torch.rand(N, 1, generator=generator) - 1
    z = torch.randn(N, 1, generator=generator)
    both = agents.function(read)(*(x.expand(S, *x.shape) for x in (observations, actions, z)))  # (S, N, 2)
    return both.unflatten(1, (num_states, noises)).mean(dim=2).permute(2, 0, 1).numpy()


def verdict(correlations):
    """The rule, for the rank correlations of the seeds."""
    mean, half = interval(correlations)
    if not mean - half > 0:  # NaN of one seed, too
        return "not resolved"
    return "follow" if mean - half > 0.9 else "follow in part"


def draw(path, rows):
    """Saves learned deviations and mean weights against the true deviation; a colour for each temperature."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    deviations, weights = figure.subplots(1, 2)
    largest = max(row["true_deviation"] for row in rows)
    deviations.plot([0, largest], [0, largest], color="black", linewidth=1, label="equal")
    grid = np.linspace(1e-3, largest, 200)
    for i, temp in enumerate(sorted({row["temp"] for row in rows})):
        of_temp = [row for row in rows if row["temp"] == temp]
        for bootstrapped, marker in ((0, "o"), (1, "x")):
            chosen = [row for row in of_temp if row["bootstrapped"] == bootstrapped]
            look = dict(
                marker=marker, color=f"C{i}", s=20, label=f"{'before a bet' if bootstrapped else 'bet'}, temp {temp:g}"
            )
            for axes, column in ((deviations, "deviation"), (weights, "weight")):
                axes.scatter([row["true_deviation"] for row in chosen], [row[column] for row in chosen], **look)
        exact = value_flows.confidence_weight(torch.tensor(grid), temp)
        weights.plot(grid, exact, color=f"C{i}", linewidth=1)
    deviations.set(xlabel="true deviation of the return", ylabel=r"mean $|d\Phi/dz|$")
    weights.set(xlabel="true deviation of the return", ylabel="mean confidence weight")
    deviations.legend(fontsize="small")
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    options = tyro.cli(WeightsArgs, description=__doc__)
    arguments.check_numbers(options, above_zero=("seeds", "updates", "temps"))
    if options.output:
        tables.output_path(options.output)
    (mdp, truth), rows, lines = make_bets(), [], []
    for temp in tqdm(options.temps, unit=" trainings"):
        args = return_accuracy.small_args(value_flows, GAMMA, confidence_weight_temp=temp)
        seeds = list(range(options.seeds))
        agents, diverged = return_accuracy.train(value_flows, args, mdp, options.updates, seeds, options.compile)
        if diverged is not None:
            raise SystemExit(f"error: a loss became non-finite at step {diverged}")
        deviation, weight = learned(agents, len(truth), temp)
        for seed in seeds:
            for state, true in enumerate(truth.tolist()):
                bootstrapped = int(state >= len(STAKES))
                row = {"temp": temp, "seed": seed, "stake": STAKES[state % len(STAKES)], "bootstrapped": bootstrapped}
                columns = {"true_deviation": true, "deviation": deviation[seed, state], "weight": weight[seed, state]}
                rows.append(row | {name: float(f"{value:.4g}") for name, value in columns.items()})
        correlations = [spearmanr(weight[seed], truth).statistic for seed in seeds]
        mean, half = interval(correlations)
        spread = [f"{weight[:, s].mean():.2f} / {weight[:, len(STAKES) + s].mean():.2f}" for s in range(len(STAKES))]
        lines.append([temp, *spread, f"{mean:.3f} +- {half:.3f}", verdict(correlations)])
    header = [
        "temp",
        *(f"weight, stake {stake:g} (bet / before it)" for stake in STAKES),
        "rank correlation",
        "verdict",
    ]
    print(tables.markdown(header, lines))
    if options.output:
        tables.write(tables.beside(options.output, ".csv"), rows)
        draw(tables.beside(options.output, ".png"), rows)
