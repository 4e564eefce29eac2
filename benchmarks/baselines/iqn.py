"""IQN: return distributions by quantiles (Dabney et al. 2018, arXiv 1806.06923), on OGBench; a baseline.

The idea: the return of (s,a) is a random variable, and a network z(level|s,a) computes its quantile at any level in
[0,1]. It is trained by quantile regression towards r + gamma z(level'|s',a') at other levels: a Huber loss that weighs
errors of one sign by the level and of the other by its complement. For continuous actions as in the Value Flows paper:
16 actions are drawn from a behaviour-cloning flow, and the one with the largest mean of quantiles is taken (rejection
sampling), in targets as in acting.

Read first: Quantiles, Agent.critic_loss, Agent.actor_loss (what is learned), update (one step), then the main program
at the end. An agent is written for one seed; common/stacked.py runs several side by side.

    python -m benchmarks.baselines.iqn --quick                                         # generated data, small networks
    python -m benchmarks.baselines.iqn --env-id cube-double-play-singletask-task1-v0   # the published hyperparameters
    python benchmarks/baselines/iqn.py --env-id scene-play-singletask-v0 --num-seeds 8 --online-timesteps 1000000

Notation in the shapes: E ensemble members, B batch, C candidate actions, N rows, Q quantile levels, D observation
dimension, A action dimension, K Euler steps. "As released": as the authors' code does, whatever the paper says.
"""

import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # where common/ lies

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
    quick: bool = False  # the whole pipeline small: generated data, small networks (see QUICK)

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
    tau: float = 0.005  # EMA rate of the target critic
    num_quantiles: int = 16  # quantile levels Q per distribution, drawn anew at each use
    kappa: float = 0.9  # where the Huber loss turns from a square to a line
    num_cosines: int = 64  # cosines that a quantile level is embedded by
    embedding_dim: int = 512  # dimension of the embeddings of (s, a) and of the level
    num_samples: int = 16  # candidate actions C of rejection sampling (1: pure behaviour cloning)
    num_flow_steps: int = 10  # Euler steps K of the behaviour-cloning flow
    quantile_agg: Literal["mean", "min"] = "mean"  # aggregation of quantiles over the two critics
    clip_flow_actions: bool = True  # keep actions in [-1, 1] after every Euler step (they always end there)
    value_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)  # hidden widths of the critic
    value_layer_norm: bool = True  # layer normalisation in the critic
    actor_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)  # hidden widths of the cloning flow
    actor_layer_norm: bool = True  # layer normalisation in the cloning flow

    # Speed
    compile: bool = True  # compile the losses: up to two minutes at first, then faster updates
    cudagraphs: bool = True  # replay updates and policies as CUDA graphs (on a GPU)
    matmul_precision: Literal["highest", "high", "medium"] | None = None
    """float32 products: highest (exact), high (TF32), medium (bfloat16); default: high where a GPU has TF32"""


# The Value Flows paper's settings for each environment.
TUNED = {
    "cube-double-play": dict(gamma=0.995),
    "cube-triple-play": dict(gamma=0.995, kappa=0.8),
    "puzzle-3x3-play": dict(gamma=0.995, kappa=0.8),
    "puzzle-4x4-play": dict(kappa=0.95),
    "scene-play": dict(kappa=0.95),
}

# What offline-to-online runs change further.
TUNED_ONLINE = {
    "antmaze-large-navigate": dict(kappa=0.7),
    "humanoidmaze-medium-navigate": dict(gamma=0.995, kappa=0.7),
    "cube-double-play": {},
    "cube-triple-play": {},
    "puzzle-4x4-play": dict(kappa=0.8),
    "scene-play": {},
}

# What --evaluate may change.
INFERENCE = ("num_quantiles", "num_samples", "num_flow_steps")

# What --quick changes: data that are made here, and small sizes.
QUICK = dict(exp_name=f"{Path(__file__).stem}-quick", cuda=False, env_id="cube-single-noisy-singletask-v0")
QUICK |= dict(dataset_source="generated", generated_episodes=120)
QUICK |= dict(total_timesteps=8_000, eval_interval=2_000, log_interval=500, save_interval=2_000)
QUICK |= dict(tau=0.01, num_quantiles=4, embedding_dim=256, num_samples=8, num_flow_steps=5)
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
    """Mean or minimum over the ensemble: (E, ...) -> (...)."""
    return x.mean(dim=0) if how == "mean" else x.amin(dim=0)


def quantile_huber(errors, levels, kappa):
    """Quantile regression's loss, |level - [error < 0]| Huber(error) / kappa: elementwise, shapes broadcast.

    Huber(u) = u^2 / 2 up to |u| = kappa, kappa (|u| - kappa / 2) beyond.
    """
    size = errors.abs()
    huber = torch.where(size <= kappa, size.square() / 2, kappa * (size - kappa / 2))
    return (levels - (errors < 0).float()).abs() * huber / kappa


class Quantiles(nn.Module):
    """Quantile functions z_e(level | s, a), e = 1..E: MLPs on the product of the embeddings of (s, a) and of the level.

    Both embeddings are linear and shared by the ensemble, the level's in cos(pi i level), i = 1..num_cosines.
    `condition_dim` is the dimension of (s, a).
    """

    def __init__(self, args, condition_dim, ensemble):
        super().__init__()
        self.condition_embedding = MLP((condition_dim, args.embedding_dim), layer_norm=False)
        self.level_embedding = MLP((args.num_cosines, args.embedding_dim), layer_norm=False)
        self.mlp = MLP((args.embedding_dim, *args.value_hidden_dims, 1), args.value_layer_norm, ensemble)
        # Not persistent: a function of the arguments.
        self.register_buffer("frequencies", math.pi * torch.arange(1, args.num_cosines + 1), persistent=False)

    def forward(self, condition, levels):
        """[s, a] (..., D + A), levels (..., Q), whose first axes broadcast -> (E, ..., Q)."""
        cosines = torch.cos(levels.unsqueeze(-1) * self.frequencies)  # (..., Q, num_cosines)
        x = self.condition_embedding(condition).unsqueeze(-2) * self.level_embedding(cosines)  # (..., Q, embedding_dim)
        quantiles = self.mlp(x.flatten(0, -2))  # (E, N*Q, 1)
        return quantiles.view(-1, *x.shape[:-1])


# --- Agent ---


class Agent(nn.Module):
    """One IQN agent; common/stacked.py runs one per seed.

    Args:
        args: see Args.
        obs_dim, action_dim: dimensions of observations and actions.
        min_reward, max_reward: the dataset's extreme rewards (not used: quantiles are not bounded).
    """

    ACTS = ("actor_flow", "critic")  # the networks that acting needs
    NUM_CRITICS = 2  # critics E

    def __init__(self, args, obs_dim, action_dim, min_reward, max_reward):
        super().__init__()
        self.args, self.action_dim = args, action_dim
        bc_flow_dims = (obs_dim + action_dim + 1, *args.actor_hidden_dims, action_dim)  # inputs [s, x, t]
        self.critic = Quantiles(args, obs_dim + action_dim, (self.NUM_CRITICS,))
        self.actor_flow = MLP(bc_flow_dims, args.actor_layer_norm)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)

    def bc_velocity(self, observations, x, t):
        """The cloning flow's velocity u(s, x, t): (N, D), (N, A), t (N, 1) or a float -> (N, A)."""
        t = t if torch.is_tensor(t) else torch.full_like(x[:, :1], t)
        return self.actor_flow(observations, torch.cat([x, t], dim=-1))

    def flow_actions(self, observations, noise):
        """End points of the cloning flow: (N, D), (N, C, A) -> (N, C, A) in [-1, 1]."""
        K, C = self.args.num_flow_steps, noise.shape[1]
        rows = observations.repeat_interleave(C, dim=0)  # (N*C, D)
        x = noise.flatten(0, 1)  # (N*C, A)
        for k in range(K):
            x = x + self.bc_velocity(rows, x, k / K) / K
            x = x.clamp(-1, 1) if self.args.clip_flow_actions else x
        return x.clamp(-1, 1).unflatten(0, (-1, C))

    def quantiles(self, critic, observations, actions, levels):
        """Quantiles of the return: (..., D), (..., A), levels (..., Q) -> (E, ..., Q)."""
        return critic(torch.cat([observations, actions], dim=-1), levels)

    def q_values(self, observations, actions, levels):
        """Q(s, a), the mean of agg_e of the quantiles: (N, D), (N, C, A), (C, Q) or (N, C, Q) -> (N, C)."""
        rows = observations.unsqueeze(1).expand(-1, actions.shape[1], -1)  # (N, C, D)
        quantiles = self.quantiles(self.critic, rows, actions, levels)  # (E, N, C, Q)
        return aggregate(quantiles, self.args.quantile_agg).mean(dim=-1)

    def rejection_sampling(self, observations, action_noise, levels):
        """The best of C flow actions: (N, D), (N, C, A), (C, Q) or (N, C, Q) -> (N, A)."""
        actions = self.flow_actions(observations, action_noise)  # (N, C, A)
        best = self.q_values(observations, actions, levels).argmax(dim=1)  # (N,)
        index = best[:, None, None].expand(-1, -1, actions.shape[2])  # (N, 1, A)
        return actions.gather(1, index).squeeze(1)

    def critic_loss(self, batch, noise):
        """L_critic, and its parts for the log; trains the critics.

        Args:
            batch: observations, next_observations (B, D), actions (B, A), rewards (B,), masks (B,), 0 at a success.
            noise: an update's entries of draw_noise.
        """
        args, next_observations = self.args, batch["next_observations"]
        rewards, masks = batch["rewards"].unsqueeze(-1), batch["masks"].unsqueeze(-1)  # (B, 1)
        levels = noise["level"]  # (B, Q)

        # No gradient through steps 1 and 2: they make the regression's fixed labels.
        with torch.no_grad():
            # 1. The next action, by rejection sampling with the trained critics, not their targets, as released.
            candidates, next_q = noise["next_action_candidates"], noise["next_q"]  # (B, C, A), (C, Q)
            next_actions = self.rejection_sampling(next_observations, candidates, next_q)  # (B, A)

            # 2. Targets r + gamma mask z(level'), at levels of their own.
            next_quantiles = self.quantiles(self.target_critic, next_observations, next_actions, noise["next_level"])
            next_quantiles = aggregate(next_quantiles, args.quantile_agg)  # (B, Q)
            target = rewards + args.gamma * masks * next_quantiles  # (B, Q)

        # 3. Quantile regression of every quantile on every target. As released, summed over the quantiles.
        quantiles = self.quantiles(self.critic, batch["observations"], batch["actions"], levels)  # (E, B, Q)
        errors = target.unsqueeze(1) - quantiles.unsqueeze(-1)  # (E, B, Q, Q): quantiles, then targets
        critic_loss = quantile_huber(errors, levels.unsqueeze(-1), args.kappa).sum(dim=2).mean()
        return critic_loss, {
            "critic/critic_loss": critic_loss,
            "critic/q_mean": quantiles.mean(),
            "critic/target_mean": target.mean(),
        }

    def actor_loss(self, batch, noise):
        """L_BC, and its parts for the log; trains the cloning flow. Arguments as for critic_loss."""
        # Behaviour cloning by flow matching: u(s, x_t, t) -> a - x_0.
        x_0, t = noise["bc_action"], noise["bc_time"]  # (B, A), (B, 1)
        x_t = (1 - t) * x_0 + t * batch["actions"]  # (B, A)
        velocity = self.bc_velocity(batch["observations"], x_t, t)  # (B, A)
        bc_flow_loss = (velocity - (batch["actions"] - x_0)).square().mean()
        return bc_flow_loss, {"actor/bc_flow_loss": bc_flow_loss}

    def act(self, observations, noise):
        """Rejection sampling: (N, D), (N, C, A + Q) -> (N, A). Levels are Phi(noise): acting's noise is normal."""
        action_noise, level_noise = noise.split([self.action_dim, self.args.num_quantiles], dim=-1)
        return self.rejection_sampling(observations, action_noise, torch.special.ndtr(level_noise))

    def draw_noise(self, generator, num_updates):
        """Random numbers of `num_updates` updates, named after what they become: {name: (num_updates, ...)}."""
        B, A, C, Q = self.args.batch_size, self.action_dim, self.args.num_samples, self.args.num_quantiles
        device = generator.device
        normal = lambda *shape: torch.randn(num_updates, *shape, generator=generator, device=device)
        uniform = lambda *shape: torch.rand(num_updates, *shape, generator=generator, device=device)
        return {
            "next_action_candidates": normal(B, C, A),
            "next_q": uniform(C, Q),  # as released, the same for all rows
            "next_level": uniform(B, Q),
            "level": uniform(B, Q),
            "bc_action": normal(B, A),
            "bc_time": uniform(B, 1),
        }

    def draw_act_noise(self, generator, num_steps):
        """The random numbers of `num_steps` actions: (num_steps, C, A + Q), see `act`."""
        shape = (num_steps, self.args.num_samples, self.action_dim + self.args.num_quantiles)
        return torch.randn(shape, generator=generator, device=generator.device)


def update(agents, batch, noise):
    """One update of every seed; returns the losses at the weights before it, {name: one per seed}.

    Batch and noise are those of Agent.critic_loss with a leading axis of seeds. A loss moves the networks that `trains`
    names; to it, all others are constants (see common/stacked.py, also for `agents`).
    """
    agents.optimizer.zero_grad()
    with agents.side_by_side():  # neither loss waits for the other
        metrics = agents.backward("critic_loss", batch, noise, trains=("critic",))
        metrics |= agents.backward("actor_loss", batch, noise, trains=("actor_flow",))

    # As released, the EMA comes before Adam's step: the targets lag by one update.
    agents.ema("target_critic", "critic", agents.agent.args.tau)
    agents.optimizer.step()
    return metrics


# --- Main program ---


def parse_args(words=None):
    """The arguments of a command line (None: this program's), and the checkpoint to continue from, or None."""
    args, resumed = arguments.parse(Args, TUNED, TUNED_ONLINE, QUICK, INFERENCE, words=words)
    above_zero = "num_quantiles kappa num_cosines embedding_dim num_samples num_flow_steps"
    above_zero += " value_hidden_dims actor_hidden_dims"
    arguments.check_numbers(args, above_zero.split())
    if envs.is_pixels(args.env_id):
        fail(f"--env-id {args.env_id}: iqn.py works on state observations")
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
