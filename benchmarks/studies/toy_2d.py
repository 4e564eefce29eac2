"""Q-Flow's study in two dimensions: what three ways of improving a flow policy do to the data and its modes.

    python -m benchmarks.studies.toy_2d                                 # four data sets, reduced size
    python -m benchmarks.studies.toy_2d --datasets moons --seeds 1      # one of them
    python -m benchmarks.studies.toy_2d --full                          # the paper's size: for a GPU

Actions are points of the plane, every point of a data set carries a reward, and there is one state and one step. Each
method improves a flow policy u on the rewards while it stays near the data, the more so the larger lambda is (an equal
lambda is not an equal push, see docs/q_flow.md):

    q_flow     the losses of q_flow.py: u follows the data's velocity plus grad V / lambda, V on the flow's latents
    backprop   flow matching - Q(end point of the flow) / lambda, differentiated through every step of the solver
    one_step   FQL's: flow matching, and a one-step policy mu with distillation from the flow - Q(mu) / lambda

Networks, batches, noise, learning rates and numbers of updates are the same for all; seeds and lambdas are trained side
by side, stacked. Lambda inf is cloning: one flow for q_flow and backprop, mu distilled from that flow for one_step. At
the reduced size all start from one flow, critic, V and one-step policy trained without improvement, so that what is
seen is the improvement; at the full size all start from scratch, as in the paper.

A data set is compared only if cloning is on the data: 97% of the flow's samples on the support, mean over seeds.
Elsewhere the picture, the column `comparable` and the last lines say that nothing may be compared.

Writes DATASET.png (samples and value landscapes) and summary.csv, with a row for each method, lambda and seed: mean
reward of samples, share of them on the data's support, share of the good modes covered, flow consistency
|V(x_t, t) - V(end point, 1)|, norm of the policy's gradient.

Notation in the shapes: S lambdas x seeds, B batch, N rows, K Euler steps.
"""

import csv
import itertools
import math
import multiprocessing
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro

import q_flow
from benchmarks import tables
from common import arguments, fail, num_cores
from common.device import setup_torch
from common.draws import CHUNK, Draws
from common.stacked import Stacked

METHODS = ("q_flow", "backprop", "one_step")
CLONING = math.inf
LAMBDAS = (5.0, 1.0, 0.3)
NUM_POINTS = 10_000
NUM_SAMPLES = 2_000
SUPPORT = 3.3  # the support ends this many standard deviations of the noise away from the noise-free points
FAITHFUL = 0.97  # share of cloning's samples on the support from which on methods are compared
GOOD = 0.7  # a mode is good if the mean reward of its points is at least this
WAVES = (2.0, 4.0, 8.0, 16.0)  # radians per unit of a point: the waves in which policies see it


@dataclass
class ToyArgs:
    datasets: tuple[str, ...] = ("swiss_roll", "two_spirals", "eight_gaussians", "moons")
    """data sets"""
    seeds: int = 3
    """seeds of each method and lambda"""
    pretrain_updates: int = 12_000
    """updates of the flow that all methods start from (0: all networks from scratch)"""
    fit_updates: int = 1_000
    """updates of the critic, V and the one-step policy that all start from, on the pretrained flow's end points"""
    pretrain_batch_size: int = 1024
    """points a batch in both"""
    updates: int = 400
    """updates of each method"""
    batch_size: int = 256
    """points a batch of each method"""
    width: int = 64
    """hidden width of all networks"""
    depth: int = 3
    """their hidden layers"""
    flow_steps: int = 50
    """Euler steps of the flow"""
    reward_scale: float = 0.25
    """what rewards in [0, 1] are multiplied by; only its ratio to lambda matters"""
    full: bool = False
    """the paper's size: 4 layers of 512, 2,100 epochs (5,100 for the spirals), from scratch"""
    cuda: bool = True
    """use the GPU; without one, one process a core, a data set each"""
    output_dir: str = "toy_2d"
    """directory of the pictures and the summary"""


# --- Data ---


class Data(NamedTuple):
    """Points of a data set, n of them.

    points: (n, 2) in [-1, 1], float32.
    rewards: (n,) in [0, 1], float32. On the roll rewards rise and fall three times, on spirals and moons they rise
        towards the far ends, every second Gaussian is good.
    modes: (n,), int: the piece of the data that a point is of.
    centres: (n, 2), float32: the points without their noise.
    noise: the noise's standard deviation in each direction.
    """

    points: np.ndarray
    rewards: np.ndarray
    modes: np.ndarray
    centres: np.ndarray
    noise: float


def make_points(name, n, seed=0):
    """n points of a data set, a Data."""
    rng = np.random.default_rng(seed)
    u, noise = rng.random(n), 0.025
    circle = lambda angle: np.stack([np.cos(angle), np.sin(angle)], axis=1)
    if name == "swiss_roll":
        angle = 1.5 * np.pi * (1 + 2 * u)
        centres = 0.8 * circle(angle) * angle[:, None] / (4.5 * np.pi)
        rewards, modes = (1 - np.cos(6 * np.pi * u)) / 2, np.rint(6 * u)
    elif name == "two_spirals":
        radius, arm = np.sqrt(u), rng.integers(2, size=n)
        centres = 0.8 * circle(2 * np.pi * radius + np.pi * arm) * radius[:, None]
        rewards, modes = radius, 2 * arm + (radius > 0.7)
    elif name == "eight_gaussians":
        modes, noise = rng.integers(8, size=n), 0.06
        centres, rewards = 0.65 * circle(np.pi / 4 * modes), modes % 2
    elif name == "moons":
        moon = rng.integers(2, size=n)
        upper = circle(np.pi * u) - [0.5, 0.25]
        centres = np.where(moon[:, None] == 0, upper, -upper) / 2
        rewards, modes = u, 2 * moon + (u > 0.6)
    else:
        fail(f"--datasets {name} is unknown; known: swiss_roll, two_spirals, eight_gaussians, moons")
    points = np.clip(centres + noise * rng.standard_normal((n, 2)), -1, 1)
    return Data(
        points.astype(np.float32), rewards.astype(np.float32), modes.astype(int), centres.astype(np.float32), noise
    )


def judge(samples, data):
    """How good samples are, by the noise-free points nearest to them.

    The support holds 99.9% of the data along a curve and 99.6% of a Gaussian. Distances to the data's own points would
    be too lenient: stragglers of 10,000 points fill the gaps between spirals and between Gaussians.

    Args:
        samples: (N, 2); non-finite ones are off the support.
        data: a Data.

    Returns:
        reward: mean reward of the nearest points, counted as zero off the support;
        on_support: share of samples within SUPPORT standard deviations of a noise-free point;
        good_modes: share of the good modes that hold at least a quarter of an even share of the samples.
    """
    samples = torch.nan_to_num(torch.as_tensor(samples), nan=1e3)
    distances, nearest = torch.cdist(samples, torch.as_tensor(data.centres)).min(dim=1)
    on_support, nearest = (distances <= SUPPORT * data.noise).numpy(), nearest.numpy()
    good = [mode for mode in np.unique(data.modes) if data.rewards[data.modes == mode].mean() >= GOOD]
    shares = [np.mean(on_support & (data.modes[nearest] == mode)) for mode in good]
    return {
        "reward": float(np.mean(data.rewards[nearest] * on_support)),
        "on_support": float(on_support.mean()),
        "good_modes": float(np.mean([share >= 0.25 / len(good) for share in shares])),
    }


# --- The three methods ---


class Study(q_flow.Agent):
    """A Q-Flow agent with a one-step policy mu(s, n), and with a lambda of its own. Losses return (loss, {})."""

    def __init__(self, args, obs_dim, action_dim):
        super().__init__(args, obs_dim, action_dim, 0.0, 1.0)
        dims = (obs_dim + action_dim, *args.actor_hidden_dims, action_dim)  # inputs [s, noise]
        self.one_step = q_flow.MLP(dims, args.actor_layer_norm)
        self.strength = torch.nn.Parameter(torch.tensor(args.alpha), requires_grad=False)  # lambda

    def one_step_action(self, observations, noise):
        """mu(s, n), unclipped: (N, D), (N, A) -> (N, A)."""
        return self.one_step(torch.cat([observations, noise], dim=-1))

    def solve(self, observations, x):
        """The flow's end points, with gradients through every step: (N, D), noise (N, A) -> (N, A)."""
        K = self.args.flow_steps
        for k in range(K):
            x = x + self.velocity(observations, x, torch.full_like(x[..., :1], k / K)) / K
        return x.clamp(-1, 1)

    def mean_q(self, batch, actions):
        """Mean Q of actions (B, A), a number."""
        return self.q_values(self.critic, batch["observations"], actions).mean()

    def q_flow(self, batch, noise):
        """Q-Flow's policy loss with this agent's lambda."""
        shared, self.args = self.args, replace(self.args, alpha=self.strength)
        loss, _ = self.actor_loss(batch, noise)
        self.args = shared
        return loss, {}

    def values(self, batch, noise):
        """Q-Flow's losses of the critic and of the intermediate value."""
        return self.critic_loss(batch, noise)[0], {}

    def regression(self, batch, noise):
        """The critic's loss: rewards are the returns of the one step, so no method's Q depends on its policy."""
        q = self.q_values(self.critic, batch["observations"], batch["actions"])  # (E, B)
        return (q - batch["rewards"]).square().mean(), {}

    def cloning(self, batch, noise):
        """Flow matching: u(x_t, t) -> a - x_0."""
        x_0, t, actions = noise["policy_action"], noise["policy_time"], batch["actions"]
        velocity = self.velocity(batch["observations"], (1 - t) * x_0 + t * actions, t)  # (B, A)
        return (velocity - (actions - x_0)).square().mean(), {}

    def distillation(self, batch, noise):
        """Squared distance of mu(noise) to the flow's end point, a constant."""
        with torch.no_grad():
            end_points = self.solve(batch["observations"], noise["next_action"])  # (B, A)
        actions = self.one_step_action(batch["observations"], noise["next_action"])  # (B, A)
        return (actions - end_points).square().mean(), {}

    def fitting(self, batch, noise):
        """Regressions beside a flow that rests: Q on rewards, V on Q of the latents' end points, mu on the noise's.

        batch: also x, t and end_points, (2 * B, .): first the noise at t = 0, then latents at any t.
        """
        x, t, end_points = batch["x"], batch["t"], batch["end_points"]
        of_noise, of_latents = end_points.chunk(2)  # (B, A)
        noise, x = x.chunk(2)
        with torch.no_grad():
            target = q_flow.aggregate(self.q_values(self.critic, batch["observations"], of_latents), self.args.q_agg)
        values = self.inner_values(batch["observations"], x, t.chunk(2)[1])  # (E, B)
        value_loss = (q_flow.aggregate(values, self.args.q_agg) - target).square().mean()
        mu_loss = (self.one_step_action(batch["observations"], noise) - of_noise).square().mean()
        return self.regression(batch, noise)[0] + value_loss + mu_loss, {}

    def backprop(self, batch, noise):
        """Flow matching - Q(end point) / lambda, through every step of the solver."""
        end_points = self.solve(batch["observations"], noise["next_action"])  # (B, A)
        return self.cloning(batch, noise)[0] - self.mean_q(batch, end_points) / self.strength, {}

    def improved_one_step(self, batch, noise):
        """Distillation - Q(mu(noise)) / lambda."""
        actions = self.one_step_action(batch["observations"], noise["next_action"]).clamp(-1, 1)  # (B, A)
        return self.distillation(batch, noise)[0] - self.mean_q(batch, actions) / self.strength, {}

    def samples(self, observations, noise):
        """Actions of the flow, (N, A)."""
        return self.solve(observations, noise)

    def one_step_samples(self, observations, noise):
        """Actions of the one-step policy, (N, A)."""
        return self.one_step_action(observations, noise).clamp(-1, 1)

    def flow_consistency(self, x):
        """mean |V(x_t, t) - V(end point, 1)| along the flow at t = 0, 1/K, ..., 1: noise (N, A) -> (K + 1,)."""
        K, observations, values = self.args.flow_steps, torch.zeros_like(x[..., :1]), []
        for k in range(K + 1):
            t = torch.full_like(x[..., :1], k / K)
            values.append(self.inner_values(observations, x, t).mean(dim=0))  # (N,)
            x = x + self.velocity(observations, x, t) / K
        return torch.stack([(value - values[-1]).abs().mean() for value in values])

    def value_landscape(self, x, t):
        """V(x, t) of points: (N, A), (N, 1) -> (N,)."""
        return self.inner_values(torch.zeros_like(t), x, t).mean(dim=0)


def waves(x):
    """Points beside their sines and cosines: (N, A) -> (N, A + 2 * len(WAVES) * A)."""
    angles = [frequency * x for frequency in WAVES]
    return torch.cat([x, *(wave(angle) for angle in angles for wave in (torch.sin, torch.cos))], dim=-1)


class PlaneStudy(Study):
    """A study whose policies see their point in waves too, with which small ones learn narrow data in fewer updates."""

    def __init__(self, args, obs_dim, action_dim):
        super().__init__(args, obs_dim, action_dim)
        inputs = obs_dim + action_dim * (1 + 2 * len(WAVES))
        hidden = (*args.actor_hidden_dims, action_dim)
        t_dim = args.time_embed_dim if args.actor_time_embed else 1
        self.actor_flow = q_flow.MLP((inputs + t_dim, *hidden), args.actor_layer_norm)
        self.one_step = q_flow.MLP((inputs, *hidden), args.actor_layer_norm)

    def velocity(self, observations, x, t):
        """u(s, x, t): (N, D), (N, A), (N, 1) -> (N, A)."""
        return super().velocity(observations, waves(x), t)

    def one_step_action(self, observations, noise):
        """mu(s, n), unclipped: (N, D), (N, A) -> (N, A)."""
        return super().one_step_action(observations, waves(noise))


# Each method's losses, with the networks that they train; before them what all start from, and cloning.
LOSSES = {
    "flow": {"cloning": ("actor_flow",)},
    "fit": {"fitting": ("critic", "inner_value", "one_step")},
    "cloning": {"cloning": ("actor_flow",), "distillation": ("one_step",)},
    "q_flow": {"values": ("critic", "inner_value"), "q_flow": ("actor_flow",)},
    "backprop": {"regression": ("critic",), "backprop": ("actor_flow",)},
    "one_step": {"regression": ("critic",), "cloning": ("actor_flow",), "improved_one_step": ("one_step",)},
}
FIRST_CHUNK = {"flow": 0, "fit": 10**6}  # numbers of the chunks of random draws
METHODS_FIRST_CHUNK = 2 * 10**6  # the same draws for every method


def make_agents(options, lambdas, device, batch_size):
    """Agents for every lambda with every seed, S = lambdas x seeds; a seed's begin alike for every lambda."""
    hidden = (options.width,) * options.depth
    args = replace(
        q_flow.Args(), batch_size=batch_size, tau=0.02, flow_steps=options.flow_steps,
        use_time_embed=True, actor_time_embed=True, time_embed_dim=8,
        actor_layer_norm=not options.full,  # learns the data's shape in fewer updates; the published policy has none
        value_hidden_dims=hidden, actor_hidden_dims=hidden,
    )  # fmt: skip
    seeds = list(range(options.seeds)) * len(lambdas)
    agents = Stacked(lambda: PlaneStudy(args, 1, 2), seeds, device, args.learning_rate)
    agents.optimizer.param_groups[0]["betas"] = (0.9, 0.99)  # a short memory, for a short training
    agents.parameters["strength"].data.copy_(torch.tensor(lambdas).repeat_interleave(options.seeds))
    return agents


def draw_batches(agents, method, points, rewards, seeds):
    """Batches and noise of a method's updates, without end; every lambda of a seed sees the same.

    Yields:
        batch, noise: {name: (S, B, ...)}, as for q_flow.py's losses.
    """
    args, device, S = agents.agent.args, points.device, len(agents.parameters["strength"])
    zeros = torch.zeros(S, args.batch_size, 1, device=device)
    draw = Draws(agents.agent, args, range(seeds), len(points), device)
    for number in itertools.count(FIRST_CHUNK.get(method, METHODS_FIRST_CHUNK)):
        chunk = draw.chunk(number)
        chunk = {name: value.repeat(1, S // seeds, *[1] * (value.ndim - 2)) for name, value in chunk.items()}
        for update in range(CHUNK):
            noise = {name: value[update] for name, value in chunk.items()}
            indices = noise.pop("indices")  # (S, B)
            batch = {"observations": zeros, "next_observations": zeros, "actions": points[indices]}
            yield batch | {"rewards": rewards[indices], "masks": zeros.squeeze(-1)}, noise


def solved_batches(agents, *data_and_seeds):
    """One chunk of batches for `fitting`, again and again: the flow rests, so its end points are solved once.

    Yields:
        as draw_batches; batch also has x, t and end_points, (S, 2 * B, .).
    """
    solve, pool = agents.function("roll_out"), []
    for batch, noise in itertools.islice(draw_batches(agents, "fit", *data_and_seeds), CHUNK):
        t = noise["value_time"]  # (S, B, 1)
        latents = (1 - t) * noise["value_action"] + t * batch["actions"]
        x = torch.cat([noise["next_action"], latents], dim=1)  # (S, 2 * B, A)
        t = torch.cat([torch.zeros_like(t), t], dim=1)
        end_points = solve(torch.zeros_like(t), x, t)
        pool.append((batch | {"x": x, "t": t, "end_points": end_points}, noise))
    yield from itertools.cycle(pool)


def train(method, agents, batches, updates, learning_rate, progress):
    """Trains the agents; the learning rate rises in the first twentieth and falls to zero along a cosine.

    Args:
        batches: yields batch and noise of each update.
        progress: called with the number of updates done.

    Returns:
        norm of the policy's gradient every 50 updates: (updates // 50, S).
    """
    network = "one_step" if method == "one_step" else "actor_flow"
    policy = [p for name, p in agents.parameters.items() if name.split(".")[0] == network]
    norms = []
    for update, (batch, noise) in zip(range(updates), batches):
        rising, falling = min(1, 20 * (update + 1) / updates), (1 + math.cos(math.pi * update / updates)) / 2
        agents.optimizer.param_groups[0]["lr"] = learning_rate * rising * falling
        agents.optimizer.zero_grad()
        for loss, trains in LOSSES[method].items():
            agents.backward(loss, batch, noise, trains)
        agents.ema("target_critic", "critic", agents.agent.args.tau)  # as in q_flow.py: targets lag by one update
        agents.optimizer.step()
        if update % 50 == 49:
            if method in METHODS or method == "cloning":
                norms.append(sum(p.grad.square().flatten(1).sum(dim=1) for p in policy).sqrt())  # (S,)
            progress(50)
    return torch.stack(norms) if norms else None


def value_landscapes(agents, times, size=60):
    """V(x, t) on a grid over [-1.1, 1.1]^2: (times, S, size, size)."""
    strength = agents.parameters["strength"]
    S, line = len(strength), torch.linspace(-1.1, 1.1, size, device=strength.device)
    x = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1).view(1, -1, 2).expand(S, -1, -1)
    landscape = agents.function("value_landscape")
    values = [landscape(x, torch.full_like(x[..., :1], t)) for t in times]  # (S, size^2)
    return torch.stack(values).view(len(times), S, size, size)


# --- One data set ---


def study(name, options, device, progress):
    """Trains all methods on a data set and draws its picture.

    Args:
        progress: called with the number of updates done.

    Returns:
        rows of summary.csv.
    """
    data = make_points(name, NUM_POINTS)
    rewards = torch.as_tensor(options.reward_scale * data.rewards, device=device)
    inputs = torch.as_tensor(data.points, device=device), rewards, options.seeds
    start = make_agents(options, (CLONING,), device, options.pretrain_batch_size)
    if options.pretrain_updates:
        train("flow", start, draw_batches(start, "flow", *inputs), options.pretrain_updates, 1e-2, progress)
        train("fit", start, solved_batches(start, *inputs), options.fit_updates, 8e-3, progress)
        start.ema("target_critic", "critic", 1.0)

    samples, extra = {}, {}  # of each method, lambda and seed
    noise = torch.randn(1, NUM_SAMPLES, 2, generator=torch.Generator().manual_seed(0)).to(device)
    for method in ("cloning", *METHODS):
        lambdas = (CLONING,) if method == "cloning" else LAMBDAS
        agents = make_agents(options, lambdas, device, options.batch_size)
        for key, parameter in agents.parameters.items():  # every lambda starts from its seed's agent
            if key != "strength":
                begin = start.parameters[key]
                parameter.data.copy_(begin.repeat(len(lambdas), *[1] * (begin.ndim - 1)))
        batches = draw_batches(agents, method, *inputs)
        norms = train(method, agents, batches, num_updates(name, options), 1e-3, progress)

        keys = list(itertools.product(lambdas, range(options.seeds)))  # as the agents are stacked
        x = noise.expand(len(keys), -1, -1)
        for shown in METHODS if method == "cloning" else [method]:
            act = agents.function("one_step_samples" if shown == "one_step" else "samples")
            actions = act(torch.zeros_like(x[..., :1]), x).cpu().numpy()  # (S, N, 2)
            samples |= {(shown, *key): points for key, points in zip(keys, actions)}
            if shown == method or shown != "one_step":  # cloning's norms are its flow's
                last = norms[-5:].mean(dim=0).tolist()  # (S,)
                extra |= {(shown, *key): {"gradient_norm": value} for key, value in zip(keys, last)}
        if method == "q_flow":
            consistency = agents.function("flow_consistency")(x)[:, :-1].mean(dim=1).tolist()  # (S,)
            for key, value in zip(keys, consistency):
                extra[(method, *key)]["consistency"] = value
            landscapes = value_landscapes(agents, (0, 1 / 3, 2 / 3, 1))[:, keys.index((1.0, 0))].cpu().numpy()

    rows = []
    for method, value, seed in itertools.product(METHODS, (CLONING, *LAMBDAS), range(options.seeds)):
        key = method, value, seed
        row = {"dataset": name, "method": method, "lambda": value, "seed": seed} | judge(samples[key], data)
        row |= {"consistency": "", "gradient_norm": ""} | extra.get(key, {})
        rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
    comparable = cloning_on_support(rows) >= FAITHFUL
    rows = [row | {"comparable": "yes" if comparable else "no"} for row in rows]
    draw(Path(options.output_dir) / f"{name}.png", data, rows, samples, landscapes)
    return rows


def num_updates(name, options):
    """Updates of each method: --updates, or the paper's epochs over the points."""
    epochs = 5_100 if name == "two_spirals" else 2_100
    return epochs * (NUM_POINTS // options.batch_size) if options.full else options.updates


def mean_of(rows, column, method, value):
    """Mean over the seeds of a column, for one method and lambda of a data set's rows."""
    return float(np.mean([row[column] for row in rows if (row["method"], row["lambda"]) == (method, value)]))


def cloning_on_support(rows):
    """Share of the cloning flow's samples on the support: mean over the seeds of a data set's rows."""
    return mean_of(rows, "on_support", "q_flow", CLONING)


# --- Picture and table ---

TITLES = {"q_flow": "Q-Flow", "backprop": "backprop\nthrough the solver", "one_step": "one-step policy"}


def density_image(data, size=220, blur=0.02):
    """The data's density, coloured by reward from grey to orange: (size, size, 4) over [-1.1, 1.1]^2."""
    from matplotlib.colors import LinearSegmentedColormap

    edges = np.linspace(-1.1, 1.1, size + 1)
    reach = np.arange(size)
    kernel = np.exp(-0.5 * ((reach[:, None] - reach[None]) * (edges[1] - edges[0]) / blur) ** 2)
    count, rewards = (
        kernel @ np.histogram2d(*data.points[:, ::-1].T, bins=(edges, edges), weights=weights)[0] @ kernel
        for weights in (None, data.rewards)
    )
    colours = LinearSegmentedColormap.from_list("reward", ["#c3cad6", "#ffd28a", "#f59a00"])
    image = colours(rewards / np.maximum(count, 1e-9))
    image[..., 3] = np.clip(count / np.quantile(count[count > 0.05 * count.max()], 0.5), 0, 1) ** 0.7
    return image


def draw(path, data, rows, samples, landscapes):
    """The picture of a data set: the first seed's samples before the data's density; V. Numbers are means over seeds.

    Args:
        rows: of this data set.
        samples: {(method, lambda, seed): (N, 2)}.
        landscapes: V(x, t) for lambda 1 at t = 0, 1/3, 2/3, 1: (4, size, size).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    values, extent = (CLONING, *LAMBDAS), (-1.1, 1.1, -1.1, 1.1)
    figure, axes = plt.subplots(4, len(values), figsize=(10, 10.6), layout="constrained")
    for panel in axes.flat:
        panel.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), xticks=[], yticks=[], aspect="equal")
        panel.spines[:].set_color("#b0b0b0")
    background, limit = density_image(data), SUPPORT * data.noise
    for row, method in enumerate(METHODS):
        axes[row, 0].set_ylabel(TITLES[method], fontsize=13)
        for panel, value in zip(axes[row], values):
            panel.imshow(background, origin="lower", extent=extent, interpolation="bilinear")
            shown = np.nan_to_num(samples[method, value, 0], nan=1e3)
            off = torch.cdist(torch.as_tensor(shown), torch.as_tensor(data.centres)).min(dim=1).values.numpy() > limit
            panel.scatter(*shown[~off].T, c="#1f3a93", s=2.5, linewidths=0, alpha=0.55)
            panel.scatter(*shown[off].T, c="#d62728", s=4, linewidths=0, alpha=0.8)
            reward, on_support = (mean_of(rows, column, method, value) for column in ("reward", "on_support"))
            panel.set_xlabel(f"reward {reward:.2f}, on the data {on_support:.0%}", fontsize=10.5)
            if row == 0:
                title = "cloning ($\\lambda = \\infty$)" if value == CLONING else f"$\\lambda$ = {value:g}"
                panel.set_title(title, fontsize=13)
    axes[3, 0].set_ylabel("Q-Flow's V(x, t)\nat $\\lambda$ = 1", fontsize=13)
    for panel, landscape, t in zip(axes[3], landscapes, ("t = 0 (noise)", "t = 1/3", "t = 2/3", "t = 1 (action)")):
        panel.imshow(landscape, origin="lower", extent=extent, cmap="cividis")
        panel.set_xlabel(t, fontsize=10.5)
    name, reached = rows[0]["dataset"].replace("_", " "), cloning_on_support(rows)
    legend = "samples on the data blue, off it red; data grey, orange where rewarded"
    figure.suptitle(f"{name}: {legend}\nthe smaller $\\lambda$, the more the reward counts", fontsize=12)
    if reached < FAITHFUL:
        warning = f"cloning has {reached:.1%} of its samples on the data, below {FAITHFUL:.0%}"
        figure.supxlabel(f"{warning}: nothing here may be compared", color="#d62728", fontsize=13)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def summarize(rows):
    """Lines that say each method's means over the seeds, and on which data sets nothing may be compared."""
    lines = [f"{'data set':>16} {'method':>9} {'lambda':>8} {'reward':>7} {'on support':>11} {'good modes':>11}"]
    groups = {}
    for row in rows:
        groups.setdefault(row["dataset"], []).append(row)
    for name, group in groups.items():
        for method, value in itertools.product(METHODS, (CLONING, *LAMBDAS)):
            means = [mean_of(group, column, method, value) for column in ("reward", "on_support", "good_modes")]
            lines.append(f"{name:>16} {method:>9} {value:>8g} {means[0]:>7.2f} {means[1]:>11.3f} {means[2]:>11.2f}")
    for name, group in groups.items():
        if cloning_on_support(group) < FAITHFUL:
            reached = f"{cloning_on_support(group):.1%} of cloning's samples are on the support, below {FAITHFUL:.0%}"
            lines.append(f"{name}: {reached}: nothing there may be compared")
    return "\n".join(lines)


def in_worker(job):
    """study() in a process of its own with its share of the cores; reports progress through a queue."""
    name, options, threads, queue = job
    setup_torch(q_flow.Args(cuda=False))
    torch.set_num_threads(threads)
    return study(name, options, torch.device("cpu"), queue.put)


if __name__ == "__main__":
    from tqdm import tqdm

    options = tyro.cli(ToyArgs, description=__doc__)
    for name in options.datasets:
        make_points(name, 10)  # refuses unknown names
    sizes = ("seeds", "fit_updates", "pretrain_batch_size", "batch_size", "width", "depth", "flow_steps")
    arguments.check_numbers(options, above_zero=(*sizes, "reward_scale"))
    if options.updates < 50 or options.pretrain_updates < 0 or options.batch_size > NUM_POINTS:
        fail(f"--updates must be at least 50, --pretrain-updates at least 0, --batch-size at most {NUM_POINTS}")
    if options.full:
        options = replace(options, width=512, depth=4, pretrain_updates=0)
    output = Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    others = {row["dataset"] for row in tables.read_rows(output / "summary.csv")} - set(options.datasets)
    if others:
        fail(f"--output-dir {output} has the results of {', '.join(sorted(others))}, which would be lost; name another")
    started, table = time.perf_counter(), []
    before = options.pretrain_updates + options.fit_updates if options.pretrain_updates else 0
    steps = sum(before + (1 + len(METHODS)) * num_updates(name, options) for name in options.datasets)

    def write(rows):
        """Adds a data set's rows to summary.csv."""
        table.extend(rows)
        table.sort(key=lambda row: options.datasets.index(row["dataset"]))
        with open(output / "summary.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)

    with tqdm(total=steps, unit=" updates") as bar:
        if options.cuda and torch.cuda.is_available():
            device = setup_torch(q_flow.Args())
            for name in options.datasets:
                write(study(name, options, device, bar.update))
        else:
            cores = num_cores()
            workers = min(cores, len(options.datasets))
            context = multiprocessing.get_context("spawn")
            with context.Manager() as manager, ProcessPoolExecutor(workers, context) as pool:
                queue = manager.Queue()
                jobs = [(name, options, max(1, cores // workers), queue) for name in options.datasets]
                pending = {pool.submit(in_worker, job) for job in jobs}
                while pending:
                    done, pending = wait(pending, 0.5, FIRST_COMPLETED)
                    while not queue.empty():
                        bar.update(queue.get())
                    for result in done:
                        write(result.result())
    print(summarize(table))
    print(f"{time.perf_counter() - started:.0f} s; pictures and summary.csv in {output}")
