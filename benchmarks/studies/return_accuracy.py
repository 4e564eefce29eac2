"""Return distributions learned on small MDPs where the truth is known: Wasserstein distance, error of the mean, modes.

    python -m benchmarks.studies.return_accuracy                            # EVOR's targets and Value Flows, all MDPs
    python -m benchmarks.studies.return_accuracy --output docs/evor_returns # also a csv file and a picture
    python -m benchmarks.studies.return_accuracy --mdps coin --variants value_flows:bcfm_lambda=0 value_flows
    python -m benchmarks.studies.return_accuracy --variants value_flows c51:loss=cross_entropy iqn:kappa=0.01
    python -m benchmarks.studies.return_accuracy --variants evor iqn:kappa=0.01 --measure-after 250 500 1000 --output a

The MDPs (actions change nothing in them, so that there is one policy):

    chain      four states in a row, each step costs 1, then the end: returns are single numbers
    coin       three states in a row without reward, then a fair coin of +1 or -1: two modes
    geometric  one state, each step costs 1 and is the last with probability 1/10: a long tail

A variant is FILE:field=value,field=value, changes to the arguments of evor, value_flows, or the baselines c51 and iqn
(`evor:value_hidden_dims=(16,16)`). --measure-after measures within a training too, and draws the distances against the
updates, OUTPUT_curves.png. Networks, batches, learning rates and numbers of updates are equal unless a variant changes
them. The error of the mean is also given as a share of the MDP's range of returns, which is (largest - smallest of its
true returns, geometric's tail cut at one in a thousand).
"""

import ast
import itertools
import re
import time
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import tyro
from tqdm import tqdm

from benchmarks import tables
from benchmarks.scores import interval, interval_text
from benchmarks.speed import module_of
from benchmarks.studies.return_figures import return_samples
from common import arguments, fail
from common.draws import CHUNK, Draws
from common.files import written_whole
from common.stacked import Stacked

VARIANTS = (
    "evor",
    "evor:td_target=published,latents=data",
    "evor:td_target=published,latents=target",
    "value_flows",
)
ALGORITHMS = ("evor", "value_flows", "c51", "iqn")  # those that learn return distributions


@dataclass
class AccuracyArgs:
    mdps: tuple[str, ...] = ("chain", "coin", "geometric")
    """MDPs"""
    gammas: tuple[float, ...] = (0.9, 0.99)
    """discount factors"""
    variants: tuple[str, ...] = VARIANTS
    """FILE or FILE:field=value,field=value"""
    seeds: int = 5
    """seeds, trained side by side"""
    updates: int = 2_000
    """updates of each training"""
    measure_after: tuple[int, ...] = ()
    """measure after these updates too"""
    compile: bool = True
    """compile the losses with torch.compile"""
    output: str | None = None
    """csv and PNG get this path's stem (default: no files); the same command continues a study that was cut off"""


# --- MDPs ---


def make_mdp(name, num_actions=8):
    """An MDP as a table of its transitions, as load_dataset would give them: {observations (N, states), actions (N, 1),
    rewards (N,), ...}. From a state each of its rows happens with equal probability; each row is there with each
    action.
    """
    if name == "chain":  # (state, next state, reward, mask)
        table = [(0, 1, -1, 1), (1, 2, -1, 1), (2, 3, -1, 1), (3, 3, -1, 0)]
    elif name == "coin":
        table = [(0, 1, 0, 1), (1, 2, 0, 1), (2, 2, 1, 0), (2, 2, -1, 0)]
    elif name == "geometric":
        table = [(0, 0, -1, 1)] * 9 + [(0, 0, -1, 0)]
    else:
        fail(f"--mdps {name} is unknown; known: chain, coin, geometric")
    state, following, rewards, masks = (torch.tensor(column).repeat_interleave(num_actions) for column in zip(*table))
    eye = torch.eye(1 + int(state.max()))
    return {
        "observations": eye[state],
        "next_observations": eye[following],
        "actions": torch.linspace(-1, 1, num_actions).repeat(len(table)).unsqueeze(-1),
        "rewards": rewards.float(),
        "masks": masks.float(),
    }


def true_returns(mdp, state, gamma, n=2_000, episodes=200_000):
    """n equally likely values of the return from a state, in order: the middle quantiles of simulated episodes."""
    rng = np.random.default_rng(0)
    states, following = (mdp[key].argmax(dim=1).numpy() for key in ("observations", "next_observations"))
    rows = [np.flatnonzero(states == s) for s in range(states.max() + 1)]
    now, discount, returns = np.full(episodes, state), np.ones(episodes), np.zeros(episodes)
    while discount.max() > 1e-4:
        row = np.empty(episodes, int)
        for s, choices in enumerate(rows):
            row[now == s] = rng.choice(choices, (now == s).sum())
        returns += discount * mdp["rewards"].numpy()[row]
        discount *= gamma * mdp["masks"].numpy()[row]
        now = following[row]
    return np.quantile(returns, (np.arange(n) + 0.5) / n)


def rewards_to_go(mdp, gamma):
    """A return of each row of an MDP's table, (N,): its reward, then a simulated return from its next state."""
    rng = np.random.default_rng(1)
    truths = [true_returns(mdp, state, gamma) for state in range(mdp["observations"].shape[1])]
    following = mdp["next_observations"].argmax(dim=1).tolist()
    later = torch.tensor([rng.choice(truths[state]) for state in following], dtype=torch.float32)
    return mdp["rewards"] + gamma * mdp["masks"] * later


# --- Training and measures ---


def parse_variant(variant, algorithms=ALGORITHMS):
    """The module and the changes {field: value} that a variant's words mean; unknown ones end with exit code 2."""
    name, _, words = variant.partition(":")
    if name not in algorithms:
        reason = "learns no return distribution" if algorithms is ALGORITHMS else "is unknown"
        fail(f"--variants {variant}: {name} {reason}; known: {', '.join(algorithms)}")
    module, changes = module_of(name), {}
    for word in filter(None, re.split(r",(?![^(]*\))", words)):  # at commas outside of brackets
        field, _, value = word.partition("=")
        if field not in {known.name for known in fields(module.Args)}:
            fail(f"--variants {variant}: {name}.py has no argument {field}")
        try:
            changes[field] = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # a word
            changes[field] = value
    return module, changes


def small_args(module, gamma=0.9, **changes):
    """Arguments of an agent for these MDPs: small networks, one candidate action (actions change nothing)."""
    candidates = {} if module.__name__ == "evor" else {"num_samples": 1}
    candidates |= {"embedding_dim": 64} if hasattr(module.Args, "embedding_dim") else {}
    small = dict(
        learning_rate=1e-3, batch_size=512, tau=0.02, value_hidden_dims=(64, 64), actor_hidden_dims=(8,), cuda=False
    )
    return replace(module.Args(), gamma=gamma, **small | candidates | changes)


def train(module, args, mdp, updates, seeds, compiled=False):
    """Trains one agent per seed on an MDP; returns the agents, and the step of the first non-finite loss or None."""
    ((agents, updates, diverged),) = training(module, args, mdp, [updates], seeds, compiled)
    return agents, updates if diverged else None


def training(module, args, mdp, stops, seeds, compiled=False):
    """Trains one agent per seed on an MDP. Yields (agents, updates so far, whether a loss is non-finite) after each of
    the rising numbers of updates `stops`, and at a non-finite loss, which ends the training.
    """
    rewards = mdp["rewards"]
    lowest, highest = min(rewards.min().item(), 0.0), max(rewards.max().item(), 0.0)  # after the end rewards are zero
    make_agent = lambda: module.Agent(args, mdp["observations"].shape[1], 1, lowest, highest)
    agents = Stacked(make_agent, seeds, "cpu", args.learning_rate)
    agents.compiled = compiled
    mdp = mdp | {"returns": rewards_to_go(mdp, args.gamma)}  # for EVOR's latents of the data
    draw = Draws(agents.agent, args, seeds, len(rewards), "cpu")
    for start, stop in zip([0, *stops], stops):
        for step in range(start, stop):
            noise = draw(step)
            indices = noise.pop("indices")  # (S, B)
            metrics = module.update(agents, {key: value[indices] for key, value in mdp.items()}, noise)
            if step % CHUNK == 0 and not torch.isfinite(metrics["critic/critic_loss"]).all():
                yield agents, step, True
                return
        yield agents, stop, False


def learned_returns(agents, mdp, state, n=2_000):
    """n equally likely values of each seed's learned return from a state, in order, by its EMA networks: (S, n)."""
    observation = torch.eye(mdp["observations"].shape[1])[state].unsqueeze(0)  # (1, D)
    action, levels = torch.zeros(1, 1), (torch.arange(n) + 0.5) / n
    if hasattr(agents.agent, "target_critic_flow"):  # a flow's end points from the n middle quantiles of N(0, 1)
        noise = torch.special.ndtri(levels).view(n, 1)
        returns = return_samples(agents, torch.cat([observation, action], dim=1), noise)[0].squeeze(1)  # (S, n)
    else:
        read = iqn_returns if hasattr(agents.agent, "quantiles") else c51_returns
        S = len(next(iter(agents.parameters.values())))
        every = [x.expand(S, *x.shape) for x in (observation, action, levels)]
        returns = agents.function(read)(*every)  # (S, n)
    return returns.sort(dim=1).values.numpy()


def iqn_returns(agent, observation, action, levels):
    """Quantiles at the levels, mean over the critics: (1, D), (1, A), (n,) -> (n,)."""
    return agent.quantiles(agent.target_critic, observation, action, levels.unsqueeze(0)).mean(dim=(0, 1))


def c51_returns(agent, observation, action, levels):
    """Quantiles at the levels of the mean of the critics' histograms: (1, D), (1, A), (n,) -> (n,)."""
    probs = agent.logits(agent.target_critic, observation, action).softmax(dim=-1).mean(dim=(0, 1))  # (atoms,)
    below = (probs.cumsum(dim=0)[:-1] < levels.unsqueeze(1)).sum(dim=1)  # (n,): atoms whose levels lie below
    return agent.atoms[below]


def accuracy(agents, mdp, gamma):
    """How far each seed's return distributions are from the truth.

    Returns:
        one row a state and seed: wasserstein, W1 distance; mean_error; mean_error_share, its size over the MDP's range
        of returns; low_mode, high_mode: share of samples near the lowest and the highest true return, within a quarter
        of the way between them (0.5 each for a fair coin).
    """
    truths = [true_returns(mdp, state, gamma) for state in range(mdp["observations"].shape[1])]
    cut = [np.quantile(truth, (0.001, 0.999)) for truth in truths]
    full_range = max(high for _, high in cut) - min(low for low, _ in cut)
    full_range = full_range or abs(truths[0][0])  # of a single number: its size
    rows = []
    for state, truth in enumerate(truths):
        low, high = truth[0], truth[-1]
        for s, samples in enumerate(learned_returns(agents, mdp, state, len(truth))):
            error = samples.mean() - truth.mean()
            row = {"state": state, "seed_index": s, "wasserstein": np.abs(samples - truth).mean(), "mean_error": error}
            row["mean_error_share"] = abs(error) / full_range
            row["low_mode"] = (np.abs(samples - low) < (high - low) / 4).mean()
            rows.append(row | {"high_mode": (np.abs(samples - high) < (high - low) / 4).mean()})
    return rows


def draw(output, pictures):
    """Saves histograms of the first state's learned returns, all seeds together, with the truth as a black outline.

    Args:
        output: PNG file.
        pictures: {(mdp, gamma): {variant: (returns (S, n), true returns (n,))}}.
    """
    from matplotlib.figure import Figure

    columns = list(next(iter(pictures.values())))
    shape = len(pictures), len(columns)
    figure = Figure(figsize=(2.6 * shape[1], 1.7 * shape[0] + 0.5), layout="constrained")
    panels = figure.subplots(*shape, squeeze=False)
    for row, ((mdp, gamma), variants) in enumerate(pictures.items()):
        for column, (variant, (returns, truth)) in enumerate(variants.items()):
            axes, margin = panels[row, column], 0.3 * (truth[-1] - truth[0]) or 1.0
            bins = np.linspace(truth[0] - margin, truth[-1] + margin, 61)
            shown = returns[np.isfinite(returns)]  # a diverged variant has none
            axes.hist(np.clip(shown, bins[0], bins[-1]), bins, density=len(shown) > 0, color="tab:blue")
            axes.hist(truth, bins, density=True, histtype="step", color="black")
            axes.set(yticks=[])
            axes.tick_params(labelsize="x-small")
            if row == 0:
                axes.set_title(variant.replace(":", "\n").replace("td_target=", "").replace("latents=", ""), fontsize=8)
            if column == 0:
                axes.set_ylabel(f"{mdp}\n$\\gamma$ = {gamma:g}", fontsize=8)
    figure.savefig(output, dpi=90)


def draw_curves(output, rows):
    """Saves the W1 distances against the updates, mean over states, on logarithmic axes: a line per variant and a band,
    the 95% interval over seeds; one panel per MDP and discount.
    """
    from matplotlib.figure import Figure

    places = list(dict.fromkeys((row["mdp"], row["gamma"]) for row in rows))
    variants = {variant: f"C{i}" for i, variant in enumerate(dict.fromkeys(row["variant"] for row in rows))}
    figure = Figure(figsize=(3.8 * len(places) + 0.4, 3.4 + 0.12 * len(variants)), layout="constrained")
    for axes, place in zip(figure.subplots(1, len(places), squeeze=False)[0], places):
        axes.set(xscale="log", yscale="log", xlabel="updates", title=f"{place[0]}, $\\gamma$ = {place[1]:g}")
        for variant, color in variants.items():
            points = {}
            for row in rows:
                if (row["mdp"], row["gamma"], row["variant"]) == (*place, variant):
                    points.setdefault(row["updates"], []).append(row)
            if not points:
                continue
            updates = sorted(points)
            mean, half = np.array([interval(of_seeds(points[number], "wasserstein")) for number in updates]).T
            axes.plot(updates, mean, marker=".", color=color, label=variant)
            low = np.maximum(mean - np.nan_to_num(half), mean / 10)  # a band that crosses zero has no logarithm
            axes.fill_between(updates, low, mean + np.nan_to_num(half), color=color, alpha=0.2)
            axes.set_xticks(updates, [f"{number:,}" for number in updates], fontsize="small")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="$W_1$ to the true returns")
    lines = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(output, dpi=110)


def of_seeds(rows, name):
    """A measure's mean over states, for each seed in their order."""
    seeds = sorted({row["seed_index"] for row in rows})
    return [np.mean([float(row[name]) for row in rows if row["seed_index"] == s]) for s in seeds]


def spread(rows, name, digits, scale=1, unit=""):
    """A measure's mean over states and seeds, as text; of several seeds with its 95% interval over them."""
    return interval_text([scale * value for value in of_seeds(rows, name)], f".{digits}f", unit)


def summary(rows):
    """A markdown table of variants against MDPs: W1; the error of the mean as a share of the range; of the coin also
    the shares near both modes. All are those of the trainings' ends.
    """
    training_of = lambda row: (row["mdp"], row["gamma"], row["variant"])
    ends = {training_of(row): row["updates"] for row in rows}  # a training's last rows are those of its end
    rows = [row for row in rows if row["updates"] == ends[training_of(row)]]
    places, lines = dict.fromkeys((row["mdp"], row["gamma"]) for row in rows), []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        lines.append([f"`{variant}`"])
        for place in places:
            found = [row for row in rows if (row["mdp"], row["gamma"]) == place and row["variant"] == variant]
            cell = f"{spread(found, 'wasserstein', 3)}; {spread(found, 'mean_error_share', 1, 100, '%')}"
            modes = f"; {spread(found, 'low_mode', 2)}, {spread(found, 'high_mode', 2)}" if place[0] == "coin" else ""
            lines[-1].append(cell + modes)
    return tables.markdown(["variant", *(f"{mdp}, {gamma:g}" for mdp, gamma in places)], lines)


def read_partial(path, settings):
    """{(mdp, gamma, variant): (csv rows, picture)} that a study with these settings finished before it was cut off.

    One of other settings ends the program with exit code 2: its trainings would be lost.
    """
    if path is None or not path.exists():
        return {}
    saved = torch.load(path, weights_only=True)
    if saved["settings"] != settings:
        began = f"{path} is of a study with {saved['settings']} that was cut off"
        fail(f"{began}; continue it, delete it, or name another --output")
    return {key: (rows, [returns.numpy() for returns in picture]) for key, (rows, picture) in saved["finished"].items()}


def write_partial(path, settings, finished):
    """Writes what `read_partial` reads, whole or not at all."""
    finished = {key: (rows, [torch.as_tensor(one) for one in picture]) for key, (rows, picture) in finished.items()}
    with written_whole(path) as file:
        torch.save({"settings": settings, "finished": finished}, file)


def main():
    """The study that the command line asks for."""
    options = tyro.cli(AccuracyArgs, description=__doc__)
    arguments.check_numbers(options, above_zero=("seeds", "updates", "measure_after"))
    if not all(0 < gamma < 1 for gamma in options.gammas):
        fail("--gammas must lie between 0 and 1")
    stops = sorted({options.updates, *(number for number in options.measure_after if number < options.updates)})
    mdps = {name: make_mdp(name) for name in options.mdps}
    variants = {variant: parse_variant(variant) for variant in options.variants}
    trainings = list(itertools.product(mdps, options.gammas, variants))
    stem = options.output and tables.output_path(options.output)
    within = {"measure_after": stops[:-1]} if stops[1:] else {}
    settings = " ".join(arguments.as_flags({"seeds": options.seeds, "updates": options.updates} | within))
    partial = stem and tables.beside(stem, ".partial")
    finished = read_partial(partial, settings)
    bar = tqdm(trainings, unit=" trainings")
    for key in bar:
        if key in finished:
            continue
        (name, gamma, variant), start = key, time.perf_counter()
        module, changes = variants[variant]
        args, seeds = small_args(module, gamma, **changes), list(range(options.seeds))
        digits = lambda row: {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
        measured = []
        for agents, updates, diverged in training(module, args, mdps[name], stops, seeds, options.compile):
            rows = accuracy(agents, mdps[name], gamma)
            keys = {"mdp": name, "gamma": gamma, "variant": variant, "updates": updates}
            measured += [keys | digits(row) for row in rows]
            ended = f"  non-finite at step {updates}" if diverged else ""
        picture = learned_returns(agents, mdps[name], 0), true_returns(mdps[name], 0, gamma)
        finished[key] = measured, picture
        if stem:  # as it goes: what was trained is not lost
            write_partial(partial, settings, finished)
            rows_so_far = [row for one in trainings if one in finished for row in finished[one][0]]
            tables.write(tables.beside(stem, ".csv"), rows_so_far)
        column = lambda name: np.array([row[name] for row in rows])
        distance, share = column("wasserstein"), 100 * column("mean_error_share")
        modes = f"  modes {column('low_mode').min():.2f} + {column('high_mode').min():.2f}" if name == "coin" else ""
        bar.write(
            f"{name} {gamma:g} {variant}: W1 {distance.mean():.3f} (worst {distance.max():.3f})  "
            f"mean off by {share.mean():.1f}% (worst {share.max():.1f}%) of the range{modes}"
            f"  {time.perf_counter() - start:.0f} s{ended}"
        )
    print(summary([row for key in trainings for row in finished[key][0]]))
    if stem:
        pictures = {}
        for name, gamma, variant in trainings:
            pictures.setdefault((name, gamma), {})[variant] = finished[name, gamma, variant][1]
        draw(tables.beside(stem, ".png"), pictures)
        if len(stops) > 1:
            draw_curves(tables.beside(stem, "_curves.png"), [row for key in trainings for row in finished[key][0]])
        if finished.keys() <= set(trainings):  # else it holds trainings of another list
            partial.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
