"""floq: Q-functions as flows (Agrawalla et al. 2025, arXiv 2509.06863), on OGBench.

The idea: Q(s,a) is the mean end point of a scalar flow. A velocity network v(z,t|s,a) carries a noise z_0 ~ U[l,u] to a
value z_1 in K Euler steps, so that a small network is applied K times in a row: more computation with the same weights.
It is trained by flow matching towards the TD target y = r + gamma E[Q(s',a')], with Q(s',a') by the flow's EMA copy.
A distilled critic without a flow learns the end points and gives the policy its gradient. The policy is FQL's: a
behaviour-cloning flow, distilled into a one-step policy that maximises the critic.

Read first: ValueFlow (the flow's velocity), Agent.critic_loss, Agent.actor_loss (what is learned), update (one step),
then the main program at the end. An agent is written for one seed; common/stacked.py runs several side by side.

    python floq.py --quick                                            # minutes on two CPU cores, data included
    python floq.py --env-id cube-single-play-singletask-v0            # the published hyperparameters
    python floq.py --env-id puzzle-3x3-play-singletask-v0 --num-seeds 8    # eight seeds in one process

Notation in the shapes: E ensemble members, B batch, m noise samples, N rows, D observation dimension, A action
dimension, K Euler steps. "As released": as the authors' code does, whatever the paper says.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import arguments, checkpoint, datasets, envs, export, fail, graphs, policies, rollout, warn
from common.device import setup_torch
from common.draws import Draws
from common.log import Log
from common.replay import Replay
from common.signals import StopRequest
from common.stacked import Stacked

# --- Arguments ---


@dataclass
class Args:
    # General
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run directory's name
    seed: int = 0  # seed of the first agent
    num_seeds: int = 1  # independent agents trained side by side, with seeds seed, seed + 1, ...
    torch_deterministic: bool = True  # deterministic algorithms only: the same command gives the same numbers
    cuda: bool = True  # train on the GPU; without one, on the CPU with a warning
    track: bool = False  # also log to Weights & Biases, one run per seed
    wandb_project_name: str = "cleanflow"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases team or user (default: yours)
    capture_video: bool = False  # save a video of each seed's first evaluation episode (needs OpenGL)
    runs_dir: str = "runs"  # directory that run directories are made in
    resume: str | None = None  # run directory to continue; its arguments apply
    evaluate: str | None = None
    """run directory or exported folder to evaluate only, without data; its arguments apply, --seed is the episodes'"""
    export: str | None = None  # with --evaluate: write the policy to this folder, with the evaluation's scores
    export_seed: int | None = None  # with --export: the one seed to write (default: all)
    quick: bool = False  # the whole pipeline small, in minutes on two cores: generated data, small networks (see QUICK)

    # Data and evaluation
    env_id: str = "cube-single-play-singletask-v0"  # OGBench single-task environment with its dataset type
    dataset_dir: str = "~/.ogbench/data"  # directory of the dataset files
    dataset_path: str | None = None  # this dataset file instead of one in dataset_dir
    dataset_source: Literal["official", "generated"] = "official"
    """OGBench's file, downloaded if missing, or one made here with OGBench's scripted collectors"""
    generated_episodes: int | None = None  # episodes of a generated dataset (default: as the official one)
    success_timing: Literal["post", "pre"] = "post"  # judge success after the action (published scores) or before it
    total_timesteps: int = 2_000_000  # gradient updates of the offline phase (published before going online: 1M)
    online_timesteps: int = 0  # environment steps of the online phase, each with an update (0: no such phase)
    eval_interval: int = 100_000  # updates between evaluations; more after the first update and at each phase's end
    eval_episodes: int = 50  # evaluation episodes per seed
    eval_workers: int = 0  # processes that step environments (0: one per core, at most 16)
    log_interval: int = 5_000  # updates between rows of train.csv
    save_interval: int = 50_000  # updates between checkpoints

    # Algorithm
    batch_size: int = 256  # transitions per batch and seed, B
    learning_rate: float = 3e-4  # Adam's learning rate
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # EMA rate of the target velocity network
    alpha: float = 10.0  # weight of the distillation towards the behaviour-cloning flow
    noise_samples: int = 8  # noise samples m per transition in the critic loss
    critic_flow_steps: int = 8  # Euler steps K of the value flow
    actor_flow_steps: int = 10  # Euler steps of the behaviour-cloning flow
    noise_coverage: float = 0.1  # kappa: the start noise covers [l, u] = kappa * [r_min, r_max] / (1 - gamma)
    q_agg: Literal["mean", "min"] = "mean"  # aggregation of the target flows over the ensemble
    normalize_q_loss: bool = False  # divide the policy's Q term by the mean absolute Q
    train_at_zero_only: bool = False  # train the velocity at t = 0 only (with critic_flow_steps 1: a single pass)
    flow_num_ensembles: int = 2  # velocity networks, an ensemble of E
    distill_num_ensembles: int = 2  # distilled critics, another ensemble, whose E may differ
    use_prob_embed: bool = True  # embed z as an HL-Gauss histogram, instead of scaling its range to [0, 1]
    num_bins: int = 51  # edges of the HL-Gauss histogram, one more than its bins
    sigma: float = 16.0  # standard deviation of the HL-Gauss histogram's Gaussian, in bin widths
    reward_offset: float = 0.01  # the HL-Gauss histogram covers [r_min - offset, r_max + offset] / (1 - gamma)
    time_embedding: Literal["cos", "fourier"] = "cos"
    """of the velocity network's time: cos(t) (released code) or cos(pi i t), i = 1..64 (paper)"""
    block_width: int = 512  # hidden width of the velocity network
    block_depth: int = 4  # hidden layers of the velocity network
    layer_norm: bool = True  # layer normalisation in the velocity network and the distilled critic
    value_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)  # hidden widths of the distilled critic
    actor_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)  # hidden widths of both policies
    actor_layer_norm: bool = False  # layer normalisation in both policies

    # Speed
    compile: bool = True  # compile the losses: up to two minutes at first, then faster updates
    cudagraphs: bool = True  # replay updates and policies as CUDA graphs (on a GPU)
    matmul_precision: Literal["highest", "high", "medium"] | None = None
    """float32 products: highest (exact), high (TF32), medium (bfloat16); default: high where a GPU has TF32"""


# The paper's settings, which replace Args' defaults: the best of its configurations for each environment.
TUNED = {
    "antmaze-large-navigate": dict(alpha=10.0),
    "antmaze-giant-navigate": dict(alpha=10.0, gamma=0.995, q_agg="min", batch_size=512, critic_flow_steps=4),
    "humanoidmaze-medium-navigate": dict(alpha=30.0, gamma=0.995),
    "humanoidmaze-large-navigate": dict(alpha=20.0, gamma=0.995, batch_size=512),
    "antsoccer-arena-navigate": dict(alpha=10.0, gamma=0.995),
    "cube-single-play": dict(alpha=300.0, block_depth=2),
    "cube-double-play": dict(alpha=300.0, block_depth=2),
    "scene-play": dict(alpha=300.0),
    "puzzle-3x3-play": dict(alpha=1000.0),
    "puzzle-4x4-play": dict(alpha=1000.0, noise_coverage=0.25),
}

# What offline-to-online runs change further: half of the offline updates, and in two environments more.
TUNED_ONLINE = {environment: dict(total_timesteps=1_000_000) for environment in TUNED}
TUNED_ONLINE["antsoccer-arena-navigate"] |= dict(alpha=30.0)
TUNED_ONLINE["humanoidmaze-large-navigate"] |= dict(critic_flow_steps=16)

# What --evaluate may change: nothing, since the policy acts in one step.
INFERENCE = ()

# What --quick changes: data that are made here, and sizes that learn within minutes on two cores.
QUICK = dict(exp_name=f"{Path(__file__).stem}-quick", cuda=False, env_id="cube-single-noisy-singletask-v0")
QUICK |= dict(dataset_source="generated", generated_episodes=120)
QUICK |= dict(total_timesteps=16_000, eval_interval=4_000, log_interval=500, save_interval=2_000)
QUICK |= dict(alpha=100.0, tau=0.01, noise_samples=2, critic_flow_steps=4, actor_flow_steps=5)
QUICK |= dict(block_width=256, block_depth=2, value_hidden_dims=(256, 256, 256), actor_hidden_dims=(256, 256, 256))


# --- Networks ---


class MLP(nn.Module):
    """Linear, GELU and LayerNorm for each hidden layer, then Linear.

    Weights are drawn Glorot-uniform from torch's global generator; biases are zero.

    Args:
        dims: (inputs, hidden widths..., outputs).
        layer_norm: whether hidden layers end with LayerNorm (of eps 1e-6, flax's, not torch's 1e-5).
        ensemble: (E,) for E networks; () for one network.
    """

    def __init__(self, dims, layer_norm, ensemble=()):
        super().__init__()
        self.layer_norm = layer_norm
        layers = list(zip(dims[:-1], dims[1:]))
        glorot = lambda i, o: (2 * torch.rand(*ensemble, i, o) - 1) * math.sqrt(6 / (i + o))
        self.weights = nn.ParameterList(glorot(i, o) for i, o in layers)
        self.biases = nn.ParameterList(torch.zeros(*ensemble, 1, o) for _, o in layers)
        norms = dims[1:-1] if layer_norm else []
        self.scales = nn.ParameterList(torch.ones(*ensemble, 1, h) for h in norms)
        self.shifts = nn.ParameterList(torch.zeros(*ensemble, 1, h) for h in norms)

    def forward(self, *inputs):
        """Inputs of (N, .) each -> (N, outputs); of an ensemble (N, .) or (E, N, .) each -> (E, N, outputs).

        [c, y] W is computed as c W_c + y W_y: Euler steps share c (s, or s and a), so the compiler takes c W_c once.
        """
        parts = self.weights[0].split([x.shape[-1] for x in inputs], dim=-2)
        x = sum(x @ part for x, part in zip(inputs, parts)) + self.biases[0]
        for i in range(1, len(self.weights)):
            x = gelu(x)
            if self.layer_norm:
                x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * self.scales[i - 1] + self.shifts[i - 1]
            x = x @ self.weights[i] + self.biases[i]
        return x


def gelu(x):
    """GELU in its tanh form, x (1 + tanh u) / 2 = x sigmoid(2u); compiled as the latter: CPUs compute tanh slowly."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))  # sigmoid(2u)


def aggregate(x, how):
    """Mean or minimum over the ensemble: (E, N) -> (N,)."""
    return x.mean(dim=0) if how == "mean" else x.amin(dim=0)


def euler(velocity, x, num_steps):
    """Carries x from t = 0 to 1 along velocity(x, t): x_{k+1} = x_k + v(x_k, k / K) / K."""
    for k in range(num_steps):
        x = x + velocity(x, k / num_steps) / num_steps
    return x


def hl_gauss(z, edges, sigma):
    """HL-Gauss embedding: the mass that a Gaussian around z, truncated to the edges' range, has in each bin.

    p_i = [erf((b_{i+1} - z) / (sqrt2 sigma w)) - erf((b_i - z) / (sqrt2 sigma w))] / (the same over the whole range)

    z (..., 1), edges b (bins + 1,) spaced by w, sigma in bin widths -> (..., bins): at least 0, with sum 1, or all 0
    where z is so far outside that the whole range has no mass.
    """
    mass = torch.erf((edges - z) / (math.sqrt(2) * sigma * (edges[1] - edges[0]))).diff(dim=-1)  # (..., bins)
    total = mass.sum(dim=-1, keepdim=True)
    return mass / torch.where(total > 0, total, 1.0)


class ValueFlow(nn.Module):
    """Velocities v_e(z, t | s, a) of the value flow, e = 1..E, from inputs [s, a, emb(z), emb(t)].

    `condition_dim` is the dimension of (s, a); [q_min, q_max] is the range of the histogram that embeds z.
    """

    def __init__(self, args, condition_dim, q_min, q_max):
        super().__init__()
        self.args = args
        z_dim = args.num_bins - 1 if args.use_prob_embed else 1
        t_dim = 1 if args.time_embedding == "cos" else 64
        dims = (condition_dim + z_dim + t_dim, *[args.block_width] * args.block_depth, 1)
        self.mlp = MLP(dims, args.layer_norm, (args.flow_num_ensembles,))
        # Not persistent: both are functions of the arguments and the data's rewards.
        self.register_buffer("edges", torch.linspace(q_min, q_max, args.num_bins), persistent=False)
        self.register_buffer("frequencies", math.pi * torch.arange(1, 65), persistent=False)

    def forward(self, observations, actions, z, t):
        """(N, D), (N, A), z (N, 1) or (E, N, 1), t (N, 1) or a float -> (E, N, 1)."""
        t = t.expand_as(z) if torch.is_tensor(t) else torch.full_like(z, t)
        if self.args.use_prob_embed:
            z_embedding = hl_gauss(z, self.edges, self.args.sigma)  # (..., N, bins)
        else:
            z_embedding = (z - self.edges[0]) / (self.edges[-1] - self.edges[0])
        t_embedding = torch.cos(t if self.args.time_embedding == "cos" else t * self.frequencies)
        return self.mlp(torch.cat([observations, actions], dim=-1), torch.cat([z_embedding, t_embedding], dim=-1))


# --- Agent ---


class Agent(nn.Module):
    """One floq agent; common/stacked.py runs one per seed.

    Args:
        args: see Args.
        obs_dim, action_dim: dimensions of observations and actions.
        min_reward, max_reward: the dataset's extreme rewards; r_min = min(min_reward, 0), r_max = max(max_reward, 0).
    """

    ACTS = ("actor_onestep_flow",)  # the networks that acting needs

    def __init__(self, args, obs_dim, action_dim, min_reward, max_reward):
        super().__init__()
        self.args, self.action_dim = args, action_dim
        horizon = 1 / (1 - args.gamma)
        min_reward, max_reward = min(min_reward, 0.0), max(max_reward, 0.0)  # the range holds 0, as released
        self.start_low, self.start_high = (args.noise_coverage * r * horizon for r in (min_reward, max_reward))
        q_min, q_max = (min_reward - args.reward_offset) * horizon, (max_reward + args.reward_offset) * horizon

        critic_dims = (obs_dim + action_dim, *args.value_hidden_dims, 1)  # inputs [s, a]
        bc_flow_dims = (obs_dim + action_dim + 1, *args.actor_hidden_dims, action_dim)  # inputs [s, x, t]
        onestep_dims = (obs_dim + action_dim, *args.actor_hidden_dims, action_dim)  # inputs [s, noise]
        self.critic_flow = ValueFlow(args, obs_dim + action_dim, q_min, q_max)
        self.critic = MLP(critic_dims, args.layer_norm, (args.distill_num_ensembles,))
        self.actor_bc_flow = MLP(bc_flow_dims, args.actor_layer_norm)
        self.actor_onestep_flow = MLP(onestep_dims, args.actor_layer_norm)
        self.target_critic_flow = copy.deepcopy(self.critic_flow).requires_grad_(False)

    def onestep_action(self, observations, noise):
        """mu(s, n), no flow in spite of the released name, unclipped as released: (N, D), (N, A) -> (N, A)."""
        return self.actor_onestep_flow(torch.cat([observations, noise], dim=-1))

    def bc_velocity(self, observations, x, t):
        """The cloning flow's velocity u(s, x, t): (N, D), (N, A), t (N, 1) or a float -> (N, A)."""
        t = t if torch.is_tensor(t) else torch.full_like(x[:, :1], t)
        return self.actor_bc_flow(observations, torch.cat([x, t], dim=-1))

    def start_noise(self, uniform):
        """z_0 in [l, u], from uniform numbers in [0, 1] of any shape."""
        return self.start_low + (self.start_high - self.start_low) * uniform

    def flow_q(self, flow, observations, actions, z_0):
        """End points of a value flow from z_0: (N, D), (N, A), (N, 1) -> (E, N)."""
        velocity = lambda z, t: flow(observations, actions, z, t)
        return euler(velocity, z_0, self.args.critic_flow_steps).squeeze(-1)

    def q_values(self, observations, actions):
        """The distilled critics D_e(s, a): (N, D), (N, A) -> (E, N)."""
        return self.critic(torch.cat([observations, actions], dim=-1)).squeeze(-1)

    def critic_loss(self, batch, noise):
        """L_critic, and its parts for the log; trains the value flow and the distilled critics.

        Args:
            batch: observations, next_observations (B, D), actions (B, A), rewards (B,), masks (B,), 0 at a success.
            noise: an update's entries of draw_noise, (rows, dim).
        """
        args, m = self.args, self.args.noise_samples
        per_sample = lambda x: x.repeat_interleave(m, dim=0)  # (B, ...) -> (B*m, ...): m noise samples of each row
        observations, actions = per_sample(batch["observations"]), per_sample(batch["actions"])  # (B*m, D), (B*m, A)
        next_observations = per_sample(batch["next_observations"])  # (B*m, D)

        # 1. TD target y = r + gamma mask mean_i agg_e Q_e(s', a'_i). No gradient: it is the regression's fixed label.
        with torch.no_grad():
            next_actions = self.onestep_action(next_observations, noise["next_action"]).clamp(-1, 1)  # (B*m, A)
            next_z_0 = self.start_noise(noise["next_start"])  # (B*m, 1)
            next_q = self.flow_q(self.target_critic_flow, next_observations, next_actions, next_z_0)  # (E, B*m)
            next_q = aggregate(next_q, args.q_agg).view(-1, m).mean(dim=1)  # (B,)
            target = batch["rewards"] + args.gamma * batch["masks"] * next_q  # (B,)

        # 2. Flow matching from z_0 ~ U[l, u] to y: v(z_t, t) -> y - z_0. As released, summed over the m samples.
        z_0 = self.start_noise(noise["start"])  # (B*m, 1)
        z_1 = per_sample(target).unsqueeze(-1)  # (B*m, 1)
        t = torch.zeros_like(z_0) if args.train_at_zero_only else noise["time"]  # (B*m, 1)
        z_t = (1 - t) * z_0 + t * z_1  # (B*m, 1)
        velocity = self.critic_flow(observations, actions, z_t, t)  # (E, B*m, 1)
        floq_loss = m * (velocity - (z_1 - z_0)).square().mean()

        # 3. Distillation of the flow's end point into the distilled critic. No gradient to the flow: it is the teacher.
        with torch.no_grad():
            end_points = self.flow_q(self.critic_flow, observations, actions, z_0)  # (E, B*m)
            flow_q = end_points.mean(dim=0).view(-1, m).mean(dim=1)  # (B,)
        q = self.q_values(batch["observations"], batch["actions"])  # (E, B)
        distilled_critic_loss = (q - flow_q).square().mean()

        critic_loss = floq_loss + distilled_critic_loss
        return critic_loss, {
            "critic/critic_loss": critic_loss,
            "critic/floq_loss": floq_loss,
            "critic/distilled_critic_loss": distilled_critic_loss,
            "critic/td_error": (flow_q - target).square().mean(),
            "critic/q_mean": q.mean(),
            "critic/target_mean": target.mean(),
        }

    def actor_loss(self, batch, noise):
        """L_actor, and its parts for the log; trains both policies. Arguments as for critic_loss."""
        args, observations, actions = self.args, batch["observations"], batch["actions"]

        # 1. Behaviour cloning by flow matching: u(s, x_t, t) -> a - x_0.
        x_0, t = noise["bc_action"], noise["bc_time"]  # (B, A), (B, 1)
        x_t = (1 - t) * x_0 + t * actions  # (B, A)
        bc_flow_loss = (self.bc_velocity(observations, x_t, t) - (actions - x_0)).square().mean()

        # 2. Distillation: mu(s, n) -> the cloning flow's action from the same n. No gradient to the flow: the teacher.
        with torch.no_grad():
            velocity = lambda x, t: self.bc_velocity(observations, x, t)
            flow_actions = euler(velocity, noise["distill"], args.actor_flow_steps).clamp(-1, 1)  # (B, A)
        policy_actions = self.onestep_action(observations, noise["distill"])  # (B, A)
        distill_loss = (policy_actions - flow_actions).square().mean()

        # 3. Policy improvement: maximise Q(s, mu(s, n)), with the critic a constant (see `trains` in update).
        q = self.q_values(observations, policy_actions.clamp(-1, 1)).mean(dim=0)  # (B,)
        q_loss = -q.mean()
        if args.normalize_q_loss:
            q_loss = q_loss / q.abs().mean().detach()  # a scale, not something to optimise

        actor_loss = bc_flow_loss + args.alpha * distill_loss + q_loss
        return actor_loss, {
            "actor/actor_loss": actor_loss,
            "actor/bc_flow_loss": bc_flow_loss,
            "actor/distill_loss": distill_loss,
            "actor/q_loss": q_loss,
        }

    def act(self, observations, noise):
        """The stochastic policy's action, clip(mu(s, n), -1, 1): (N, D), (N, A) -> (N, A)."""
        return self.onestep_action(observations, noise).clamp(-1, 1)

    def draw_noise(self, generator, num_updates):
        """Random numbers of `num_updates` updates, named after what they become: {name: (num_updates, rows, dim)}."""
        B, A, m = self.args.batch_size, self.action_dim, self.args.noise_samples
        device = generator.device
        normal = lambda *shape: torch.randn(num_updates, *shape, generator=generator, device=device)
        uniform = lambda *shape: torch.rand(num_updates, *shape, generator=generator, device=device)
        return {
            "next_action": normal(B * m, A),
            "next_start": uniform(B * m, 1),
            "start": uniform(B * m, 1),
            "time": uniform(B * m, 1),
            "bc_action": normal(B, A),
            "bc_time": uniform(B, 1),
            "distill": normal(B, A),
        }

    def draw_act_noise(self, generator, num_steps):
        """The random numbers of `num_steps` actions: (num_steps, A)."""
        return torch.randn(num_steps, self.action_dim, generator=generator, device=generator.device)


def update(agents, batch, noise):
    """One update of every seed; returns the losses at the weights before it, {name: one per seed}.

    Batch and noise are those of Agent.critic_loss with a leading axis of seeds. A loss moves the networks that `trains`
    names; to it, all others are constants (see common/stacked.py, also for `agents`).
    """
    agents.optimizer.zero_grad()
    with agents.side_by_side():  # neither loss waits for the other
        metrics = agents.backward("critic_loss", batch, noise, trains=("critic_flow", "critic"))
        metrics |= agents.backward("actor_loss", batch, noise, trains=("actor_bc_flow", "actor_onestep_flow"))

    # As released, the EMA comes before Adam's step: the targets lag by one update.
    agents.ema("target_critic_flow", "critic_flow", agents.agent.args.tau)
    agents.optimizer.step()
    return metrics


# --- Main program ---


def parse_args(words=None):
    """The arguments of a command line (None: this program's), and the checkpoint to continue from, or None."""
    args, resumed = arguments.parse(Args, TUNED, TUNED_ONLINE, QUICK, INFERENCE, words=words)
    above_zero = "noise_samples critic_flow_steps actor_flow_steps flow_num_ensembles distill_num_ensembles num_bins"
    above_zero += " sigma block_width block_depth value_hidden_dims actor_hidden_dims"
    arguments.check_numbers(args, above_zero.split(), at_least_zero=("alpha", "noise_coverage", "reward_offset"))
    if args.num_bins < 2:
        fail(f"--num-bins {args.num_bins}: a histogram needs at least 2 edges")
    if args.train_at_zero_only and args.critic_flow_steps > 1:
        warn(f"--train-at-zero-only: of --critic-flow-steps {args.critic_flow_steps} only step 1 is trained")
    if envs.is_pixels(args.env_id):
        fail(f"--env-id {args.env_id}: floq.py works on state observations, as its paper does")
    return args, resumed


def load(directory, seed=None):
    """The policy of a run directory or an exported folder: `load(DIR).act(observation)`; see common/policies.py."""
    return policies.load(Agent, Args, directory, seed)


if __name__ == "__main__":
    args, resumed = parse_args()
    device = setup_torch(args)
    seeds = list(range(args.seed, args.seed + args.num_seeds))

    if args.evaluate is not None:
        raise SystemExit(policies.evaluate(Agent, args, resumed, INFERENCE, device))

    # --- Data ---
    dataset, identity = datasets.load(args, device)
    log = Log(args, resumed, device, identity)

    # --- Agents, one per seed ---
    replay = Replay(dataset, args.num_seeds, args.online_timesteps)
    agent_inputs = replay.agent_inputs()  # dimensions and extreme rewards
    agents = Stacked(lambda: Agent(args, **agent_inputs), seeds, device, args.learning_rate)
    if resumed is not None:
        agents.load_state_dict(resumed)
        replay.restore(resumed.pop("replay"), count=max(0, resumed["step"] - args.total_timesteps))

    # --- Training: offline, then online ---
    one_update = lambda draws: update(agents, *replay.inputs(draws))  # the batch, and noise
    fast_update = graphs.FastUpdate(agents, one_update, args.compile, args.cudagraphs)  # torch.compile, CUDA graphs
    draw = Draws(agents.agent, args, seeds, len(dataset["rewards"]), device)  # every random number of an update
    act, draw_act_noise = graphs.FastPolicy(agents, "act", args.cudagraphs), agents.agent.draw_act_noise
    evaluator = rollout.Evaluator(args, seeds, device, log.run_dir)  # episodes in worker processes
    explorer = rollout.Explorer(args, seeds, device)  # online: one environment per seed
    stop = StopRequest()  # true after SIGTERM or Ctrl-C
    step, evaluated = (resumed["step"], resumed["evaluated"]) if resumed is not None else (0, 0)
    saved, last_step = step, args.total_timesteps + args.online_timesteps

    def save():
        """Saves all that a resumed run needs; random numbers are functions of the seed and the step."""
        progress = {"step": step, "evaluated": evaluated, "replay": replay.state(), "agent_inputs": agent_inputs}
        checkpoint.save(log.run_dir, log.state() | agents.state_dict() | progress)  # log.state() refuses NaN and inf

    while True:
        # Evaluate after the first update, every eval_interval, and after the last of each phase.
        evaluation_due = step in (1, args.total_timesteps, last_step) or step % args.eval_interval == 0
        evaluation_due = evaluation_due and step > evaluated

        # Save every save_interval, at the end, when stopped, and before an evaluation, which may fail.
        if step > saved and (evaluation_due or stop or step % args.save_interval == 0 or step == last_step):
            save()
            saved = step
        if evaluation_due:
            rows = evaluator(act, draw_act_noise, step, stop)
            log.evaluation(rows, phase="offline" if step <= args.total_timesteps else "online")
            evaluated = evaluated if rows is None else step  # None: a signal came; evaluated again after --resume
        if stop and saved == step:
            stop.leave(log.run_dir, step)
        if step == last_step:
            break

        # One update; in the online phase, one environment step of every seed before it.
        online = step >= args.total_timesteps
        draws = draw(step, online)
        if online:
            transitions = explorer(act, draws.pop("act"), step, on_failure=save)
            draws["count"] = replay.append(transitions)
        metrics = fast_update(draws)
        step += 1
        log.training(step, metrics, warm_up=fast_update.new)

    log.close()
    export.write_run(log.run_dir, Agent)
