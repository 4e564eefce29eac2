"""Evaluation and exploration: policies of S seeds act in the environments of common/workers.py.

An episode's start and noise are functions of (seed, step, episode number), so that a result depends neither on the
number of workers nor on which of them is faster, and a seed's result not on its neighbours.
"""

import contextlib
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from common import envs, pixels, warn
from common.workers import Workers

EXPLORING = 2**32 - 1  # stands for the episode's number in the seeds of the online phase's episodes


class Evaluator:
    """Plays a run's evaluation episodes in worker processes, which start with the first evaluation.

    Args:
        args: the run's arguments: the environment, the number of episodes per seed, ...
        seeds, device: the S seeds and the torch device of their policies.
        run_dir: with --capture-video, a GIF of each seed's first episode goes to its folder `videos`.
        video_names: what ends these files' names, one for each seed; None for `seed{seed}`.
    """

    def __init__(self, args, seeds, device, run_dir, video_names=None):
        self.args, self.seeds, self.device = args, seeds, device
        self.video_names = video_names or [f"seed{seed}" for seed in seeds]
        self.video_dir = run_dir / "videos" if args.capture_video else None
        self.workers = None

    def __call__(self, policy, draw_noise, step, stop=False):
        """Plays `eval_episodes` episodes with each seed's policy.

        Args:
            policy: (observations (S, P, D), noise (S, P, ...)) tensors on the device -> actions (S, P, A) in [-1, 1].
            draw_noise: (CPU generator, T) -> (T, ...), the noise of an episode of T steps.
            step: the training step, which the episodes' random numbers depend on too.
            stop: an object (signals.StopRequest); once it is true, the evaluation is given up.

        Returns:
            One row per seed, {step, seed, success (a fraction), episode_return (undiscounted), episode_length,
            episodes}, means over its episodes; None when given up.
        """
        args, seeds = self.args, self.seeds
        if self.workers is None:
            frame_stack = pixels.NUM_FRAMES if envs.is_pixels(args.env_id) else 1
            self.workers = Workers(args, len(seeds), args.eval_episodes, frame_stack, render=args.capture_video)
        ask = self.workers.ask
        episodes = [[] for _ in seeds]  # of each seed, in the order of their numbers
        playing = {}  # slot (s, p) -> its episode so far, and the episode's noise (T, ...)

        def begin(slots):
            """Starts the next episode of each slot's seed, where one is left; returns {slot: first observation}."""
            resets = {}
            for s, p in slots:
                playing.pop((s, p), None)
                if len(episodes[s]) < args.eval_episodes:
                    words = np.random.SeedSequence([seeds[s], step, len(episodes[s])]).generate_state(2, np.uint32)
                    generator = torch.Generator().manual_seed(int(words[0]))
                    episode = SimpleNamespace(success=0.0, episode_return=0.0, length=0, frames=[])  # frames of a video
                    playing[s, p] = episode, draw_noise(generator, self.workers.max_episode_steps)
                    episodes[s].append(episode)
                    resets[s, p] = int(words[1] >> 1)
            return ask("reset", resets)

        total = len(seeds) * args.eval_episodes
        bar = tqdm(total=total, desc=f"evaluating at {step}", unit=" episodes", leave=False, position=1)
        with bar, contextlib.ExitStack() as afterwards:
            afterwards.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)  # the policy's products are small: idle threads would spin on the workers' cores
            first = begin(self.workers.slots)
            ob, episode_noise = first[0, 0], playing[0, 0][1]
            shape = len(seeds), len(self.workers.slots) // len(seeds)  # (S, P)
            observations = np.zeros((*shape, *ob.shape), np.uint8 if ob.dtype == np.uint8 else np.float32)
            blank = episode_noise.new_zeros(*shape, *episode_noise.shape[1:])  # where no episode is left
            while playing:
                for slot, ob in first.items():
                    observations[slot] = ob
                if stop:
                    return None
                noise = blank.clone()
                for slot, (episode, episode_noise) in playing.items():
                    noise[slot] = episode_noise[episode.length]
                observed = torch.as_tensor(observations).to(self.device)
                actions = policy(observed, noise.to(self.device)).cpu().numpy()  # (S, P, A)
                done = []
                for slot, reply in ask("step", {slot: actions[slot] for slot in playing}).items():
                    episode, _ = playing[slot]
                    observations[slot], reward, terminated, truncated, episode.success = reply
                    episode.episode_return += reward
                    episode.length += 1
                    if self.video_dir is not None and episode is episodes[slot[0]][0]:
                        episode.frames.append(ask("render", {slot: None})[slot])
                    if terminated or truncated:
                        done.append(slot)
                first = begin(done)
                bar.update(len(done))
        rows = []
        for seed, name, played in zip(seeds, self.video_names, episodes):
            ends = [(episode.success, episode.episode_return, episode.length) for episode in played]
            success, episode_return, length = np.mean(ends, axis=0).tolist()
            row = {"step": step, "seed": seed, "success": success, "episode_return": episode_return}
            rows.append(row | {"episode_length": length, "episodes": len(played)})
            if played[0].frames:
                try:
                    save_gif(self.video_dir / f"step{step}-{name}.gif", played[0].frames)
                except OSError as error:
                    warn(f"the video of seed {seed} is not saved ({error})")
        return rows


class Explorer:
    """The online phase's environments, one per seed, in worker processes, which start with the first step."""

    def __init__(self, args, seeds, device):
        self.args, self.seeds, self.device = args, seeds, device
        self.workers, self.observations = None, None  # the present ones, (S, D)

    def __call__(self, policy, noise, step, on_failure=lambda: None):
        """One environment step of every seed with its stochastic policy; where an episode ends, the next one begins.

        Args:
            policy: see `Evaluator`.
            noise: (S, ...) on the device, one action's random numbers for each seed.
            step: the training step, which a new episode's start depends on.
            on_failure: called before the error of an environment that failed or died ends the run.

        Returns:
            {observations, next_observations (S, D), actions (S, A), rewards, masks (S,)} of float32 on the device;
            masks = 1 - terminated, so that an episode cut off at its time limit still bootstraps.
        """
        try:
            if self.workers is None:
                self.workers = Workers(self.args, len(self.seeds), num_episodes=1)
                self.observations = self._begin(range(len(self.seeds)), step)
            observations = torch.as_tensor(self.observations).to(self.device)  # (S, D)
            actions = policy(observations.unsqueeze(1), noise.unsqueeze(1)).squeeze(1)  # (S, A)
            replies = self.workers.ask("step", {(s, 0): action for s, action in enumerate(actions.cpu().numpy())})
            next_observations, rewards, terminated, truncated, _ = map(np.array, zip(*replies.values()))
            rows = {"next_observations": next_observations, "rewards": rewards, "masks": 1 - terminated}
            rows = {key: torch.as_tensor(value.astype(np.float32)).to(self.device) for key, value in rows.items()}
            self.observations = next_observations.astype(np.float32)
            over = np.flatnonzero(terminated | truncated).tolist()
            if over:
                self.observations[over] = self._begin(over, step)
            return rows | {"observations": observations, "actions": actions}
        except RuntimeError:
            on_failure()
            raise

    def _begin(self, which, step):
        """New episodes of the seeds with the indices `which`, functions of (seed, step): first observations (n, D)."""
        words = lambda s: np.random.SeedSequence([self.seeds[s], step, EXPLORING]).generate_state(1, np.uint32)
        first = self.workers.ask("reset", {(s, 0): int(words(s)[0] >> 1) for s in which})
        return np.array([first[s, 0] for s in which], np.float32)


def save_gif(path, frames, frames_per_second=20):
    """Saves uint8 frames (H, W, 3) as an animated GIF."""
    from PIL import Image

    path.parent.mkdir(exist_ok=True)
    first, *others = [Image.fromarray(frame) for frame in frames]
    first.save(path, save_all=True, append_images=others, duration=1000 / frames_per_second, loop=0)
