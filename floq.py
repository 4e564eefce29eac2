"""floq: Q-functions as flows (Agrawalla et al. 2025, arXiv 2509.06863), on OGBench.

The idea: Q(s,a) is the end point of a scalar flow. A velocity network v(z,t|s,a) carries a noise z_0 ~ U[l,u] to the
value z_1 in K Euler steps, so that a small network is applied K times in a row: iterative compute, as depth is for
language models. It is trained by flow matching towards the TD target y = r + gamma E[Q(s',a')], whose own flow runs
with an EMA copy. A plain critic is distilled from the flow; it gives the policy its gradient. The policy is FQL's: a
behaviour-cloning flow, distilled into a one-step policy that maximises the critic.

    python floq.py --quick                                            # minutes on two CPU cores, data included
    python floq.py --env-id cube-single-play-singletask-v0            # the published hyperparameters
    python floq.py --env-id puzzle-3x3-play-singletask-v0 --num-seeds 8 --track    # eight seeds in one process

Notation in the shapes: S seeds, E ensemble members, B batch, m noise samples, N rows, A action dimension, H width.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import arguments, checkpoint, datasets, envs, fail, graphs, rollout, runs, warn
from common.device import setup_torch
from common.draws import Draws
from common.replay import Replay


# --- Arguments ---


@dataclass
class Args:
    # General
    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the run directory's name"""
    seed: int = 0
    """first seed"""
    num_seeds: int = 1
    """independent agents trained side by side, with seeds seed, seed + 1, ..."""
    torch_deterministic: bool = True
    """use deterministic algorithms only, so that the same command gives the same numbers"""
    cuda: bool = True
    """train on the GPU; without one, on the CPU with a warning"""
    track: bool = False
    """also log to Weights & Biases, one run a seed"""
    wandb_project_name: str = "cleanflow"
    """Weights & Biases project"""
    wandb_entity: Optional[str] = None
    """Weights & Biases team or user (default: yours)"""
    capture_video: bool = False
    """save a video of each seed's first evaluation episode (needs OpenGL)"""
    runs_dir: str = "runs"
    """directory that run directories are made in"""
    resume: Optional[str] = None
    """run directory to continue; its arguments apply"""
    quick: bool = False
    """the whole pipeline small (see QUICK): generated data, small networks, minutes on two CPU cores"""

    # Data and evaluation
    env_id: str = "cube-single-play-singletask-v0"
    """OGBench single-task environment with its dataset type"""
    dataset_dir: str = "~/.ogbench/data"
    """directory of the dataset files"""
    dataset_path: Optional[str] = None
    """this dataset file instead of one in dataset_dir"""
    dataset_source: Literal["official", "generated"] = "official"
    """official: OGBench's file, downloaded if missing; generated: made here with OGBench's scripted collectors"""
    generated_episodes: Optional[int] = None
    """episodes of a generated dataset (default: as many as the official one has)"""
    success_timing: Literal["post", "pre"] = "post"
    """judge success after the action (published scores) or before it (ogbench >= 1.2.0's default)"""
    total_timesteps: int = 2_000_000
    """gradient updates of the offline phase (published: 2M, or 1M before an online phase of 2M)"""
    online_timesteps: int = 0
    """environment steps of the online phase, with an update each (0: none)"""
    eval_interval: int = 100_000
    """updates between evaluations; there is one after the first and after the last update of each phase too"""
    eval_episodes: int = 50
    """episodes an evaluation, for each seed"""
    eval_workers: int = 0
    """processes that step environments (0: one a core, at most 16)"""
    log_interval: int = 5_000
    """updates between rows of train.csv"""
    save_interval: int = 50_000
    """updates between checkpoints"""

    # Algorithm
    batch_size: int = 256
    """transitions a batch B, for each seed"""
    learning_rate: float = 3e-4
    """Adam's learning rate"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """EMA rate of the target velocity network"""
    alpha: float = 10.0
    """weight of the distillation towards the behaviour-cloning flow"""
    noise_samples: int = 8
    """noise samples m a transition in the critic loss"""
    critic_flow_steps: int = 8
    """Euler steps K of the value flow"""
    actor_flow_steps: int = 10
    """Euler steps of the behaviour-cloning flow"""
    noise_coverage: float = 0.1
    """kappa: the start noise covers [l, u] = kappa * [r_min, r_max] / (1 - gamma)"""
    q_agg: Literal["mean", "min"] = "mean"
    """aggregation of the target flows over the ensemble"""
    normalize_q_loss: bool = False
    """divide the policy's Q term by the mean absolute Q"""
    train_at_zero_only: bool = False
    """train the velocity at t = 0 only (use with critic_flow_steps 1: a single-pass critic)"""
    flow_num_ensembles: int = 2
    """velocity networks"""
    distill_num_ensembles: int = 2
    """distilled critics"""
    use_prob_embed: bool = True
    """embed z as an HL-Gauss histogram before the velocity network, instead of scaling its range to [0, 1]"""
    num_bins: int = 51
    """edges of that histogram"""
    sigma: float = 16.0
    """its Gaussian's deviation, in bin widths"""
    reward_offset: float = 0.01
    """widening of its range: [r_min - offset, r_max + offset] / (1 - gamma)"""
    time_embedding: Literal["cos", "fourier"] = "cos"
    """of the velocity network's time: cos(t) (released code) or cos(pi i t), i = 1..64 (paper)"""
    block_width: int = 512
    """hidden width of the velocity network"""
    block_depth: int = 4
    """hidden layers of the velocity network (with use_resnets: layers of each residual block)"""
    use_resnets: bool = False
    """velocity network with residual blocks"""
    num_transformations: int = 2
    """residual blocks (with use_resnets)"""
    layer_norm: bool = True
    """layer normalisation in the velocity network and the distilled critic"""
    value_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)
    """hidden widths of the distilled critic"""
    actor_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)
    """hidden widths of both policies"""
    actor_layer_norm: bool = False
    """layer normalisation in both policies"""

    # Speed
    compile: bool = True
    """compile the losses with torch.compile (up to two minutes when a size is new to the machine, then faster updates)"""
    cudagraphs: bool = True
    """replay the whole update as one CUDA graph (on a GPU)"""
    matmul_precision: Optional[Literal["highest", "high", "medium"]] = None
    """float32 products: highest is exact, high TF32, medium a CPU's bfloat16 (default: high on a GPU that has it, else highest)"""


# The paper's settings where they differ from the defaults (its best configuration for each environment).
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

# What --quick changes.
QUICK = dict(
    exp_name=f"{Path(__file__).stem}-quick",
    cuda=False,
    env_id="cube-single-noisy-singletask-v0",
    dataset_source="generated",
    generated_episodes=120,
    total_timesteps=16_000,
    eval_interval=4_000,
    log_interval=500,
    save_interval=2_000,
    alpha=100.0,
    tau=0.01,
    noise_samples=2,
    critic_flow_steps=4,
    actor_flow_steps=5,
    block_width=256,
    block_depth=2,
    value_hidden_dims=(256, 256, 256),
    actor_hidden_dims=(256, 256, 256),
)


def parse_args(words=None):
    """The arguments of a command line (None: this program's), and the checkpoint to continue from, or None."""
    args, resumed = arguments.parse(
        Args, TUNED, TUNED_ONLINE, QUICK, may_be_zero=("alpha", "noise_coverage", "reward_offset"), words=words
    )
    if args.num_bins < 2:
        fail(f"--num-bins {args.num_bins}: a histogram needs at least 2 edges")
    if args.train_at_zero_only and args.critic_flow_steps > 1:
        warn(
            f"--train-at-zero-only with --critic-flow-steps {args.critic_flow_steps}: only step 1 has a trained velocity"
        )
    if envs.is_pixels(args.env_id):
        fail(f"--env-id {args.env_id}: floq.py works on state observations, as its paper does")
    return args, resumed


# --- Networks ---


class MLP(nn.Module):
    """A stack of independent networks: Linear -> GELU (tanh) -> LayerNorm for each hidden layer, then Linear.

    Args:
        stack: leading axes of every weight, (S,) for policies and (S, E) for ensembles of critics.
        dims: (inputs, hidden widths..., outputs).
        layer_norm: whether hidden layers end with LayerNorm (eps 1e-6).
    """

    def __init__(self, stack, dims, layer_norm):
        super().__init__()
        self.layer_norm = layer_norm
        pairs = list(zip(dims[:-1], dims[1:]))
        self.weights = nn.ParameterList(torch.empty(*stack, i, o) for i, o in pairs)
        self.biases = nn.ParameterList(torch.zeros(*stack, 1, o) for _, o in pairs)
        norms = dims[1:-1] if layer_norm else []
        self.scales = nn.ParameterList(torch.ones(*stack, 1, h) for h in norms)
        self.shifts = nn.ParameterList(torch.zeros(*stack, 1, h) for h in norms)

    def layers(self, detach=False, fold=True):
        """[(weight, bias)] of every layer; a LayerNorm's scale and shift are folded into the layer after it:
        (norm(h) * scale + shift) W + b = norm(h) (scale W) + (shift W + b). `detach` stops gradients to the weights.
        """
        layers = list(zip(self.weights, self.biases))
        for i, (scale, shift) in enumerate(zip(self.scales, self.shifts) if fold else (), start=1):
            weight, bias = layers[i]
            layers[i] = (scale.mT * weight, linear(shift, weight, bias))
        return [(weight.detach(), bias.detach()) for weight, bias in layers] if detach else layers

    def hidden(self, x, norm=None):
        """What follows a hidden layer's linear part: GELU, then LayerNorm; its scale and shift only if not folded,
        for which `norm` names it.
        """
        x = gelu(x)
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6) if self.layer_norm else x
        return x if norm is None or not self.layer_norm else torch.addcmul(self.shifts[norm], x, self.scales[norm])

    def forward(self, x, detach=False):
        """(*stack, N, inputs) -> (*stack, N, outputs)."""
        *layers, last = self.layers(detach)
        for weight, bias in layers:
            x = self.hidden(linear(x, weight, bias))
        return linear(x, *last)


def linear(x, weight, bias):
    """x W + b for every index of the leading axes: (..., N, I), (..., I, O), (..., 1 or N, O) -> (..., N, O)."""
    out = torch.bmm(x.flatten(0, -3), weight.flatten(0, -3)).add_(bias.flatten(0, -3))
    return out.unflatten(0, x.shape[:-2])


def gelu(x):
    """GELU in its tanh form, (1 + tanh(u)) x / 2; compiled as sigmoid(2u) x, the same, since CPUs compute tanh slowly."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))


def to_ensemble(x, num_ensembles):
    """(S, N, D) -> (S, E, N, D): every member of an ensemble sees the same rows."""
    return x.unsqueeze(1).expand(-1, num_ensembles, -1, -1)


class Velocity(nn.Module):
    """The value flow's velocity networks v_e(z, t | s, a), e = 1..E; each carries its own z.

    Inputs [s, a, emb(z), emb(t)], a scalar out. With `use_resnets`: Linear-GELU-norm, then residual blocks.
    """

    def __init__(self, args, stack, condition_dim, q_min, q_max):
        super().__init__()
        self.use_prob_embed, self.time_embedding = args.use_prob_embed, args.time_embedding
        self.use_resnets = args.use_resnets
        self.condition_dim, self.sigma, self.block_depth = condition_dim, args.sigma, args.block_depth
        z_dim = args.num_bins - 1 if args.use_prob_embed else 1
        t_dim = 1 if args.time_embedding == "cos" else 64
        hidden = 1 + args.num_transformations * args.block_depth if args.use_resnets else args.block_depth
        self.mlp = MLP(stack, (condition_dim + z_dim + t_dim, *[args.block_width] * hidden, 1), args.layer_norm)
        self.register_buffer("edges", torch.linspace(q_min, q_max, args.num_bins), persistent=False)
        self.register_buffer("frequencies", math.pi * torch.arange(1, 65), persistent=False)

    def embed(self, z, t):
        """[emb(z), emb(t)]: (..., N, 1) and t of the same shape or a float -> (..., N, z_dim + t_dim)."""
        t = t if torch.is_tensor(t) else torch.full_like(z, t)
        if self.use_prob_embed:
            z_embedding = hl_gauss(z, self.edges, self.sigma)
        else:
            z_embedding = (z - self.edges[0]) / (self.edges[-1] - self.edges[0])
        t_embedding = torch.cos(t if self.time_embedding == "cos" else t * self.frequencies)
        return torch.cat([z_embedding, t_embedding], dim=-1)

    def field(self, observations, actions, repeats=1):
        """The field v(., . | s, a) as a function of (z, t); what does not depend on them is computed once, here.

        Args:
            observations, actions: (S, N, D), (S, N, A).
            repeats: adjacent copies of each row, for several z of one (s, a).

        Returns:
            velocity(z, t): (S, E, N * repeats, 1), and t of the same shape or a float -> (S, E, N * repeats, 1).
        """
        layers = self.mlp.layers(fold=not self.use_resnets)
        (weight, bias), *blocks = layers[:-1]
        weight_sa, weight_zt = weight[..., : self.condition_dim, :], weight[..., self.condition_dim :, :]
        condition = to_ensemble(torch.cat([observations, actions], dim=-1), weight.shape[1])  # (S, E, N, D + A)
        base = linear(condition, weight_sa, bias).repeat_interleave(repeats, dim=-2)  # (S, E, N * repeats, H)

        def velocity(z, t):
            h = self.mlp.hidden(linear(self.embed(z, t), weight_zt, base))
            for weight, bias in blocks:
                h = self.mlp.hidden(linear(h, weight, bias))
            return linear(h, *layers[-1])

        def velocity_resnet(z, t):
            h = self.mlp.hidden(linear(self.embed(z, t), weight_zt, base), norm=0)
            for first in range(0, len(blocks), self.block_depth):
                block_input = h
                for i, (weight, bias) in enumerate(blocks[first : first + self.block_depth], start=first + 1):
                    h = self.mlp.hidden(linear(h, weight, bias), norm=i)
                h = block_input + h
            return linear(h, *layers[-1])

        return velocity_resnet if self.use_resnets else velocity


def hl_gauss(z, edges, sigma):
    """HL-Gauss embedding: the mass that a Gaussian around z, truncated to the edges' range, has in each bin.

    p_i = [erf((b_{i+1} - z) / (sqrt2 sigma w)) - erf((b_i - z) / (sqrt2 sigma w))] / (the same over the whole range)

    Args:
        z: (..., 1), any real numbers.
        edges: (bins + 1,), equally spaced by w.
        sigma: deviation in bin widths.

    Returns:
        (..., bins), non-negative with sum 1; zeros where z is so far outside that the whole range has no mass.
    """
    mass = torch.erf((edges - z) / (math.sqrt(2) * sigma * (edges[1] - edges[0]))).diff(dim=-1)  # (..., bins)
    total = mass.sum(dim=-1, keepdim=True)
    return mass / torch.where(total > 0, total, 1.0)


def init_weights(module, seeds):
    """Glorot-uniform weights, drawn on the CPU by each seed's own generator: the same alone, stacked and on a GPU."""
    for s, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in module.named_parameters():
            if ".weights." in name:
                bound = math.sqrt(6 / (parameter.shape[-2] + parameter.shape[-1]))
                draw = torch.rand(parameter.shape[1:], generator=generator)
                parameter.data[s] = (2 * draw - 1) * bound


def euler(velocity, x, num_steps):
    """Carries x from t = 0 to 1 along velocity(x, t): x_{k+1} = x_k + v(x_k, k / K) / K."""
    for k in range(num_steps):
        x = x + velocity(x, k / num_steps) / num_steps
    return x


# --- Agent ---


class Agent(nn.Module):
    """S independent floq agents.

    Args:
        args: see Args.
        obs_dim, action_dim: dimensions of observations and actions.
        seeds: the S seeds of the initial weights.
        min_reward, max_reward: the dataset's extreme rewards; with 0, which belongs to them as in the released code, they fix
            the value flow's ranges.
    """

    def __init__(self, args, obs_dim, action_dim, seeds, min_reward, max_reward):
        super().__init__()
        self.args, self.action_dim = args, action_dim
        horizon = 1 / (1 - args.gamma)
        min_reward, max_reward = min(min_reward, 0.0), max(max_reward, 0.0)
        self.z_low, self.z_high = args.noise_coverage * min_reward * horizon, args.noise_coverage * max_reward * horizon
        q_min, q_max = (min_reward - args.reward_offset) * horizon, (max_reward + args.reward_offset) * horizon

        S = len(seeds)
        policy_dims = (obs_dim + action_dim, *args.actor_hidden_dims, action_dim)
        bc_flow_dims = (obs_dim + action_dim + 1, *args.actor_hidden_dims, action_dim)
        critic_dims = (obs_dim + action_dim, *args.value_hidden_dims, 1)
        self.floq = Velocity(args, (S, args.flow_num_ensembles), obs_dim + action_dim, q_min, q_max)
        self.critic = MLP((S, args.distill_num_ensembles), critic_dims, args.layer_norm)
        self.actor_bc_flow = MLP((S,), bc_flow_dims, args.actor_layer_norm)
        self.actor_onestep_flow = MLP((S,), policy_dims, args.actor_layer_norm)
        init_weights(self, seeds)
        self.target_floq = Velocity(args, (S, args.flow_num_ensembles), obs_dim + action_dim, q_min, q_max)
        self.target_floq.load_state_dict(self.floq.state_dict())
        self.target_floq.requires_grad_(False)

    def make_optimizer(self):
        """One Adam over all networks (Adam is elementwise, so several would be the same)."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        on_gpu = parameters[0].is_cuda
        self.optimizer = torch.optim.Adam(
            parameters, lr=self.args.learning_rate, eps=1e-8, fused=True, capturable=on_gpu
        )
        for p in parameters:  # Adam makes its state in the first step, which a CUDA graph would repeat
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.optimizer.state[p] = {"step": torch.zeros((), device=p.device)} | moments

    def state_tensors(self):
        """Every tensor that an update changes."""
        adam = [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        return [*self.parameters(), *adam]

    def draw_noise(self, generator, num_updates):
        """Every random number of `num_updates` updates of one seed: {name: (num_updates, rows, dim)}."""
        B, A, m = self.args.batch_size, self.action_dim, self.args.noise_samples
        device = generator.device
        normal = lambda *shape: torch.randn(num_updates, *shape, generator=generator, device=device)
        uniform = lambda *shape: torch.rand(num_updates, *shape, generator=generator, device=device)
        return {
            "next_action": normal(B * m, A),
            "next_return_ratio": uniform(B * m, 1),
            "return_ratio": uniform(B * m, 1),
            "time": uniform(B * m, 1),
            "bc_action": normal(B, A),
            "bc_time": uniform(B, 1),
            "distill": normal(B, A),
        }

    def draw_act_noise(self, generator, num_steps):
        """The random numbers of `num_steps` actions of one seed: (num_steps, A)."""
        return torch.randn(num_steps, self.action_dim, generator=generator, device=generator.device)

    def onestep_action(self, observations, noise):
        """mu(s, n), unclipped: (S, N, D), (S, N, A) -> (S, N, A)."""
        return self.actor_onestep_flow(torch.cat([observations, noise], dim=-1))

    def bc_velocity(self, observations, x, t):
        """u(s, x, t): (S, N, D), (S, N, A), (S, N, 1) -> (S, N, A)."""
        return self.actor_bc_flow(torch.cat([observations, x, t], dim=-1))

    def critic_loss(self, batch, noise):
        """L_critic of every seed (S,), and its parts for the log.

        Args:
            batch: observations, next_observations (S, B, D), actions (S, B, A), rewards, masks (S, B).
            noise: see draw_noise, without the first axis and with a seed axis: (S, rows, dim).
        """
        args, m, E = self.args, self.args.noise_samples, self.args.flow_num_ensembles
        observations, actions = batch["observations"], batch["actions"]

        # 1. TD target y = r + gamma mask mean_i Q(s', a'_i). No gradient: it is the regression's fixed label.
        with torch.no_grad():
            next_observations = batch["next_observations"].repeat_interleave(m, dim=1)  # (S, B*m, D)
            next_actions = self.onestep_action(next_observations, noise["next_action"]).clamp(-1, 1)  # (S, B*m, A)
            next_z = self.z_low + (self.z_high - self.z_low) * noise["next_return_ratio"]  # (S, B*m, 1)
            next_field = self.target_floq.field(next_observations, next_actions)
            next_z = euler(next_field, to_ensemble(next_z, E), args.critic_flow_steps)  # (S, E, B*m, 1)
            next_q = next_z.mean(dim=1) if args.q_agg == "mean" else next_z.amin(dim=1)  # (S, B*m, 1)
            next_q = next_q.unflatten(1, (-1, m)).mean(dim=(2, 3))  # (S, B)
            target = batch["rewards"] + args.gamma * batch["masks"] * next_q  # (S, B)

        # 2. Flow matching from z_0 ~ U[l, u] to y: v(z_t, t) -> y - z_0, summed over the noise samples.
        z_0 = self.z_low + (self.z_high - self.z_low) * noise["return_ratio"]  # (S, B*m, 1)
        z_1 = target.repeat_interleave(m, dim=1).unsqueeze(-1)  # (S, B*m, 1)
        t = torch.zeros_like(noise["time"]) if args.train_at_zero_only else noise["time"]  # (S, B*m, 1)
        z_t = (1 - t) * z_0 + t * z_1
        field = self.floq.field(observations, actions, repeats=m)
        velocity = field(to_ensemble(z_t, E), to_ensemble(t, E))  # (S, E, B*m, 1)
        errors = (velocity - to_ensemble(z_1 - z_0, E)).square().unflatten(2, (-1, m))  # (S, E, B, m, 1)
        floq_loss = errors.sum(dim=(3, 4)).mean(dim=(1, 2))  # (S,)

        # 3. Distillation of the flow's end point into a plain critic. No gradient to the flow: it is the teacher.
        with torch.no_grad():
            field = self.floq.field(observations, actions, repeats=m)
            flow_q = euler(field, to_ensemble(z_0, E), args.critic_flow_steps)  # (S, E, B*m, 1)
            flow_q = flow_q.unflatten(2, (-1, m)).mean(dim=(1, 3, 4))  # (S, B)
        q = self.q_values(observations, actions)  # (S, E, B)
        distilled_critic_loss = (q - flow_q.unsqueeze(1)).square().mean(dim=(1, 2))  # (S,)

        critic_loss = floq_loss + distilled_critic_loss
        return critic_loss, {
            "critic/critic_loss": critic_loss,
            "critic/floq_loss": floq_loss,
            "critic/distilled_critic_loss": distilled_critic_loss,
            "critic/td_error": (flow_q - target).square().mean(dim=1),
            "critic/q_mean": q.mean(dim=(1, 2)),
            "critic/target_mean": target.mean(dim=1),
        }

    def q_values(self, observations, actions, detach=False):
        """The distilled critics D_e(s, a): (S, N, D), (S, N, A) -> (S, E, N)."""
        inputs = to_ensemble(torch.cat([observations, actions], dim=-1), self.args.distill_num_ensembles)
        return self.critic(inputs, detach).squeeze(-1)

    def actor_loss(self, batch, noise):
        """L_actor of every seed (S,), and its parts for the log; arguments as for critic_loss."""
        args, observations, actions = self.args, batch["observations"], batch["actions"]

        # 1. Behaviour cloning by flow matching: u(s, x_t, t) -> a - x_0.
        x_0, t = noise["bc_action"], noise["bc_time"]  # (S, B, A), (S, B, 1)
        x_t = (1 - t) * x_0 + t * actions
        velocity = self.bc_velocity(observations, x_t, t)  # (S, B, A)
        bc_flow_loss = (velocity - (actions - x_0)).square().mean(dim=(1, 2))  # (S,)

        # 2. Distillation: mu(s, n) -> the cloning flow's action from the same n. No gradient to the flow: the teacher.
        with torch.no_grad():
            field = lambda x, t: self.bc_velocity(observations, x, torch.full_like(noise["bc_time"], t))
            flow_actions = euler(field, noise["distill"], args.actor_flow_steps).clamp(-1, 1)  # (S, B, A)
        policy_actions = self.onestep_action(observations, noise["distill"])  # (S, B, A)
        distill_loss = (policy_actions - flow_actions).square().mean(dim=(1, 2))  # (S,)

        # 3. Policy improvement: maximise Q(s, mu(s, n)). Detached critic weights: this loss moves the policy alone.
        q = self.q_values(observations, policy_actions.clamp(-1, 1), detach=True).mean(dim=1)  # (S, B)
        q_loss = -q.mean(dim=1)  # (S,)
        if args.normalize_q_loss:
            q_loss = q_loss / q.abs().mean(dim=1).detach()  # a scale, not something to optimise

        actor_loss = bc_flow_loss + args.alpha * distill_loss + q_loss
        return actor_loss, {
            "actor/actor_loss": actor_loss,
            "actor/bc_flow_loss": bc_flow_loss,
            "actor/distill_loss": distill_loss,
            "actor/q_loss": q_loss,
        }

    def update(self, batch, noise):
        """One update of every seed; returns the losses at the weights before it, {name: (S,)}."""
        self.optimizer.zero_grad()
        critic_loss, critic_metrics = self.critic_loss(batch, noise)
        critic_loss.sum().backward()
        actor_loss, actor_metrics = self.actor_loss(batch, noise)
        actor_loss.sum().backward()

        # The EMA comes before Adam's step, so that the targets lag by one update as in the released code.
        with torch.no_grad():
            targets, online = list(self.target_floq.parameters()), list(self.floq.parameters())
            torch._foreach_lerp_(targets, online, self.args.tau)
        self.optimizer.step()
        return {name: value.detach() for name, value in (critic_metrics | actor_metrics).items()}

    @torch.no_grad()
    def act(self, observations, noise):
        """The stochastic policy's action, clip(mu(s, n), -1, 1): (S, N, D), (S, N, A) -> (S, N, A)."""
        return self.onestep_action(observations, noise).clamp(-1, 1)


if __name__ == "__main__":
    args, resumed = parse_args()
    device = setup_torch(args)
    seeds = list(range(args.seed, args.seed + args.num_seeds))

    # --- Data ---
    dataset, identity = datasets.load(args, device)
    log = runs.Log(args, resumed, device, identity)

    # --- Agent ---
    rewards = dataset["rewards"]
    obs_dim, action_dim = dataset["observations"].shape[1], dataset["actions"].shape[1]
    agent = Agent(args, obs_dim, action_dim, seeds, rewards.min().item(), rewards.max().item()).to(device)
    agent.make_optimizer()
    replay = Replay(dataset, args.num_seeds, args.online_timesteps)
    if resumed is not None:
        agent.load_state_dict(resumed["agent"])
        checkpoint.restore_optimizer(agent.optimizer, resumed["optimizer"])
        replay.restore(resumed["replay"], count=max(0, resumed["step"] - args.total_timesteps))

    # --- Training: offline, then online ---
    update = graphs.FastUpdate(
        agent, lambda draws: agent.update(replay.batch(draws), draws), args.compile, args.cudagraphs
    )
    draw = Draws(agent, args, seeds, len(rewards), device)  # every random number of an update
    evaluator = rollout.Evaluator(args, seeds, device, log.run_dir)  # episodes in worker processes
    explorer = rollout.Explorer(args, seeds, device)  # online: one environment per seed
    stop = runs.StopRequest()  # true after SIGTERM or Ctrl-C
    step, evaluated = (resumed["step"], resumed["evaluated"]) if resumed is not None else (0, 0)
    saved, last_step = step, args.total_timesteps + args.online_timesteps

    def save():
        """Saves all that a resumed run needs; random numbers are functions of the seed and the step."""
        log.flush()  # stops at a non-finite loss
        state = {"agent": agent.state_dict(), "optimizer": agent.optimizer.state_dict(), "replay": replay.state()}
        progress = {"step": step, "evaluated": evaluated, "csv_sizes": runs.csv_sizes(log.run_dir)}
        origin = {"algorithm": arguments.algorithm(args), "args": asdict(args), "dataset": identity}
        checkpoint.save(log.run_dir, origin | progress | state)

    while True:
        # Evaluate after the first update, every eval_interval, and after the last of each phase.
        evaluation_due = step in (1, args.total_timesteps, last_step) or step % args.eval_interval == 0
        evaluation_due = evaluation_due and step > evaluated

        # Save every save_interval, at the end, when stopped, and before an evaluation, which may fail.
        if step > saved and (evaluation_due or stop or step % args.save_interval == 0 or step == last_step):
            save()
            saved = step
        if evaluation_due:
            rows = evaluator(agent.act, agent.draw_act_noise, step, stop)
            log.evaluation(rows, phase="offline" if step <= args.total_timesteps else "online")
            evaluated = evaluated if rows is None else step  # None: a signal came; evaluated again after --resume
        if stop:
            stop.leave(log.run_dir, step)
        if step == last_step:
            break

        # One update; in the online phase, one environment step of every seed before it.
        online = step >= args.total_timesteps
        draws = draw(step, online)
        if online:
            transitions = explorer(agent.act, draws.pop("act"), step, on_failure=save)
            draws["count"] = replay.append(transitions)
        metrics = update(draws)
        step += 1
        log.training(step, metrics, warm_up=update.new)

    evaluator.close()
    explorer.close()
    log.close()
