"""OGBench environments: names, construction, seeded resets, frame stacks, and the evaluation worker process.

Imports neither torch nor anything that does, so that a worker process (`python -m common.envs FD`, started by
`common.rollout`) comes up in a second and stays small.
"""

import difflib
import os
import re
import sys
import traceback
import warnings

import numpy as np

from common import fail

# Dataset types that OGBench publishes for each family of environments.
DATASET_TYPES = {
    "pointmaze": ("navigate", "stitch"),
    "antmaze": ("navigate", "stitch", "explore"),
    "humanoidmaze": ("navigate", "stitch"),
    "antsoccer": ("navigate", "stitch"),
    "cube": ("play", "noisy"),
    "scene": ("play", "noisy"),
    "puzzle": ("play", "noisy"),
}


def import_ogbench(render=False):
    """Imports ogbench, which registers its environments; `render=False` spares state observations an OpenGL context.

    A `MUJOCO_GL` set by the user wins.
    """
    os.environ.setdefault("MUJOCO_GL", "egl" if render else "disable")
    warnings.filterwarnings("ignore", message=".*precision lowered by casting.*")
    import ogbench

    return ogbench


def is_pixels(env_id):
    """True for `visual-*` environments, whose observations are 64x64x3 uint8 frames."""
    return env_id.startswith("visual-")


def known_env_ids():
    """Every single-task environment id with its dataset type, e.g. `cube-single-play-singletask-task2-v0`."""
    import_ogbench()
    import gymnasium

    ids = []
    for name in gymnasium.registry:
        match = re.fullmatch(r"([\w-]+)-(singletask(?:-task\d)?)-v0", name)
        if match:
            base, task = match.groups()
            family = base.removeprefix("visual-").split("-")[0]
            ids += [f"{base}-{kind}-{task}-v0" for kind in DATASET_TYPES.get(family, ())]
    return ids


def check_env_id(env_id):
    """Ends with exit code 2 unless `env_id` is a single-task id; names the nearest ids, or the single-task form."""
    import_ogbench(render=is_pixels(env_id))  # before anything switches OpenGL off
    ids = known_env_ids()
    if env_id in ids:
        return
    single_task = re.sub(r"-v0$", "-singletask-v0", env_id)
    if single_task in ids:
        fail(
            f"--env-id {env_id} is goal-conditioned; these algorithms need one task: "
            f"{single_task} (the default task) or {single_task[:-3]}-task1-v0 ... -task5-v0"
        )
    near = difflib.get_close_matches(env_id, ids, n=3, cutoff=0.4)
    fail(f"--env-id {env_id} is unknown to ogbench" + (f"; nearest: {', '.join(near)}" if near else ""))


def dataset_name(env_id):
    """`cube-single-play-singletask-task2-v0` -> `cube-single-play-v0`: OGBench's name of the dataset's file."""
    return re.sub(r"-singletask(-task\d)?", "", env_id)


def gym_id(env_id):
    """`cube-single-play-singletask-task2-v0` -> `cube-single-singletask-task2-v0`: the registered environment."""
    return re.sub(r"-\w+(-singletask)", r"\1", env_id, count=1)


class FrameStack:
    """Stacks the last `num_frames` observations along the last axis: (64, 64, 3) -> (64, 64, 3 * num_frames).

    The first frame of an episode is repeated. Everything else is the wrapped environment's.
    """

    def __init__(self, env, num_frames):
        self.env, self.num_frames, self.frames = env, num_frames, []

    def __getattr__(self, name):
        return getattr(self.env, name)

    def reset(self, **kwargs):
        ob, info = self.env.reset(**kwargs)
        self.frames = [ob] * self.num_frames
        return np.concatenate(self.frames, axis=-1), info

    def step(self, action):
        ob, *rest = self.env.step(action)
        self.frames = [*self.frames[1:], ob]
        return np.concatenate(self.frames, axis=-1), *rest


def make_env(env_id, success_timing="post", frame_stack=1, render=False):
    """Makes the environment of a single-task id.

    Args:
        env_id: e.g. `cube-single-play-singletask-v0`.
        success_timing: `post` judges reward, termination and success at the state after the action (the published
            scores, ogbench <= 1.1.2), `pre` at the one before it (ogbench >= 1.2.0's default).
        frame_stack: number of frames stacked on the channel axis (1: none).
        render: whether `env.render()` will be called; needs OpenGL (EGL on a headless machine).

    Returns:
        A gymnasium environment: observations float64 (D,) or uint8 (64, 64, 3 * frame_stack), actions in [-1, 1].
    """
    import_ogbench(render=render or is_pixels(env_id))
    import gymnasium

    env = gymnasium.make(gym_id(env_id), success_timing=success_timing)
    return FrameStack(env, frame_stack) if frame_stack > 1 else env


def reset_env(env, seed):
    """Resets so that `seed` alone determines the episode's start; returns (observation, info).

    Mazes draw their start from numpy's global generator and warm up with samples of the action space, so these are
    seeded too; manipulation draws from the environment's own generator.
    """
    np.random.seed(seed % 2**32)
    env.action_space.seed(seed)
    return env.reset(seed=seed)


def worker(connection):
    """Steps this process's environments on request until the other end closes; every reply is (ok, value).

    Requests: ("make", num_envs, make_env's keyword arguments), ("reset", {slot: seed}) -> {slot: observation},
    ("step", {slot: action}) -> {slot: (observation, reward, terminated, truncated, success)}, ("render", slot). A failure is replied as (False, traceback) and ends the worker.
    """
    envs = []
    try:
        while True:
            try:
                kind, *payload = connection.recv()
            except EOFError:
                return
            if kind == "make":
                num_envs, kwargs = payload
                envs = [make_env(**kwargs) for _ in range(num_envs)]
                reply = envs[0].spec.max_episode_steps
            elif kind == "reset":
                reply = {slot: reset_env(envs[slot], seed)[0] for slot, seed in payload[0].items()}
            elif kind == "step":
                reply = {}
                for slot, action in payload[0].items():
                    ob, reward, terminated, truncated, info = envs[slot].step(action)
                    reply[slot] = (ob, float(reward), bool(terminated), bool(truncated), float(info["success"]))
            else:
                reply = envs[payload[0]].render()
            connection.send((True, reply))
    except BaseException:
        connection.send((False, traceback.format_exc()))


if __name__ == "__main__":
    import signal
    from multiprocessing.connection import Connection

    # Ctrl-C and schedulers signal the whole group; the main process saves first, and closes the connection.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    worker(Connection(int(sys.argv[1])))
    os._exit(0)  # past the renderers' destructors, which print errors when the interpreter is half gone
