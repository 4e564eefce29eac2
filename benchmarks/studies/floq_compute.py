"""floq's claims about compute, where the true values are known: steps, noise interval, single passes, noise, freezing.

    python -m benchmarks.studies.floq_compute                               # 16 minutes of a shared core
    python -m benchmarks.studies.floq_compute --output DIR/floq_compute     # csv, verdicts, picture and parts there

A stopped study continues with the same command: each trained variant is a file in OUTPUT_parts.

**The known task.** States are places x of a ring, seen as (cos 2 pi x, sin 2 pi x). A step doubles the place,
x' = 2x + a / 8 mod 1, and the reward is r(x) = (cos 2 pi x - 1) / 2. The policy evaluated is a = 0. Its value is a
Weierstrass function, V(x) = sum_k gamma^k r(2^k x), whose frequencies have no end: dynamics and reward are smooth and
the value is not, so that an error is left at any capacity. Q(s, a) = r(x) + gamma V(x').

Critics learn by the unmodified critic losses of floq.py and benchmarks/baselines/fql.py, all from the same batches;
floq has one velocity network. The error is the root mean square of Q - true Q at places and actions that were not in
the data, as a share of the true Q's standard deviation: 1 is a constant. Learned values are the EMA networks', means
over members and starts; the distilled critic has no EMA, and its error is that of the trained network.

    floq      K Euler steps, start noise in [-KAPPA, 0] / (1 - gamma)
    equal     fql.py's critic with as many parameters as floq's velocity network
    wide      4 times as wide
    ensemble  8 members of `equal`
    residual  a residual network as wide as floq's, with as many operations per value as floq with K = 8

Noise: rewards get N(0, 1) anew in each batch; the values stay. Change: at half of the updates the phase of the reward
moves by an eighth of a turn, and then all weights learn, or only the last layer's (frozen features).

**The curvature** of a path z_0..z_T, T = 32 Euler steps: the largest distance to the straight line from (0, z_0) to
(1, z_T), mean over paths, divided by the mean of |z_T - z_0|.

**The rule**, fixed before any result. A comparison is one number per seed, written so that the claim says it is above
zero: differences between variants with the same seed, hence with the same batches. With the mean and half of its 95%
interval over seeds (benchmarks.scores.interval):

    seen          mean - half > 0
    not seen      mean + half < 0, the opposite; or both ends lie within MARGIN of zero, so an effect would have shown
    not resolved  anything else; also a number that is not finite
    not run       a variant of the comparison is not trained

A claim with several comparisons is seen if each is seen, and in part if some are. No correction is made for their
number. Whether the distilled critic, which the policy sees, is as exact as the flow is in the csv, without a verdict.
"""

import copy
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

import floq
from benchmarks import tables
from benchmarks.baselines import fql
from benchmarks.scores import interval
from common import draws, fail, runs
from common.stacked import Stacked

GAMMA = 0.8
PHASE = math.pi / 4  # by which the reward's phase moves in the variants with a change
REWARD_NOISE = 1.0  # standard deviation, where rewards are noisy: their own is 0.35
STEPS = (1, 2, 4, 8)  # K
NARROW, WIDE, WHOLE = 0.01, 0.25, 1.0  # kappa: nearly a point, the widest published, the whole range of returns
FINE = 32  # Euler steps of paths whose curvature is measured
SHOWN = 1 / math.pi  # the place whose paths are drawn
MARGIN = 0.02  # a smaller difference of errors, curvatures or success is no effect
MONOLITHIC = ("equal", "wide", "ensemble", "residual")


@dataclass
class ComputeArgs:
    seeds: int = 4  # seeds, trained side by side
    updates: int = 1_000  # updates of each variant of the known task
    width: int = 32  # hidden width of its velocity network, 2 hidden layers
    batch_size: int = 64  # its transitions per batch and seed
    transitions: int = 20_000  # transitions of its data
    output: str = "floq_compute"  # stem of .csv, _verdicts.csv, .png and of the folder _parts


@dataclass(frozen=True)
class Variant:
    """A critic of the known task; steps and coverage are floq's."""

    critic: str
    steps: int = 1  # K
    coverage: float | None = None  # kappa
    rate: float = 3e-3  # Adam's learning rate
    noise: float = 0.0  # standard deviation of the noise that rewards get
    change: Literal["none", "all", "last"] = "none"  # what learns after the reward has changed; none: no change


BEST = Variant("floq", 8, WIDE)
CRITICS = (BEST, *(Variant(critic) for critic in MONOLITHIC))
# In the order in which they are trained: what most claims need comes first.
VARIANTS = [Variant("equal"), *(Variant("floq", K, kappa) for K in (8, 1) for kappa in (WIDE, NARROW))]
VARIANTS += [Variant(critic) for critic in MONOLITHIC[1:]]
VARIANTS += [replace(v, change=change) for v in CRITICS[:2] for change in ("all", "last")]
VARIANTS += [replace(v, noise=REWARD_NOISE) for v in CRITICS]
VARIANTS += [replace(v, rate=1e-3) for v in CRITICS]
VARIANTS += [Variant("floq", K, kappa) for kappa in (WIDE, NARROW) for K in STEPS[1:-1]]
VARIANTS += [replace(v, change=change) for v in CRITICS[2:] for change in ("all", "last")]
VARIANTS += [Variant("floq", K, WHOLE) for K in STEPS]


# --- The known task ---


def reward(x, phase=0.0):
    """r(x) of places in [0, 1), in [-1, 0]."""
    return (np.cos(2 * np.pi * x + phase) - 1) / 2


def true_value(x, phase=0.0, terms=45):
    """V(x) = sum_k gamma^k r(2^k x), within 3e-4: float64 places have 53 binary digits, and a doubling takes one."""
    total = np.zeros_like(x)
    for k in range(terms):
        total += GAMMA**k * reward(x, phase)
        x = 2 * x % 1
    return total


def true_q(x, a, phase=0.0):
    """Q(x, a) of places and actions, (N,) each."""
    return reward(x, phase) + GAMMA * true_value((2 * x + a / 8) % 1, phase)


def observe(x):
    """What is observed of places: (N,) array -> (N, 2) tensor."""
    return torch.tensor(np.stack([np.cos(2 * np.pi * x), np.sin(2 * np.pi * x)], axis=1), dtype=torch.float32)


def make_data(n, seed):
    """n transitions from uniform places by uniform actions.

    Returns {x, a: (n,) float64 arrays; observations, next_observations (n, 2), actions (n, 1), rewards, new_rewards
    (after the change) and masks (n,): float32 tensors}.
    """
    rng = np.random.default_rng(seed)
    x, a = rng.random(n), rng.uniform(-1, 1, n)
    data = {"x": x, "a": a, "observations": observe(x), "next_observations": observe((2 * x + a / 8) % 1)}
    arrays = {"actions": a[:, None], "rewards": reward(x), "new_rewards": reward(x, PHASE), "masks": np.ones(n)}
    return data | {name: torch.tensor(array, dtype=torch.float32) for name, array in arrays.items()}


# --- Critics ---


class Residual(fql.MLP):
    """fql's MLP with the same weights as a residual network: x <- x + W gelu(LayerNorm(x)) for each hidden product."""

    def forward(self, x):
        """(N, inputs) -> (E, N, outputs)."""
        x = x @ self.weights[0] + self.biases[0]
        for i in range(1, len(self.weights)):
            y = F.layer_norm(x, x.shape[-1:], eps=1e-6) * self.scales[i - 1] + self.shifts[i - 1]
            y = fql.gelu(y) @ self.weights[i] + self.biases[i]
            x = x + y if i < len(self.weights) - 1 else y
        return x


def num_parameters(network):
    """Weights, biases and norms of a network, over its members."""
    return sum(p.numel() for p in network.parameters())


def operations(network, steps=1):
    """Operations of the matrix products for one value, over the members: two per weight and Euler step."""
    return 2 * steps * sum(p.numel() for name, p in network.named_parameters() if "weights." in name)


def sizes(width):
    """(hidden widths, members) of each single-pass critic beside a velocity network of this width."""
    network = floq.ValueFlow(replace(floq.Args(), block_width=width, block_depth=2, flow_num_ensembles=1), 3, -1.0, 0.0)
    # Two hidden layers of w have w^2 + 10 w + 1 parameters: products 3w + w^2 + w, biases 2w + 1, norms 4w.
    w = round(math.sqrt(24 + num_parameters(network)) - 5)
    products = operations(network, max(STEPS)) / 2  # of all Euler steps; the first and the last layer take 4 width
    blocks = round((products - 4 * width) / width**2)
    return {
        "equal": ((w, w), 1),
        "wide": ((4 * w, 4 * w), 1),
        "ensemble": ((w, w), max(STEPS)),
        "residual": ((width,) * (1 + blocks), 1),
    }


def make_agent(options, variant):
    """The agent of a variant: one velocity network, or plain critics; its one-step policy is a = 0, not trained."""
    hidden, members = sizes(options.width).get(variant.critic, sizes(options.width)["equal"])
    args = dict(gamma=GAMMA, tau=0.05, batch_size=options.batch_size, actor_hidden_dims=(8,), cuda=False)
    args |= dict(value_hidden_dims=hidden)  # of floq's distilled critic: as large as `equal`
    if variant.critic == "floq":
        args |= dict(flow_num_ensembles=1, distill_num_ensembles=1, noise_samples=2, block_depth=2)
        args |= dict(block_width=options.width, critic_flow_steps=variant.steps, noise_coverage=variant.coverage)
        agent = floq.Agent(replace(floq.Args(), **args), 2, 1, -1.0, 0.0)
    else:
        agent = fql.Agent(replace(fql.Args(), num_ensembles=members, **args), 2, 1, -1.0, 0.0)
    if variant.critic == "residual":
        agent.critic = Residual((3, *hidden, 1), agent.args.layer_norm, (members,))
        agent.target_critic = copy.deepcopy(agent.critic).requires_grad_(False)
    for parameter in agent.actor_onestep_flow.parameters():
        parameter.data.zero_()
    return agent


def features(names, critic):
    """Those of the parameters' names that belong to a network's layers below the last one."""
    names = [name for name in names if name.startswith(f"{critic}.")]
    last = max(int(name.split(".")[-1]) for name in names if ".weights." in name)
    return [name for name in names if not name.endswith((f".weights.{last}", f".biases.{last}"))]


def train(options, variant, data, tick):
    """Trains one agent per seed by its critic loss; calls tick() after each update; returns the agents."""
    seeds, B = range(options.seeds), options.batch_size
    agents = Stacked(lambda: make_agent(options, variant), seeds, "cpu", variant.rate)
    trains = ("critic_flow", "critic") if variant.critic == "floq" else ("critic",)
    frozen = [agents.parameters[name] for name in features(agents.parameters, trains[0])]
    draw = draws.Draws(agents.agent, agents.agent.args, seeds, len(data["rewards"]), "cpu")
    generators = [torch.Generator().manual_seed(1_000_000 + seed) for seed in seeds]  # of the rewards' noise
    for step in range(options.updates):
        changed = variant.change != "none" and step >= options.updates // 2
        noise = draw(step)
        indices = noise.pop("indices")  # (S, B)
        batch = {key: data[key][indices] for key in ("observations", "next_observations", "actions", "masks")}
        batch["rewards"] = data["new_rewards" if changed else "rewards"][indices]  # (S, B)
        if variant.noise:
            batch["rewards"] += variant.noise * torch.stack([torch.randn(B, generator=g) for g in generators])
        agents.optimizer.zero_grad()
        agents.backward("critic_loss", batch, noise, trains)
        if changed and variant.change == "last":
            for parameter in frozen:
                parameter.grad = None  # Adam leaves it as it is
        agents.ema(f"target_{trains[0]}", trains[0], agents.agent.args.tau)
        agents.optimizer.step()
        tick()
    return agents


# --- Measures ---


def paths(agent, observations, actions, z, num_steps):
    """Each member's path through the EMA flow: (N, D), (N, A), z_0 (N, 1), K -> (K + 1, E, N)."""
    z = z.expand(agent.args.flow_num_ensembles, *z.shape)
    points = [z]
    for k in range(num_steps):
        z = z + agent.target_critic_flow(observations, actions, z, k / num_steps) / num_steps
        points.append(z)
    return torch.stack(points).squeeze(-1)


def curvature(z):
    """Of paths (T + 1, P) at equal times: mean largest distance to the straight line, over the mean way |z_T - z_0|."""
    t = np.linspace(0, 1, len(z))[:, None]
    straight = z[0] + t * (z[-1] - z[0])
    return np.abs(z - straight).max(axis=0).mean() / np.abs(z[-1] - z[0]).mean()


def every(agents, function, *inputs):
    """function(agent, *inputs) of every seed, as an array (S, ...); inputs are the same for all."""
    S = len(next(iter(agents.parameters.values())))
    return agents.function(function)(*(x.expand(S, *x.shape) for x in inputs)).double().numpy()


def run_paths(agents, observations, actions, num_starts, num_steps):
    """Paths from the start noise's middle quantiles: (N, D), (N, A) -> (S, K + 1, E, N, num_starts) array."""
    N, levels = len(actions), (torch.arange(num_starts) + 0.5) / num_starts
    inputs = (x.repeat_interleave(num_starts, dim=0) for x in (observations, actions))
    z = agents.agent.start_noise(levels).repeat(N).unsqueeze(1)  # (N * starts, 1)
    z = every(agents, lambda agent, *x: paths(agent, *x, num_steps), *inputs, z)
    return z.reshape(*z.shape[:3], N, num_starts)


def learned_q(agents, variant, observations, actions):
    """Q by the EMA networks, mean over members and 4 starts: (N, D), (N, A) -> (S, N) array."""
    if variant.critic == "floq":
        return run_paths(agents, observations, actions, 4, variant.steps)[:, -1].mean(axis=(1, 3))
    return every(agents, lambda agent, *x: agent.q_values(agent.target_critic, *x).mean(dim=0), observations, actions)


def measure(agents, variant):
    """One row per seed, and what the picture needs of the first: {rows, values (256,), paths (9 starts, FINE + 1)}."""
    test = make_data(500, seed=1)
    truth = true_q(test["x"], test["a"], PHASE if variant.change != "none" else 0.0)  # (N,)
    share = lambda q: np.sqrt(np.mean((q - truth) ** 2, axis=-1)) / truth.std()
    inputs = test["observations"], test["actions"]
    columns, shown = {"error": share(learned_q(agents, variant, *inputs))}, []
    columns |= {name: [None] * len(columns["error"]) for name in ("distilled_error", "fine_error", "curvature", "way")}
    if variant.critic == "floq":
        fine = run_paths(agents, *inputs, 4, FINE)  # (S, T + 1, E, N, starts)
        columns["distilled_error"] = share(every(agents, lambda agent, *x: agent.q_values(*x).mean(dim=0), *inputs))
        columns["fine_error"] = share(fine[:, -1].mean(axis=(1, 3)))
        columns["curvature"] = [curvature(z.reshape(FINE + 1, -1)) for z in fine]
        columns["way"] = [np.abs(z[-1] - z[0]).mean() for z in fine]
        shown = run_paths(agents, observe(np.array([SHOWN])), torch.zeros(1, 1), 9, FINE)[0, :, 0, 0].T.tolist()
    network = getattr(agents.agent, "critic_flow" if variant.critic == "floq" else "critic")
    fixed = {"parameters": num_parameters(network), "operations": operations(network, variant.steps)}
    rows = []
    for seed, numbers in enumerate(zip(*columns.values())):
        digits = {name: "" if x is None else f"{x:.5g}" for name, x in zip(columns, numbers)}
        rows.append(asdict(variant) | {"seed": seed} | fixed | digits)
    values = learned_q(agents, variant, observe(np.arange(256) / 256), torch.zeros(256, 1))[0].tolist()
    return {"rows": rows, "values": values, "paths": shown}


# --- Claims ---


def verdict(values):
    """The rule of this file's docstring: (mean, half of the 95% interval, "seen", "not seen" or "not resolved")."""
    mean, half = interval(values)
    if mean - half > 0:
        return mean, half, "seen"
    if mean + half < 0 or abs(mean) + half < MARGIN:
        return mean, half, "not seen"
    return mean, half, "not resolved"


def comparisons(of):
    """(claim, comparison, function: one number per seed, above zero by the claim), from of(variant, column) -> (S,)."""
    error = lambda variant: of(variant, "error")
    narrow, many = Variant("floq", 8, NARROW), max(STEPS)
    for name, kappa in (("wide", WIDE), ("narrow", NARROW), ("whole", WHOLE)):
        flow = lambda K, kappa=kappa: Variant("floq", K, kappa)
        for few, more in [(1, many), *zip(STEPS, STEPS[1:])]:
            gain = lambda few=few, more=more, flow=flow: error(flow(few)) - error(flow(more))
            yield "more steps", f"{name} interval: error with K = {few} - with K = {more}", gain
    for name, other in (("wide", BEST), ("whole", Variant("floq", 8, WHOLE))):
        yield "wide interval", f"K = 8: error of narrow - of {name}", lambda v=other: error(narrow) - error(v)
        bent = lambda v=other: of(v, "curvature") - of(narrow, "curvature")
        yield "curved paths", f"K = 8: curvature of {name} - of narrow", bent
    finite = lambda errors: np.nan_to_num(errors.mean(), nan=np.inf)
    better = lambda v: min(error(v), error(replace(v, rate=1e-3)), key=finite)  # of two learning rates
    rise = lambda v: error(replace(v, noise=REWARD_NOISE)) - error(v)
    cost = lambda v: error(replace(v, change="last")) - error(replace(v, change="all"))
    measures = {
        "single passes": ("error of {} - of floq, each at its better rate", better),
        "noise": ("rise of the error by noisy rewards: of {} - of floq", rise),
        "frozen features": ("rise of the error by freezing: of {} - of floq", cost),
    }
    for claim, (text, measure) in measures.items():
        for critic in MONOLITHIC:
            excess = lambda v=Variant(critic), measure=measure: measure(v) - measure(BEST)
            yield claim, text.format(critic), excess


def judge(compared):
    """Rows of comparisons with their verdicts, by claim; "not run" where a variant is missing (KeyError)."""
    rows = []
    for claim, name, values in sorted(compared, key=lambda one: one[0]):
        try:
            mean, half, found = verdict(values())
            numbers = {"mean": f"{mean:.4f}", "half": f"{half:.4f}", "verdict": found}
        except KeyError:
            numbers = {"mean": "", "half": "", "verdict": "not run"}
        rows.append({"claim": claim, "comparison": name} | numbers)
    return rows


def draw(path, parts):
    """Saves the picture: errors against K and of single passes, noise and freezing, curvature, values, paths.

    Args:
        parts: {variant: {rows, values, paths}}.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 7), layout="constrained")
    panels = figure.subplots(2, 4)

    def of(variant, column):
        mean, half = interval([float(row[column]) for row in parts[variant]["rows"]])
        return mean, np.nan_to_num(half)  # no half of one seed; a mean that is not finite is not drawn

    intervals = {"narrow": NARROW, "wide": WIDE, "whole": WHOLE}
    for axes, column, label in ((panels[0, 0], "error", "error"), (panels[0, 3], "curvature", "curvature")):
        for name, coverage in intervals.items():
            means, halves = zip(*(of(Variant("floq", steps, coverage), column) for steps in STEPS))
            axes.errorbar(STEPS, means, halves, marker="o", capsize=3, label=f"{name}, $\\kappa$ = {coverage:g}")
        axes.set(xscale="log", xlabel="Euler steps $K$", ylabel=label, xticks=STEPS, xticklabels=STEPS)
        axes.minorticks_off()
        axes.legend(fontsize="small")
    names = [v.critic for v in CRITICS]
    groups = {"0.003": {}, "0.001": dict(rate=1e-3)}
    changes = {"as it is": {}, "noisy rewards": dict(noise=REWARD_NOISE), "changed": dict(change="all")}
    changes |= {"changed, frozen": dict(change="last")}
    for axes, bars, title in ((panels[0, 1], groups, "learning rate"), (panels[0, 2], changes, "rewards")):
        for i, (label, change) in enumerate(bars.items()):
            means, halves = zip(*(of(replace(v, **change), "error") for v in CRITICS))
            places = np.arange(len(names)) + (i - (len(bars) - 1) / 2) * 0.8 / len(bars)
            axes.bar(places, means, 0.8 / len(bars), yerr=halves, capsize=2, label=label)
        axes.set(xticks=range(len(names)), xticklabels=names, ylabel="error")
        axes.tick_params(axis="x", labelsize="small")
        axes.legend(title=title, fontsize="small")
    for axes, (name, coverage) in zip(panels[1], intervals.items()):
        followed = np.array(parts[Variant("floq", 8, coverage)]["paths"]).T  # (T + 1, starts)
        axes.plot(np.linspace(0, 1, FINE + 1), followed, color="tab:blue", linewidth=0.8)
        axes.axhline(true_value(np.array([SHOWN]))[0], color="black", linestyle=":")
        axes.set(xlabel="$t$", ylabel="$z$", title=f"paths, {name}, $K$ = 8", ylim=(-5, 0.3))
    x = np.sort(np.random.default_rng(0).random(512))  # typical places: multiples of 2^-8 reach 0
    panels[1, 3].plot(x, true_value(x), color="black", linewidth=0.8, label="true")
    for v in (BEST, Variant("equal"), Variant("residual")):
        panels[1, 3].plot(np.arange(256) / 256, parts[v]["values"], linewidth=0.8, label=v.critic)
    panels[1, 3].set(xlabel="$x$", ylabel="$V$")
    panels[1, 3].legend(fontsize="small")
    figure.savefig(path, dpi=80)


# --- The study ---


def known_task(options):
    """Trains what has no part yet; writes csv and verdicts after each variant, and the picture at the end."""
    folder = Path(f"{options.output}_parts")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--output {options.output}: {folder} cannot be made: {error}")
    settings = {key: value for key, value in asdict(options).items() if key != "output"}
    data, parts = make_data(options.transitions, seed=0), {}
    of = lambda v, column: np.array([float(row[column]) for row in parts[v]["rows"]])
    bar = tqdm(total=len(VARIANTS) * options.updates, unit=" updates")
    for variant in VARIANTS:
        path = folder / ("-".join(str(value) for value in asdict(variant).values()) + ".json")
        if path.exists():
            part = json.loads(path.read_text())
            if part["settings"] != settings:
                fail(f"{path} is of {part['settings']}; remove {folder} or pass another --output")
            bar.update(options.updates)
        else:
            agents = train(options, variant, data, bar.update)
            part = {"settings": settings, **measure(agents, variant)}
            runs.write_text(path, json.dumps(part))
        parts[variant] = part
        save(options, [row for part in parts.values() for row in part["rows"]], judge(comparisons(of)))
    bar.close()
    draw(f"{options.output}.png", parts)
    print_verdicts(options)


def save(options, rows, verdicts):
    """Writes OUTPUT.csv and OUTPUT_verdicts.csv."""
    runs.write_text(Path(f"{options.output}.csv"), tables.csv_text(rows))
    runs.write_text(Path(f"{options.output}_verdicts.csv"), tables.csv_text(verdicts))


def print_verdicts(options):
    """Prints OUTPUT_verdicts.csv in columns."""
    rows = tables.read_rows(f"{options.output}_verdicts.csv")
    print("\n".join(tables.aligned([[*rows[0]], *([*row.values()] for row in rows)], right=(2, 3))))


def main():
    """The program; bad arguments end it with exit code 2."""
    options = tyro.cli(ComputeArgs, description=__doc__)
    for name, least in dict(seeds=2, updates=2, width=1, batch_size=1, transitions=1).items():
        if getattr(options, name) < least:
            fail(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least {least}")
    known_task(options)


if __name__ == "__main__":
    main()
