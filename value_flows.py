"""Value Flows: return distributions by flow matching (Dong et al. 2025, arXiv 2510.07650), on OGBench.

The idea: the return of (s,a) is a random variable, and its distribution is the end point of a scalar flow from N(0,1).
Two velocity networks v(z,t|s,a), the return fields, are trained by two kinds of flow matching. Bootstrapped (BCFM):
towards r + gamma G', where G' is a return of (s',a'). Distributional (DCFM): at the point r + gamma z', where z' is on
the way from noise to G', towards the target field's velocity at z'. The flow's derivative dz_1/dz_0 tells how much
returns spread; transitions with uncertain returns weigh more. One Euler step reads off Q. The policy draws 16 actions
from a cloning flow and takes the best; online, a one-step policy explores.

Read first: Agent.returns (the flow), Agent.critic_loss, Agent.actor_loss (what is learned), update (one step), then
the main program at the end. An agent is written for one seed; common/stacked.py runs several side by side.

    python value_flows.py --quick                                         # minutes on two CPU cores, data included
    python value_flows.py --env-id cube-double-play-singletask-task1-v0   # the published hyperparameters
    python value_flows.py --env-id scene-play-singletask-v0 --num-seeds 8 --online-timesteps 1000000  # then online

Notation in the shapes: E return fields, B batch, C candidate actions, R return samples, N rows, D observation
dimension, A action dimension, K Euler steps. "As released": as the authors' code does, whatever the paper says.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import arguments, checkpoint, datasets, envs, export, fail, graphs, pixels, policies, rollout
from common.device import setup_torch
from common.draws import Draws
from common.log import Log
from common.replay import Replay
from common.returns import cvar
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
    env_id: str = "cube-double-play-singletask-v0"  # OGBench single-task environment with its dataset type
    dataset_dir: str = "~/.ogbench/data"  # directory of the dataset files
    dataset_path: str | None = None  # this dataset file instead of one in dataset_dir
    dataset_source: Literal["official", "generated"] = "official"
    """OGBench's file, downloaded if missing, or one made here with OGBench's scripted collectors"""
    generated_episodes: int | None = None  # episodes of a generated dataset (default: as the official one)
    success_timing: Literal["post", "pre"] = "post"  # judge success after the action (published scores) or before it
    total_timesteps: int = 1_000_000  # gradient updates of the offline phase
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
    tau: float = 0.005  # EMA rate of the target return fields
    alpha: float = 10.0  # weight of the one-step policy's distillation towards the behaviour-cloning flow
    bcfm_lambda: float = 1.0  # weight of bootstrapped conditional flow matching (0: training diverges, says the paper)
    dcfm_lambda: float = 1.0  # weight of distributional conditional flow matching
    confidence_weight_temp: float = 0.3  # temperature of the confidence weights sigmoid(-temp / std) + 0.5
    num_samples: int = 16  # candidate actions C of rejection sampling (1: pure behaviour cloning)
    cvar_level: float = 1.0  # act by the mean of this lowest share of returns (1: by Q, as released); not in training
    eval_policy: Literal["act", "act_online"] | None = None  # what evaluations play (default: act_online once online)
    num_flow_steps: int = 10  # Euler steps K of every flow: returns and actions
    ret_agg: Literal["mean", "min"] = "mean"  # aggregation of target returns over the two fields
    q_agg: Literal["mean", "min"] = "mean"  # aggregation of Q-values and of deviations over the two fields
    clip_flow_returns: bool = True  # keep returns in [r_min, r_max] / (1 - gamma) after every Euler step
    clip_flow_actions: bool = True  # keep actions in [-1, 1] after every Euler step (they always end there)
    normalize_q_loss: bool = False  # divide the one-step policy's Q term by the mean absolute Q
    value_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)  # hidden widths of the return fields
    value_layer_norm: bool = True  # layer normalisation in the return fields
    actor_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)  # hidden widths of both policies
    actor_layer_norm: bool = True  # layer normalisation in both policies

    # Speed
    compile: bool = True  # compile the losses: up to two minutes at first, then faster updates
    cudagraphs: bool = True  # replay updates and policies as CUDA graphs (on a GPU)
    matmul_precision: Literal["highest", "high", "medium"] | None = None
    """float32 products: highest (exact), high (TF32), medium (bfloat16); default: high where a GPU has TF32"""


# The paper's settings, which replace Args' defaults; on pixels with the number of updates of FQL's paper.
TUNED = {
    "cube-double-play": dict(gamma=0.995, confidence_weight_temp=3.0),
    "cube-triple-play": dict(gamma=0.995, bcfm_lambda=3.0, confidence_weight_temp=0.03),
    "puzzle-3x3-play": dict(bcfm_lambda=0.5, ret_agg="min"),
    "puzzle-4x4-play": dict(bcfm_lambda=3.0, confidence_weight_temp=100.0, q_agg="min"),
    "scene-play": dict(ret_agg="min"),
    "visual-antmaze-medium-navigate": dict(total_timesteps=500_000, bcfm_lambda=0.3, confidence_weight_temp=0.03),
    "visual-antmaze-teleport-navigate": dict(total_timesteps=500_000, bcfm_lambda=0.3, confidence_weight_temp=0.03),
    "visual-cube-double-play": dict(total_timesteps=500_000, gamma=0.995),
    "visual-scene-play": dict(total_timesteps=500_000, ret_agg="min"),
    "visual-puzzle-3x3-play": dict(total_timesteps=500_000, bcfm_lambda=0.3, ret_agg="min"),
}

# What offline-to-online runs change further.
TUNED_ONLINE = {
    "antmaze-large-navigate": dict(bcfm_lambda=10.0, confidence_weight_temp=0.01, alpha=30.0, q_agg="min"),
    "humanoidmaze-medium-navigate": dict(gamma=0.995, bcfm_lambda=3.0, alpha=100.0, ret_agg="min", q_agg="min"),
    "cube-double-play": dict(alpha=300.0),
    "cube-triple-play": dict(alpha=300.0),
    "puzzle-4x4-play": dict(confidence_weight_temp=0.1, alpha=300.0),
    "scene-play": dict(alpha=300.0),
}

# What --evaluate may change.
INFERENCE = ("eval_policy", "num_samples", "num_flow_steps", "cvar_level")

# What --quick changes: data that are made here, and sizes that learn within minutes on two cores.
QUICK = dict(exp_name=f"{Path(__file__).stem}-quick", cuda=False, env_id="cube-single-noisy-singletask-v0")
QUICK |= dict(dataset_source="generated", generated_episodes=120)
QUICK |= dict(total_timesteps=8_000, eval_interval=2_000, log_interval=500, save_interval=2_000)
QUICK |= dict(tau=0.01, num_samples=8, num_flow_steps=5, value_hidden_dims=(256,) * 3, actor_hidden_dims=(256,) * 3)


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


class Network(nn.Module):
    """An MLP on encoded observations; the caller encodes, `network.encoder(s)`, once for all Euler steps of a flow.

    Args:
        obs_dim: dimension of observations; for images their shape (H, W, channels).
        dims: (further inputs, hidden widths..., outputs).
        layer_norm, ensemble: of the MLP; an ensemble shares its encoder.
    """

    def __init__(self, obs_dim, dims, layer_norm, ensemble=()):
        super().__init__()
        self.encoder = nn.Identity() if isinstance(obs_dim, int) else pixels.Encoder(obs_dim)
        features = obs_dim if isinstance(obs_dim, int) else pixels.Encoder.features
        self.mlp = MLP((features + dims[0], *dims[1:]), layer_norm, ensemble)

    def forward(self, condition, x, t):
        """Velocity of a flow at its state x (N, .) or (E, N, .) and time t (N, 1) or a float; see MLP.

        The condition (N, .) holds encoded observations, and of return fields actions too.
        """
        t = t.expand_as(x[..., :1]) if torch.is_tensor(t) else torch.full_like(x[..., :1], t)
        return self.mlp(condition, torch.cat([x, t], dim=-1))


def aggregate(x, how):
    """Mean or minimum over the ensemble: (E, N, 1) -> (N, 1)."""
    return x.mean(dim=0) if how == "mean" else x.amin(dim=0)


def confidence_weight(deviation, temp):
    """w = sigmoid(-temp / deviation) + 0.5, in [0.5, 1): the paper's name; higher where returns are uncertain."""
    return torch.sigmoid(-temp / deviation) + 0.5


# --- Agent ---


class Agent(nn.Module):
    """One Value Flows agent; common/stacked.py runs one per seed.

    Args:
        args: see Args.
        obs_dim, action_dim: dimensions of observations and actions; for images obs_dim is the shape (H, W, channels).
        min_reward, max_reward: the dataset's extreme rewards, which fix the range of returns.
    """

    ACTS = ("actor_flow", "critic_flow", "actor_onestep_flow")  # the networks that acting needs
    NUM_FIELDS = 2  # return fields E
    NUM_RETURNS = 64  # return samples R of a risk-averse choice

    def __init__(self, args, obs_dim, action_dim, min_reward, max_reward):
        super().__init__()
        self.args, self.action_dim, self.is_pixels = args, action_dim, not isinstance(obs_dim, int)
        horizon = 1 / (1 - args.gamma)
        self.z_min, self.z_max = min_reward * horizon, max_reward * horizon  # as released; floq.py's range holds 0

        critic_dims = (action_dim + 2, *args.value_hidden_dims, 1)  # inputs [s, a, z, t]
        bc_flow_dims = (action_dim + 1, *args.actor_hidden_dims, action_dim)  # inputs [s, x, t]
        onestep_dims = (action_dim, *args.actor_hidden_dims, action_dim)  # inputs [s, noise]
        self.critic_flow = Network(obs_dim, critic_dims, args.value_layer_norm, (self.NUM_FIELDS,))
        self.actor_flow = Network(obs_dim, bc_flow_dims, args.actor_layer_norm)
        self.actor_onestep_flow = Network(obs_dim, onestep_dims, args.actor_layer_norm)
        self.target_critic_flow = copy.deepcopy(self.critic_flow).requires_grad_(False)

    def onestep_action(self, observations, noise):
        """mu(s, n), no flow in spite of the released name, clipped as released: (N, D), (N, A) -> (N, A)."""
        return self.actor_onestep_flow.mlp(self.actor_onestep_flow.encoder(observations), noise).clamp(-1, 1)

    def flow_actions(self, observations, noise):
        """End points of the cloning flow: (N, D), (N, C, A) -> (N, C, A) in [-1, 1]."""
        K, C = self.args.num_flow_steps, noise.shape[1]
        states = self.actor_flow.encoder(observations).repeat_interleave(C, dim=0)  # (N*C, D)
        x = noise.flatten(0, 1)  # (N*C, A)
        for k in range(K):
            x = x + self.actor_flow(states, x, k / K) / K
            x = x.clamp(-1, 1) if self.args.clip_flow_actions else x
        return x.clamp(-1, 1).unflatten(0, (-1, C))

    def clip_return(self, z):
        """z kept in [r_min, r_max] / (1 - gamma)."""
        return z.clamp(self.z_min, self.z_max) if self.args.clip_flow_returns else z

    def returns(self, flow, condition, z, end_time):
        """Carries noise to returns, Phi(z; T): K Euler steps of T / K with self.critic_flow or its target as `flow`.

        Encoded observations and actions (N, D + A), start noise (N, 1), T in [0, 1], (N, 1) or a float -> (E, N, 1).
        """
        step = end_time / self.args.num_flow_steps
        for k in range(self.args.num_flow_steps):
            z = self.clip_return(z + step * flow(condition, z, k * step))  # (E, N, 1)
        return z

    def return_derivatives(self, flow, condition, z):
        """dPhi(z; 1)/dz by the flow derivative ODE dJ/dt = (dv/dz) J, J_0 = 1; clipping is not differentiated.

        Arguments as for returns, (E, N, 1) out. As v is elementwise in z, the pull-back of ones is dv/dz.
        """
        K = self.args.num_flow_steps
        z, J = z.expand(self.NUM_FIELDS, -1, -1), 1.0  # (E, N, 1): of one z for both the pull-back would be their sum
        for k in range(K):
            v, pull_back = torch.func.vjp(lambda z: flow(condition, z, k / K), z)  # (E, N, 1)
            (dv,) = pull_back(torch.ones_like(v))  # (E, N, 1)
            z, J = self.clip_return(z + v / K), J + dv * J / K
        return J

    def q_values(self, observations, actions, noise, cvar_level=1.0):
        """Q(s, a) = agg_e clip(z + v_e(z, 0 | s, a)): (N, D), (N, C, A), (N, C, 1) -> (N, C).

        One Euler step: BCFM's solution has z + v(z, 0) = E[return | z]. As released, from one z, its own per candidate.
        With a level below 1, the CVaR of R end points, from starts in equal steps of probability, alike for all.
        """
        C, R = noise.shape[1], self.NUM_RETURNS
        states = self.critic_flow.encoder(observations).repeat_interleave(C, dim=0)  # (N*C, D)
        condition = torch.cat([states, actions.flatten(0, 1)], dim=-1)  # (N*C, D + A)
        if cvar_level < 1:
            z = torch.special.ndtri((torch.arange(R, device=noise.device) + 0.5) / R).view(R, 1, 1, 1)
            returns = self.returns(self.critic_flow, condition, z, 1.0)  # (R, E, N*C, 1): the R starts broadcast
            return aggregate(cvar(returns, cvar_level), self.args.q_agg).view(-1, C)
        z = noise.flatten(0, 1)  # (N*C, 1)
        v = self.critic_flow(condition, z, 0.0)  # (E, N*C, 1)
        return aggregate(self.clip_return(z + v), self.args.q_agg).view(-1, C)

    def rejection_sampling(self, observations, action_noise, q_noise, cvar_level=1.0):
        """The best of C flow actions: (N, D), (N, C, A), (N, C, 1) -> (N, A)."""
        actions = self.flow_actions(observations, action_noise)  # (N, C, A)
        best = self.q_values(observations, actions, q_noise, cvar_level).argmax(dim=1)  # (N,)
        return actions.take_along_dim(best[:, None, None], dim=1).squeeze(1)

    def critic_loss(self, batch, noise):
        """L_critic, and its parts for the log; trains the return fields.

        Args:
            batch: observations, next_observations (B, D), actions (B, A), rewards (B,), masks (B,), 0 at a success.
            noise: an update's entries of draw_noise, (B, ...).
        """
        args, target = self.args, self.target_critic_flow
        observations, actions, next_observations = batch["observations"], batch["actions"], batch["next_observations"]
        rewards, masks = batch["rewards"].unsqueeze(-1), batch["masks"].unsqueeze(-1)  # (B, 1)
        t, eps = noise["time"], noise["return"]  # (B, 1)

        # No gradient through steps 1 to 3: they make the regression's fixed weights and labels.
        with torch.no_grad():
            # 1. The next action, by rejection sampling with the trained fields, not their targets, as released.
            action_noise, q_noise = noise["next_action_candidates"], noise["next_q"]  # (B, C, A), (B, C, 1)
            next_actions = self.rejection_sampling(next_observations, action_noise, q_noise)  # (B, A)

            # 2. Confidence weight w in [0.5, 1), from |dPhi/dz|: to first order the return's deviation, since z's is 1.
            condition = torch.cat([target.encoder(observations), actions], dim=-1)  # (B, D + A)
            derivatives = self.return_derivatives(target, condition, noise["confidence"])  # (E, B, 1)
            deviation = aggregate(derivatives.abs(), args.q_agg)  # (B, 1)
            weight = confidence_weight(deviation, args.confidence_weight_temp)  # (B, 1)

            # 3. Flows of (s', a') from eps: to time 1 for G' in BCFM's return G, to time t for DCFM's z' and label f.
            next_condition = torch.cat([target.encoder(next_observations), next_actions], dim=-1)  # (B, D + A)
            next_return = aggregate(self.returns(target, next_condition, eps, 1.0), args.ret_agg)  # (B, 1)
            bcfm_return = rewards + args.gamma * masks * next_return  # (B, 1)
            next_z = aggregate(self.returns(target, next_condition, eps, t), args.ret_agg)  # (B, 1)
            dcfm_label = aggregate(target(next_condition, next_z, t), args.ret_agg)  # (B, 1)

        # 4. Flow matching at two points of the same (s, a, t), as released summed over the fields.
        #    BCFM: v(t G + (1 - t) eps, t) -> G - eps. DCFM: v(r + gamma mask z', t) -> f, not d(r + gamma z')/dt.
        condition = torch.cat([self.critic_flow.encoder(observations), actions], dim=-1)  # (B, D + A)
        bcfm_velocity = self.critic_flow(condition, t * bcfm_return + (1 - t) * eps, t)  # (E, B, 1)
        dcfm_velocity = self.critic_flow(condition, rewards + args.gamma * masks * next_z, t)  # (E, B, 1)
        bcfm_loss = (bcfm_velocity - (bcfm_return - eps)).square().sum(dim=0)  # (B, 1)
        dcfm_loss = (dcfm_velocity - dcfm_label).square().sum(dim=0)  # (B, 1)
        critic_loss = (weight * (args.bcfm_lambda * bcfm_loss + args.dcfm_lambda * dcfm_loss)).mean()
        return critic_loss, {
            "critic/critic_loss": critic_loss,
            "critic/bcfm_loss": bcfm_loss.mean(),
            "critic/dcfm_loss": dcfm_loss.mean(),
            "critic/weight": weight.mean(),
            "critic/q_std": deviation.mean(),
            "critic/target_mean": bcfm_return.mean(),
        }

    def actor_loss(self, batch, noise):
        """L_actor, and its parts for the log; trains both policies in both phases. Arguments as for critic_loss."""
        args, observations, actions = self.args, batch["observations"], batch["actions"]

        # 1. Behaviour cloning by flow matching: u(s, x_t, t) -> a - x_0.
        x_0, t = noise["bc_action"], noise["bc_time"]  # (B, A), (B, 1)
        x_t = (1 - t) * x_0 + t * actions  # (B, A)
        velocity = self.actor_flow(self.actor_flow.encoder(observations), x_t, t)  # (B, A)
        bc_flow_loss = (velocity - (actions - x_0)).square().mean()

        # 2. Distillation: mu(s, n) -> the cloning flow's action from the same n. No gradient to the flow: the teacher.
        with torch.no_grad():
            flow_actions = self.flow_actions(observations, noise["distill"].unsqueeze(1)).squeeze(1)  # (B, A)
        policy_actions = self.onestep_action(observations, noise["distill"])  # (B, A)
        distill_loss = (policy_actions - flow_actions).square().mean()

        # 3. Policy improvement: maximise Q(s, mu(s, n)), with the critic a constant (see `trains` in update).
        q = self.q_values(observations, policy_actions.unsqueeze(1), noise["actor_q"].unsqueeze(1))  # (B, 1)
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
        """Rejection sampling, the offline phase's policy: (N, D), (N, C, A + 1) -> (N, A)."""
        return self.rejection_sampling(observations, noise[..., :-1], noise[..., -1:], self.args.cvar_level)

    def act_online(self, observations, noise):
        """The one-step policy, which explores and is evaluated in the online phase; arguments as for act."""
        return self.onestep_action(observations, noise[:, 0, :-1])

    def augment(self, batch, noise):
        """A batch of images, each row's observation and next observation shifted alike."""
        return batch | {name: pixels.crop(batch[name], noise["crop"]) for name in ("observations", "next_observations")}

    def draw_noise(self, generator, num_updates):
        """Random numbers of `num_updates` updates, named after what they become: {name: (num_updates, B, ...)}."""
        B, A, C = self.args.batch_size, self.action_dim, self.args.num_samples
        device = generator.device
        normal = lambda *shape: torch.randn(num_updates, *shape, generator=generator, device=device)
        uniform = lambda *shape: torch.rand(num_updates, *shape, generator=generator, device=device)
        return {
            "next_action_candidates": normal(B, C, A),
            "next_q": normal(B, C, 1),
            "confidence": normal(B, 1),
            "return": normal(B, 1),
            "time": uniform(B, 1),
            "bc_action": normal(B, A),
            "bc_time": uniform(B, 1),
            "distill": normal(B, A),
            "actor_q": normal(B, 1),
        } | ({"crop": pixels.draw_crops(generator, num_updates, B)} if self.is_pixels else {})

    def draw_act_noise(self, generator, num_steps):
        """The random numbers of `num_steps` actions: (num_steps, C, A + 1), the last for q_values."""
        shape = (num_steps, self.args.num_samples, self.action_dim + 1)
        return torch.randn(shape, generator=generator, device=generator.device)


def update(agents, batch, noise):
    """One update of every seed; returns the losses at the weights before it, {name: one per seed}.

    Batch and noise are those of Agent.critic_loss with a leading axis of seeds. A loss moves the networks that `trains`
    names; to it, all others are constants (see common/stacked.py, also for `agents`).
    """
    if agents.agent.is_pixels:
        batch = agents.function("augment")(batch, noise)
    agents.optimizer.zero_grad()
    with agents.side_by_side():  # neither loss waits for the other
        metrics = agents.backward("critic_loss", batch, noise, trains=("critic_flow",))
        metrics |= agents.backward("actor_loss", batch, noise, trains=("actor_flow", "actor_onestep_flow"))

    # As released, the EMA comes before Adam's step: the targets lag by one update.
    agents.ema("target_critic_flow", "critic_flow", agents.agent.args.tau)
    agents.optimizer.step()
    return metrics


# --- Main program ---


def parse_args(words=None):
    """The arguments of a command line (None: this program's), and the checkpoint to continue from, or None."""
    args, resumed = arguments.parse(Args, TUNED, TUNED_ONLINE, QUICK, INFERENCE, words=words)
    above_zero = "confidence_weight_temp num_samples num_flow_steps value_hidden_dims actor_hidden_dims"
    arguments.check_numbers(args, above_zero.split(), at_least_zero=("alpha", "bcfm_lambda", "dcfm_lambda"))
    if not 0 < args.cvar_level <= 1:
        fail(f"--cvar-level {args.cvar_level} must lie above 0 and be at most 1")
    if envs.is_pixels(args.env_id) and args.online_timesteps:
        fail(f"--online-timesteps with --env-id {args.env_id}: the online phase works on state observations")
    return args, resumed


def acting(args, step):
    """Name of the policy that acts after `step` updates: rejection sampling offline, the one-step policy online."""
    return args.eval_policy or ("act" if step <= args.total_timesteps else "act_online")


def load(directory, seed=None):
    """The policy of a run directory or an exported folder: `load(DIR).act(observation)`; see common/policies.py."""
    return policies.load(Agent, Args, directory, seed, acting)


if __name__ == "__main__":
    args, resumed = parse_args()
    device = setup_torch(args)
    seeds = list(range(args.seed, args.seed + args.num_seeds))

    if args.evaluate is not None:
        raise SystemExit(policies.evaluate(Agent, args, resumed, INFERENCE, device, acting))

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
    acts = {name: graphs.FastPolicy(agents, name, args.cudagraphs) for name in ("act", "act_online")}
    act, draw_act_noise = acts["act_online"], agents.agent.draw_act_noise
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
            rows = evaluator(acts[acting(args, step)], draw_act_noise, step, stop)
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
