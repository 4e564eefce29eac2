"""Value Flows' choice among candidates by the conditional value at risk, on a bet where it differs from the mean's.

    python -m benchmarks.studies.risk_averse                             # prints a table
    python -m benchmarks.studies.risk_averse --output docs/value_flows_risk

The MDP: in its one state an action a in [-1, 1] is a stake of b = (1 + a) / 2. The reward is 2 b with probability 0.7
and -2 b with probability 0.3. Then a state follows where nothing happens. The mean return, 0.8 b, is largest for the
full stake. The mean of the lowest share L of returns, (2 L - 1.2) b / L for L above 0.3 and -2 b below, is so for L
above 0.6 only; below, for no stake.

Agents are trained once, by the mean as always. Then the same agents choose among the same candidates by each level.
Candidates need not reach both ends, so a choice has a place: 0 for the lowest stake among them, 1 for the highest.
Writes OUTPUT.csv, one row per level and seed (means over the states), and OUTPUT.png: the place against the level.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import tyro

import value_flows
from benchmarks import tables
from benchmarks.scores import interval
from benchmarks.studies import return_accuracy
from common import fail

WIN = 0.7  # probability of winning a bet
TURN = 2 * (1 - WIN)  # the level above which the full stake has the largest CVaR


@dataclass
class RiskArgs:
    levels: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.65, 0.7, 0.8, 0.9, 1.0)
    """values of --cvar-level"""
    candidates: int = 16
    """candidate actions"""
    states: int = 200
    """choices of each seed, per level"""
    seeds: int = 5
    """seeds, trained side by side"""
    updates: int = 1_000
    """updates of the training"""
    compile: bool = True
    """compile the losses with torch.compile"""
    output: str | None = None
    """csv and PNG get this path's stem (default: no files)"""


def make_bet(num_actions=16):
    """The bet as a table of its transitions, as `return_accuracy.make_mdp` makes them."""
    actions = torch.linspace(-1, 1, num_actions).tolist()
    table = [(0, a, outcome * (1 + a) / 2, 1) for a in actions for outcome in [2] * 7 + [-2] * 3]
    table += [(1, a, 0, 0) for a in actions]
    state, action, rewards, masks = (torch.tensor(column) for column in zip(*table))
    return {
        "observations": torch.eye(2)[state],
        "next_observations": torch.eye(2)[torch.ones_like(state)],
        "actions": action.unsqueeze(-1),
        "rewards": rewards,
        "masks": masks.float(),
    }


def true_cvar(stake, level):
    """The mean of the lowest share `level` of the returns of a stake."""
    lost = min(level, 1 - WIN)
    return 2 * stake * (level - 2 * lost) / level


def train(updates, seeds, compiled, **changes):
    """Agents of value_flows.py trained on the bet, one per seed; each has one candidate while it trains."""
    args = return_accuracy.small_args(value_flows, actor_hidden_dims=(64, 64), **changes)
    agents, diverged = return_accuracy.train(value_flows, args, make_bet(), updates, seeds, compiled)
    if diverged is not None:
        raise SystemExit(f"error: a loss became non-finite at step {diverged}")
    return agents


def stakes(agents, level, candidates, states):
    """Stakes in `states` visits of the first state, with the same noise for all levels.

    Returns:
        chosen by the level, the lowest and the highest of the candidates: numpy arrays (S, states) in [0, 1].
    """
    agents.agent.args = replace(agents.agent.args, cvar_level=level, num_samples=candidates)
    S = len(next(iter(agents.parameters.values())))
    generators = [torch.Generator().manual_seed(s) for s in range(S)]
    noise = torch.stack([agents.agent.draw_act_noise(generator, states) for generator in generators])
    observations = torch.eye(2)[:1].expand(S, states, 2)
    offered = agents.function("flow_actions")(observations, noise[..., :-1]).squeeze(-1)  # (S, states, C)
    chosen = agents.function("act")(observations, noise).squeeze(-1)  # (S, states)
    return [((1 + actions) / 2).numpy() for actions in (chosen, offered.amin(dim=-1), offered.amax(dim=-1))]


def draw(output, rows):
    """Saves a picture of the mean place against the level, with 95% intervals over seeds, and of the best choice."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 2.8), layout="constrained")
    axes = figure.subplots()
    levels = sorted({row["level"] for row in rows})
    spread = [interval([row["place"] for row in rows if row["level"] == level]) for level in levels]
    axes.step([0, TURN, 1], [0, 0, 1], color="black", linewidth=1, label="best")
    axes.errorbar(levels, *np.transpose(spread), marker="o", capsize=3, color="tab:blue", label="chosen")
    axes.set(xlabel="--cvar-level", ylabel="stake, from lowest\nto highest candidate", ylim=(-0.05, 1.05))
    axes.legend()
    figure.savefig(output, dpi=90)


if __name__ == "__main__":
    options = tyro.cli(RiskArgs, description=__doc__)
    if not all(0 < level <= 1 for level in options.levels):
        fail(f"--levels {' '.join(map(str, options.levels))}: must lie above 0 and be at most 1")
    if min(options.states, options.seeds, options.updates) < 1 or options.candidates < 2:
        fail("--states, --seeds and --updates must be above zero, --candidates above one")
    if options.output:
        tables.output_path(options.output)
    agents, rows, lines = train(options.updates, list(range(options.seeds)), options.compile), [], []
    for level in options.levels:
        chosen, lowest, highest = (x.mean(axis=1) for x in stakes(agents, level, options.candidates, options.states))
        columns = {"stake": chosen, "lowest": lowest, "highest": highest}
        columns["place"] = (chosen - lowest) / (highest - lowest)
        seeds = range(options.seeds)
        rows += [{"level": level, "seed": s} | {name: f"{x[s]:.4g}" for name, x in columns.items()} for s in seeds]
        words = [f"{mean:.2f} +- {half:.2f}" for mean, half in map(interval, (columns["place"], chosen))]
        lines.append([level, float(level > TURN), *words, f"{true_cvar(chosen.mean(), level):.2f}"])
    print(tables.markdown(["level", "best place", "place", "stake", "CVaR of the stake"], lines))
    if options.output:
        tables.write(tables.beside(options.output, ".csv"), rows)
        draw(tables.beside(options.output, ".png"), [{name: float(x) for name, x in row.items()} for row in rows])
