"""EVOR: expressive value learning, improved at inference (arXiv 2510.08218), on OGBench.

The idea: a flow policy clones the data, and a scalar flow from N(0,1) learns the distribution of the return that this
base policy earns from (s,a): policy evaluation, nothing is maximised in training. All improvement is made when acting:
draw candidate actions from the base policy, rate each by a soft maximum of its return samples, and draw one of them by a
softmax of the ratings. How many candidates and how greedily is chosen at inference, without training again.

    python evor.py --quick                                                  # minutes on two CPU cores, data included
    python evor.py --env-id cube-single-play-singletask-v0 --num-seeds 8    # full size, eight seeds stacked
    python evor.py --evaluate runs/RUN_DIR --num-actions 64 --tau-q 0.1     # a trained run, improved more

The paper's page links code; neither that nor the full text could be read here. docs/evor.md says what the paper states,
what it leaves open, and why each choice here was made. One choice differs from the paper: the default label of flow TD is
the exact one (`--td-target published`: the paper's).

Notation in the shapes: S seeds, E ensemble members, B batch, C candidate actions, R return samples, N rows, A action
dimension, H width.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import arguments, checkpoint, datasets, envs, fail, graphs, rollout, runs
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
    evaluate: Optional[str] = None
    """run directory to evaluate only; its arguments apply, those of the choice among candidates may change"""
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
    total_timesteps: int = 1_000_000
    """gradient updates of the offline phase"""
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
    """EMA rate of the target return fields"""
    flow_steps: int = 10
    """Euler steps K of every flow: returns and actions"""
    num_actions: int = 32
    """N_pi, candidate actions of the base policy (1: pure behaviour cloning)"""
    num_returns: int = 50
    """N, return samples that rate a candidate"""
    tau_q: float = 1.0
    """temperature of the choice among the candidates, in units of return (small: the best one, large: any)"""
    tau_r: float = 10.0
    """temperature of the soft maximum over return samples, in units of return (large: their mean, small: their maximum)"""
    td_target: Literal["exact", "published"] = "exact"
    """label of flow TD: the straight way's velocity r + gamma z' - z_0, or the paper's r + gamma sbar(z_t, t | s', a')"""
    latents: Literal["data", "target"] = "data"
    """the published label's z_1, a reward-to-go of (s,a): the trajectory's own, or a sample of the target fields"""
    bc_timesteps: int = 0
    """first updates that train the policy alone, which is then frozen while the return fields train (0: both together)"""
    num_ensembles: int = 2
    """return fields E"""
    clip_flow_returns: bool = True
    """keep the end points of return flows in [min(r_min, 0), max(r_max, 0)] / (1 - gamma)"""
    value_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)
    """hidden widths of the return fields"""
    value_layer_norm: bool = True
    """layer normalisation in the return fields"""
    actor_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)
    """hidden widths of the flow policy"""
    actor_layer_norm: bool = False
    """layer normalisation in the flow policy"""

    # Speed
    compile: bool = True
    """compile the losses with torch.compile (up to two minutes when a size is new to the machine, then faster updates)"""
    cudagraphs: bool = True
    """replay the whole update as one CUDA graph (on a GPU)"""
    matmul_precision: Optional[Literal["highest", "high", "medium"]] = None
    """float32 products: highest is exact, high TF32, medium a CPU's bfloat16 (default: high on a GPU that has it, else highest)"""


# The paper's settings where they differ from the defaults: the same in all environments.
TUNED = {}

# What offline-to-online runs change further: none are known.
TUNED_ONLINE = {}

# What --evaluate may change.
INFERENCE = ("num_actions", "num_returns", "tau_q", "tau_r")

# What --quick changes.
QUICK = dict(
    exp_name=f"{Path(__file__).stem}-quick",
    cuda=False,
    env_id="cube-single-noisy-singletask-v0",
    dataset_source="generated",
    generated_episodes=120,
    total_timesteps=8_000,
    eval_interval=4_000,
    log_interval=500,
    save_interval=2_000,
    tau=0.01,
    flow_steps=5,
    num_actions=16,
    num_returns=8,
    value_hidden_dims=(256, 256, 256),
    actor_hidden_dims=(256, 256, 256),
)


def parse_args(words=None):
    """The arguments of a command line (None: this program's), and the checkpoint to continue from, or None."""
    args, resumed = arguments.parse(Args, TUNED, TUNED_ONLINE, QUICK, inference=INFERENCE, words=words)
    if envs.is_pixels(args.env_id):
        fail(f"--env-id {args.env_id}: evor.py works on state observations")
    if args.td_target == "published" and args.latents == "data" and args.online_timesteps:
        fail("--latents data: the reward-to-go of an online transition is not known yet; use --latents target")
    if args.bc_timesteps > args.total_timesteps:
        fail(
            f"--bc-timesteps {args.bc_timesteps} is above --total-timesteps {args.total_timesteps}, of which it is a part"
        )
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

    def layers(self):
        """[(weight, bias)] of every layer; a LayerNorm's scale and shift are folded into the layer after it:
        (norm(h) * scale + shift) W + b = norm(h) (scale W) + (shift W + b).
        """
        layers = list(zip(self.weights, self.biases))
        for i, (scale, shift) in enumerate(zip(self.scales, self.shifts), start=1):
            weight, bias = layers[i]
            layers[i] = (scale.mT * weight, linear(shift, weight, bias))
        return layers

    def hidden(self, x):
        """What follows a hidden layer's linear part: GELU, then LayerNorm without its scale and shift."""
        x = gelu(x)
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) if self.layer_norm else x

    def forward(self, x):
        """(*stack, N, inputs) -> (*stack, N, outputs)."""
        *layers, last = self.layers()
        for weight, bias in layers:
            x = self.hidden(linear(x, weight, bias))
        return linear(x, *last)

    def field(self, condition, repeats=1):
        """The network of a flow, as a function of its state x and time t with the other inputs, the first ones, fixed;
        what depends on these alone is computed once, here.

        Args:
            condition: (*stack, N, D).
            repeats: adjacent copies of each of its rows, for several x of one condition.

        Returns:
            velocity(x, t): (*stack, N * repeats, X), and t (*stack, N * repeats, 1) or a float -> (..., outputs).
        """
        (weight, bias), *layers = self.layers()
        weight_condition, weight_xt = weight.split(
            [condition.shape[-1], weight.shape[-2] - condition.shape[-1]], dim=-2
        )
        base = linear(condition, weight_condition, bias).repeat_interleave(repeats, dim=-2)  # (*stack, N * repeats, H)

        def velocity(x, t):
            t = t if torch.is_tensor(t) else torch.full_like(x[..., :1], t)
            h = linear(torch.cat([x, t], dim=-1), weight_xt, base)
            for weight, bias in layers:
                h = linear(self.hidden(h), weight, bias)
            return h

        return velocity


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


def init_weights(module, seeds):
    """Glorot-uniform weights, drawn on the CPU by each seed's own generator: the same alone, stacked and on a GPU."""
    for s, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in module.named_parameters():
            if ".weights." in name:
                bound = math.sqrt(6 / (parameter.shape[-2] + parameter.shape[-1]))
                draw = torch.rand(parameter.shape[1:], generator=generator)
                parameter.data[s] = (2 * draw - 1) * bound


# --- Agent ---


class Agent(nn.Module):
    """S independent EVOR agents.

    Args:
        args: see Args.
        obs_dim, action_dim: dimensions of observations and actions.
        seeds: the S seeds of the initial weights.
        min_reward, max_reward: the dataset's extreme rewards, which fix the range of returns.
    """

    METRICS = (
        "critic/critic_loss",
        "critic/target_mean",
        "actor/bc_flow_loss",
    )  # a phase's updates give a part of them

    def __init__(self, args, obs_dim, action_dim, seeds, min_reward, max_reward):
        super().__init__()
        self.args, self.action_dim = args, action_dim
        horizon = 1 / (1 - args.gamma)
        self.z_min, self.z_max = min(min_reward, 0) * horizon, max(max_reward, 0) * horizon  # episodes may end: 0

        S, E = len(seeds), args.num_ensembles
        policy_dims = (obs_dim + action_dim + 1, *args.actor_hidden_dims, action_dim)  # inputs [s, x, t]
        critic_dims = (obs_dim + action_dim + 2, *args.value_hidden_dims, 1)  # inputs [s, a, z, t]
        self.critic_flow = MLP((S, E), critic_dims, args.value_layer_norm)
        self.actor_flow = MLP((S,), policy_dims, args.actor_layer_norm)
        init_weights(self, seeds)
        self.target_critic_flow = MLP((S, E), critic_dims, args.value_layer_norm)
        self.target_critic_flow.load_state_dict(self.critic_flow.state_dict())
        self.target_critic_flow.requires_grad_(False)

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
        """Every random number of `num_updates` updates of one seed: {name: (num_updates, B, dim)}."""
        B, A = self.args.batch_size, self.action_dim
        device = generator.device
        normal = lambda *shape: torch.randn(num_updates, *shape, generator=generator, device=device)
        uniform = lambda *shape: torch.rand(num_updates, *shape, generator=generator, device=device)
        return {
            "next_action": normal(B, A),
            "return": normal(B, 1),
            "time": uniform(B, 1),
            "policy_action": normal(B, A),
            "policy_time": uniform(B, 1),
        } | ({"latent": normal(B, 1)} if self.samples_latents() else {})

    def draw_act_noise(self, generator, num_steps):
        """The random numbers of `num_steps` actions of one seed: (num_steps, C A + C + R), see `act`."""
        size = self.args.num_actions * (self.action_dim + 1) + self.args.num_returns
        return torch.randn(num_steps, size, generator=generator, device=generator.device)

    def flow_actions(self, observations, noise):
        """End points of the base policy's flow: (S, N, D), (S, N, C, A) -> (S, N, C, A) in [-1, 1]."""
        K, C = self.args.flow_steps, noise.shape[2]
        velocity = self.actor_flow.field(observations, repeats=C)
        x = noise.flatten(1, 2)  # (S, N*C, A)
        for k in range(K):
            x = x + velocity(x, k / K) / K
        return x.clamp(-1, 1).unflatten(1, (-1, C))

    def return_flow(self, velocity, z, end_time):
        """Carries noise towards returns, Phi(z; T): K Euler steps of T / K.

        Args:
            velocity: of `MLP.field`.
            z: (S, E, N, 1), the start noise.
            end_time: T of each row, (S, E, N, 1) in [0, 1].

        Returns:
            (S, E, N, 1); not clipped, since what is on the way may lie outside the range of returns.
        """
        step = end_time / self.args.flow_steps
        for k in range(self.args.flow_steps):
            z = z + step * velocity(z, k * step)
        return z

    def clip_return(self, z):
        """An end point kept in the range of returns."""
        return z.clamp(self.z_min, self.z_max) if self.args.clip_flow_returns else z

    def returns(self, observations, actions, noise):
        """Return samples of the EMA fields, the mean of the fields' end points from the same noise.

        Args:
            observations, actions: (S, N, D), (S, N, A).
            noise: (S, N, R).

        Returns:
            (S, N, R).
        """
        E, R = self.args.num_ensembles, noise.shape[2]
        condition = to_ensemble(torch.cat([observations, actions], dim=-1), E)  # (S, E, N, D + A)
        z = to_ensemble(noise.flatten(1).unsqueeze(-1), E)  # (S, E, N*R, 1)
        z = self.return_flow(self.target_critic_flow.field(condition, repeats=R), z, torch.ones_like(z))
        return self.clip_return(z).mean(dim=1).view(noise.shape)

    def samples_latents(self):
        """Whether z_1 is a sample of the target fields, which needs noise of its own."""
        return self.args.td_target == "published" and self.args.latents == "target"

    @torch.no_grad()  # labels are the regression's constants, and the policy is not trained by returns
    def flow_td(self, batch, noise):
        """Flow TD: the points z_t of the return field of (s,a), and their labels.

        Args:
            batch: observations, next_observations (S, B, D), actions (S, B, A), rewards, masks (S, B); for the published
                label with latents of the data also returns (S, B), see reward_to_go.
            noise: see draw_noise, without the first axis and with a seed axis: (S, B, dim).

        Returns:
            z_t and label, (S, B, 1) each.
        """
        args = self.args
        rewards, masks = batch["rewards"].unsqueeze(-1), batch["masks"].unsqueeze(-1)  # (S, B, 1)
        z_0, t = noise["return"], noise["time"]  # (S, B, 1)
        ensemble = lambda x: to_ensemble(x, args.num_ensembles)
        target_field = lambda s, a: self.target_critic_flow.field(ensemble(torch.cat([s, a], dim=-1)))
        end_time = ensemble(torch.ones_like(t))  # (S, E, B, 1)

        # 1. The base policy's next action a', and the target fields of (s', a').
        next_observations = batch["next_observations"]
        next_actions = self.flow_actions(next_observations, noise["next_action"].unsqueeze(2)).squeeze(2)  # (S, B, A)
        next_field = target_field(next_observations, next_actions)

        if args.td_target == "exact":
            # 2. A return z' = Phi(z_0; s', a', 1). The label is the velocity of the straight way from z_0 to r + gamma z'.
            next_return = self.clip_return(self.return_flow(next_field, ensemble(z_0), end_time)).mean(
                dim=1
            )  # (S, B, 1)
            z_1 = rewards + args.gamma * masks * next_return  # (S, B, 1)
            z_t = (1 - t) * z_0 + t * z_1  # (S, B, 1)
            label = z_1 - z_0  # (S, B, 1)
        else:
            # 2. A reward-to-go z_1 of (s,a), independent of z_0. The label is the paper's Bellman equation of fields: the
            #    next field at the same z_t and t.
            if args.latents == "data":
                z_1 = batch["returns"].unsqueeze(-1)  # (S, B, 1)
            else:
                field = target_field(batch["observations"], batch["actions"])
                z_1 = self.clip_return(self.return_flow(field, ensemble(noise["latent"]), end_time)).mean(dim=1)
            z_t = (1 - t) * z_0 + t * z_1  # (S, B, 1)
            next_velocity = next_field(ensemble(z_t), ensemble(t)).mean(dim=1)  # (S, B, 1)
            label = rewards + args.gamma * masks * next_velocity  # (S, B, 1)
        return z_t, label

    def critic_loss(self, batch, noise):
        """L_critic of every seed (S,), and its parts for the log (S,); arguments as for flow_td."""
        ensemble = lambda x: to_ensemble(x, self.args.num_ensembles)
        z_t, label = self.flow_td(batch, noise)

        # Regression of every field: s(z_t, t | s, a) -> label. The mean label is the mean return, since z_0 has mean zero.
        velocity = self.critic_flow.field(ensemble(torch.cat([batch["observations"], batch["actions"]], dim=-1)))
        v = velocity(ensemble(z_t), ensemble(noise["time"]))  # (S, E, B, 1)
        critic_loss = (v - label.unsqueeze(1)).square().mean(dim=(1, 2, 3))  # (S,)
        return critic_loss, {"critic/critic_loss": critic_loss, "critic/target_mean": label.mean(dim=(1, 2))}

    def actor_loss(self, batch, noise):
        """L_BC of every seed (S,), and parts for the log; arguments as for flow_td."""
        observations, actions = batch["observations"], batch["actions"]

        # Behaviour cloning by flow matching: u(s, x_t, t) -> a - x_0.
        x_0, t = noise["policy_action"], noise["policy_time"]  # (S, B, A), (S, B, 1)
        x_t = (1 - t) * x_0 + t * actions
        velocity = self.actor_flow.field(observations)(x_t, t)  # (S, B, A)
        bc_flow_loss = (velocity - (actions - x_0)).square().mean(dim=(1, 2))  # (S,)
        return bc_flow_loss, {"actor/bc_flow_loss": bc_flow_loss}

    def update(self, batch, noise, trains=("returns", "policy")):
        """One update of every seed; returns the losses at the weights before it, {name: (S,)}.

        What is not named in `trains` stays bit-equal: Adam passes over weights that have no gradient.
        """
        self.optimizer.zero_grad()
        metrics = {}
        if "returns" in trains:
            critic_loss, critic_metrics = self.critic_loss(batch, noise)
            critic_loss.sum().backward()
            metrics |= critic_metrics
        if "policy" in trains:
            actor_loss, actor_metrics = self.actor_loss(batch, noise)
            actor_loss.sum().backward()
            metrics |= actor_metrics

        # The EMA comes before Adam's step, so that the targets lag by one update. Untrained fields equal their targets.
        with torch.no_grad():
            targets, online = list(self.target_critic_flow.parameters()), list(self.critic_flow.parameters())
            torch._foreach_lerp_(targets, online, self.args.tau)
        self.optimizer.step()
        return {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def act(self, observations, noise):
        """Inference: the base policy's candidates, rated and chosen by softmax: (S, N, D), (S, N, C A + C + R) -> (S, N, A).

        All candidates of a state are rated with the same R start noises, so that their differences are not noise.
        """
        args, C, A, R = self.args, self.args.num_actions, self.action_dim, self.args.num_returns
        action_noise, choice_noise, return_noise = noise.split([C * A, C, R], dim=-1)
        actions = self.flow_actions(observations, action_noise.unflatten(-1, (C, A)))  # (S, N, C, A)
        rows = observations.repeat_interleave(C, dim=1)  # (S, N*C, D)
        returns = self.returns(rows, actions.flatten(1, 2), return_noise.repeat_interleave(C, dim=1))  # (S, N*C, R)
        q = soft_maximum(returns, args.tau_r).unflatten(1, (-1, C))  # (S, N, C)
        best = softmax_choice(q, args.tau_q, choice_noise)  # (S, N)
        index = best[..., None, None].expand(-1, -1, -1, A)  # (S, N, 1, A)
        return actions.gather(2, index).squeeze(2)


def trajectory_ends(data):
    """(N,) bool: True in a trajectory's last transition, which does not lead to the next row's observation."""
    leads_on = (data["next_observations"][:-1] == data["observations"][1:]).all(dim=-1).cpu().numpy()
    return np.append(~leads_on, True)


def reward_to_go(data, gamma):
    """Discounted returns along the data's trajectories, G_t = r_t + gamma mask_t G_{t+1}, cut off at each one's end.

    Args:
        data: transitions {observations, next_observations (N, D), rewards, masks (N,)} in order of time.
        gamma: discount factor.

    Returns:
        returns, and the discount of what is cut off (0 where a success follows): (N,) arrays of float64.
    """
    rewards, masks = (data[key].double().cpu().numpy() for key in ("rewards", "masks"))
    ends = trajectory_ends(data)
    returns, cut_off = np.zeros_like(rewards), np.zeros_like(rewards)
    value, discount = 0.0, 1.0
    for i in reversed(range(len(rewards))):
        if ends[i]:
            value, discount = 0.0, 1.0
        value = rewards[i] + gamma * masks[i] * value
        discount *= gamma * masks[i]
        returns[i], cut_off[i] = value, discount
    return returns, cut_off


def soft_maximum(returns, tau_r):
    """Q = tau_R ln mean_j exp(r_j / tau_R), between the mean (tau_R large) and the maximum: (..., R) -> (...).

    Finite for every temperature: taken relative to the maximum, and exact near the mean by log1p and expm1.
    """
    top = returns.amax(dim=-1, keepdim=True)
    return top.squeeze(-1) + tau_r * torch.expm1((returns - top) / tau_r).mean(dim=-1).log1p()


def softmax_choice(q, tau_q, noise):
    """Index drawn from softmax(Q / tau_Q): (..., C), standard normal noise (..., C) -> (...).

    The Gumbel trick: argmax of Q / tau_Q + g, with g = -ln(-ln Phi(noise)) a Gumbel variable.
    """
    gumbel = -torch.log(-torch.special.log_ndtr(noise))
    return ((q - q.amax(dim=-1, keepdim=True)) / tau_q + gumbel).argmax(dim=-1)


if __name__ == "__main__":
    args, resumed = parse_args()
    device = setup_torch(args)
    seeds = list(range(args.seed, args.seed + args.num_seeds))

    # --- Evaluation only ---
    if args.evaluate is not None:
        agent = Agent(args, seeds=seeds, **resumed["agent_inputs"]).to(device)
        agent.load_state_dict(resumed["agent"])
        evaluator = rollout.Evaluator(args, seeds, device, Path(args.evaluate))
        rows = evaluator(agent.act, agent.draw_act_noise, resumed["step"])
        evaluator.close()
        settings = {name: getattr(args, name) for name in INFERENCE}
        runs.append_rows(Path(args.evaluate) / "inference.csv", [settings | row for row in rows])
        for row in rows:
            print(f"seed {row['seed']}: success {row['success']:.2f} at step {row['step']}, {settings}")
        raise SystemExit

    # --- Data ---
    dataset, identity = datasets.load(args, device)
    if args.td_target == "published" and args.latents == "data":
        returns, _ = reward_to_go(dataset, args.gamma)
        dataset["returns"] = torch.as_tensor(returns, dtype=torch.float32, device=device)
    log = runs.Log(args, resumed, device, identity, Agent.METRICS)

    # --- Agent ---
    rewards = dataset["rewards"]
    obs_dim, action_dim = dataset["observations"].shape[1], dataset["actions"].shape[1]
    agent_inputs = dict(obs_dim=obs_dim, action_dim=action_dim)
    agent_inputs |= dict(min_reward=rewards.min().item(), max_reward=rewards.max().item())
    agent = Agent(args, seeds=seeds, **agent_inputs).to(device)
    agent.make_optimizer()
    replay = Replay(dataset, args.num_seeds, args.online_timesteps)
    if resumed is not None:
        agent.load_state_dict(resumed["agent"])
        checkpoint.restore_optimizer(agent.optimizer, resumed["optimizer"])
        replay.restore(resumed["replay"], count=max(0, resumed["step"] - args.total_timesteps))

    # --- Training: offline, then online ---
    update = graphs.FastUpdate(
        agent, lambda draws, trains: agent.update(replay.batch(draws), draws, trains), args.compile, args.cudagraphs
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
        state["agent_inputs"] = agent_inputs  # what --evaluate needs instead of the data
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
        if not args.bc_timesteps:
            trains = ("returns", "policy")
        else:  # the base policy first, then its returns
            trains = ("policy",) if step < args.bc_timesteps else ("returns",)
        metrics = update(draws, trains)
        step += 1
        log.training(step, metrics, warm_up=update.new)

    evaluator.close()
    explorer.close()
    log.close()
