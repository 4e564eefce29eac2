"""Evaluation: S policies x n episodes in worker processes, every environment's next action from one policy call; and
the online phase's environments, one a seed.

An episode's start and noise are functions of (seed, step, episode number), so that a result depends neither on the
number of workers nor on which of them is faster, and a seed's result not on its neighbours.
"""

import contextlib
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing import Pipe
from typing import Any

import numpy as np
import torch

from common import envs, num_cores, pixels, python_environment

# Environments of a seed (a manipulation one takes 0.2 GB). A constant, since the last bits of a matrix product depend on
# how many rows it has: so the same policy acts the same on any number of cores.
EPISODES_AT_ONCE = 4
EXPLORING = 2**32 - 1  # stands for the episode's number in the seeds of the online phase's episodes


@dataclass
class Workers:
    """Running worker processes: slot (s, p), the p-th environment of seed s, is `where[s][p]` = (worker, its slot)."""

    processes: list
    connections: list
    where: list
    max_episode_steps: int


def start_workers(env_id, num_seeds, num_episodes, num_workers=0, success_timing="post", frame_stack=1, render=False):
    """Starts worker processes and makes their environments.

    Args:
        env_id, success_timing, frame_stack, render: see `envs.make_env`.
        num_seeds, num_episodes: of an evaluation; no more environments are made than it can use.
        num_workers: processes; 0 for one a core, at most 16.

    Returns:
        Workers, for `evaluate` and `stop_workers`.
    """
    num_workers = num_workers or min(16, num_cores())
    per_seed = min(num_episodes, EPISODES_AT_ONCE)
    num_workers = min(num_workers, num_seeds * per_seed)
    where = [
        [((s * per_seed + p) % num_workers, (s * per_seed + p) // num_workers) for p in range(per_seed)]
        for s in range(num_seeds)
    ]

    environment = python_environment()
    environment.setdefault("OMP_NUM_THREADS", "1")
    if render and environment.get("MUJOCO_GL") == "disable":
        environment["MUJOCO_GL"] = "egl"
    workers = Workers([], [], where, 0)
    for _ in range(num_workers):
        connection, child = Pipe()
        command = [sys.executable, "-m", "common.envs", str(child.fileno())]
        workers.processes.append(subprocess.Popen(command, env=environment, pass_fds=[child.fileno()]))
        workers.connections.append(connection)
        child.close()
    kwargs = dict(env_id=env_id, success_timing=success_timing, frame_stack=frame_stack, render=render)
    slots = [slot for seed in where for slot in seed]
    for worker in range(num_workers):
        _send(workers, worker, ("make", sum(w == worker for w, _ in slots), kwargs))
    workers.max_episode_steps = [_receive(workers, worker) for worker in range(num_workers)][0]
    return workers


def stop_workers(workers):
    """Ends the processes; idle ones leave by themselves when their connection closes."""
    for connection in workers.connections:
        connection.close()
    for process in workers.processes:
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()


def _send(workers, worker, request):
    try:
        workers.connections[worker].send(request)
    except OSError:  # the reason stands in its last reply, or in its exit code
        _receive(workers, worker)
        raise


def _receive(workers, worker) -> Any:
    """A worker's reply; its failure, or death, is an error here with its traceback."""
    try:
        ok, value = workers.connections[worker].recv()
    except (EOFError, OSError):
        code = workers.processes[worker].wait()
        raise RuntimeError(
            f"environment worker {worker} died with exit code {code} (negative: killed by that signal)"
        ) from None
    if not ok:
        raise RuntimeError(f"environment worker {worker} failed:\n{value}")
    return value


def _ask(workers, kind, values):
    """Sends {(s, p): value} to the slots' workers in one request each; returns {(s, p): reply}."""
    requests = {}
    for (s, p), value in values.items():
        worker, slot = workers.where[s][p]
        requests.setdefault(worker, {})[slot] = value
    for worker, request in requests.items():
        _send(workers, worker, (kind, request))
    replies = {worker: _receive(workers, worker) for worker in requests}
    return {(s, p): replies[workers.where[s][p][0]][workers.where[s][p][1]] for s, p in values}


def evaluate(workers, policy, draw_noise, seeds, num_episodes, step, device, stop=False, video_dir=None):
    """Plays `num_episodes` episodes with each seed's policy.

    Args:
        workers: of `start_workers`.
        policy: (observations (S, P, D), noise (S, P, ...)) tensors on the device -> actions (S, P, A) in [-1, 1].
        draw_noise: (CPU generator, T) -> (T, ...), the noise of an episode of T steps.
        seeds: the S seeds.
        num_episodes: for each seed.
        step: the training step, which the episodes' random numbers depend on too.
        device: torch device of the policy.
        stop: an object (runs.StopRequest); once it is true, the evaluation is given up.
        video_dir: directory for a GIF of each seed's first episode (the workers must have been started to render).

    Returns:
        One row a seed, {step, seed, success (a fraction), episode_return (undiscounted), episode_length, episodes},
        means over its episodes; None when given up.
    """
    from tqdm import tqdm

    S, P = len(workers.where), len(workers.where[0])
    queue = {s: list(range(num_episodes)) for s in range(S)}
    episode, noise, frames = {}, {}, {s: [] for s in range(S)}  # of the slots (s, p) that are playing
    observations = None
    totals = {}
    results = {s: {} for s in range(S)}  # episode number -> (success, return, length)

    def begin(slots):
        """Starts the next episode of each slot's seed, where one is left, and notes its first observation."""
        nonlocal observations
        resets = {}
        for s, p in slots:
            episode.pop((s, p), None)
            if queue[s]:
                number = episode[s, p] = queue[s].pop(0)
                entropy = np.random.SeedSequence([seeds[s], step, number]).generate_state(2, np.uint32)
                generator = torch.Generator().manual_seed(int(entropy[0]))
                noise[s, p] = draw_noise(generator, workers.max_episode_steps)
                resets[s, p] = int(entropy[1] >> 1)
                totals[s, p] = [0.0, 0]
        for slot, ob in _ask(workers, "reset", resets).items():
            if observations is None:
                observations = np.zeros((S, P, *ob.shape), np.uint8 if ob.dtype == np.uint8 else np.float32)
            observations[slot] = ob

    bar = tqdm(total=S * num_episodes, desc=f"evaluating at {step}", unit=" episodes", leave=False, position=1)
    with bar, one_thread():
        begin([(s, p) for s in range(S) for p in range(P)])
        blank = torch.zeros_like(next(iter(noise.values()))[0])
        while episode:
            if stop:
                return None
            now = [[noise[s, p][totals[s, p][1]] if (s, p) in episode else blank for p in range(P)] for s in range(S)]
            now = torch.stack([torch.stack(row) for row in now])  # (S, P, ...)
            actions = policy(torch.as_tensor(observations).to(device), now.to(device)).cpu().numpy()  # (S, P, A)
            done = []
            for slot, (ob, reward, terminated, truncated, success) in _ask(
                workers, "step", {slot: actions[slot] for slot in episode}
            ).items():
                observations[slot] = ob
                totals[slot][0] += reward
                totals[slot][1] += 1
                if video_dir is not None and episode[slot] == 0:
                    worker, index = workers.where[slot[0]][slot[1]]
                    _send(workers, worker, ("render", index))
                    frames[slot[0]].append(_receive(workers, worker))
                if terminated or truncated:
                    results[slot[0]][episode[slot]] = (success, *totals[slot])
                    done.append(slot)
            if done:
                begin(done)
                bar.update(len(done))
    rows = []
    for s, seed in enumerate(seeds):
        # In the order of the episodes' numbers, so that the sums do not depend on which ended first.
        success, returns, lengths = np.mean([results[s][number] for number in range(num_episodes)], axis=0)
        row = {"step": step, "seed": seed, "success": float(success), "episode_return": float(returns)}
        rows.append(row | {"episode_length": float(lengths), "episodes": num_episodes})
        if frames[s]:
            save_gif(video_dir / f"step{step}-seed{seed}.gif", frames[s])
    return rows


class Evaluator:
    """Plays a run's evaluation episodes in worker processes, which start with the first evaluation.

    Args:
        args: the run's arguments.
        seeds: the S seeds.
        device: torch device of the policy.
        run_dir: where --capture-video puts each seed's first episode, in `videos`.
    """

    def __init__(self, args, seeds, device, run_dir):
        self.args, self.seeds, self.device = args, seeds, device
        self.video_dir = run_dir / "videos" if args.capture_video else None
        self.workers = None

    def __call__(self, policy, draw_noise, step, stop=False):
        """An evaluation's rows, or None when given up; see `evaluate`."""
        args = self.args
        if self.workers is None:
            sizes = args.env_id, args.num_seeds, args.eval_episodes, args.eval_workers
            frame_stack = pixels.NUM_FRAMES if envs.is_pixels(args.env_id) else 1
            self.workers = start_workers(*sizes, args.success_timing, frame_stack, render=args.capture_video)
        rest = self.device, stop, self.video_dir
        return evaluate(self.workers, policy, draw_noise, self.seeds, args.eval_episodes, step, *rest)

    def close(self):
        """Ends the worker processes."""
        if self.workers is not None:
            stop_workers(self.workers)


class Explorer:
    """The online phase's environments, one per seed, in worker processes, which start with the first step.

    Args:
        args: the run's arguments.
        seeds: the S seeds.
        device: torch device of the policy.
    """

    def __init__(self, args, seeds, device):
        self.args, self.seeds, self.device = args, seeds, device
        self.workers, self.observations = None, None  # the present ones, (S, D)

    def __call__(self, policy, noise, step, on_failure=lambda: None):
        """One environment step of every seed with its stochastic policy; where an episode ends, the next one begins.

        Args:
            policy: see `evaluate`.
            noise: (S, ...) on the device, one action's random numbers for each seed.
            step: the training step, which a new episode's start depends on.
            on_failure: called before the error of an environment that failed or died ends the run.

        Returns:
            transitions: {observations, next_observations (S, D), actions (S, A), rewards, masks (S,)} float32 tensors on the
            device; masks = 1 - terminated, so that an episode cut off at its time limit still bootstraps.
        """
        try:
            if self.workers is None:
                args, S = self.args, len(self.seeds)
                self.workers = start_workers(args.env_id, S, 1, args.eval_workers, args.success_timing)
                first = self._begin(range(S), step)
                self.observations = np.stack([first[s] for s in range(S)])
            return self._step(policy, noise, step)
        except RuntimeError:
            on_failure()
            raise

    def _begin(self, which, step):
        """Begins a new episode of the seeds with the indices `which`, each a function of (seed, step); returns
        {s: first observation}.
        """
        sequences = {s: np.random.SeedSequence([self.seeds[s], step, EXPLORING]) for s in which}
        requests = {(s, 0): int(sequence.generate_state(1, np.uint32)[0] >> 1) for s, sequence in sequences.items()}
        return {s: ob.astype(np.float32) for (s, _), ob in _ask(self.workers, "reset", requests).items()}

    def _step(self, policy, noise, step):
        observations = self.observations
        on_device = torch.as_tensor(observations).to(self.device)
        actions = policy(on_device.unsqueeze(1), noise.unsqueeze(1)).squeeze(1)  # (S, A)
        replies = _ask(self.workers, "step", {(s, 0): action for s, action in enumerate(actions.cpu().numpy())})
        next_observations, rewards, terminated, truncated, _ = zip(*(replies[s, 0] for s in range(len(observations))))
        next_observations = np.stack(next_observations).astype(np.float32)  # (S, D)
        rows = {"observations": observations, "next_observations": next_observations}
        rows |= {"rewards": np.array(rewards, np.float32), "masks": 1 - np.array(terminated, np.float32)}
        self.observations = next_observations.copy()
        over = np.flatnonzero(np.array(terminated) | np.array(truncated)).tolist()
        for s, ob in self._begin(over, step).items():
            self.observations[s] = ob
        return {key: torch.as_tensor(value).to(self.device) for key, value in rows.items()} | {"actions": actions}

    def close(self):
        """Ends the worker processes."""
        if self.workers is not None:
            stop_workers(self.workers)


@contextlib.contextmanager
def one_thread():
    """The policy's small products on one thread: idle ones would spin on the cores that the workers need."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def save_gif(path, frames, frames_per_second=20):
    """Saves uint8 frames (H, W, 3) as an animated GIF."""
    from PIL import Image

    path.parent.mkdir(exist_ok=True)
    first, *others = [Image.fromarray(frame) for frame in frames]
    first.save(path, save_all=True, append_images=others, duration=1000 / frames_per_second, loop=0)
