"""C51: categorical return distributions (Bellemare et al. 2017, arXiv 1707.06887), on OGBench; a baseline.

The idea: the return of (s,a) is a random variable, and its distribution is a histogram on fixed atoms z_1..z_n between
the smallest and the largest return. The target r + gamma z' of a next atom falls between two atoms, which share its
mass (the categorical projection). For continuous actions as in the Value Flows paper: 16 actions are drawn from a
behaviour-cloning flow, and the one with the largest mean return is taken (rejection sampling), in targets as in acting.

Read first: project, Agent.critic_loss, Agent.actor_loss (what is learned), update (one step), then the main program at
the end. An agent is written for one seed; common/stacked.py runs several side by side.

    python -m benchmarks.baselines.c51 --quick                                         # generated data, small networks
    python -m benchmarks.baselines.c51 --env-id cube-double-play-singletask-task1-v0   # the published hyperparameters
    python benchmarks/baselines/c51.py --env-id scene-play-singletask-v0 --loss cross_entropy   # C51's own loss

Notation in the shapes: E critics, B batch, C candidate actions, N rows, n atoms, D observation dimension, A action
dimension, K Euler steps. "As released": as the authors' code does, whatever the paper says.
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
    num_atoms: int = 51  # atoms n of the return distribution
    loss: Literal["released", "cross_entropy"] = "released"
    """-sum m_i logit_i (released code) or the cross-entropy -sum m_i log p_i (C51's paper) of the target's masses m"""
    num_samples: int = 16  # candidate actions C of rejection sampling (1: pure behaviour cloning)
    num_flow_steps: int = 10  # Euler steps K of the behaviour-cloning flow
    q_agg: Literal["mean", "min"] = "mean"  # aggregation of Q-values over the two critics
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
    "cube-double-play": dict(gamma=0.995, num_atoms=101),
    "cube-triple-play": dict(gamma=0.995),
    "puzzle-3x3-play": dict(gamma=0.995, num_atoms=101),
    "puzzle-4x4-play": dict(num_atoms=101, q_agg="min"),
    "scene-play": {},
}

# That paper has no offline-to-online runs of C51.
TUNED_ONLINE = {}

# What --evaluate may change.
INFERENCE = ("num_samples", "num_flow_steps")

# What --quick changes: data that are made here, and small sizes.
QUICK = dict(exp_name=f"{Path(__file__).stem}-quick", cuda=False, env_id="cube-single-noisy-singletask-v0")
QUICK |= dict(dataset_source="generated", generated_episodes=120)
QUICK |= dict(total_timesteps=8_000, eval_interval=2_000, log_interval=500, save_interval=2_000)
QUICK |= dict(tau=0.01, num_samples=8, num_flow_steps=5)
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


def project(places, mass):
    """The categorical projection: each mass is split between the two atoms beside it, in proportion to its nearness.

    m_i = sum_j mass_j max(0, 1 - |places_j - i|), i = 0..n - 1

    Places in units of atoms, between 0 and n - 1: (B, n), masses (B, n) -> (B, n).
    """
    atoms = torch.arange(mass.shape[-1], device=mass.device)
    share = (1 - (places.unsqueeze(-1) - atoms).abs()).clamp(min=0)  # (B, n, n)
    return (mass.unsqueeze(-1) * share).sum(dim=-2)


# --- Agent ---


class Agent(nn.Module):
    """One C51 agent; common/stacked.py runs one per seed.

    Args:
        args: see Args.
        obs_dim, action_dim: dimensions of observations and actions.
        min_reward, max_reward: the dataset's extreme rewards, which fix the range of returns.
    """

    ACTS = ("actor_flow", "critic")  # the networks that acting needs
    NUM_CRITICS = 2  # critics E

    def __init__(self, args, obs_dim, action_dim, min_reward, max_reward):
        super().__init__()
        self.args, self.action_dim = args, action_dim
        horizon = 1 / (1 - args.gamma)
        z_min, z_max = min_reward * horizon, max_reward * horizon  # as released, without 0, an end's return
        self.spacing = max(z_max - z_min, 1e-6) / (args.num_atoms - 1)  # above zero even if all rewards are equal
        # Not persistent: a function of the arguments and the data's rewards.
        self.register_buffer("atoms", torch.linspace(z_min, z_max, args.num_atoms), persistent=False)

        critic_dims = (obs_dim + action_dim, *args.value_hidden_dims, args.num_atoms)  # inputs [s, a]
        bc_flow_dims = (obs_dim + action_dim + 1, *args.actor_hidden_dims, action_dim)  # inputs [s, x, t]
        self.critic = MLP(critic_dims, args.value_layer_norm, (self.NUM_CRITICS,))
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

    def logits(self, critic, observations, actions):
        """Logits of the return distributions: (N, D), (N, A) -> (E, N, n)."""
        return critic(torch.cat([observations, actions], dim=-1))

    def means(self, logits):
        """Mean returns of distributions, sum_i p_i z_i: (..., n) -> (...)."""
        return (logits.softmax(dim=-1) * self.atoms).sum(dim=-1)

    def q_values(self, observations, actions):
        """Q(s, a) = agg_e of the mean returns: (N, D), (N, C, A) -> (N, C)."""
        C = actions.shape[1]
        logits = self.logits(self.critic, observations.repeat_interleave(C, dim=0), actions.flatten(0, 1))
        return aggregate(self.means(logits), self.args.q_agg).view(-1, C)

    def rejection_sampling(self, observations, noise):
        """The best of C flow actions: (N, D), (N, C, A) -> (N, A)."""
        actions = self.flow_actions(observations, noise)  # (N, C, A)
        best = self.q_values(observations, actions).argmax(dim=1)  # (N,)
        index = best[:, None, None].expand(-1, -1, actions.shape[2])  # (N, 1, A)
        return actions.gather(1, index).squeeze(1)

    def critic_loss(self, batch, noise):
        """L_critic, and its parts for the log; trains the critics.

        Args:
            batch: observations, next_observations (B, D), actions (B, A), rewards (B,), masks (B,), 0 at a success.
            noise: an update's entries of draw_noise, (B, ...).
        """
        args, next_observations = self.args, batch["next_observations"]
        rewards, masks = batch["rewards"].unsqueeze(-1), batch["masks"].unsqueeze(-1)  # (B, 1)

        # No gradient through steps 1 and 2: they make the regression's fixed labels.
        with torch.no_grad():
            # 1. The next action, by rejection sampling with the trained critics, not their targets, as released.
            next_actions = self.rejection_sampling(next_observations, noise["next_action_candidates"])  # (B, A)

            # 2. Masses of the target r + gamma mask z', as released of the mean of both target distributions.
            next_logits = self.logits(self.target_critic, next_observations, next_actions)  # (E, B, n)
            next_probs = next_logits.softmax(dim=-1).mean(dim=0)  # (B, n)
            returns = (rewards + args.gamma * masks * self.atoms).clamp(self.atoms[0], self.atoms[-1])  # (B, n)
            target = project((returns - self.atoms[0]) / self.spacing, next_probs)  # (B, n)

        # 3. Every critic towards the same masses. As released without the logits' normaliser, unlike a cross-entropy.
        logits = self.logits(self.critic, batch["observations"], batch["actions"])  # (E, B, n)
        scores = logits.log_softmax(dim=-1) if args.loss == "cross_entropy" else logits
        critic_loss = -(target * scores).sum(dim=-1).mean()
        return critic_loss, {
            "critic/critic_loss": critic_loss,
            "critic/q_mean": self.means(logits).mean(),
            "critic/target_mean": (target * self.atoms).sum(dim=-1).mean(),
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
        """Rejection sampling: (N, D), (N, C, A) -> (N, A)."""
        return self.rejection_sampling(observations, noise)

    def draw_noise(self, generator, num_updates):
        """Random numbers of `num_updates` updates, named after what they become: {name: (num_updates, B, ...)}."""
        B, A, C = self.args.batch_size, self.action_dim, self.args.num_samples
        device = generator.device
        normal = lambda *shape: torch.randn(num_updates, *shape, generator=generator, device=device)
        uniform = lambda *shape: torch.rand(num_updates, *shape, generator=generator, device=device)
        return {
            "next_action_candidates": normal(B, C, A),
            "bc_action": normal(B, A),
            "bc_time": uniform(B, 1),
        }

    def draw_act_noise(self, generator, num_steps):
        """The random numbers of `num_steps` actions: (num_steps, C, A)."""
        shape = (num_steps, self.args.num_samples, self.action_dim)
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
    above_zero = "num_atoms num_samples num_flow_steps value_hidden_dims actor_hidden_dims"
    arguments.check_numbers(args, above_zero.split())
    if args.num_atoms < 2:
        fail(f"--num-atoms {args.num_atoms}: a histogram needs at least 2 atoms")
    if envs.is_pixels(args.env_id):
        fail(f"--env-id {args.env_id}: c51.py works on state observations")
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
