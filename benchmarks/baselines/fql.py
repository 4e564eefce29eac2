"""FQL: flow Q-learning (Park, Li and Levine 2025, arXiv 2502.02538), on OGBench; a baseline of the four papers.

The idea: a flow policy is expressive, but its many steps make it hard to train by a critic. So a behaviour-cloning flow
only imitates the data, and a one-step policy is trained beside it: it maximises a plain critic and is distilled towards
the cloning flow's action from the same noise. The critic is trained by ordinary TD, y = r + gamma E[Q(s',a')], with an
EMA copy in the target. floq.py keeps this policy and replaces the critic by a flow.

Read first: Agent.critic_loss, Agent.actor_loss (what is learned), update (one step), then the main program at the end.
An agent is written for one seed; common/stacked.py runs several side by side.

    python -m benchmarks.baselines.fql --quick                                  # generated data, small networks
    python -m benchmarks.baselines.fql --env-id cube-single-play-singletask-v0  # the published hyperparameters
    python benchmarks/baselines/fql.py --env-id scene-play-singletask-v0 --num-seeds 8    # eight seeds in one process

Notation in the shapes: E ensemble members, B batch, N rows, D observation dimension, A action dimension.
"As released": as the authors' code does, whatever the paper says.
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
    alpha: float = 10.0  # weight of the distillation towards the behaviour-cloning flow
    actor_flow_steps: int = 10  # Euler steps of the behaviour-cloning flow
    q_agg: Literal["mean", "min"] = "mean"  # aggregation of the target critics over the ensemble
    normalize_q_loss: bool = False  # divide the policy's Q term by the mean absolute Q
    num_ensembles: int = 2  # critics
    layer_norm: bool = True  # layer normalisation in the critic
    value_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)  # hidden widths of the critic
    actor_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)  # hidden widths of both policies
    actor_layer_norm: bool = False  # layer normalisation in both policies

    # Speed
    compile: bool = True  # compile the losses: up to two minutes at first, then faster updates
    cudagraphs: bool = True  # replay updates and policies as CUDA graphs (on a GPU)
    matmul_precision: Literal["highest", "high", "medium"] | None = None
    """float32 products: highest (exact), high (TF32), medium (bfloat16); default: high where a GPU has TF32"""


# The paper's settings, which replace Args' defaults; cube-triple's are those of the Value Flows paper.
TUNED = {
    "antmaze-large-navigate": dict(alpha=10.0, q_agg="min"),
    "antmaze-giant-navigate": dict(alpha=10.0, gamma=0.995, q_agg="min"),
    "humanoidmaze-medium-navigate": dict(alpha=30.0, gamma=0.995),
    "humanoidmaze-large-navigate": dict(alpha=30.0, gamma=0.995),
    "antsoccer-arena-navigate": dict(alpha=10.0, gamma=0.995),
    "cube-single-play": dict(alpha=300.0),
    "cube-double-play": dict(alpha=300.0),
    "cube-triple-play": dict(alpha=300.0, gamma=0.995),
    "scene-play": dict(alpha=300.0),
    "puzzle-3x3-play": dict(alpha=1000.0),
    "puzzle-4x4-play": dict(alpha=1000.0),
}

# What offline-to-online runs change further; antmaze-large's and cube-triple's are those of the Value Flows paper.
TUNED_ONLINE = {
    "antmaze-large-navigate": dict(q_agg="mean"),
    "humanoidmaze-medium-navigate": dict(alpha=100.0),
    "antsoccer-arena-navigate": dict(alpha=30.0),
    "cube-double-play": {},
    "cube-triple-play": {},
    "scene-play": {},
    "puzzle-4x4-play": {},
}

# What --evaluate may change: nothing, since the policy acts in one step.
INFERENCE = ()

# What --quick changes: data that are made here, and small sizes.
QUICK = dict(exp_name=f"{Path(__file__).stem}-quick", cuda=False, env_id="cube-single-noisy-singletask-v0")
QUICK |= dict(dataset_source="generated", generated_episodes=120)
QUICK |= dict(total_timesteps=16_000, eval_interval=4_000, log_interval=500, save_interval=2_000)
QUICK |= dict(alpha=100.0, tau=0.01, actor_flow_steps=5)
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


def euler(velocity, x, num_steps):
    """Carries x from t = 0 to 1 along velocity(x, t): x_{k+1} = x_k + v(x_k, k / K) / K."""
    for k in range(num_steps):
        x = x + velocity(x, k / num_steps) / num_steps
    return x


# --- Agent ---


class Agent(nn.Module):
    """One FQL agent; common/stacked.py runs one per seed.

    Args:
        args: see Args.
        obs_dim, action_dim: dimensions of observations and actions.
        min_reward, max_reward: the dataset's extreme rewards (not used: FQL's values are not bounded).
    """

    ACTS = ("actor_onestep_flow",)  # the networks that acting needs

    def __init__(self, args, obs_dim, action_dim, min_reward, max_reward):
        super().__init__()
        self.args, self.action_dim = args, action_dim
        critic_dims = (obs_dim + action_dim, *args.value_hidden_dims, 1)  # inputs [s, a]
        bc_flow_dims = (obs_dim + action_dim + 1, *args.actor_hidden_dims, action_dim)  # inputs [s, x, t]
        onestep_dims = (obs_dim + action_dim, *args.actor_hidden_dims, action_dim)  # inputs [s, noise]
        self.critic = MLP(critic_dims, args.layer_norm, (args.num_ensembles,))
        self.actor_bc_flow = MLP(bc_flow_dims, args.actor_layer_norm)
        self.actor_onestep_flow = MLP(onestep_dims, args.actor_layer_norm)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)

    def onestep_action(self, observations, noise):
        """mu(s, n), no flow in spite of the released name, unclipped as released: (N, D), (N, A) -> (N, A)."""
        return self.actor_onestep_flow(torch.cat([observations, noise], dim=-1))

    def bc_velocity(self, observations, x, t):
        """The cloning flow's velocity u(s, x, t): (N, D), (N, A), t (N, 1) or a float -> (N, A)."""
        t = t if torch.is_tensor(t) else torch.full_like(x[:, :1], t)
        return self.actor_bc_flow(observations, torch.cat([x, t], dim=-1))

    def q_values(self, critic, observations, actions):
        """Q_e(s, a) of a critic: (N, D), (N, A) -> (E, N)."""
        return critic(torch.cat([observations, actions], dim=-1)).squeeze(-1)

    def critic_loss(self, batch, noise):
        """L_critic, and its parts for the log; trains the critics.

        Args:
            batch: observations, next_observations (B, D), actions (B, A), rewards (B,), masks (B,), 0 at a success.
            noise: an update's entries of draw_noise, (rows, dim).
        """
        args, next_observations = self.args, batch["next_observations"]

        # 1. TD target y = r + gamma mask Q(s', a'). No gradient: it is the regression's fixed label.
        with torch.no_grad():
            next_actions = self.onestep_action(next_observations, noise["next_action"]).clamp(-1, 1)  # (B, A)
            next_q = self.q_values(self.target_critic, next_observations, next_actions)  # (E, B)
            target = batch["rewards"] + args.gamma * batch["masks"] * aggregate(next_q, args.q_agg)  # (B,)

        # 2. Regression of every critic on the same target.
        q = self.q_values(self.critic, batch["observations"], batch["actions"])  # (E, B)
        critic_loss = (q - target).square().mean()
        return critic_loss, {
            "critic/critic_loss": critic_loss,
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
        q = self.q_values(self.critic, observations, policy_actions.clamp(-1, 1)).mean(dim=0)  # (B,)
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
        B, A = self.args.batch_size, self.action_dim
        device = generator.device
        normal = lambda *shape: torch.randn(num_updates, *shape, generator=generator, device=device)
        uniform = lambda *shape: torch.rand(num_updates, *shape, generator=generator, device=device)
        return {
            "next_action": normal(B, A),
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
        metrics = agents.backward("critic_loss", batch, noise, trains=("critic",))
        metrics |= agents.backward("actor_loss", batch, noise, trains=("actor_bc_flow", "actor_onestep_flow"))

    # As released, the EMA comes before Adam's step: the targets lag by one update.
    agents.ema("target_critic", "critic", agents.agent.args.tau)
    agents.optimizer.step()
    return metrics


# --- Main program ---


def parse_args(words=None):
    """The arguments of a command line (None: this program's), and the checkpoint to continue from, or None."""
    args, resumed = arguments.parse(Args, TUNED, TUNED_ONLINE, QUICK, INFERENCE, words=words)
    above_zero = "actor_flow_steps num_ensembles value_hidden_dims actor_hidden_dims"
    arguments.check_numbers(args, above_zero.split(), at_least_zero=("alpha",))
    if envs.is_pixels(args.env_id):
        fail(f"--env-id {args.env_id}: fql.py works on state observations")
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
