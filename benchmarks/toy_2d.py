"""Q-Flow's study in two dimensions: what three ways of improving a flow policy do to the data's modes.

    python -m benchmarks.toy_2d                                  # four data sets, reduced size, minutes on two CPU cores
    python -m benchmarks.toy_2d --datasets moons --full          # the paper's size
    python -m benchmarks.toy_2d --output-dir docs/toy_2d

Actions are points of the plane, every point of a data set carries a reward, and there is one state and one step. Each
method improves a policy on the rewards while it stays near the data, with the coefficient lambda as the strength of
staying:

  q_flow     the losses of q_flow.py: the velocity follows the data plus grad V / lambda, V on the flow's latents
  backprop   lambda * flow matching - Q(end point), differentiated through the solver's steps
  one_step   FQL: flow matching, and a one-step policy with lambda * distillation - Q(its action)

and `cloning` is q_flow with lambda = 1e6. All have equal networks, batches and numbers of updates. Seeds and coefficients
are trained stacked. Writes one picture a data set and summary.csv: mean reward of samples, share on the data's support,
share of the good modes covered, flow consistency, gradient norms.
"""

import csv
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro

import q_flow
from common import fail, runs

COEFFICIENTS = (0.3, 0.5, 1.0, 5.0)
CLONING = 1e6
METHODS = ("q_flow", "backprop", "one_step")
NUM_POINTS = 10_000
SUPPORT = 0.1  # distance to the nearest data point that counts as on the data's support; the sets are 2 wide
GOOD = 0.7  # a mode is good if its points' mean reward is at least this


@dataclass
class ToyArgs:
    datasets: tuple[str, ...] = ("swiss_roll", "two_spirals", "eight_gaussians", "moons")
    """data sets"""
    seeds: int = 2
    """seeds of each method and coefficient"""
    updates: int = 1_500
    """updates of each training"""
    batch_size: int = 256
    """points a batch"""
    width: int = 64
    """hidden width of all networks"""
    depth: int = 3
    """their hidden layers"""
    flow_steps: int = 10
    """Euler steps of the flow"""
    full: bool = False
    """the paper's size: 4 layers of 512, 25 flow steps, 20 times the updates (40 times for the spirals)"""
    output_dir: str = "toy_2d"
    """directory of the pictures and the summary"""


# --- Data ---


def make_points(name, n, seed=0):
    """n points (n, 2) in [-1, 1]^2 with their rewards (n,) in [0, 1] and modes (n,), pieces of the data.

    Rewards are smooth along the curves; on the Gaussians every second one is good.
    """
    rng = np.random.default_rng(seed)
    u = rng.random(n)
    if name == "swiss_roll":  # reward rises outwards; three pieces of the curve
        angle = 1.5 * np.pi * (1 + 2 * u)
        points = np.stack([np.cos(angle), np.sin(angle)], axis=1) * (angle / (4.5 * np.pi))[:, None]
        rewards, modes, noise = u, (3 * u).astype(int), 0.04
    elif name == "two_spirals":  # reward rises outwards on both arms; inner and outer half of each
        angle, arm = 3 * np.pi * np.sqrt(u), rng.integers(2, size=n)
        points = np.stack([np.cos(angle + np.pi * arm), np.sin(angle + np.pi * arm)], axis=1)
        points = points * (angle / (3 * np.pi))[:, None]
        rewards, modes, noise = np.sqrt(u), 2 * arm + (np.sqrt(u) > 0.7), 0.04
    elif name == "eight_gaussians":
        modes = rng.integers(8, size=n)
        points = 0.75 * np.stack([np.cos(np.pi / 4 * modes), np.sin(np.pi / 4 * modes)], axis=1)
        rewards, noise = (modes % 2 == 0).astype(float), 0.06
    elif name == "moons":  # reward rises towards the outer tips of both moons
        moon, angle = rng.integers(2, size=n), np.pi * u
        upper = np.stack([np.cos(angle) - 0.5, np.sin(angle) - 0.25], axis=1)
        points = np.where(moon[:, None] == 0, upper, -upper) / 1.6
        rewards, modes, noise = u, 2 * moon + (u > 0.6), 0.04
    else:
        fail(f"--datasets {name} is unknown; known: swiss_roll, two_spirals, eight_gaussians, moons")
    points = np.clip(points + noise * rng.standard_normal((n, 2)), -1, 1)
    return points.astype(np.float32), rewards.astype(np.float32), modes


def judge(samples, points, rewards, modes):
    """How good samples are, by their nearest data points.

    Args:
        samples: (n, 2).
        points, rewards, modes: of `make_points`.

    Returns:
        reward: mean reward of the nearest points, zero off the support;
        on_support: share of samples within SUPPORT of a data point;
        good_modes: share of the good modes that hold at least a quarter of an even share of the samples.
    """
    samples, points = torch.as_tensor(samples), torch.as_tensor(points)
    distances, nearest = torch.cdist(torch.nan_to_num(samples, nan=1e3), points).min(dim=1)
    on_support, nearest = (distances <= SUPPORT).numpy(), nearest.numpy()
    good = [mode for mode in np.unique(modes) if rewards[modes == mode].mean() >= GOOD]
    shares = [np.mean(on_support & (modes[nearest] == mode)) for mode in good]
    return {
        "reward": float(np.mean(rewards[nearest] * on_support)),
        "on_support": float(on_support.mean()),
        "good_modes": float(np.mean([share >= 0.25 / len(good) for share in shares])),
    }


# --- The three methods ---


def make_agent(options, coefficients, updates):
    """A Q-Flow agent whose seed axis holds every coefficient with every seed; lambda is (S, 1, 1)."""
    hidden = (options.width,) * options.depth
    args = replace(
        q_flow.Args(), batch_size=options.batch_size, learning_rate=1e-3, tau=0.02, flow_steps=options.flow_steps,
        value_hidden_dims=hidden, actor_hidden_dims=hidden, time_embed_dim=16, cuda=False,
    )  # fmt: skip
    seeds = list(range(options.seeds)) * len(coefficients)
    args.alpha = torch.tensor(coefficients).repeat_interleave(options.seeds).view(-1, 1, 1)
    return q_flow.Agent(args, 1, 2, seeds, 0.0, 1.0), seeds


class OneStep(torch.nn.Module):
    """The one-step policy mu(n) of `one_step`, beside a Q-Flow agent."""

    def __init__(self, agent, seeds):
        super().__init__()
        self.mlp = q_flow.MLP((len(seeds),), (3, *agent.args.actor_hidden_dims, 2), layer_norm=False)
        q_flow.init_weights(self, seeds)

    def forward(self, observations, noise):
        return self.mlp(torch.cat([observations, noise], dim=-1))


def solve(agent, observations, x):
    """The flow policy's end point with gradients through every step, unclipped: (S, N, 2)."""
    K = agent.args.flow_steps
    velocity = agent.actor_flow.field(observations)
    for k in range(K):
        x = x + velocity(x, torch.full_like(x[..., :1], k / K)) / K
    return x


def flow_matching(agent, batch, noise):
    """L_BC of the flow policy (S,): u(s, x_t, t) -> a - x_0."""
    x_0, t, actions = noise["policy_action"], noise["policy_time"], batch["actions"]
    velocity = agent.actor_flow.field(batch["observations"])((1 - t) * x_0 + t * actions, t)
    return (velocity - (actions - x_0)).square().mean(dim=(1, 2))


def negative_q(agent, observations, actions):
    """-mean Q (S,) of the ensemble's mean; moves the actions' makers alone."""
    agent.critic.requires_grad_(False)
    q = agent.q_values(agent.critic, observations, actions).mean(dim=(1, 2))
    agent.critic.requires_grad_(True)
    return -q


def train(method, options, coefficients, points, rewards, updates, progress):
    """Trains one method for every coefficient and seed.

    Returns:
        policy: noise (S, N, 2) -> samples (S, N, 2); agent; norms (updates / 50, S), of the policy's gradient.
    """
    agent, seeds = make_agent(options, coefficients, updates)
    agent.make_optimizer()
    S, B, lambdas = len(seeds), options.batch_size, agent.args.alpha.flatten()
    one_step = OneStep(agent, seeds) if method == "one_step" else None
    optimizer = agent.optimizer if one_step is None else torch.optim.Adam(
        [p for p in [*agent.parameters(), *one_step.parameters()] if p.requires_grad], lr=1e-3
    )  # fmt: skip
    policy_parameters = [p for m in (agent.actor_flow, one_step) if m is not None for p in m.parameters()]
    zeros = torch.zeros(S, B, 1)
    norms = []
    for update in range(updates):
        if update % runs.CHUNK == 0:  # every coefficient of a seed sees the same points and noise
            chunk = runs.draw_chunk(agent, agent.args, seeds, len(points), update // runs.CHUNK, "cpu")
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * update / updates))
        inputs = {name: value[update % runs.CHUNK] for name, value in chunk.items()}
        batch = {"observations": zeros, "next_observations": zeros, "actions": points[inputs["indices"]]}
        batch |= {
            "rewards": rewards[inputs["indices"]],
            "masks": zeros.squeeze(-1),
        }  # one step: the return is the reward
        if method == "q_flow":
            agent.update(batch, inputs)
        else:
            optimizer.zero_grad()
            q = agent.q_values(agent.critic, zeros, batch["actions"])  # (S, E, B)
            loss = (q - batch["rewards"].unsqueeze(1)).square().mean(dim=(1, 2))
            cloning = flow_matching(agent, batch, inputs)
            if method == "backprop":
                actions = solve(agent, zeros, inputs["next_action"]).clamp(-1, 1)
                loss = loss + lambdas * cloning + negative_q(agent, zeros, actions)
            else:
                actions = one_step(zeros, inputs["next_action"])
                with torch.no_grad():
                    teacher = solve(agent, zeros, inputs["next_action"]).clamp(-1, 1)
                distillation = (actions - teacher).square().mean(dim=(1, 2))
                loss = loss + cloning + lambdas * distillation + negative_q(agent, zeros, actions.clamp(-1, 1))
            loss.sum().backward()
            optimizer.step()
        if update % 50 == 49:
            squares = sum(p.grad.square().flatten(1).sum(dim=1) for p in policy_parameters if p.grad is not None)
            norms.append(squares.sqrt())
            progress.update(50)

    @torch.no_grad()
    def policy(noise):
        observations = torch.zeros(*noise.shape[:2], 1)
        if one_step is not None:
            return one_step(observations, noise).clamp(-1, 1)
        return solve(agent, observations, noise).clamp(-1, 1)

    return policy, agent, torch.stack(norms)


@torch.no_grad()
def flow_consistency(agent, noise):
    """mean |V(x_tau, tau) - V(end point, 1)| along policy flows at tau = 0, 1/K, ..., 1: noise (S, N, 2) -> (S, K + 1)."""
    K, observations, x = agent.args.flow_steps, torch.zeros(*noise.shape[:2], 1), noise
    velocity = agent.actor_flow.field(observations)
    values = []
    for k in range(K + 1):
        t = torch.full_like(x[..., :1], k / K)
        values.append(agent.inner_values(observations, x, t).mean(dim=1))  # (S, N)
        x = x + velocity(x, t) / K if k < K else x
    return torch.stack([(value - values[-1]).abs().mean(dim=1) for value in values], dim=1)


# --- Picture ---


def draw(path, name, points, rewards, samples, agent, consistency, norms, options):
    """Samples of every method and coefficient (first seed), value landscapes over flow time, consistency, gradient norms."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = ["data", "cloning", *(f"lambda {c:g}" for c in reversed(COEFFICIENTS))]
    figure, axes = plt.subplots(4, len(columns), figsize=(2.1 * len(columns), 8.8), layout="constrained")
    for row, method in enumerate(METHODS):
        for column, title in enumerate(columns):
            panel = axes[row, column]
            panel.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), xticks=[], yticks=[], aspect="equal")
            if column == 0:
                panel.scatter(*points[:2000].T, c=rewards[:2000], s=1, cmap="viridis")
                panel.set_ylabel(method)
            else:
                panel.scatter(*points[:2000].T, c="lightgrey", s=0.5)
                panel.scatter(*samples["cloning" if column == 1 else (method, title)].T, c="tab:red", s=1)
            if row == 0:
                panel.set_title(title if column else "data, by reward", fontsize="small")
    grid = torch.linspace(-1.5, 1.5, 60)
    x = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), dim=-1).view(1, -1, 2)
    S = agent.args.alpha.shape[0]
    for column, t in enumerate((0.0, 0.33, 0.67, 1.0)):  # of q_flow with lambda 1, first seed
        observations, time_ = torch.zeros(S, x.shape[1], 1), torch.full((S, x.shape[1], 1), t)
        with torch.no_grad():
            value = agent.inner_values(observations, x.expand(S, -1, -1), time_).mean(dim=1)
        seed = COEFFICIENTS.index(1.0) * options.seeds
        axes[3, column].imshow(value[seed].view(60, 60), origin="lower", extent=(-1.5, 1.5, -1.5, 1.5), cmap="viridis")
        axes[3, column].set(title=f"V(x, {t:g}), lambda 1", xticks=[], yticks=[])
        axes[3, column].title.set_fontsize("small")
    for index, c in enumerate(COEFFICIENTS):
        rows = slice(index * options.seeds, (index + 1) * options.seeds)
        axes[3, 4].plot(np.linspace(0, 1, consistency.shape[1]), consistency[rows].mean(dim=0), label=f"{c:g}")
    axes[3, 4].set_title("|V(x,t) - V(end,1)| over t", fontsize="small")
    axes[3, 4].legend(fontsize="xx-small", title="lambda", title_fontsize="xx-small")
    weakest = slice(0, options.seeds)
    for method in METHODS:
        curve = norms[method][:, weakest].mean(dim=1)
        axes[3, 5].plot(50 * np.arange(1, len(curve) + 1), curve, label=method)
    axes[3, 5].set(yscale="log")
    axes[3, 5].set_title(f"policy gradient norm, lambda {COEFFICIENTS[0]:g}", fontsize="small")
    axes[3, 5].legend(fontsize="xx-small")
    figure.suptitle(name)
    figure.savefig(path, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    from tqdm import tqdm

    options = tyro.cli(ToyArgs, description=__doc__)
    if (
        min(options.seeds, options.updates // 50, options.batch_size, options.width, options.depth, options.flow_steps)
        < 1
    ):
        fail("sizes must be above zero, --updates at least 50")
    for name in options.datasets:
        make_points(name, 10)
    if options.full:
        options = replace(options, width=512, depth=4, flow_steps=25)
    runs.setup_torch(q_flow.Args(cuda=False))
    output = Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    table, start = [], time.perf_counter()
    for name in options.datasets:
        points, rewards, modes = make_points(name, NUM_POINTS)
        updates = options.updates * ((40 if name == "two_spirals" else 20) if options.full else 1)
        generator = torch.Generator().manual_seed(0)
        samples, norms, rows = {}, {}, []
        with tqdm(total=4 * updates // 50 * 50, desc=name, unit=" updates") as progress:
            for method in ("cloning", *METHODS):
                coefficients = (CLONING,) if method == "cloning" else COEFFICIENTS
                trained = "q_flow" if method == "cloning" else method
                policy, agent, norms[method] = train(
                    trained, options, coefficients, torch.as_tensor(points), torch.as_tensor(rewards), updates, progress
                )
                S = len(coefficients) * options.seeds
                noise = torch.randn(1, 2_000, 2, generator=generator).expand(S, -1, -1)
                drawn = policy(noise).numpy()
                consistency = flow_consistency(agent, noise) if trained == "q_flow" else None
                for index in range(S):
                    c = coefficients[index // options.seeds]
                    row = {"dataset": name, "method": method, "lambda": c, "seed": index % options.seeds}
                    row |= judge(drawn[index], points, rewards, modes)
                    row["consistency"] = consistency[index, :-1].mean().item() if consistency is not None else ""
                    row["gradient_norm"] = norms[method][-5:, index].mean().item()
                    rows.append(row)
                    if index % options.seeds == 0:
                        samples["cloning" if method == "cloning" else (method, f"lambda {c:g}")] = drawn[index]
                if method == "q_flow":
                    q_flow_agent, q_flow_consistency = agent, consistency
        draw(output / f"{name}.png", name, points, rewards, samples, q_flow_agent, q_flow_consistency, norms, options)
        for method, c in [("cloning", CLONING), *((m, c) for m in METHODS for c in COEFFICIENTS)]:
            here = [row for row in rows if row["method"] == method and row["lambda"] == c]
            mean = {key: np.mean([row[key] for row in here]) for key in ("reward", "on_support", "good_modes")}
            print(
                f"{name:>16} {method:>9} lambda {c:<7g} reward {mean['reward']:.2f}  on support {mean['on_support']:.2f}  "
                f"good modes {mean['good_modes']:.2f}",
                flush=True,
            )
        table += rows
        with open(output / "summary.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)
    print(f"{time.perf_counter() - start:.0f} s; see {output}")
