"""Q-Flow: policy improvement by intermediate values of a flow policy (arXiv 2605.13435), on OGBench.

The idea: a flow policy turns noise into an action in K Euler steps. A value function V(s,x,tau) of the latents x on the
way says what the action at the end will be worth; it learns that by rolling latents out with the policy. Its gradient in
x then bends the flow: the velocity is regressed on the behaviour's velocity plus grad V / alpha. Nothing is
differentiated through the solver, there is no cloning network and no distillation; the policy that acts is the flow.

    python q_flow.py --quick                                            # minutes on two CPU cores, data included
    python q_flow.py --env-id cube-single-play-singletask-v0            # the published hyperparameters
    python q_flow.py --env-id antmaze-giant-navigate-singletask-v0 --num-seeds 8 --online-timesteps 1000000  # then online

Notation in the shapes: S seeds, E ensemble members, B batch, N rows, A action dimension, H width.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Optional

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
    """EMA rate of the target critic"""
    alpha: float = 1.0
    """lambda: strength of behaviour cloning; the guidance is the value's gradient over it (1e6: pure cloning)"""
    flow_steps: int = 10
    """Euler steps K of the flow policy"""
    q_agg: Literal["mean", "min"] = "mean"
    """aggregation of values over the ensemble (the guidance is always of the mean)"""
    num_ensembles: int = 2
    """critics, and intermediate values"""
    use_time_embed: bool = False
    """give the intermediate value sines and cosines of the flow time instead of the raw number"""
    time_embed_dim: int = 16
    """number of these sines and cosines, even"""
    actor_time_embed: bool = False
    """give the flow policy these sines and cosines too (paper) instead of the raw number (released code)"""
    layer_norm: bool = True
    """layer normalisation in the critic and the intermediate value"""
    value_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)
    """hidden widths of the critic and the intermediate value"""
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


# The paper's settings for each environment; the time embedding is that of the authors' results notebook.
EMBED = dict(use_time_embed=True, time_embed_dim=64)
TUNED = {
    "antmaze-large-navigate": dict(alpha=0.2, **EMBED),
    "antmaze-giant-navigate": dict(alpha=0.2, gamma=0.995, q_agg="min", **EMBED),
    "antsoccer-arena-navigate": dict(alpha=0.5, gamma=0.995, **EMBED),
    "humanoidmaze-medium-navigate": dict(alpha=1.0, gamma=0.995, **EMBED),
    "humanoidmaze-large-navigate": dict(alpha=1.0, gamma=0.995, **EMBED),
    "cube-single-play": dict(alpha=5.0, **EMBED),
    "cube-double-play": dict(alpha=2.0, use_time_embed=True, time_embed_dim=16),
    "scene-play": dict(alpha=5.0, **EMBED),
    "puzzle-3x3-play": dict(alpha=20.0, q_agg="min", **EMBED),
    "puzzle-4x4-play": dict(alpha=20.0, q_agg="min", **EMBED),
}

# What offline-to-online runs change further: nothing.
TUNED_ONLINE = {
    "antmaze-giant-navigate": {},
    "humanoidmaze-medium-navigate": {},
    "antsoccer-arena-navigate": {},
    "cube-double-play": {},
    "puzzle-4x4-play": {},
}

# What --quick changes.
QUICK = dict(
    exp_name=f"{Path(__file__).stem}-quick",
    cuda=False,
    env_id="cube-single-noisy-singletask-v0",
    dataset_source="generated",
    generated_episodes=120,
    total_timesteps=12_000,
    eval_interval=4_000,
    log_interval=500,
    save_interval=2_000,
    tau=0.01,
    alpha=5.0,
    **EMBED,
    flow_steps=5,
    value_hidden_dims=(256, 256, 256),
    actor_hidden_dims=(256, 256, 256),
)


def parse_args(words=None):
    """The arguments of a command line (None: this program's), and the checkpoint to continue from, or None."""
    args, resumed = arguments.parse(Args, TUNED, TUNED_ONLINE, QUICK, words=words)
    if args.time_embed_dim % 2:
        fail(f"--time-embed-dim {args.time_embed_dim} must be even: half of it are sines, half cosines")
    if envs.is_pixels(args.env_id):
        fail(f"--env-id {args.env_id}: q_flow.py works on state observations, as its paper does")
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

    def field(self, condition):
        """The network of a flow, as a function of its state x and time t with the other inputs, the first ones, fixed;
        what depends on these alone is computed once, here.

        Args:
            condition: (*stack, N, D).

        Returns:
            velocity(x, t): (*stack, N, X), (*stack, N, 1) -> (*stack, N, outputs).
        """
        (weight, bias), *layers = self.layers()
        weight_condition, weight_xt = weight.split(
            [condition.shape[-1], weight.shape[-2] - condition.shape[-1]], dim=-2
        )
        base = linear(condition, weight_condition, bias)  # (*stack, N, H)

        def velocity(x, t):
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


def time_frequencies(dim):
    """f_i = 256^(i / (dim / 2 - 1)) for i = 0..dim / 2 - 1, (dim / 2,); in float64, rounded once, so that they are the same
    on every processor.
    """
    return torch.linspace(0, math.log(256), dim // 2, dtype=torch.float64).exp().float()


def embed_time(t, frequencies):
    """[sin(f_i t), cos(f_i t)]: (..., 1), (dim / 2,) -> (..., dim)."""
    return torch.cat([torch.sin(t * frequencies), torch.cos(t * frequencies)], dim=-1)


# --- Agent ---


class Agent(nn.Module):
    """S independent Q-Flow agents.

    Args:
        args: see Args.
        obs_dim, action_dim: dimensions of observations and actions.
        seeds: the S seeds of the initial weights.
        min_reward, max_reward: the dataset's extreme rewards (not used: values are not bounded).
    """

    def __init__(self, args, obs_dim, action_dim, seeds, min_reward, max_reward):
        super().__init__()
        self.args, self.action_dim = args, action_dim
        time_dim = args.time_embed_dim if args.use_time_embed else 1
        policy_time_dim = args.time_embed_dim if args.actor_time_embed else 1
        self.register_buffer("frequencies", time_frequencies(args.time_embed_dim), persistent=False)

        S, E = len(seeds), args.num_ensembles
        policy_dims = (obs_dim + action_dim + policy_time_dim, *args.actor_hidden_dims, action_dim)  # inputs [s, x, t]
        critic_dims = (obs_dim + action_dim, *args.value_hidden_dims, 1)  # inputs [s, a]
        value_dims = (obs_dim + action_dim + time_dim, *args.value_hidden_dims, 1)  # inputs [s, x, emb(t)]
        self.critic = MLP((S, E), critic_dims, args.layer_norm)
        self.inner_value = MLP((S, E), value_dims, args.layer_norm)
        self.actor_flow = MLP((S,), policy_dims, args.actor_layer_norm)
        init_weights(self, seeds)
        self.target_critic = MLP((S, E), critic_dims, args.layer_norm)
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.target_critic.requires_grad_(False)

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
            "value_action": normal(B, A),
            "value_time": uniform(B, 1),
            "policy_action": normal(B, A),
            "policy_time": uniform(B, 1),
        }

    def draw_act_noise(self, generator, num_steps):
        """The random numbers of `num_steps` actions of one seed: (num_steps, A)."""
        return torch.randn(num_steps, self.action_dim, generator=generator, device=generator.device)

    def policy_velocity(self, observations):
        """u(s, x, t) as a function of x (S, N, A) and t (S, N, 1): (S, N, D) -> (S, N, A)."""
        velocity = self.actor_flow.field(observations)
        embed = lambda t: embed_time(t, self.frequencies) if self.args.actor_time_embed else t
        return lambda x, t: velocity(x, embed(t))

    def roll_out(self, observations, x, t):
        """Carries latents from their flow time t to the action at 1: K Euler steps of min(1 / K, what is left).

        Args:
            observations, x, t: (S, N, D), (S, N, A), (S, N, 1) in [0, 1].

        Returns:
            (S, N, A) in [-1, 1]; clipped at the end only.
        """
        velocity = self.policy_velocity(observations)
        for _ in range(self.args.flow_steps):
            step = (1 - t).clamp(0, 1 / self.args.flow_steps)
            x = x + step * velocity(x, t)
            t = t + step
        return x.clamp(-1, 1)

    def q_values(self, critic, observations, actions):
        """Q_e(s, a) of a critic: (S, N, D), (S, N, A) -> (S, E, N)."""
        inputs = to_ensemble(torch.cat([observations, actions], dim=-1), self.args.num_ensembles)
        return critic(inputs).squeeze(-1)

    def inner_values(self, observations, x, t, detach=False):
        """V_e(s, x, tau): (S, N, D), (S, N, A), (S, N, 1) -> (S, E, N)."""
        t = embed_time(t, self.frequencies) if self.args.use_time_embed else t
        inputs = to_ensemble(torch.cat([observations, x, t], dim=-1), self.args.num_ensembles)
        return self.inner_value(inputs, detach).squeeze(-1)

    def critic_loss(self, batch, noise):
        """L_Q + L_V of every seed (S,), and parts for the log.

        Args:
            batch: observations, next_observations (S, B, D), actions (S, B, A), rewards, masks (S, B).
            noise: see draw_noise, without the first axis and with a seed axis: (S, B, dim).
        """
        args, B = self.args, self.args.batch_size
        observations, actions, next_observations = batch["observations"], batch["actions"], batch["next_observations"]
        t = noise["value_time"]  # (S, B, 1)
        x = (1 - t) * noise["value_action"] + t * actions  # (S, B, A)

        # No gradient: targets are the regressions' fixed labels, and the policy is not trained through its solver.
        with torch.no_grad():
            # 1. One roll-out of the policy for both targets: from noise at s', and from the latents x at s.
            both_observations = torch.cat([next_observations, observations], dim=1)  # (S, 2*B, D)
            both_x = torch.cat([noise["next_action"], x], dim=1)  # (S, 2*B, A)
            both_t = torch.cat([torch.zeros_like(t), t], dim=1)  # (S, 2*B, 1)
            end_points = self.roll_out(both_observations, both_x, both_t)  # (S, 2*B, A)
            q = aggregate(self.q_values(self.target_critic, both_observations, end_points), args.q_agg)  # (S, 2*B)

            # 2. TD target y = r + gamma mask Q(s', a'), and the intermediate value's label Q(s, end point).
            next_q, inner_target = q.split(B, dim=1)  # (S, B)
            target = batch["rewards"] + args.gamma * batch["masks"] * next_q  # (S, B)

        # 3. Regressions. The intermediate values are aggregated before the square, the critics are not.
        q = self.q_values(self.critic, observations, actions)  # (S, E, B)
        outer_loss = (q - target.unsqueeze(1)).square().mean(dim=(1, 2))  # (S,)
        value = aggregate(self.inner_values(observations, x, t), args.q_agg)  # (S, B)
        distillation_loss = (value - inner_target).square().mean(dim=1)  # (S,)

        critic_loss = outer_loss + distillation_loss
        return critic_loss, {
            "critic/outer_loss": outer_loss,
            "critic/distillation_loss": distillation_loss,
            "critic/q_outer_mean": q.mean(dim=(1, 2)),
            "critic/q_inner_mean": value.mean(dim=1),
            "critic/target_mean": target.mean(dim=1),
        }

    def guidance(self, observations, x, t):
        """g = grad_x mean_e V_e(s, x, tau): (S, N, D), (S, N, A), (S, N, 1) -> (S, N, A), a constant."""
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            value = self.inner_values(observations, x, t, detach=True).mean(dim=1)  # (S, N)
            return torch.autograd.grad(value.sum(), x)[0]

    def actor_loss(self, batch, noise):
        """L_pi of every seed (S,), and parts for the log; arguments as for critic_loss."""
        args, observations, actions = self.args, batch["observations"], batch["actions"]

        # Flow matching towards the data's velocity plus guidance: u(s, x_t, t) -> sg[(a - x_0) + g / lambda].
        x_0, t = noise["policy_action"], noise["policy_time"]  # (S, B, A), (S, B, 1)
        x_t = (1 - t) * x_0 + t * actions
        guidance = self.guidance(observations, x_t, t)  # (S, B, A)
        velocity = self.policy_velocity(observations)(x_t, t)  # (S, B, A)
        label = actions - x_0 + guidance / (args.alpha + 1e-8)
        actor_loss = (velocity - label).square().mean(dim=(1, 2))  # (S,)
        return actor_loss, {
            "actor/total_loss": actor_loss,
            "actor/guidance_norm": guidance.norm(dim=-1).mean(dim=1),
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
            targets, online = list(self.target_critic.parameters()), list(self.critic.parameters())
            torch._foreach_lerp_(targets, online, self.args.tau)
        self.optimizer.step()
        return {name: value.detach() for name, value in (critic_metrics | actor_metrics).items()}

    @torch.no_grad()
    def act(self, observations, noise):
        """The flow policy's action: (S, N, D), (S, N, A) -> (S, N, A)."""
        return self.roll_out(observations, noise, torch.zeros_like(noise[..., :1]))


def aggregate(x, how):
    """Mean or minimum over the ensemble: (S, E, N) -> (S, N)."""
    return x.mean(dim=1) if how == "mean" else x.amin(dim=1)


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
