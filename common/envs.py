"""OGBench environments: names, construction, seeded resets and frame stacks.

Imports neither torch nor anything that does: neither do the processes of `common.workers` and `common.generate`.
"""

import difflib
import os
import re
import sys
import warnings

import gymnasium
import numpy as np

from common import fail

# Dataset types that OGBench publishes for each family of environments.
DATASET_TYPES = dict.fromkeys(("cube", "scene", "puzzle"), ("play", "noisy"))
DATASET_TYPES |= dict.fromkeys(("pointmaze", "humanoidmaze", "antsoccer"), ("navigate", "stitch"))
DATASET_TYPES["antmaze"] = ("navigate", "stitch", "explore")
RENDERER = "egl" if sys.platform == "linux" else "glfw"  # of MuJoCo's; egl needs no display, macOS has none


def import_ogbench(render=False):
    """Imports ogbench, which registers its environments; `render=False` spares state observations an OpenGL context.

    A `MUJOCO_GL` set by the user wins. `disable` does not where there is something to render: a parent process that did
    not render (the launcher) may have set it.
    """
    if os.environ.get("MUJOCO_GL", "disable") == "disable":
        os.environ["MUJOCO_GL"] = RENDERER if render else "disable"
    warnings.filterwarnings("ignore", message=".*precision lowered by casting.*")
    import ogbench

    return ogbench


def is_pixels(env_id):
    """True for `visual-*` environments, whose observations are 64x64x3 uint8 frames."""
    return env_id.startswith("visual-")


def known_env_ids():
    """Every single-task environment id with its dataset type, e.g. `cube-single-play-singletask-task2-v0`."""
    import_ogbench()
    ids = []
    for name in gymnasium.registry:
        if match := re.fullmatch(r"([\w-]+)-(singletask(?:-task\d)?)-v0", name):
            base, task = match.groups()
            family = base.removeprefix("visual-").split("-")[0]
            ids += [f"{base}-{kind}-{task}-v0" for kind in DATASET_TYPES.get(family, ())]
    return ids


def check_env_id(env_id, where="--env-id"):
    """Ends with exit code 2 unless `env_id`, of `where`, is a single-task id; names the nearest, or the id's tasks."""
    import_ogbench(render=is_pixels(env_id))  # before anything switches OpenGL off
    ids = known_env_ids()
    if env_id in ids:
        return
    single_task = re.sub(r"-v0$", "-singletask-v0", env_id)
    if single_task in ids:
        tasks = f"{single_task} (the default task) or {single_task[:-3]}-task1-v0 ... -task5-v0"
        fail(f"{where} {env_id} is goal-conditioned; these algorithms need one task: {tasks}")
    near = difflib.get_close_matches(env_id, ids, n=3, cutoff=0.4)
    fail(f"{where} {env_id} is unknown to ogbench" + (f"; nearest: {', '.join(near)}" if near else ""))


def dataset_name(env_id):
    """`cube-single-play-singletask-task2-v0` -> `cube-single-play-v0`: OGBench's name of the dataset's file."""
    return re.sub(r"-singletask(-task\d)?", "", env_id)


def gym_id(env_id):
    """`cube-single-play-singletask-task2-v0` -> `cube-single-singletask-task2-v0`: the registered environment."""
    return re.sub(r"-\w+(-singletask)", r"\1", env_id, count=1)


def stack_frames(env, num_frames):
    """Observations become the last `num_frames` ones, stacked along the last axis: (64, 64, 3) -> (64, 64, 3 * number).

    The first frame of an episode is repeated.
    """
    env = gymnasium.wrappers.FrameStackObservation(env, num_frames)  # (num_frames, 64, 64, 3)
    channels_last = lambda frames: np.concatenate(frames, axis=-1)
    low, high = map(channels_last, (env.observation_space.low, env.observation_space.high))
    return gymnasium.wrappers.TransformObservation(env, channels_last, gymnasium.spaces.Box(low, high, dtype=low.dtype))


def make_env(env_id, success_timing="post", frame_stack=1, render=False):
    """The gymnasium environment of a single-task id: observations float64 (D,) or uint8 (64, 64, 3 * frame_stack),
    actions in [-1, 1].

    Args:
        env_id: e.g. `cube-single-play-singletask-v0`.
        success_timing: `post` judges reward, termination and success at the state after the action (the published
            scores, ogbench <= 1.1.2), `pre` at the one before it (ogbench >= 1.2.0's default).
        frame_stack: number of frames stacked on the channel axis (1: none).
        render: whether `env.render()` will be called; needs OpenGL (EGL on a headless machine).
    """
    import_ogbench(render=render or is_pixels(env_id))
    env = gymnasium.make(gym_id(env_id), success_timing=success_timing)
    return stack_frames(env, frame_stack) if frame_stack > 1 else env


def reset_env(env, seed):
    """Resets so that `seed` alone determines the episode's start; returns (observation, info).

    Mazes draw their start from numpy's global generator and warm up with samples of the action space, so these are
    seeded too; manipulation draws from the environment's own generator.
    """
    np.random.seed(seed % 2**32)
    env.action_space.seed(seed)
    return env.reset(seed=seed)
