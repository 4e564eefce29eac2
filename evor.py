"""EVOR: expressive value learning, improved at inference (arXiv 2510.08218), on OGBench.

The idea: a flow policy clones the data, and a scalar flow from N(0,1) learns the distribution of the return that this
base policy earns from (s,a); its velocities are the return fields v(z,t|s,a). Nothing is maximised in training. All
improvement is made when acting: draw candidate actions from the base policy, rate each by a soft maximum of its return
samples, draw one of them by a softmax of the ratings. How many and how greedily is chosen then, without training again.

Neither the authors' code nor the paper's full text could be read: docs/evor.md says what is known and what was chosen.
Flow TD, the return fields' Bellman equation, has a label of our own by default: the flow then ends at the distribution
of returns. With the paper's (`--td-target published`) it ends at a mean return plus the start noise.

Read first: Agent.flow_td (the targets), Agent.critic_loss, Agent.actor_loss (what is learned), Agent.act, update (one
step), then the main program at the end. An agent is written for one seed; common/stacked.py runs several side by side.

    python evor.py --quick                                                  # minutes on two CPU cores, data included
    python evor.py --env-id cube-single-play-singletask-v0 --num-seeds 8    # full size, eight seeds stacked
    python evor.py --evaluate runs/RUN_DIR --num-actions 64                 # a trained run with more candidates

Notation in the shapes: E return fields, B batch, C candidate actions, R return samples, N rows, D observation
dimension, A action dimension, K Euler steps.
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
from common.returns import reward_to_go
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
    tau: float = 0.005  # EMA rate of the target return fields
    flow_steps: int = 10  # Euler steps K of every flow: returns and actions
    num_actions: int = 32  # candidate actions C, the paper's N_pi, of the base policy (1: cloning)
    num_returns: int = 50  # return samples R, the paper's N, that rate a candidate
    tau_q: float = 1.0  # temperature of the choice among candidates, in units of return (small: the best, large: any)
    tau_r: float = 10.0  # temperature of the soft maximum over return samples (small: their maximum, large: their mean)
    td_target: Literal["exact", "published"] = "exact"
    """label of flow TD: a straight line's velocity, r + gamma z' - z_0, z' a return of (s', a'), or the paper's"""
    latents: Literal["data", "target"] = "data"  # the paper's label only: z_1 of the data or a sample of the EMA fields
    bc_timesteps: int = 0  # first updates, of the policy alone, which is then frozen (0: policy and returns together)
    num_ensembles: int = 2  # return fields E
    clip_flow_returns: bool = True  # keep end points of returns in [min(r_min, 0), max(r_max, 0)] / (1 - gamma)
    value_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)  # hidden widths of the return fields
    value_layer_norm: bool = True  # layer normalisation in the return fields
    actor_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)  # hidden widths of the flow policy
    actor_layer_norm: bool = False  # layer normalisation in the flow policy

    # Speed
    compile: bool = True  # compile the losses: up to two minutes at first, then faster updates
    cudagraphs: bool = True  # replay updates and policies as CUDA graphs (on a GPU)
    matmul_precision: Literal["highest", "high", "medium"] | None = None
    """float32 products: highest (exact), high (TF32), medium (bfloat16); default: high where a GPU has TF32"""


# No settings of single environments: the paper has the same everywhere. What is known of them: docs/evor.md.
TUNED, TUNED_ONLINE = {}, {}

# What --evaluate may change.
INFERENCE = ("num_actions", "num_returns", "tau_q", "tau_r")

# What --quick changes: data that are made here, and sizes that learn within minutes on two cores.
QUICK = dict(exp_name=f"{Path(__file__).stem}-quick", cuda=False, env_id="cube-single-noisy-singletask-v0")
QUICK |= dict(dataset_source="generated", generated_episodes=120)
QUICK |= dict(total_timesteps=8_000, eval_interval=4_000, log_interval=500, save_interval=2_000)
QUICK |= dict(tau=0.01, flow_steps=5, num_actions=16, num_returns=8)
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


def euler(velocity, x, num_steps):
    """Carries x from t = 0 to 1 along velocity(x, t): x_{k+1} = x_k + v(x_k, k / K) / K."""
    for k in range(num_steps):
        x = x + velocity(x, k / num_steps) / num_steps
    return x


# --- Agent ---


class Agent(nn.Module):
    """One EVOR agent; common/stacked.py runs one per seed.

    Args:
        args: see Args.
        obs_dim, action_dim: dimensions of observations and actions.
        min_reward, max_reward: the dataset's extreme rewards; with 0, an ended episode's return, they fix the range.
    """

    ACTS = ("actor_flow", "target_critic_flow")  # the networks that acting needs
    COMPILE_ACT = True  # an action rates 1,600 returns, which takes longer than the environment's step
    METRICS = ("critic/critic_loss", "critic/target_mean", "actor/bc_flow_loss")  # an update may have a part of them

    def __init__(self, args, obs_dim, action_dim, min_reward, max_reward):
        super().__init__()
        self.args, self.action_dim = args, action_dim
        horizon = 1 / (1 - args.gamma)
        self.z_min, self.z_max = min(min_reward, 0) * horizon, max(max_reward, 0) * horizon
        self.samples_latents = args.td_target == "published" and args.latents == "target"  # z_1 has noise of its own

        critic_dims = (obs_dim + action_dim + 2, *args.value_hidden_dims, 1)  # inputs [s, a, z, t]
        policy_dims = (obs_dim + action_dim + 1, *args.actor_hidden_dims, action_dim)  # inputs [s, x, t]
        self.critic_flow = MLP(critic_dims, args.value_layer_norm, (args.num_ensembles,))
        self.actor_flow = MLP(policy_dims, args.actor_layer_norm)
        self.target_critic_flow = copy.deepcopy(self.critic_flow).requires_grad_(False)

    def bc_velocity(self, observations, x, t):
        """The base policy's velocity u(s, x, t): (N, D), (N, A), t (N, 1) or a float -> (N, A)."""
        t = t if torch.is_tensor(t) else torch.full_like(x[:, :1], t)
        return self.actor_flow(observations, torch.cat([x, t], dim=-1))

    def flow_actions(self, observations, noise):
        """End points of the base policy's flow: (N, D), (N, C, A) -> (N, C, A) in [-1, 1]."""
        C = noise.shape[1]
        rows = observations.repeat_interleave(C, dim=0)  # (N*C, D)
        x = euler(lambda x, t: self.bc_velocity(rows, x, t), noise.flatten(0, 1), self.args.flow_steps)  # (N*C, A)
        return x.clamp(-1, 1).unflatten(0, (-1, C))

    def z_velocity(self, flow, condition, z, t):
        """Velocities v_e(z, t|s, a): [s, a] (N, D + A), z (N, 1) or (E, N, 1), t (N, 1) or a float -> (E, N, 1)."""
        t = t.expand_as(z) if torch.is_tensor(t) else torch.full_like(z, t)
        return flow(condition, torch.cat([z, t], dim=-1))

    def return_samples(self, condition, noise):
        """Return samples: the EMA fields' end points from the same noise, averaged: (N, D + A), (N, 1) -> (N, 1).

        Clipped at the end only, since what is on the way may lie outside the range of returns.
        """
        z = euler(lambda z, t: self.z_velocity(self.target_critic_flow, condition, z, t), noise, self.args.flow_steps)
        z = z.clamp(self.z_min, self.z_max) if self.args.clip_flow_returns else z  # (E, N, 1)
        return z.mean(dim=0)

    @torch.no_grad()  # fixed labels; and returns do not train the policy
    def flow_td(self, batch, noise):
        """Flow TD: points z_t of the return field of (s,a), and their labels, (B, 1) each.

        Args:
            batch: observations, next_observations (B, D), actions (B, A), rewards, masks (B,), maybe returns (B,).
            noise: an update's entries of draw_noise, (B, dim).
        """
        args = self.args
        rewards, masks = batch["rewards"].unsqueeze(-1), batch["masks"].unsqueeze(-1)  # (B, 1), masks 0 at a success
        z_0, t = noise["return"], noise["time"]  # (B, 1)

        # 1. The base policy's next action a'.
        next_actions = self.flow_actions(batch["next_observations"], noise["next_action"].unsqueeze(1))  # (B, 1, A)
        next_condition = torch.cat([batch["next_observations"], next_actions.squeeze(1)], dim=-1)  # (B, D + A)

        # 2. A return z_1 of (s,a). Exact: r + gamma mask z', z' of (s',a') from z_0 too. Published: independent of z_0.
        if args.td_target == "exact":
            z_1 = rewards + args.gamma * masks * self.return_samples(next_condition, z_0)  # (B, 1)
        elif args.latents == "data":
            z_1 = batch["returns"].unsqueeze(-1)  # (B, 1)
        else:
            condition = torch.cat([batch["observations"], batch["actions"]], dim=-1)  # (B, D + A)
            z_1 = self.return_samples(condition, noise["latent"])  # (B, 1)
        z_t = (1 - t) * z_0 + t * z_1  # (B, 1)

        # 3. The label. Exact: the straight line's velocity. Published: Bellman's equation of fields at z_t, t.
        if args.td_target == "exact":
            return z_t, z_1 - z_0
        next_velocity = self.z_velocity(self.target_critic_flow, next_condition, z_t, t).mean(dim=0)  # (B, 1)
        return z_t, rewards + args.gamma * masks * next_velocity

    def critic_loss(self, batch, noise):
        """L_critic, and its parts for the log; trains the return fields. Arguments as for flow_td."""
        z_t, label = self.flow_td(batch, noise)  # (B, 1)

        # Regression of every field: v(z_t, t | s, a) -> label. Exact: its mean is the mean return, as z_0's is 0.
        condition = torch.cat([batch["observations"], batch["actions"]], dim=-1)  # (B, D + A)
        velocity = self.z_velocity(self.critic_flow, condition, z_t, noise["time"])  # (E, B, 1)
        critic_loss = (velocity - label).square().mean()
        return critic_loss, {"critic/critic_loss": critic_loss, "critic/target_mean": label.mean()}

    def actor_loss(self, batch, noise):
        """L_BC, and its parts for the log; trains the base policy. Arguments as for flow_td."""
        # Behaviour cloning by flow matching: u(s, x_t, t) -> a - x_0.
        x_0, t = noise["bc_action"], noise["bc_time"]  # (B, A), (B, 1)
        x_t = (1 - t) * x_0 + t * batch["actions"]  # (B, A)
        velocity = self.bc_velocity(batch["observations"], x_t, t)  # (B, A)
        bc_flow_loss = (velocity - (batch["actions"] - x_0)).square().mean()
        return bc_flow_loss, {"actor/bc_flow_loss": bc_flow_loss}

    def ratings(self, observations, actions, noise):
        """Q of candidate actions, rated by a soft maximum of return samples: (N, D), (N, C, A), (N, R) -> (N, C).

        All candidates of a state have the same R start noises, so that their differences are not noise.
        """
        C, R = actions.shape[1], noise.shape[1]
        condition = torch.cat([observations.unsqueeze(1).expand(-1, C, -1), actions], dim=-1)  # (N, C, D + A)
        condition = condition.flatten(0, 1).repeat_interleave(R, dim=0)  # (N*C*R, D + A)
        noise = noise.repeat_interleave(C, dim=0).view(-1, 1)  # (N*C*R, 1)
        return soft_maximum(self.return_samples(condition, noise).view(-1, C, R), self.args.tau_r)

    def act(self, observations, noise):
        """Inference: the base policy's candidates, rated and chosen by softmax: (N, D), (N, C*A + C + R) -> (N, A)."""
        args, C, A, R = self.args, self.args.num_actions, self.action_dim, self.args.num_returns
        action_noise, choice_noise, return_noise = noise.split([C * A, C, R], dim=-1)
        actions = self.flow_actions(observations, action_noise.unflatten(-1, (C, A)))  # (N, C, A)
        q = self.ratings(observations, actions, return_noise)  # (N, C)
        chosen = softmax_choice(q, args.tau_q, choice_noise)  # (N,)
        return actions.take_along_dim(chosen[:, None, None], dim=1).squeeze(1)

    def draw_noise(self, generator, num_updates):
        """Random numbers of `num_updates` updates, named after what they become: {name: (num_updates, B, dim)}."""
        B, A = self.args.batch_size, self.action_dim
        device = generator.device
        normal = lambda *shape: torch.randn(num_updates, *shape, generator=generator, device=device)
        uniform = lambda *shape: torch.rand(num_updates, *shape, generator=generator, device=device)
        return {
            "next_action": normal(B, A),
            "return": normal(B, 1),
            "time": uniform(B, 1),
            "bc_action": normal(B, A),
            "bc_time": uniform(B, 1),
        } | ({"latent": normal(B, 1)} if self.samples_latents else {})

    def draw_act_noise(self, generator, num_steps):
        """The random numbers of `num_steps` actions: (num_steps, C*A + C + R), see `act`."""
        size = self.args.num_actions * (self.action_dim + 1) + self.args.num_returns
        return torch.randn(num_steps, size, generator=generator, device=generator.device)


def soft_maximum(returns, tau_r):
    """Q = tau_R ln mean_j exp(z^(j) / tau_R), the maximum for small tau_R, the mean for large: (..., R) -> (...)."""
    top = returns.amax(dim=-1, keepdim=True)  # exp cannot overflow; expm1 and log1p stay exact where tau_R is large
    return top.squeeze(-1) + tau_r * torch.expm1((returns - top) / tau_r).mean(dim=-1).log1p()


def softmax_choice(q, tau_q, noise):
    """Index drawn from softmax(Q / tau_Q): (..., C), standard normal noise (..., C) -> (...).

    The Gumbel trick: argmax of Q / tau_Q + g, where g = -ln(-ln p), p the noise's distribution function, is Gumbel.
    """
    beyond = torch.erfc(noise.abs() / math.sqrt(2)) / 2  # probability of the tail beyond the noise
    gumbel = -torch.log(-torch.where(noise < 0, beyond.log(), torch.log1p(-beyond)))
    return ((q - q.amax(dim=-1, keepdim=True)) / tau_q + gumbel).argmax(dim=-1)


def update(agents, batch, noise, losses=("critic_loss", "actor_loss")):
    """One update of every seed; returns the losses at the weights before it, {name: one per seed}.

    Batch and noise are those of Agent.critic_loss with a leading axis of seeds. A loss moves the networks that `trains`
    names; to it, all others are constants (see common/stacked.py, also for `agents`). The networks of a loss that is
    left out stay bit-equal: Adam skips weights without a gradient.
    """
    agents.optimizer.zero_grad()
    metrics = {}
    with agents.side_by_side():  # neither loss waits for the other
        if "critic_loss" in losses:
            metrics |= agents.backward("critic_loss", batch, noise, trains=("critic_flow",))
        if "actor_loss" in losses:
            metrics |= agents.backward("actor_loss", batch, noise, trains=("actor_flow",))

    # The EMA comes before Adam's step, as in the other three files: the targets lag by one update.
    agents.ema("target_critic_flow", "critic_flow", agents.agent.args.tau)
    agents.optimizer.step()
    return metrics


# --- Main program ---


def parse_args(words=None):
    """The arguments of a command line (None: this program's), and the checkpoint to continue from, or None."""
    args, resumed = arguments.parse(Args, TUNED, TUNED_ONLINE, QUICK, INFERENCE, words=words)
    above_zero = "flow_steps num_actions num_returns tau_q tau_r num_ensembles value_hidden_dims actor_hidden_dims"
    arguments.check_numbers(args, above_zero.split(), at_least_zero=("bc_timesteps",))
    if envs.is_pixels(args.env_id):
        fail(f"--env-id {args.env_id}: evor.py works on state observations")
    if args.td_target == "published" and args.latents == "data" and args.online_timesteps:
        fail("--latents data: the reward-to-go of an online transition is not known yet; use --latents target")
    if args.bc_timesteps > args.total_timesteps:
        fail(f"--bc-timesteps {args.bc_timesteps} is above --total-timesteps {args.total_timesteps}")
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
    if args.td_target == "published" and args.latents == "data":
        dataset["returns"] = torch.as_tensor(reward_to_go(dataset, args.gamma), dtype=torch.float32, device=device)
    log = Log(args, resumed, device, identity, Agent.METRICS)

    # --- Agents, one per seed ---
    replay = Replay(dataset, args.num_seeds, args.online_timesteps)
    agent_inputs = replay.agent_inputs()  # dimensions and extreme rewards
    agents = Stacked(lambda: Agent(args, **agent_inputs), seeds, device, args.learning_rate)
    if resumed is not None:
        agents.load_state_dict(resumed)
        replay.restore(resumed.pop("replay"), count=max(0, resumed["step"] - args.total_timesteps))

    # --- Training: offline, then online ---
    one_update = lambda draws, losses: update(agents, *replay.inputs(draws), losses)  # the batch, and noise
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
        losses = ("critic_loss", "actor_loss")
        if args.bc_timesteps:  # the base policy first, then its returns
            losses = ("actor_loss",) if step < args.bc_timesteps else ("critic_loss",)
        metrics = fast_update(draws, losses)
        step += 1
        log.training(step, metrics, warm_up=fast_update.new)

    log.close()
    export.write_run(log.run_dir, Agent)
