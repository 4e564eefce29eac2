"""Makes OGBench datasets locally with OGBench's own scripted collectors, for machines without the official files.

    python -m common.generate --dataset cube-single-play-v0                      # as large as the official set
    python -m common.generate --dataset pointmaze-medium-navigate-v0 --num-episodes 200 --seed 1

Writes `{dataset}-generated-{episodes}ep-seed{seed}.npz` and `...-val.npz` (10% more episodes) in OGBench's row format;
the name keeps them apart from official files. The recipe is OGBench's (arXiv 2410.20092, appendix on data collection):
`play` follows a noisy plan to random targets, `noisy` a reactive script with strong action noise, `navigate` and
`stitch` walk a maze along shortest paths. Every episode is a function of (seed, split, episode number) alone, so the
file does not depend on the number of workers, and an interrupted collection continues where it stopped.
"""

import functools
import importlib
import multiprocessing
import os
import shutil
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import gymnasium
import numpy as np
from tqdm import tqdm

from common import fail, num_cores
from common.envs import import_ogbench
from common.files import DAMAGE, is_whole, only_one, written_whole

EPISODES_PER_PART = 10  # an interrupted collection loses at most this many episodes per worker

_SIZES = (
    ("cube-single cube-double scene puzzle-3x3 puzzle-4x4", "play noisy", (1000, 1001)),
    ("cube-triple puzzle-4x5", "play noisy", (3000, 1001)),
    ("cube-quadruple puzzle-4x6", "play noisy", (5000, 1001)),
    ("pointmaze-medium pointmaze-large pointmaze-teleport", "navigate", (1000, 1001)),
    ("pointmaze-giant", "navigate", (500, 2001)),
    ("pointmaze-medium pointmaze-large pointmaze-giant pointmaze-teleport", "stitch", (5000, 201)),
)
# dataset -> (episodes, rows per episode) of the official files.
OFFICIAL_SIZES = {f"{e}-{kind}-v0": size for es, kinds, size in _SIZES for e in es.split() for kind in kinds.split()}
STACKING = {"double": (0.0, 0.25), "triple": (0.05, 0.35), "quadruple": (0.1, 0.5)}  # probability range per episode


def generated_path(dataset, dataset_dir, num_episodes, seed):
    """Path of the generated training file; its `-val` sibling lies beside it."""
    return Path(dataset_dir).expanduser() / f"{dataset}-generated-{num_episodes}ep-seed{seed}.npz"


def val_path(path):
    """Path of the validation file that lies beside a training file."""
    return path.with_name(path.stem + "-val.npz")


def check_collectable(dataset):
    """Ends with exit code 2 for a dataset whose collector is not a script (ant, humanoid, soccer, pixels)."""
    if dataset in OFFICIAL_SIZES:
        return
    if any(name in dataset for name in ("ant", "humanoid", "soccer")):
        expert = "its collector is a trained expert policy, not a script"
        fail(f"{dataset} cannot be generated: {expert}. Use --dataset-source official, which downloads it")
    fail(f"{dataset} cannot be generated; generated datasets: {', '.join(sorted(OFFICIAL_SIZES))}")


def make_collection_env(dataset):
    """The environment that a dataset is collected in: no task, never terminating, episodes of the official length."""
    import_ogbench()
    env_id, length = dataset.rsplit("-", 2)[0] + "-v0", OFFICIAL_SIZES[dataset][1]
    kwargs = {} if "maze" in dataset else {"mode": "data_collection"}
    return gymnasium.make(env_id, terminate_at_goal=False, max_episode_steps=length, **kwargs)


def collect_episode(env, dataset, seed):
    """One episode: {observations (T, D), actions (T, A), qpos, qvel} float32, {terminals (T,)} bool, true in the last
    row, and for scene and puzzles {button_states} int64. Seeds numpy's global generator, which the oracles draw from.

    The environment is of `make_collection_env`. Equal seeds, sequences (seed, split, episode), give equal episodes.
    """
    collect = collect_maze if "maze" in dataset else collect_manipulation
    for attempt in range(100):
        episode_seed = int(np.random.SeedSequence([*seed, attempt]).generate_state(1)[0])
        np.random.seed(episode_seed)
        rows = collect(env, dataset, episode_seed)
        episode = {key: np.array([row[key] for row in rows]) for key in rows[0]}
        if "scene" not in dataset or cube_stays_in_reach(episode["qpos"][:, 14:17]):
            break
    dtypes = {"terminals": bool, "button_states": np.int64}
    return {key: value.astype(dtypes.get(key, np.float32)) for key, value in episode.items()}


def cube_stays_in_reach(xyz):
    """False where scene's cube (T, 3) leaves the table: too far right, or too far left but not in the drawer."""
    right = xyz[:, 1] >= 0.29
    left = (xyz[:, 1] <= -0.3) & ((xyz[:, 2] < 0.06) | (xyz[:, 2] > 0.08))
    return not (right | left).any()


def make_oracles(env, dataset):
    """OGBench's scripted oracles by the target they serve: plans for `play`, reactive scripts for `noisy`."""
    if "play" in dataset:
        style, settings = "plan", {"noise": 0.1, "noise_smoothing": 0.5}
    else:
        style, settings = "markov", {"min_norm": 0.4}
    oracles = {}
    for target in ("button", "cube", "drawer", "window"):
        module = importlib.import_module(f"ogbench.manipspace.oracles.{style}.{target}_{style}")
        oracle = getattr(module, f"{target.title()}{style.title()}Oracle")  # cube_plan.CubePlanOracle
        closed = {"gripper_always_closed": True} if target == "button" and "puzzle" in dataset else {}
        oracles[target] = oracle(env=env, **settings, **closed)
    return oracles


def _step(env, ob, action, rows):
    """Takes the clipped action, appends its row in OGBench's format to `rows`; returns (next ob, info, done)."""
    action = np.clip(action, -1, 1)
    next_ob, _, terminated, truncated, info = env.step(action)
    done = terminated or truncated
    row = {"observations": ob, "actions": action, "terminals": done}
    rows.append(row | {key: info[f"prev_{key}"] for key in ("qpos", "qvel", "button_states") if f"prev_{key}" in info})
    return next_ob, info, done


def collect_manipulation(env, dataset, seed):
    """Rows of one `play` or `noisy` episode: one random target after the other until the episode's length is full."""
    oracles = make_oracles(env, dataset)
    noisy = "noisy" in dataset
    p_random = (0.2 if "puzzle" in dataset else 0.1) if noisy else 0.0
    p_stack = np.random.uniform(*STACKING.get(dataset.split("-")[1], (0.0, 0.0)))
    xi = np.random.uniform(0, 0.1)
    noise_std = np.array([xi, xi, xi, 3 * xi, 10 * xi])

    ob, info = env.reset(seed=seed)
    rows, done, oracle = [], False, None
    while not done:
        if oracle is None:  # a new target; puzzles have buttons only, and no target_task that says so
            oracle = oracles[info.get("privileged/target_task", "button")]
            oracle.reset(ob, info)
        if np.random.rand() < p_random:
            action = np.random.uniform(-1, 1, 5)
        else:
            action = np.asarray(oracle.select_action(ob, info))
            if noisy:
                action = action + np.random.normal(0, noise_std)
        ob, info, done = _step(env, ob, action, rows)
        if oracle.done:
            ob, info = env.unwrapped.set_new_target(p_stack=p_stack)
            oracle = None
    return rows


def collect_maze(env, dataset, seed):
    """Rows of one maze episode: unit steps along the shortest path plus noise of deviation 0.5.

    `navigate`: from any cell to a random junction, and on to the next when it is reached. `stitch`: one goal, four
    cells away.
    """
    maze = env.unwrapped
    cells = [tuple(map(int, cell)) for cell in np.argwhere(maze.maze_map == 0)]

    def is_corridor(i, j):
        up, down, left, right = maze.maze_map[[i - 1, i + 1, i, i], [j, j, j - 1, j + 1]]
        return (up == down == 0 and left == right == 1) or (up == down == 1 and left == right == 0)

    junctions = [cell for cell in cells if not is_corridor(*cell)]
    start = cells[np.random.randint(len(cells))]
    goals = junctions
    if "stitch" in dataset:
        xy = np.array(maze.ij_to_xy(start))
        distances = maze.get_oracle_subgoal(xy, xy)[1]
        goals = [tuple(map(int, cell)) for cell in np.argwhere(distances == 4)] or cells
    goal = goals[np.random.randint(len(goals))]

    env.action_space.seed(seed)
    ob, _ = env.reset(seed=seed, options={"task_info": {"init_ij": start, "goal_ij": goal}})
    rows, done = [], False
    while not done:
        xy = maze.get_xy()
        direction = maze.get_oracle_subgoal(xy, maze.cur_goal_xy)[0] - xy
        action = direction / (np.linalg.norm(direction) + 1e-6) + np.random.normal(0, 0.5, 2)
        ob, info, done = _step(env, ob, action, rows)
        if info["success"] and "navigate" in dataset:
            goal = junctions[np.random.randint(len(junctions))]
            maze.set_goal(goal_xy=maze.add_noise(maze.ij_to_xy(goal)))
    return rows


def _begin_worker():
    """Lets Ctrl-C end a worker at once, and the end of the collection too, however that has ended."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_too = lambda: (multiprocessing.parent_process().join(), os._exit(1))
    threading.Thread(target=end_too, daemon=True).start()


def _collect_part(dataset, seed, split, part_path, episodes):
    """Worker: the given episodes of a split, concatenated in one file."""
    env = make_collection_env(dataset)
    parts = [collect_episode(env, dataset, [seed, split, episode]) for episode in episodes]
    arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    with written_whole(part_path) as file:
        np.savez(file, **arrays)


def _read(part):
    """The arrays of a part; its file is closed, since a large set has more parts than a process may open.

    A damaged part is deleted, so that the next collection makes it again, and ends the program with exit code 2.
    """
    try:
        with np.load(part) as file:
            return dict(file)
    except DAMAGE as error:
        if isinstance(error, OSError) or is_whole(part):  # too many open files, too little memory
            raise
        part.unlink()
        fail(f"{part} was damaged and is deleted ({error}); run again to make it anew")


def generate(
    dataset: str = "cube-single-play-v0",
    dataset_dir: str = "~/.ogbench/data",
    num_episodes: int | None = None,
    seed: int = 0,
    num_workers: int = 0,
):
    """Makes the training and validation files, skipping what exists; returns the training file's path.

    A dataset without a scripted collector and a number below 1 end the program with exit code 2.

    Args:
        dataset: dataset to make, by OGBench's name.
        dataset_dir: directory of the files, made if missing.
        num_episodes: training episodes (default: the official set's number); validation gets 10% more, at least one.
        seed: seed of the collection.
        num_workers: worker processes (0: one per core).
    """
    check_collectable(dataset)
    num_episodes = OFFICIAL_SIZES[dataset][0] if num_episodes is None else num_episodes
    if num_episodes < 1 or num_workers < 0 or seed < 0:
        numbers = f"--num-episodes {num_episodes} --num-workers {num_workers} --seed {seed}"
        fail(f"{numbers}: at least 1 episode, and no negative number")
    train_path = generated_path(dataset, dataset_dir, num_episodes, seed)
    # As with downloads, the validation file comes first: a run looks for the other one only.
    files = ((1, val_path(train_path), max(1, num_episodes // 10)), (0, train_path, num_episodes))
    if all(path.exists() for _, path, _ in files):
        return train_path

    context = multiprocessing.get_context("spawn")
    with (
        only_one(train_path),  # the second of two collections finds everything made
        ProcessPoolExecutor(num_workers or num_cores(), context, _begin_worker) as pool,
    ):
        for split, path, episodes in files:
            if path.exists():
                continue
            # A file is cut into parts, which the workers share out; finished parts survive an interruption.
            directory = path.with_name(path.stem + ".parts")
            directory.mkdir(exist_ok=True)
            starts = range(0, episodes, EPISODES_PER_PART)
            parts = {directory / f"{i:06d}.npz": range(episodes)[i : i + EPISODES_PER_PART] for i in starts}
            todo = {part: numbers for part, numbers in parts.items() if not part.exists()}
            collect = functools.partial(_collect_part, dataset, seed, split)
            made = pool.map(collect, todo, todo.values())  # what fails cancels the rest
            list(tqdm(made, f"collecting {path.stem}", len(todo), unit="part"))
            arrays = [_read(part) for part in parts]
            with written_whole(path) as file:
                np.savez_compressed(file, **{k: np.concatenate([a[k] for a in arrays]) for k in arrays[0]})
            shutil.rmtree(directory)
    return train_path


if __name__ == "__main__":
    import tyro

    try:
        path = tyro.cli(generate, description=__doc__)
    except (KeyboardInterrupt, BrokenProcessPool) as error:  # at Ctrl-C either may be the first
        cause = "a worker has died" if isinstance(error, BrokenProcessPool) else "stopped"
        raise SystemExit(f"{cause}: finished parts are kept, run again to continue") from None
    except OSError as error:
        fail(f"could not write to --dataset-dir ({error}); finished parts are kept, run again to continue")
    print(f"{path} ({path.stat().st_size / 2**20:.0f} MiB)")
