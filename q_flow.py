"""Q-Flow: policy improvement by intermediate values of a flow policy (arXiv 2605.13435), on OGBench.

The idea: a flow policy turns noise into an action in K Euler steps. A value V(s,x,t) of a point x on the way at flow
time t says what the action at the end will be worth. Its label is a TD critic's Q(s,a) at the end of a roll-out from x
by the policy. Its gradient in x bends the flow: the velocity is regressed on the behaviour's velocity plus
grad V / lambda. Nothing is differentiated through the solver, and there is no cloning network and no second policy:
the flow itself acts.

Read first: Agent.roll_out (the flow), Agent.critic_loss, Agent.actor_loss (what is learned), update (one step), then
the main program at the end. An agent is written for one seed; common/stacked.py runs several side by side.

    python q_flow.py --quick                                            # minutes on two CPU cores, data included
    python q_flow.py --env-id cube-single-play-singletask-v0            # the published hyperparameters
    python q_flow.py --env-id antmaze-giant-navigate-singletask-v0 --num-seeds 8 --online-timesteps 1000000  # online

Notation in the shapes: E ensemble members, B batch, N rows, D observation dimension, A action dimension,
K Euler steps. "As released": as the authors' code does, whatever the paper says.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import arguments, checkpoint, datasets, envs, export, fail, graphs, policies, rollout
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
    tau: float = 0.005  # EMA rate of the target critic
    alpha: float = 1.0
    """the paper's lambda, strength of behaviour cloning: the guidance is grad V / lambda (1e6: pure cloning)"""
    flow_steps: int = 10  # Euler steps K of the flow policy
    q_agg: Literal["mean", "min"] = "mean"
    """aggregation of values over the ensemble (the guidance is always of the mean)"""
    num_ensembles: int = 2  # critics E, and as many intermediate values
    use_time_embed: bool = False
    """give the intermediate value sines and cosines of the flow time instead of the raw number"""
    time_embed_dim: int = 16  # number of these sines and cosines, even
    actor_time_embed: bool = False
    """give the flow policy these sines and cosines too (paper) instead of the raw number (released code)"""
    layer_norm: bool = True  # layer normalisation in the critic and the intermediate value
    value_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)  # hidden widths of the critic and the intermediate value
    actor_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)  # hidden widths of the flow policy
    actor_layer_norm: bool = False  # layer normalisation in the flow policy

    # Speed
    compile: bool = True  # compile the losses: up to two minutes at first, then faster updates
    cudagraphs: bool = True  # replay updates and policies as CUDA graphs (on a GPU)
    matmul_precision: Literal["highest", "high", "medium"] | None = None
    """float32 products: highest (exact), high (TF32), medium (bfloat16); default: high where a GPU has TF32"""


# The paper's settings, which replace Args' defaults; the time embedding is that of the authors' notebook.
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

# Where the paper or its authors' commands go online; nothing further changes there.
TUNED_ONLINE = {
    "antmaze-giant-navigate": {},
    "humanoidmaze-medium-navigate": {},
    "antsoccer-arena-navigate": {},
    "cube-double-play": {},
    "scene-play": {},
    "puzzle-4x4-play": {},
}

# What --evaluate may change; training uses it too.
INFERENCE = ("flow_steps",)

# What --quick changes: data that are made here, and sizes that learn within minutes on two cores.
QUICK = dict(exp_name=f"{Path(__file__).stem}-quick", cuda=False, env_id="cube-single-noisy-singletask-v0")
QUICK |= dict(dataset_source="generated", generated_episodes=120)
QUICK |= dict(total_timesteps=12_000, eval_interval=4_000, log_interval=500, save_interval=2_000)
QUICK |= dict(tau=0.01, alpha=5.0, flow_steps=5, **EMBED)
QUICK |= dict(value_hidden_dims=(256, 256, 256), actor_hidden_dims=(256, 256, 256))


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


def time_frequencies(dim):
    """f_i = 256^(i / (dim / 2 - 1)), i = 0..dim / 2 - 1; rounded once, from float64: the same on every processor."""
    return torch.linspace(0, math.log(256), dim // 2, dtype=torch.float64).exp().float()


def embed_time(t, frequencies):
    """[sin(f_i t), cos(f_i t)]: (N, 1), (dim / 2,) -> (N, dim)."""
    return torch.cat([torch.sin(t * frequencies), torch.cos(t * frequencies)], dim=-1)


# --- Agent ---


class Agent(nn.Module):
    """One Q-Flow agent; common/stacked.py runs one per seed.

    Args:
        args: see Args.
        obs_dim, action_dim: dimensions of observations and actions.
        min_reward, max_reward: the dataset's extreme rewards (not used: Q-Flow's values are not bounded).
    """

    ACTS = ("actor_flow",)  # the networks that acting needs

    def __init__(self, args, obs_dim, action_dim, min_reward, max_reward):
        super().__init__()
        self.args, self.action_dim = args, action_dim
        self.register_buffer("frequencies", time_frequencies(args.time_embed_dim), persistent=False)
        policy_t_dim = args.time_embed_dim if args.actor_time_embed else 1
        value_t_dim = args.time_embed_dim if args.use_time_embed else 1

        ensemble = (args.num_ensembles,)
        critic_dims = (obs_dim + action_dim, *args.value_hidden_dims, 1)  # inputs [s, a]
        value_dims = (obs_dim + action_dim + value_t_dim, *args.value_hidden_dims, 1)  # inputs [s, x, emb(t)]
        policy_dims = (obs_dim + action_dim + policy_t_dim, *args.actor_hidden_dims, action_dim)  # inputs [s, x, t]
        self.critic = MLP(critic_dims, args.layer_norm, ensemble)  # the paper's outer value Q
        self.inner_value = MLP(value_dims, args.layer_norm, ensemble)  # its inner value V
        self.actor_flow = MLP(policy_dims, args.actor_layer_norm)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)

    def velocity(self, observations, x, t):
        """The policy's velocity u(s, x, t): (N, D), (N, A), (N, 1) -> (N, A)."""
        t = embed_time(t, self.frequencies) if self.args.actor_time_embed else t
        return self.actor_flow(observations, torch.cat([x, t], dim=-1))

    def roll_out(self, observations, x, t):
        """Carries points from their flow time t to the action at 1: K Euler steps of min(1 / K, what is left).

        Args:
            observations, x, t: (N, D), (N, A), (N, 1) in [0, 1].

        Returns:
            (N, A) in [-1, 1]; clipped at the end only.
        """
        for _ in range(self.args.flow_steps):
            step = (1 - t).clamp(0, 1 / self.args.flow_steps)  # (N, 1)
            x = x + step * self.velocity(observations, x, t)
            t = t + step
        return x.clamp(-1, 1)

    def q_values(self, critic, observations, actions):
        """Q_e(s, a) of a critic: (N, D), (N, A) -> (E, N)."""
        return critic(torch.cat([observations, actions], dim=-1)).squeeze(-1)

    def inner_values(self, observations, x, t):
        """The intermediate values V_e(s, x, t): (N, D), (N, A), (N, 1) -> (E, N)."""
        t = embed_time(t, self.frequencies) if self.args.use_time_embed else t
        return self.inner_value(torch.cat([observations, x, t], dim=-1)).squeeze(-1)

    def critic_loss(self, batch, noise):
        """L_Q + L_V, and their parts for the log; trains the critics and the intermediate values.

        Args:
            batch: observations, next_observations (B, D), actions (B, A), rewards (B,), masks (B,), 0 at a success.
            noise: an update's entries of draw_noise, (B, dim).
        """
        args = self.args
        observations, actions, next_observations = batch["observations"], batch["actions"], batch["next_observations"]
        x_0, t = noise["value_action"], noise["value_time"]  # (B, A), (B, 1)
        x_t = (1 - t) * x_0 + t * actions  # (B, A)

        # No gradient: targets are the regressions' fixed labels.
        with torch.no_grad():
            # 1. One roll-out of the policy for both targets: from noise at s' at time 0, and from x_t at s at time t.
            both_observations = torch.cat([next_observations, observations])  # (2*B, D)
            both_x = torch.cat([noise["next_action"], x_t])  # (2*B, A)
            both_t = torch.cat([torch.zeros_like(t), t])  # (2*B, 1)
            end_points = self.roll_out(both_observations, both_x, both_t)  # (2*B, A)
            target_q = aggregate(self.q_values(self.target_critic, both_observations, end_points), args.q_agg)  # (2*B,)

            # 2. TD target y = r + gamma mask Q(s', a'), and the intermediate value's label Q(s, end point).
            next_q, inner_target = target_q.chunk(2)  # (B,)
            target = batch["rewards"] + args.gamma * batch["masks"] * next_q  # (B,)

        # 3. Regressions. As released, intermediate values are aggregated before the square, critics are not.
        q = self.q_values(self.critic, observations, actions)  # (E, B)
        outer_loss = (q - target).square().mean()  # the paper's L_Q
        inner_value = aggregate(self.inner_values(observations, x_t, t), args.q_agg)  # (B,)
        distillation_loss = (inner_value - inner_target).square().mean()  # the paper's L_V

        return outer_loss + distillation_loss, {
            "critic/outer_loss": outer_loss,
            "critic/distillation_loss": distillation_loss,
            "critic/q_outer_mean": q.mean(),
            "critic/q_inner_mean": inner_value.mean(),
            "critic/target_mean": target.mean(),
        }

    def actor_loss(self, batch, noise):
        """L_pi, and its parts for the log; trains the policy alone. Arguments as for critic_loss."""
        observations, actions = batch["observations"], batch["actions"]
        x_0, t = noise["policy_action"], noise["policy_time"]  # (B, A), (B, 1)
        x_t = (1 - t) * x_0 + t * actions  # (B, A)

        # 1. Guidance g = grad_x mean_e V_e(s, x_t, t). No gradient flows into it: it is a part of the label.
        value = lambda x: self.inner_values(observations, x, t).mean(dim=0).sum()  # each depends on its own x only
        guidance = torch.func.grad(value)(x_t)  # (B, A)

        # 2. Flow matching towards the data's velocity plus guidance: u(s, x_t, t) -> a - x_0 + g / lambda (--alpha).
        label = (actions - x_0 + guidance / (self.args.alpha + 1e-8)).detach()  # (B, A); 1e-8 as released
        velocity = self.velocity(observations, x_t, t)  # (B, A)
        actor_loss = (velocity - label).square().mean()
        return actor_loss, {
            "actor/total_loss": actor_loss,
            "actor/guidance_norm": guidance.norm(dim=-1).mean(),
        }

    def act(self, observations, noise):
        """The flow policy's action: (N, D), (N, A) -> (N, A) in [-1, 1]."""
        return self.roll_out(observations, noise, torch.zeros_like(noise[..., :1]))

    def draw_noise(self, generator, num_updates):
        """Random numbers of `num_updates` updates, named after what they become: {name: (num_updates, B, dim)}."""
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
        """The random numbers of `num_steps` actions: (num_steps, A)."""
        return torch.randn(num_steps, self.action_dim, generator=generator, device=generator.device)


def update(agents, batch, noise):
    """One update of every seed; returns the losses at the weights before it, {name: one per seed}.

    Batch and noise are those of Agent.critic_loss with a leading axis of seeds. A loss moves the networks that `trains`
    names; to it, all others are constants (see common/stacked.py, also for `agents`).
    """
    agents.optimizer.zero_grad()
    with agents.side_by_side():  # neither loss waits for the other
        metrics = agents.backward("critic_loss", batch, noise, trains=("critic", "inner_value"))
        metrics |= agents.backward("actor_loss", batch, noise, trains=("actor_flow",))

    # As released, the EMA comes before Adam's step: the targets lag by one update.
    agents.ema("target_critic", "critic", agents.agent.args.tau)
    agents.optimizer.step()
    return metrics


# --- Main program ---


def parse_args(words=None):
    """The arguments of a command line (None: this program's), and the checkpoint to continue from, or None."""
    args, resumed = arguments.parse(Args, TUNED, TUNED_ONLINE, QUICK, INFERENCE, words=words)
    above_zero = "alpha flow_steps num_ensembles time_embed_dim value_hidden_dims actor_hidden_dims"
    arguments.check_numbers(args, above_zero.split())
    if args.time_embed_dim % 2:
        fail(f"--time-embed-dim {args.time_embed_dim} must be even: half of it are sines, half cosines")
    if envs.is_pixels(args.env_id):
        fail(f"--env-id {args.env_id}: q_flow.py works on state observations, as its paper does")
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
