"""Evaluation and exploration: policies of S seeds act in the environments of common/workers.py.

An episode's start and noise are functions of (seed, step, episode number), so that a result depends neither on the
number of workers nor on which of them is faster, and a seed's result not on its neighbours.
"""

import contextlib

import numpy as np
import torch
from tqdm import tqdm

from common import envs, pixels
from common.workers import ask, start_workers, stop_workers

EXPLORING = 2**32 - 1  # stands for the episode's number in the seeds of the online phase's episodes


class Episode:
    """An episode that is being played: its number, its noise (T, ...), and what has happened so far."""

    def __init__(self, number, noise):
        self.number, self.noise = number, noise
        self.episode_return, self.length = 0.0, 0


def evaluate(workers, policy, draw_noise, seeds, num_episodes, step, device, stop=False, video_dir=None):
    """Plays `num_episodes` episodes with each seed's policy.

    Args:
        workers: of `start_workers`.
        policy: (observations (S, P, D), noise (S, P, ...)) tensors on the device -> actions (S, P, A) in [-1, 1].
        draw_noise: (CPU generator, T) -> (T, ...), the noise of an episode of T steps.
        seeds, num_episodes: the S seeds, and the number of episodes per seed.
        step: the training step, which the episodes' random numbers depend on too.
        device: torch device of the policy.
        stop: an object (signals.StopRequest); once it is true, the evaluation is given up.
        video_dir: directory for a GIF of each seed's first episode (the workers must have been started to render).

    Returns:
        One row per seed, {step, seed, success (a fraction), episode_return (undiscounted), episode_length, episodes},
        means over its episodes; None when given up.
    """
    S, P = workers.num_seeds, workers.per_seed
    waiting = [list(range(num_episodes)) for _ in range(S)]  # numbers of each seed's episodes to come
    playing = {}  # slot (s, p) -> its Episode
    results = [{} for _ in range(S)]  # of each seed: episode number -> (success, return, length)
    frames = [[] for _ in range(S)]

    def begin(slots):
        """Starts the next episode of each slot's seed, where one is left; returns {slot: first observation}."""
        resets = {}
        for s, p in slots:
            playing.pop((s, p), None)
            if waiting[s]:
                number = waiting[s].pop(0)
                words = np.random.SeedSequence([seeds[s], step, number]).generate_state(2, np.uint32)
                generator = torch.Generator().manual_seed(int(words[0]))
                playing[s, p] = Episode(number, draw_noise(generator, workers.max_episode_steps))
                resets[s, p] = int(words[1] >> 1)
        return ask(workers, "reset", resets)

    bar = tqdm(total=S * num_episodes, desc=f"evaluating at {step}", unit=" episodes", leave=False, position=1)
    with bar, one_thread():
        first = begin([(s, p) for s in range(S) for p in range(P)])
        ob = first[0, 0]
        observations = np.zeros((S, P, *ob.shape), np.uint8 if ob.dtype == np.uint8 else np.float32)
        blank = playing[0, 0].noise.new_zeros(S, P, *playing[0, 0].noise.shape[1:])  # where no episode is left
        while playing:
            for slot, ob in first.items():
                observations[slot] = ob
            if stop:
                return None
            noise = blank.clone()
            for slot, episode in playing.items():
                noise[slot] = episode.noise[episode.length]
            actions = policy(torch.as_tensor(observations).to(device), noise.to(device)).cpu().numpy()  # (S, P, A)
            done = []
            for slot, reply in ask(workers, "step", {slot: actions[slot] for slot in playing}).items():
                s, episode = slot[0], playing[slot]
                observations[slot], reward, terminated, truncated, success = reply
                episode.episode_return += reward
                episode.length += 1
                if video_dir is not None and episode.number == 0:
                    frames[s].append(ask(workers, "render", {slot: None})[slot])
                if terminated or truncated:
                    results[s][episode.number] = (success, episode.episode_return, episode.length)
                    done.append(slot)
            first = begin(done)
            bar.update(len(done))
    rows = []
    for s, seed in enumerate(seeds):
        # In the order of the episodes' numbers, so that the sums do not depend on which ended first.
        success, episode_return, length = np.mean([results[s][n] for n in range(num_episodes)], axis=0)
        row = {"step": step, "seed": seed, "success": float(success), "episode_return": float(episode_return)}
        rows.append(row | {"episode_length": float(length), "episodes": num_episodes})
        if frames[s]:
            save_gif(video_dir / f"step{step}-seed{seed}.gif", frames[s])
    return rows


class Evaluator:
    """Plays a run's evaluation episodes in worker processes, which start with the first evaluation.

    With --capture-video, each seed's first episode is in `run_dir`/videos.
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
        stop_workers(self.workers)


class Explorer:
    """The online phase's environments, one per seed, in worker processes, which start with the first step."""

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
            {observations, next_observations (S, D), actions (S, A), rewards, masks (S,)} of float32 on the device;
            masks = 1 - terminated, so that an episode cut off at its time limit still bootstraps.
        """
        try:
            return self._step(policy, noise, step)
        except RuntimeError:
            on_failure()
            raise

    def _begin(self, which, step):
        """New episodes of the seeds with the indices `which`, functions of (seed, step): first observations (n, D)."""
        words = lambda s: np.random.SeedSequence([self.seeds[s], step, EXPLORING]).generate_state(1, np.uint32)
        first = ask(self.workers, "reset", {(s, 0): int(words(s)[0] >> 1) for s in which})
        return np.array([first[s, 0] for s in which], np.float32)

    def _step(self, policy, noise, step):
        if self.workers is None:
            args, S = self.args, len(self.seeds)
            self.workers = start_workers(args.env_id, S, 1, args.eval_workers, args.success_timing)
            self.observations = self._begin(range(S), step)
        observations = torch.as_tensor(self.observations).to(self.device)  # (S, D)
        actions = policy(observations.unsqueeze(1), noise.unsqueeze(1)).squeeze(1)  # (S, A)
        replies = ask(self.workers, "step", {(s, 0): action for s, action in enumerate(actions.cpu().numpy())})
        next_observations, rewards, terminated, truncated, _ = map(np.array, zip(*replies.values()))
        rows = {"next_observations": next_observations, "rewards": rewards, "masks": 1 - terminated}
        rows = {key: torch.as_tensor(value.astype(np.float32)).to(self.device) for key, value in rows.items()}
        self.observations = next_observations.astype(np.float32)
        over = np.flatnonzero(terminated | truncated).tolist()
        if over:
            self.observations[over] = self._begin(over, step)
        return rows | {"observations": observations, "actions": actions}

    def close(self):
        """Ends the worker processes."""
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
