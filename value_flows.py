"""Value Flows: return distributions by flow matching (Dong et al. 2025, arXiv 2510.07650), on OGBench.

The idea: the return of (s,a) is a random variable, and its distribution is the end point of a scalar flow from N(0,1).
Two return fields v(z,t|s,a) are trained by flow matching towards Bellman targets: r + gamma times a return of (s',a')
(BCFM), and the field itself carried through r + gamma z (DCFM). The flow's derivative dz_1/dz_0 tells how much returns
spread; transitions with uncertain returns weigh more. One Euler step reads off Q. The policy draws 16 actions from a
behaviour-cloning flow and takes the best (rejection sampling); online, a distilled one-step policy explores.

    python value_flows.py --quick                                         # minutes on two CPU cores, data included
    python value_flows.py --env-id cube-double-play-singletask-task1-v0   # the published hyperparameters
    python value_flows.py --env-id scene-play-singletask-v0 --num-seeds 8 --online-timesteps 1000000  # then online

Notation in the shapes: S seeds, E ensemble members, B batch, C candidate actions, N rows, A action dimension, H width.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import arguments, checkpoint, datasets, envs, fail, graphs, pixels, rollout, runs
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
    env_id: str = "cube-double-play-singletask-v0"
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
    alpha: float = 10.0
    """weight of the one-step policy's distillation towards the behaviour-cloning flow"""
    bcfm_lambda: float = 1.0
    """weight of bootstrapped conditional flow matching (0: the paper finds that training diverges)"""
    dcfm_lambda: float = 1.0
    """weight of distributional conditional flow matching"""
    confidence_weight_temp: float = 0.3
    """temperature of the confidence weights sigmoid(-temp / deviation) + 0.5"""
    num_samples: int = 16
    """candidate actions C of rejection sampling (1: pure behaviour cloning)"""
    num_flow_steps: int = 10
    """Euler steps K of every flow: returns and actions"""
    ret_agg: Literal["mean", "min"] = "mean"
    """aggregation of target returns over the two fields"""
    q_agg: Literal["mean", "min"] = "mean"
    """aggregation of Q-values and of deviations over the two fields"""
    clip_flow_returns: bool = True
    """keep returns in [r_min, r_max] / (1 - gamma) after every Euler step"""
    clip_flow_actions: bool = True
    """keep actions in [-1, 1] after every Euler step (they always end there)"""
    normalize_q_loss: bool = False
    """divide the one-step policy's Q term by the mean absolute Q"""
    value_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)
    """hidden widths of the return fields"""
    value_layer_norm: bool = True
    """layer normalisation in the return fields"""
    actor_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)
    """hidden widths of both policies"""
    actor_layer_norm: bool = True
    """layer normalisation in both policies"""

    # Speed
    compile: bool = True
    """compile the losses with torch.compile (up to two minutes when a size is new to the machine, then faster updates)"""
    cudagraphs: bool = True
    """replay the whole update as one CUDA graph (on a GPU)"""
    matmul_precision: Optional[Literal["highest", "high", "medium"]] = None
    """float32 products: highest is exact, high TF32, medium a CPU's bfloat16 (default: high on a GPU that has it, else highest)"""


# The paper's settings where they differ from the defaults.
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

# What --quick changes.
QUICK = dict(
    exp_name=f"{Path(__file__).stem}-quick",
    cuda=False,
    env_id="cube-single-noisy-singletask-v0",
    dataset_source="generated",
    generated_episodes=120,
    total_timesteps=8_000,
    eval_interval=2_000,
    log_interval=500,
    save_interval=2_000,
    tau=0.01,
    num_samples=8,
    num_flow_steps=5,
    value_hidden_dims=(256, 256, 256),
    actor_hidden_dims=(256, 256, 256),
)


def parse_args(words=None):
    """The arguments of a command line (None: this program's), and the checkpoint to continue from, or None."""
    args, resumed = arguments.parse(
        Args, TUNED, TUNED_ONLINE, QUICK, may_be_zero=("alpha", "bcfm_lambda", "dcfm_lambda"), words=words
    )
    if envs.is_pixels(args.env_id) and args.online_timesteps:
        fail(f"--online-timesteps with --env-id {args.env_id}: the online phase works on state observations")
    return args, resumed


# --- Networks ---


NUM_FIELDS = 2  # return fields E


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

    def layers(self, detach=False):
        """[(weight, bias)] of every layer; a LayerNorm's scale and shift are folded into the layer after it:
        (norm(h) * scale + shift) W + b = norm(h) (scale W) + (shift W + b). `detach` stops gradients to the weights.
        """
        layers = list(zip(self.weights, self.biases))
        for i, (scale, shift) in enumerate(zip(self.scales, self.shifts), start=1):
            weight, bias = layers[i]
            layers[i] = (scale.mT * weight, linear(shift, weight, bias))
        return [(weight.detach(), bias.detach()) for weight, bias in layers] if detach else layers

    def hidden(self, x):
        """What follows a hidden layer's linear part: GELU, then LayerNorm without its scale and shift."""
        x = gelu(x)
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) if self.layer_norm else x

    def forward(self, x, detach=False):
        """(*stack, N, inputs) -> (*stack, N, outputs)."""
        *layers, last = self.layers(detach)
        for weight, bias in layers:
            x = self.hidden(linear(x, weight, bias))
        return linear(x, *last)

    def field(self, condition, repeats=1, detach=False):
        """The network of a flow, as a function of its state x and time t with the other inputs, the first ones, fixed;
        what depends on these alone is computed once, here.

        Args:
            condition: (*stack, N, D).
            repeats: adjacent copies of each of its rows, for several x of one condition.
            detach: stops gradients to the weights.

        Returns:
            velocity(x, t): (*stack, N * repeats, X), and t (*stack, N * repeats, 1) or a float -> (..., outputs);
            velocity(x, t, dx): with the tangent dx (*stack, n, X) of the first n rows -> (the same, its derivative along
            dx at these rows (..., n, outputs)), in forward mode.
        """
        (weight, bias), *layers = self.layers(detach)
        weight_condition, weight_xt = weight.split(
            [condition.shape[-1], weight.shape[-2] - condition.shape[-1]], dim=-2
        )
        base = linear(condition, weight_condition, bias).repeat_interleave(repeats, dim=-2)  # (*stack, N * repeats, H)

        def velocity(x, t, dx=None):
            t = t if torch.is_tensor(t) else torch.full_like(x[..., :1], t)
            h = linear(torch.cat([x, t], dim=-1), weight_xt, base)
            if dx is None:
                for weight, bias in layers:
                    h = linear(self.hidden(h), weight, bias)
                return h
            dh = dx @ weight_xt[..., :-1, :]
            for weight, bias in layers:
                _, dh = torch.func.jvp(self.hidden, (h[..., : dh.shape[-2], :],), (dh,))
                h, dh = linear(self.hidden(h), weight, bias), dh @ weight
            return h, dh

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


def to_ensemble(x, num_ensembles=NUM_FIELDS):
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
    """S independent Value Flows agents.

    Args:
        args: see Args.
        obs_dim, action_dim: dimensions of observations and actions; for pixels obs_dim is the shape (H, W, channels).
        seeds: the S seeds of the initial weights.
        min_reward, max_reward: the dataset's extreme rewards, which fix the range of returns.
    """

    def __init__(self, args, obs_dim, action_dim, seeds, min_reward, max_reward):
        super().__init__()
        self.args, self.action_dim = args, action_dim
        self.is_pixels = not isinstance(obs_dim, int)
        image_shape, obs_dim = (obs_dim, pixels.Encoder.features) if self.is_pixels else (None, obs_dim)
        horizon = 1 / (1 - args.gamma)
        self.z_min, self.z_max = min_reward * horizon, max_reward * horizon

        S = len(seeds)
        policy_dims = (obs_dim + action_dim, *args.actor_hidden_dims, action_dim)
        bc_flow_dims = (obs_dim + action_dim + 1, *args.actor_hidden_dims, action_dim)
        critic_dims = (obs_dim + action_dim + 2, *args.value_hidden_dims, 1)  # inputs [s, a, z, t]
        self.critic_flow = MLP((S, NUM_FIELDS), critic_dims, args.value_layer_norm)
        self.actor_flow = MLP((S,), bc_flow_dims, args.actor_layer_norm)
        self.actor_onestep_flow = MLP((S,), policy_dims, args.actor_layer_norm)
        init_weights(self, seeds)
        self.target_critic_flow = MLP((S, NUM_FIELDS), critic_dims, args.value_layer_norm)
        names = ("critic_flow", "actor_flow", "actor_onestep_flow", "target_critic_flow") if self.is_pixels else ()
        self.encoders = nn.ModuleDict({name: pixels.Encoder(S, image_shape) for name in names})
        pixels.init_encoders(self.encoders, seeds)
        for target, online in self.target_pairs():
            target.load_state_dict(online.state_dict())
            target.requires_grad_(False)

    def target_pairs(self):
        """[(EMA target, online network)]."""
        encoders = [(self.encoders["target_critic_flow"], self.encoders["critic_flow"])] if self.is_pixels else []
        return [(self.target_critic_flow, self.critic_flow), *encoders]

    def encode(self, network, observations):
        """What `network` sees of observations: states as they are, pixels through its own encoder (both fields share one)."""
        return self.encoders[network](observations) if self.is_pixels else observations

    def augment(self, batch, noise):
        """The batch with pixels shifted, a row's observation and next observation alike; states as they are."""
        names = ("observations", "next_observations") if self.is_pixels else ()
        return batch | {name: pixels.crop(batch[name], noise["crop"]) for name in names}

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
        """Every random number of `num_updates` updates of one seed: {name: (num_updates, B, ...)}."""
        B, A, C = self.args.batch_size, self.action_dim, self.args.num_samples
        device = generator.device
        normal = lambda *shape: torch.randn(num_updates, *shape, generator=generator, device=device)
        uniform = lambda *shape: torch.rand(num_updates, *shape, generator=generator, device=device)
        return {
            "next_action_candidates": normal(B, C, A),
            "next_q": normal(B, C, 1),
            "weight": normal(B, 1),
            "return": normal(B, 1),
            "time": uniform(B, 1),
            "logged_q": normal(B, 1),
            "bc_action": normal(B, A),
            "bc_time": uniform(B, 1),
            "distill": normal(B, A),
            "actor_q": normal(B, 1),
        } | ({"crop": pixels.draw_crops(generator, num_updates, B)} if self.is_pixels else {})

    def draw_act_noise(self, generator, num_steps):
        """The random numbers of `num_steps` actions of one seed: (num_steps, C, A + 1)."""
        shape = (num_steps, self.args.num_samples, self.action_dim + 1)
        return torch.randn(shape, generator=generator, device=generator.device)

    def onestep_action(self, observations, noise):
        """mu(s, n), clipped: (S, N, D), (S, N, A) -> (S, N, A)."""
        observations = self.encode("actor_onestep_flow", observations)
        return self.actor_onestep_flow(torch.cat([observations, noise], dim=-1)).clamp(-1, 1)

    def flow_actions(self, observations, noise):
        """End points of the cloning flow: (S, N, D), (S, N, C, A) -> (S, N, C, A) in [-1, 1]."""
        K, C = self.args.num_flow_steps, noise.shape[2]
        velocity = self.actor_flow.field(self.encode("actor_flow", observations), repeats=C)
        x = noise.flatten(1, 2)  # (S, N*C, A)
        for k in range(K):
            x = x + velocity(x, k / K) / K
            x = x.clamp(-1, 1) if self.args.clip_flow_actions else x
        return x.clamp(-1, 1).unflatten(1, (-1, C))

    def clip_return(self, z):
        """C(z): z kept in [r_min, r_max] / (1 - gamma)."""
        return z.clamp(self.z_min, self.z_max) if self.args.clip_flow_returns else z

    def return_flow(self, velocity, z, end_time, num_derivatives=0):
        """Carries noise to returns, Phi(z; T): K Euler steps of T / K, and beside it the flow derivative ODE
        dJ/dt = (dv/dz) J, J_0 = 1, of the first rows.

        Args:
            velocity: of `MLP.field`.
            z: (S, E, N, 1), the start noise.
            end_time: T of each row, (S, E, N, 1) in [0, 1].
            num_derivatives: rows n that need the derivative.

        Returns:
            z_K (S, E, N, 1) and J_K = dz_K / dz_0, its clipping left out, (S, E, n, 1).
        """
        step = end_time / self.args.num_flow_steps
        J = torch.ones_like(z[..., :num_derivatives, :])
        for k in range(self.args.num_flow_steps):
            v, dv = velocity(z, k * step, J)
            z = self.clip_return(z + step * v)
            J = J + step[..., :num_derivatives, :] * dv
        return z, J

    def q_values(self, observations, actions, noise, detach=False):
        """Q(s, a) by one Euler step, agg_j C(z + v_j(z, 0, s, a)): (S, N, D), (S, N, C, A), (S, N, C, 1) -> (S, N, C)."""
        observations = self.encode("critic_flow", observations)
        observations = to_ensemble(observations.detach() if detach else observations)  # (S, E, N, D)
        velocity = self.critic_flow.field(observations, repeats=actions.shape[2], detach=detach)
        z = to_ensemble(noise.flatten(1, 2))  # (S, E, N*C, 1)
        v = velocity(torch.cat([to_ensemble(actions.flatten(1, 2)), z], dim=-1), 0.0)  # (S, E, N*C, 1)
        q = aggregate(self.clip_return(z + v), self.args.q_agg)  # (S, N*C, 1)
        return q.view(noise.shape[:3])

    def rejection_sampling(self, observations, action_noise, q_noise):
        """The best of C flow actions: (S, N, D), (S, N, C, A), (S, N, C, 1) -> (S, N, A)."""
        actions = self.flow_actions(observations, action_noise)  # (S, N, C, A)
        best = self.q_values(observations, actions, q_noise).argmax(dim=2)  # (S, N)
        index = best[..., None, None].expand(-1, -1, -1, actions.shape[3])  # (S, N, 1, A)
        return actions.gather(2, index).squeeze(2)

    def critic_loss(self, batch, noise):
        """L_critic of every seed (S,), and its parts for the log, (S,) or (S, B).

        Args:
            batch: observations, next_observations (S, B, D), actions (S, B, A), rewards, masks (S, B).
            noise: see draw_noise, without the first axis and with a seed axis: (S, B, ...).
        """
        args, B = self.args, self.args.batch_size
        observations, actions, next_observations = batch["observations"], batch["actions"], batch["next_observations"]
        rewards, masks = batch["rewards"].unsqueeze(-1), batch["masks"].unsqueeze(-1)  # (S, B, 1)
        t, eps = noise["time"], noise["return"]  # (S, B, 1)

        # No gradient through steps 1 to 3: they make the regression's fixed weights and labels.
        with torch.no_grad():
            # 1. The next action, by rejection sampling.
            next_actions = self.rejection_sampling(
                next_observations, noise["next_action_candidates"], noise["next_q"]
            )  # (S, B, A)

            # 2. Three flows of the target fields as one integration: Phi(e_w; s, a, 1) with its derivative,
            #    Phi(eps; s', a', 1) and Phi(eps; s', a', t).
            next_states = self.encode("target_critic_flow", next_observations)  # (S, B, D)
            next_condition = torch.cat([next_states, next_actions], dim=-1)  # (S, B, D + A)
            condition = torch.cat([self.encode("target_critic_flow", observations), actions], dim=-1)  # (S, B, D + A)
            condition = torch.cat([condition, next_condition, next_condition], dim=1)  # (S, 3*B, D + A)
            z = torch.cat([noise["weight"], eps, eps], dim=1)  # (S, 3*B, 1)
            end_time = torch.cat([torch.ones_like(t), torch.ones_like(t), t], dim=1)  # (S, 3*B, 1)
            velocity = self.target_critic_flow.field(to_ensemble(condition))
            z, J = self.return_flow(velocity, to_ensemble(z), to_ensemble(end_time), num_derivatives=B)
            _, next_return, next_z = aggregate(z, args.ret_agg).split(B, dim=1)  # (S, B, 1)
            deviation = aggregate(J.abs(), args.q_agg)  # (S, B, 1)

            # 3. Confidence weight w in [0.5, 1), BCFM's return G, DCFM's label f.
            weight = confidence_weight(deviation, args.confidence_weight_temp)  # (S, B, 1)
            bcfm_return = rewards + args.gamma * masks * next_return  # (S, B, 1)
            velocity = self.target_critic_flow.field(to_ensemble(next_condition))
            dcfm_label = aggregate(velocity(to_ensemble(next_z), to_ensemble(t)), args.ret_agg)  # (S, B, 1)

        # 4. Flow matching at two points of the same (s, a, t). BCFM: v(t G + (1 - t) eps, t) -> G - eps.
        #    DCFM: v(r + gamma mask z', t) -> f, without gamma and mask on f.
        z_bcfm = t * bcfm_return + (1 - t) * eps  # (S, B, 1)
        z_dcfm = rewards + args.gamma * masks * next_z  # (S, B, 1)
        z = torch.stack([z_bcfm, z_dcfm], dim=2).flatten(1, 2)  # (S, B*2, 1)
        labels = torch.stack([bcfm_return - eps, dcfm_label], dim=2)  # (S, B, 2, 1)
        condition = torch.cat([self.encode("critic_flow", observations), actions], dim=-1)  # (S, B, D + A)
        velocity = self.critic_flow.field(to_ensemble(condition), repeats=2)
        v = velocity(to_ensemble(z), to_ensemble(t.repeat_interleave(2, dim=1)))  # (S, E, B*2, 1)
        errors = (v.unflatten(2, (-1, 2)) - labels.unsqueeze(1)).square().sum(dim=(1, 4))  # (S, B, 2)
        bcfm_loss, dcfm_loss = errors.unbind(dim=2)  # (S, B)
        row_losses = args.bcfm_lambda * bcfm_loss + args.dcfm_lambda * dcfm_loss  # (S, B)
        critic_loss = (weight.squeeze(-1) * row_losses).mean(dim=1)  # (S,)
        return critic_loss, {
            "critic/critic_loss": critic_loss,
            "critic/bcfm_loss": bcfm_loss,
            "critic/dcfm_loss": dcfm_loss,
            "critic/weight": weight.squeeze(-1),
            "critic/q_std": deviation.squeeze(-1),
            "critic/target_mean": bcfm_return.squeeze(-1),
        }

    def actor_loss(self, batch, noise):
        """L_actor of every seed (S,), and its parts for the log; arguments as for critic_loss."""
        args, observations, actions = self.args, batch["observations"], batch["actions"]

        # 1. Behaviour cloning by flow matching: u(s, x_t, t) -> a - x_0.
        x_0, t = noise["bc_action"], noise["bc_time"]  # (S, B, A), (S, B, 1)
        x_t = (1 - t) * x_0 + t * actions
        velocity = self.actor_flow.field(self.encode("actor_flow", observations))(x_t, t)  # (S, B, A)
        bc_flow_loss = (velocity - (actions - x_0)).square().mean(dim=(1, 2))  # (S,)

        # 2. Distillation: mu(s, n) -> the cloning flow's action from the same n. No gradient to the flow: the teacher.
        with torch.no_grad():
            flow_actions = self.flow_actions(observations, noise["distill"].unsqueeze(2)).squeeze(2)  # (S, B, A)
        policy_actions = self.onestep_action(observations, noise["distill"])  # (S, B, A)
        distill_loss = (policy_actions - flow_actions).square().mean(dim=(1, 2))  # (S,)

        # 3. Policy improvement: maximise Q(s, mu(s, n)). Detached critic weights: this loss moves the policy alone.
        q_noise = noise["actor_q"].unsqueeze(2)  # (S, B, 1, 1)
        q = self.q_values(observations, policy_actions.unsqueeze(2), q_noise, detach=True).squeeze(2)  # (S, B)
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
        batch = self.augment(batch, noise)
        self.optimizer.zero_grad()
        critic_loss, critic_metrics = self.critic_loss(batch, noise)
        critic_loss.sum().backward()
        actor_loss, actor_metrics = self.actor_loss(batch, noise)
        actor_loss.sum().backward()

        # The EMA comes before Adam's step, so that the targets lag by one update as in the released code.
        with torch.no_grad():
            for target, online in self.target_pairs():
                torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), self.args.tau)
        self.optimizer.step()
        metrics = (critic_metrics | actor_metrics).items()
        return {
            name: value.detach().flatten(1).mean(dim=1) if value.ndim > 1 else value.detach() for name, value in metrics
        }

    @torch.no_grad()
    def statistics(self, batch, noise):
        """What only a log line needs, at the present weights: {name: (S,)}."""
        batch = self.augment(batch, noise)
        q_noise = noise["logged_q"].unsqueeze(2)  # (S, B, 1, 1)
        q = self.q_values(batch["observations"], batch["actions"].unsqueeze(2), q_noise)  # (S, B, 1)
        return {"critic/q_mean": q.mean(dim=(1, 2))}

    @torch.no_grad()
    def act(self, observations, noise):
        """Rejection sampling, the offline phase's policy: (S, N, D), (S, N, C, A + 1) -> (S, N, A)."""
        return self.rejection_sampling(observations, noise[..., :-1], noise[..., -1:])

    @torch.no_grad()
    def act_online(self, observations, noise):
        """The one-step policy, which explores and is evaluated in the online phase; arguments as for act."""
        return self.onestep_action(observations, noise[:, :, 0, :-1])


def aggregate(x, how):
    """Mean or minimum over the ensemble: (S, E, N, 1) -> (S, N, 1)."""
    return x.mean(dim=1) if how == "mean" else x.amin(dim=1)


def confidence_weight(deviation, temp):
    """w = sigmoid(-temp / deviation) + 0.5, in [0.5, 1): higher where returns are uncertain; elementwise."""
    return torch.sigmoid(-temp / deviation) + 0.5


if __name__ == "__main__":
    args, resumed = parse_args()
    device = setup_torch(args)
    seeds = list(range(args.seed, args.seed + args.num_seeds))

    # --- Data ---
    dataset, identity = datasets.load(args, device)
    log = runs.Log(args, resumed, device, identity)

    # --- Agent ---
    rewards = dataset["rewards"]
    is_pixels, action_dim = envs.is_pixels(args.env_id), dataset["actions"].shape[1]
    obs_dim = (64, 64, 3 * pixels.NUM_FRAMES) if is_pixels else dataset["observations"].shape[1]
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
    evaluator = rollout.Evaluator(
        args, seeds, device, log.run_dir, pixels.NUM_FRAMES if is_pixels else 1
    )  # episodes in worker processes
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
            phase, policy = ("offline", agent.act) if step <= args.total_timesteps else ("online", agent.act_online)
            rows = evaluator(policy, agent.draw_act_noise, step, stop)
            log.evaluation(rows, phase)
            evaluated = evaluated if rows is None else step  # None: a signal came; evaluated again after --resume
        if stop:
            stop.leave(log.run_dir, step)
        if step == last_step:
            break

        # One update; in the online phase, one environment step of every seed before it.
        online = step >= args.total_timesteps
        draws = draw(step, online)
        if online:
            transitions = explorer(agent.act_online, draws.pop("act"), step, on_failure=save)
            draws["count"] = replay.append(transitions)
        statistics = agent.statistics(replay.batch(draws), draws) if log.row_due(step + 1) else None
        metrics = update(draws)
        step += 1
        log.training(step, metrics, warm_up=update.new, statistics=statistics)

    evaluator.close()
    explorer.close()
    log.close()
