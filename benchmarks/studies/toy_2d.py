"""Q-Flow's study in two dimensions: what three ways of improving a flow policy do to the data and its modes.

    python -m benchmarks.studies.toy_2d                               # four data sets, reduced: 20 minutes, 2 CPU cores
    python -m benchmarks.studies.toy_2d --datasets moons --seeds 1    # one of them
    python -m benchmarks.studies.toy_2d --full                        # the paper's size: for a GPU

Actions are points of the plane, every point of a data set carries a reward, and there is one state and one step. Each
method improves a flow policy u on the rewards while it stays near the data, with lambda as the strength of staying:

    q_flow     the losses of q_flow.py: u follows the data's velocity plus grad V / lambda, V on the flow's latents
    backprop   flow matching - Q(end point of the flow) / lambda, differentiated through every step of the solver
    one_step   FQL's: flow matching, and a one-step policy mu with distillation from the flow - Q(mu) / lambda

lambda 1e6 is cloning. Networks, batches, noise, learning rates and numbers of updates are the same for all; seeds and
lambdas are trained side by side, stacked. At the reduced size all start from one flow, critic, V and one-step
policy trained without improvement (--pretrain-updates), so that what is seen is the improvement; at the full size all
start from scratch, as in the paper.

Writes DATASET.png (samples, value landscapes, flow consistency, gradient norms) and summary.csv, with a row for each
method, lambda and seed: mean reward of samples, share of them on the data's support, share of the good modes covered,
flow consistency |V(x_t, t) - V(end point, 1)|, norm of the policy's gradient.

Notation in the shapes: S lambdas x seeds, B batch, N rows, K Euler steps.
"""

import csv
import math
import multiprocessing
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro

import q_flow
from common import draws, fail, num_cores
from common.device import setup_torch
from common.stacked import Stacked

METHODS = ("q_flow", "backprop", "one_step")
CLONING = 1e6
LAMBDAS = (CLONING, 5.0, 1.0, 0.5, 0.3)
NUM_POINTS = 10_000
NUM_SAMPLES = 2_000
SUPPORT = 0.07  # distance to the nearest data point that counts as on the support; the sets are about 1.6 wide
GOOD = 0.7  # a mode is good if the mean reward of its points is at least this


@dataclass
class ToyArgs:
    datasets: tuple[str, ...] = ("swiss_roll", "two_spirals", "eight_gaussians", "moons")
    """data sets"""
    seeds: int = 3
    """seeds of each method and lambda"""
    pretrain_updates: int = 8_000
    """updates of the flow, the critic, V and the one-step policy that all methods start from (0: from scratch)"""
    updates: int = 700
    """updates of each method"""
    batch_size: int = 256
    """points a batch"""
    width: int = 64
    """hidden width of all networks"""
    depth: int = 3
    """their hidden layers"""
    flow_steps: int = 12
    """Euler steps of the flow"""
    reward_scale: float = 0.25
    """what rewards in [0, 1] are multiplied by; only its ratio to lambda matters"""
    full: bool = False
    """the paper's size: 4 layers of 512, 25 flow steps, 2,100 epochs (5,100 for the spirals), from scratch"""
    cuda: bool = True
    """use the GPU; without one, one process a core, a data set each"""
    output_dir: str = "toy_2d"
    """directory of the pictures and the summary"""


# --- Data ---


def make_points(name, n, seed=0):
    """Points of a data set.

    Returns:
        points (n, 2) in [-1, 1], float32; rewards (n,) in [0, 1], float32; modes (n,), int: the piece of data that a
        point is of. On the roll rewards rise and fall three times, on spirals and moons they rise towards the far ends,
        every second Gaussian is good.
    """
    rng = np.random.default_rng(seed)
    u, noise = rng.random(n), 0.025
    circle = lambda angle: np.stack([np.cos(angle), np.sin(angle)], axis=1)
    if name == "swiss_roll":
        angle = 1.5 * np.pi * (1 + 2 * u)
        points = 0.8 * circle(angle) * angle[:, None] / (4.5 * np.pi)
        rewards, modes = (1 - np.cos(6 * np.pi * u)) / 2, np.rint(6 * u)
    elif name == "two_spirals":
        radius, arm = np.sqrt(u), rng.integers(2, size=n)
        points = 0.8 * circle(2 * np.pi * radius + np.pi * arm) * radius[:, None]
        rewards, modes = radius, 2 * arm + (radius > 0.7)
    elif name == "eight_gaussians":
        modes, noise = rng.integers(8, size=n), 0.06
        points, rewards = 0.65 * circle(np.pi / 4 * modes), modes % 2
    elif name == "moons":
        moon = rng.integers(2, size=n)
        upper = circle(np.pi * u) - [0.5, 0.25]
        points = np.where(moon[:, None] == 0, upper, -upper) / 2
        rewards, modes = u, 2 * moon + (u > 0.6)
    else:
        fail(f"--datasets {name} is unknown; known: swiss_roll, two_spirals, eight_gaussians, moons")
    points = np.clip(points + noise * rng.standard_normal((n, 2)), -1, 1)
    return points.astype(np.float32), rewards.astype(np.float32), modes.astype(int)


def judge(samples, points, rewards, modes):
    """How good samples are, by the data points nearest to them.

    Args:
        samples: (N, 2); non-finite ones are off the support.
        points, rewards, modes: see make_points.

    Returns:
        reward: mean reward of the nearest points, counted as zero off the support;
        on_support: share of samples within SUPPORT of a data point;
        good_modes: share of the good modes that hold at least a quarter of an even share of the samples.
    """
    samples = torch.nan_to_num(torch.as_tensor(samples), nan=1e3)
    distances, nearest = torch.cdist(samples, torch.as_tensor(points)).min(dim=1)
    on_support, nearest = (distances <= SUPPORT).numpy(), nearest.numpy()
    good = [mode for mode in np.unique(modes) if rewards[modes == mode].mean() >= GOOD]
    shares = [np.mean(on_support & (modes[nearest] == mode)) for mode in good]
    return {
        "reward": float(np.mean(rewards[nearest] * on_support)),
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


# Each method's losses, with the networks that they train. `pretrain` is all that is not improvement.
LOSSES = {
    "pretrain": {"values": ("critic", "inner_value"), "cloning": ("actor_flow",), "distillation": ("one_step",)},
    "q_flow": {"values": ("critic", "inner_value"), "q_flow": ("actor_flow",)},
    "backprop": {"regression": ("critic",), "backprop": ("actor_flow",)},
    "one_step": {"regression": ("critic",), "cloning": ("actor_flow",), "improved_one_step": ("one_step",)},
}


def make_agents(options, lambdas, device):
    """Agents for every lambda with every seed, S = lambdas x seeds; a seed's begin alike for every lambda."""
    hidden = (options.width,) * options.depth
    args = replace(
        q_flow.Args(), batch_size=options.batch_size, tau=0.02, flow_steps=options.flow_steps,
        use_time_embed=True, time_embed_dim=16,
        actor_layer_norm=not options.full,  # learns the data's shape in fewer updates; the published policy has none
        value_hidden_dims=hidden, actor_hidden_dims=hidden,
    )  # fmt: skip
    seeds = list(range(options.seeds)) * len(lambdas)
    agents = Stacked(lambda: Study(args, 1, 2), seeds, device, args.learning_rate)
    agents.parameters["strength"].data.copy_(torch.tensor(lambdas).repeat_interleave(options.seeds))
    return agents


def train(method, agents, points, rewards, updates, learning_rate, seeds, first_chunk, progress):
    """Trains the agents; the learning rate falls to zero along a cosine.

    Returns:
        norm of the policy's gradient every 50 updates: (updates / 50, S).
    """
    args, device = agents.agent.args, points.device
    S, B = len(agents.parameters["strength"]), args.batch_size
    network = "one_step" if method == "one_step" else "actor_flow"
    policy = [p for name, p in agents.parameters.items() if name.split(".")[0] == network]
    zeros, norms = torch.zeros(S, B, 1, device=device), []
    for update in range(updates):
        if update % draws.CHUNK == 0:  # every lambda of a seed sees the same points and noise
            number = first_chunk + update // draws.CHUNK
            chunk = draws.draw_chunk(agents.agent, args, range(seeds), len(points), number, device)
            chunk = {name: value.repeat(1, S // seeds, *[1] * (value.ndim - 2)) for name, value in chunk.items()}
        noise = {name: value[update % draws.CHUNK] for name, value in chunk.items()}
        indices = noise.pop("indices")  # (S, B)
        batch = {"observations": zeros, "next_observations": zeros, "actions": points[indices]}
        batch |= {"rewards": rewards[indices], "masks": zeros.squeeze(-1)}
        agents.optimizer.param_groups[0]["lr"] = learning_rate * (1 + math.cos(math.pi * update / updates)) / 2
        agents.optimizer.zero_grad()
        for loss, trains in LOSSES[method].items():
            agents.backward(loss, batch, noise, trains)
        agents.ema("target_critic", "critic", args.tau)  # as in q_flow.py: targets lag by one update
        agents.optimizer.step()
        if update % 50 == 49:
            norms.append(sum(p.grad.square().flatten(1).sum(dim=1) for p in policy).sqrt())  # (S,)
            progress(50)
    return torch.stack(norms) if norms else torch.zeros(0, S)


def value_landscapes(agents, times, size=60):
    """V(x, t) on a grid over [-1.5, 1.5]^2: (times, S, size, size)."""
    strength = agents.parameters["strength"]
    S, line = len(strength), torch.linspace(-1.5, 1.5, size, device=strength.device)
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
    points, rewards, modes = make_points(name, NUM_POINTS)
    on_device = torch.as_tensor(points, device=device), torch.as_tensor(options.reward_scale * rewards, device=device)
    updates, learning_rate = num_updates(name, options), 1e-3 if options.full else 3e-3
    start = make_agents(options, (CLONING,), device)
    train("pretrain", start, *on_device, options.pretrain_updates, 8e-3, options.seeds, 0, progress)
    start.ema("target_critic", "critic", 1.0)
    noise = torch.randn(1, NUM_SAMPLES, 2, generator=torch.Generator().manual_seed(0)).to(device)
    noise = noise.expand(len(LAMBDAS) * options.seeds, -1, -1)

    rows, samples, norms = [], {}, {}
    for method in METHODS:
        agents = make_agents(options, LAMBDAS, device)
        for key, parameter in agents.parameters.items():  # every lambda starts from its seed's agent
            if key != "strength":
                begin = start.parameters[key]
                parameter.data.copy_(begin.repeat(len(LAMBDAS), *[1] * (begin.ndim - 1)))
        first_chunk = options.pretrain_updates // draws.CHUNK + 1  # numbers that pretraining has not drawn
        norms[method] = train(
            method, agents, *on_device, updates, learning_rate, options.seeds, first_chunk, progress
        ).cpu()  # (updates / 50, S)
        act = agents.function("one_step_samples" if method == "one_step" else "samples")
        samples[method] = act(torch.zeros_like(noise[..., :1]), noise).cpu().numpy()  # (S, N, 2)
        if method == "q_flow":
            consistency = agents.function("flow_consistency")(noise).cpu()  # (S, K + 1)
            landscapes = value_landscapes(agents, (0, 0.33, 0.67, 1))
        for index in range(len(noise)):
            row = {"dataset": name, "method": method, "lambda": LAMBDAS[index // options.seeds]}
            row |= {"seed": index % options.seeds} | judge(samples[method][index], points, rewards, modes)
            row["consistency"] = consistency[index, :-1].mean().item() if method == "q_flow" else ""
            row["gradient_norm"] = norms[method][-5:, index].mean().item()
            rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
    path = Path(options.output_dir) / f"{name}.png"
    draw(path, name, options.seeds, points, rewards, samples, landscapes.cpu().numpy(), consistency, norms)
    return rows


def num_updates(name, options):
    """Updates of each method: --updates, or the paper's epochs over the points."""
    epochs = 5_100 if name == "two_spirals" else 2_100
    return epochs * (NUM_POINTS // options.batch_size) if options.full else options.updates


def draw(path, name, seeds, points, rewards, samples, landscapes, consistency, norms):
    """The picture of a data set; samples and landscapes are of the first seed, curves are means over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    label = lambda value: "cloning" if value == CLONING else f"$\\lambda$ = {value:g}"
    figure, axes = plt.subplots(4, len(LAMBDAS) + 1, figsize=(2.1 * (len(LAMBDAS) + 1), 8.6), layout="constrained")
    for panel in axes[:3].flat:
        panel.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), xticks=[], yticks=[], aspect="equal")
    for row, method in enumerate(METHODS):
        axes[row, 0].scatter(*points[:NUM_SAMPLES].T, c=rewards[:NUM_SAMPLES], s=1, cmap="viridis")
        axes[row, 0].set_ylabel(method)
        for column, value in enumerate(LAMBDAS):
            panel = axes[row, column + 1]
            panel.scatter(*points[:NUM_SAMPLES].T, c="lightgrey", s=0.5)
            panel.scatter(*samples[method][column * seeds].T, c="tab:red", s=1)
            panel.set_title(label(value) if row == 0 else "", fontsize="small")
    axes[0, 0].set_title("data, by reward", fontsize="small")
    shown = LAMBDAS.index(1.0) * seeds
    for panel, landscape, t in zip(axes[3], landscapes, ("0", "1/3", "2/3", "1")):
        panel.imshow(landscape[shown], origin="lower", extent=(-1.5, 1.5, -1.5, 1.5), cmap="viridis")
        panel.set(xticks=[], yticks=[])
        panel.set_title(f"q_flow's V(x, {t}), $\\lambda$ = 1", fontsize="small")
    for index, value in enumerate(LAMBDAS):
        mean = consistency[index * seeds : (index + 1) * seeds].mean(dim=0)
        axes[3, 4].plot(np.linspace(0, 1, len(mean)), mean, label=label(value))
    axes[3, 4].set_title("|V($x_t$, t) - V(end, 1)| over t", fontsize="small")
    for method in METHODS:
        curve = norms[method][:, -seeds:].mean(dim=1)
        axes[3, 5].plot(50 * np.arange(1, len(curve) + 1), curve, label=method)
    axes[3, 5].set_yscale("log")
    axes[3, 5].set_title(f"policy gradient, {label(LAMBDAS[-1])}", fontsize="small")
    for panel in axes[3, 4:]:
        panel.legend(fontsize="xx-small")
        panel.tick_params(labelsize="xx-small")
    figure.suptitle(name)
    figure.savefig(path, dpi=72)
    plt.close(figure)


def summarize(rows):
    """Lines that say each method's means over the seeds."""
    lines = [f"{'data set':>16} {'method':>9} {'lambda':>8} {'reward':>7} {'on support':>11} {'good modes':>11}"]
    groups = {}
    for row in rows:
        groups.setdefault((row["dataset"], row["method"], row["lambda"]), []).append(row)
    for (name, method, value), group in groups.items():
        reward, on_support, good_modes = (
            np.mean([row[key] for row in group]) for key in ("reward", "on_support", "good_modes")
        )
        lines.append(f"{name:>16} {method:>9} {value:>8g} {reward:>7.2f} {on_support:>11.2f} {good_modes:>11.2f}")
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
    for name in ("seeds", "batch_size", "width", "depth", "flow_steps", "reward_scale"):
        if getattr(options, name) <= 0:
            fail(f"--{name.replace('_', '-')} {getattr(options, name)}: must be above zero")
    if options.updates < 50 or options.pretrain_updates < 0 or options.batch_size > NUM_POINTS:
        fail(f"--updates must be at least 50, --pretrain-updates at least 0, --batch-size at most {NUM_POINTS}")
    if options.full:
        options = replace(options, width=512, depth=4, flow_steps=25, pretrain_updates=0)
    output = Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    started, table = time.perf_counter(), []
    steps = sum(options.pretrain_updates + len(METHODS) * num_updates(name, options) for name in options.datasets)

    def write(rows):
        """Adds a data set's rows to summary.csv."""
        table.extend(rows)
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
            with context.Manager() as manager, context.Pool(workers) as pool:
                queue = manager.Queue()
                jobs = [(name, options, max(1, cores // workers), queue) for name in options.datasets]
                results = [pool.apply_async(in_worker, (job,)) for job in jobs]
                for result in results:
                    while not result.ready():
                        while not queue.empty():
                            bar.update(queue.get())
                        result.wait(0.5)
                    write(result.get())
                while not queue.empty():
                    bar.update(queue.get())
    print(summarize(table))
    print(f"{time.perf_counter() - started:.0f} s; pictures and summary.csv in {output}")
