"""Collected datasets: repeatable, readable by OGBench, rewards right; damaged files are refused by name and key."""

import hashlib
import io
import os
import signal
import subprocess
import sys
import time
import zipfile
from types import SimpleNamespace

import numpy as np
import ogbench
import pytest
import torch
from conftest import ALGORITHMS, ROOT, assert_refused, children, parse, wait_for

import floq
from common import datasets, envs, files, generate


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def val(path):
    return path.with_name(path.stem + "-val.npz")


def test_the_file_depends_on_the_seed_and_not_on_the_workers(maze_data, tmp_path):
    again = generate.generate("pointmaze-medium-navigate-v0", tmp_path, num_episodes=10, num_workers=1)
    assert again.name == maze_data.name == "pointmaze-medium-navigate-v0-generated-10ep-seed0.npz"
    assert sha256(again) == sha256(maze_data) and sha256(val(again)) == sha256(val(maze_data))
    other = generate.generate("pointmaze-medium-navigate-v0", tmp_path, num_episodes=10, seed=1)
    assert sha256(other) != sha256(again)
    with np.load(again) as training, np.load(val(again)) as validation:
        rows = min(len(training["qpos"]), len(validation["qpos"]))
        assert not np.array_equal(training["qpos"][:rows], validation["qpos"][:rows])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in (again, val(again), other, val(other)))


def test_an_episode_does_not_depend_on_the_episodes_before_it():
    env = generate.make_collection_env("cube-single-noisy-v0")
    env.reset(seed=0)
    first = generate.collect_episode(env, "cube-single-noisy-v0", [0, 0, 1])
    generate.collect_episode(env, "cube-single-noisy-v0", [0, 0, 2])
    again = generate.collect_episode(env, "cube-single-noisy-v0", [0, 0, 1])
    assert all(np.array_equal(first[key], again[key]) for key in first)


def test_an_interrupted_collection_uses_its_finished_parts(maze_data, tmp_path, monkeypatch):
    path = generate.generated_path("pointmaze-medium-navigate-v0", tmp_path, 20, 0)
    whole = generate.generate("pointmaze-medium-navigate-v0", tmp_path, num_episodes=20)
    expected = sha256(whole)
    whole.unlink()
    parts = path.with_name(path.stem + ".parts")
    parts.mkdir()
    generate._collect_part("pointmaze-medium-navigate-v0", 0, 0, parts / "000010.npz", range(10, 20))
    stamp = (parts / "000010.npz").stat().st_mtime_ns
    seen = []
    original = generate.written_whole
    monkeypatch.setattr(
        generate,
        "written_whole",
        lambda path: seen.append((parts / "000010.npz").stat().st_mtime_ns) or original(path),
    )
    generate.generate("pointmaze-medium-navigate-v0", tmp_path, num_episodes=20)
    assert sha256(whole) == expected and seen == [stamp] and not parts.exists()


@pytest.mark.parametrize(
    "dataset",
    [
        "cube-double-play-v0",
        "scene-play-v0",
        "scene-noisy-v0",
        "puzzle-3x3-play-v0",
        "puzzle-3x3-noisy-v0",
        "pointmaze-medium-stitch-v0",
    ],
)
def test_every_collector_makes_official_rows(dataset, monkeypatch):
    monkeypatch.setitem(generate.OFFICIAL_SIZES, dataset, (1, 120))
    env = generate.make_collection_env(dataset)
    episode = generate.collect_episode(env, dataset, [0, 0, 0])
    assert episode["terminals"].tolist() == [False] * 119 + [True]
    dtypes = {
        "observations": "float32",
        "actions": "float32",
        "qpos": "float32",
        "qvel": "float32",
        "terminals": "bool",
    }
    if "scene" in dataset or "puzzle" in dataset:
        dtypes["button_states"] = "int64"
    assert {key: str(value.dtype) for key, value in episode.items()} == dtypes
    assert np.abs(episode["actions"]).max() <= 1 and len(np.unique(episode["actions"], axis=0)) > 100
    assert episode["observations"].shape[1:] == env.observation_space.shape
    moved = np.linalg.norm(np.diff(episode["observations"], axis=0), axis=-1)
    assert (moved > 0).all()


@pytest.mark.parametrize(
    "dataset, share",
    [("cube-single-noisy-v0", 0.1), ("scene-noisy-v0", 0.1), ("puzzle-3x3-noisy-v0", 0.2), ("scene-play-v0", 0.0)],
)
def test_a_share_of_the_actions_of_noisy_data_is_random(dataset, share, monkeypatch):
    class Oracle:
        number, done = 0, False

        def reset(self, ob, info):
            pass

        def select_action(self, ob, info):
            self.number += 1
            return np.full(5, 0.5)

    class Env:
        def reset(self, seed):
            self.number = 0
            return np.zeros(3), {}

        def step(self, action):
            self.number += 1
            return np.zeros(3), 0.0, False, self.number == 4000, {}

    oracle = Oracle()
    monkeypatch.setattr(generate, "make_oracles", lambda env, dataset: {"button": oracle})
    np.random.seed(0)
    rows = generate.collect_manipulation(Env(), dataset, 0)
    assert len(rows) == 4000 and abs(1 - oracle.number / 4000 - share) < 0.02
    assert all((row["actions"] == 0.5).all() for row in rows) == (share == 0)


def test_each_target_of_an_episode_gets_its_own_oracle(monkeypatch):
    asked, targets = [], iter(("cube", "drawer", "window", "cube"))

    class Oracle:
        def __init__(self, name):
            self.name, self.left, self.done = name, 0, False

        def reset(self, ob, info):
            self.left, self.done = 3, False

        def select_action(self, ob, info):
            asked.append(self.name)
            self.left -= 1
            self.done = self.left == 0
            return np.zeros(5)

    class Env:
        number = 0
        unwrapped = property(lambda env: env)

        def set_new_target(self, p_stack):
            return np.zeros(3), {"privileged/target_task": next(targets)}

        def reset(self, seed):
            return self.set_new_target(0)

        def step(self, action):
            self.number += 1
            return np.zeros(3), 0.0, False, self.number == 8, {}

    oracles = {name: Oracle(name) for name in ("cube", "drawer", "window")}
    monkeypatch.setattr(generate, "make_oracles", lambda env, dataset: oracles)
    generate.collect_manipulation(Env(), "scene-play-v0", 0)
    assert asked == ["cube"] * 3 + ["drawer"] * 3 + ["window"] * 2


def test_scenes_cube_stays_on_the_table_or_in_the_drawer():
    on_the_table = [0.4, 0.0, 0.02]
    for xyz, stays in (
        ([0.4, 0.28, 0.02], True),
        ([0.4, 0.29, 0.02], False),  # too far right, at any height
        ([0.4, 0.29, 0.07], False),
        ([0.4, -0.29, 0.02], True),
        ([0.4, -0.3, 0.02], False),  # too far left, below the drawer or above it
        ([0.4, -0.3, 0.09], False),
        ([0.4, -0.3, 0.07], True),  # in the drawer
    ):
        assert generate.cube_stays_in_reach(np.array([on_the_table, xyz, on_the_table])) == stays, xyz


def test_stitch_goals_are_four_cells_away(monkeypatch):
    monkeypatch.setitem(generate.OFFICIAL_SIZES, "pointmaze-large-stitch-v0", (1, 201))
    env = generate.make_collection_env("pointmaze-large-stitch-v0")
    episode = generate.collect_episode(env, "pointmaze-large-stitch-v0", [0, 0, 3])
    path = np.linalg.norm(np.diff(episode["qpos"], axis=0), axis=-1).sum()
    assert 4 * 4 * 0.7 < path
    cell = lambda xy: maze.xy_to_ij(xy)
    maze = env.unwrapped
    assert maze.get_oracle_subgoal(episode["qpos"][0], maze.cur_goal_xy)[1][cell(episode["qpos"][0])] == 4
    reached = np.linalg.norm(episode["qpos"] - env.unwrapped.cur_goal_xy, axis=-1).min()
    assert reached < 1.0


def test_loads_through_ogbench_with_rewards_of_an_independent_relabelling(cube_data):
    env_id = "cube-single-play-singletask-task1-v0"
    dataset, identity = datasets.load_dataset(cube_data, env_id, "cpu")
    _, train, _ = ogbench.make_env_and_datasets(env_id, dataset_path=str(cube_data))
    assert len(train["rewards"]) == identity["transitions"] == 2 * 1000
    with np.load(cube_data) as file:
        rows = {key: file[key] for key in file.files}
    last = rows["terminals"]
    follows = np.concatenate([[False], ~last[:-1]])
    np.testing.assert_array_equal(dataset["observations"], rows["observations"][~last])
    np.testing.assert_array_equal(dataset["next_observations"], rows["observations"][follows])
    np.testing.assert_allclose(dataset["actions"], rows["actions"][~last], atol=1.1e-5)
    assert dataset["actions"].abs().max() < 1
    # Task 1: the cube (free joint behind the arm's 14) within 4 cm of (0.425, -0.1, 0.02).
    cube = rows["qpos"][~last][:, 14:17]
    success = np.linalg.norm(cube - np.array([0.425, -0.1, 0.02]), axis=-1) <= 0.04
    np.testing.assert_array_equal(dataset["rewards"], success - 1.0)
    np.testing.assert_array_equal(dataset["masks"], 1.0 - success)
    np.testing.assert_array_equal(dataset["rewards"], train["rewards"])
    assert identity["source"] == "generated" and identity["sha256"] == sha256(cube_data)


def test_maze_rewards_are_those_of_the_goal_distance(maze_data):
    dataset, _ = datasets.load_dataset(maze_data, "pointmaze-medium-navigate-singletask-task1-v0", "cpu")
    with np.load(maze_data) as file:
        xy = file["qpos"][~file["terminals"]]
    success = np.linalg.norm(xy - np.array([20.0, 20.0]), axis=-1) <= 1.0  # cell (6, 6), 4 units a cell from (1, 1)
    assert success.any()
    np.testing.assert_array_equal(dataset["rewards"], success - 1.0)
    np.testing.assert_array_equal(dataset["masks"], 1.0 - success)


def test_another_environments_generated_file_is_the_users_own(cube_data, tmp_path):
    """It would pass for the published settings; and so would a validation file, which is smaller."""
    own = "cube-single-play-v0-generated-1000ep-seed0"
    found = lambda path, env_id: datasets.load_dataset(path, env_id, "cpu")[1]["source"]
    for name, source in ((own, "generated"), (f"{own}-slim", "generated"), (f"{own}-val", "custom")):
        path = tmp_path / f"{name}.npz"
        path.write_bytes(cube_data.read_bytes())
        assert found(path, "cube-single-play-singletask-v0") == source
    assert found(tmp_path / f"{own}.npz", "cube-single-noisy-singletask-v0") == "custom"


def test_generated_data_is_made_once_and_named_so(tmp_path):
    words = ["--dataset-source", "generated", "--generated-episodes", "2", "--dataset-dir", str(tmp_path)]
    args = parse("floq", "--env-id", "pointmaze-medium-navigate-singletask-v0", *words)
    find = lambda: datasets.find_dataset(args)
    path = find()
    stamp = path.stat().st_mtime_ns
    assert "-generated-2ep-" in path.name and find().stat().st_mtime_ns == stamp
    generate.val_path(path).unlink()  # training does not need it
    assert find() == path and not generate.val_path(path).exists()


def test_an_interrupted_collection_leaves_no_process(tmp_path):
    """As at Ctrl-C, which reaches the whole group."""
    command = [sys.executable, "-m", "common.generate", "--dataset", "cube-single-play-v0", "--num-workers", "2"]
    command += ["--num-episodes", "40", "--dataset-dir", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    collecting = lambda: len(list(tmp_path.glob("*.parts"))) == 1 and len(children(process)) >= 2
    wait_for(process, collecting)
    time.sleep(4)  # the workers have imported what they need, and collect
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "finished parts are kept, run again to continue" in error
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # multiprocessing's own helper ends a little later
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_a_set_has_as_many_episodes_as_the_official_one_unless_told_otherwise(tmp_path):
    path = generate.generated_path(
        "cube-single-play-v0", tmp_path, generate.OFFICIAL_SIZES["cube-single-play-v0"][0], 0
    )
    path.touch()
    generate.val_path(path).touch()  # there already: nothing is collected
    assert generate.generate("cube-single-play-v0", tmp_path) == path and "-1000ep-" in path.name
    words = ("--env-id", "cube-single-play-singletask-v0", "--dataset-source", "generated")
    assert datasets.find_dataset(parse("floq", *words, "--dataset-dir", str(tmp_path))) == path


def test_processes_that_start_together_share_one_collection(tmp_path):
    code = (
        "import sys, floq; from common import datasets;"
        "sizes = dict(dataset_source='generated', generated_episodes=30);"
        "args = floq.Args(env_id='pointmaze-medium-navigate-singletask-v0', dataset_dir=sys.argv[1], **sizes);"
        "print(datasets.find_dataset(args))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    assert len({out.splitlines()[-1] for out, _ in outputs}) == 1
    assert sum("waiting for another process" in out for out, _ in outputs) >= 1
    assert sum("100%" in err for _, err in outputs) == 1
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".npz", ".npz"]


def test_a_failed_collection_is_reported(tmp_path, monkeypatch, capsys):
    sizes = dict(dataset_source="generated", generated_episodes=30, dataset_dir=str(tmp_path))
    args = floq.Args(env_id="pointmaze-medium-navigate-singletask-v0", **sizes)
    monkeypatch.setattr(datasets.subprocess, "Popen", lambda *args, **kwargs: SimpleNamespace(wait=lambda: 3))
    with pytest.raises(SystemExit) as stop:
        datasets.find_dataset(args)
    assert stop.value.code == 2 and "failed (exit code 3)" in capsys.readouterr().err


def test_a_failed_collection_keeps_its_lock_for_those_that_wait(tmp_path):
    with pytest.raises(BrokenPipeError), files.only_one(tmp_path / "set.npz"):
        raise BrokenPipeError
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]  # a new file would be another lock


def test_collections_started_by_hand_share_one_too(tmp_path):
    command = [sys.executable, "-m", "common.generate", "--dataset", "pointmaze-medium-navigate-v0"]
    command += ["--num-episodes", "30", "--num-workers", "1", "--dataset-dir", str(tmp_path)]
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    processes = [subprocess.Popen(command, **pipe) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sum("waiting for another process" in out for out, _ in outputs) <= 1
    assert sum("100%" in err for _, err in outputs) == 1
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".npz", ".npz"]


def test_a_killed_collection_leaves_no_process(tmp_path):
    command = [sys.executable, "-m", "common.generate", "--dataset", "cube-single-play-v0", "--num-workers", "2"]
    command += ["--num-episodes", "40", "--dataset-dir", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for(process, lambda: list(tmp_path.glob("*.parts")) and len(children(process)) >= 2)
    time.sleep(4)  # the workers have imported what they need, and collect
    process.kill()
    process.wait()
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_a_collections_numbers_are_checked(tmp_path, capsys):
    for numbers in (dict(num_episodes=0), dict(num_workers=-1), dict(seed=-1)):
        with pytest.raises(SystemExit) as stop:
            generate.generate("cube-single-play-v0", str(tmp_path), **numbers)
        assert stop.value.code == 2 and "no negative number" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_damaged_part_of_a_collection_is_made_anew(tmp_path, capsys):
    part = tmp_path / "000000.npz"
    part.write_bytes(b"PK junk")
    with pytest.raises(SystemExit) as stop:
        generate._read(part)
    assert stop.value.code == 2 and "run again" in capsys.readouterr().err and not part.exists()


def test_a_whole_part_is_kept_where_memory_runs_out(tmp_path, monkeypatch):
    def load(part):
        raise MemoryError("Unable to allocate 11.4 GiB")

    part = tmp_path / "000000.npz"
    np.savez(part, x=np.arange(3))
    monkeypatch.setattr(generate.np, "load", load)
    with pytest.raises(MemoryError):
        generate._read(part)
    assert part.exists()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def flock(file, mode):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with files.only_one(tmp_path / "set.npz"):
        pass
    assert "cannot be locked" in capsys.readouterr().err


def test_parts_of_a_collection_are_closed_when_read(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(3))
    before = os.listdir("/proc/self/fd")
    parts = [generate._read(tmp_path / "a.npz") for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == len(before) and all((part["x"] == np.arange(3)).all() for part in parts)


def rewritten(source, target, **changes):
    with np.load(source) as file:
        arrays = {key: file[key] for key in file.files} | changes
    np.savez(target, **{key: value for key, value in arrays.items() if value is not None})
    return target


def test_a_set_that_does_not_fit_on_the_device_is_refused(maze_data, monkeypatch, capsys):
    def no_memory(data):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 11.44 GiB.")

    monkeypatch.setattr(datasets.torch, "as_tensor", no_memory)
    with pytest.raises(SystemExit) as stop:
        datasets.load_dataset(maze_data, "pointmaze-medium-navigate-singletask-task1-v0", "cuda:0")
    assert stop.value.code == 2 and "GiB, more than is free on cuda:0" in capsys.readouterr().err


def load_error(path, capsys, env_id="pointmaze-medium-navigate-singletask-v0"):
    with pytest.raises(SystemExit) as stop:
        datasets.load_dataset(path, env_id, "cpu")
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert str(path) in message
    return message


def test_truncated_and_foreign_files_are_refused(maze_data, tmp_path, capsys):
    path = tmp_path / "broken.npz"
    path.write_bytes(maze_data.read_bytes()[:-500])
    assert "not a whole npz file" in load_error(path, capsys)
    path.write_text("hello")
    assert "not a whole npz file" in load_error(path, capsys)
    np.save(tmp_path / "array.npy", np.zeros(3))
    assert "not a whole npz file" in load_error(tmp_path / "array.npy", capsys)
    content = bytearray(maze_data.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert "is damaged" in load_error(path, capsys)


def test_incomplete_or_unfit_arrays_are_refused_by_key(maze_data, cube_data, tmp_path, capsys):
    path = tmp_path / "changed.npz"
    with np.load(maze_data) as file:
        rows = {key: file[key] for key in file.files}
    assert "lacks the keys actions, qpos" in load_error(rewritten(maze_data, path, actions=None, qpos=None), capsys)
    broken = rows["observations"].copy()
    broken[17, 1] = np.nan
    message = load_error(rewritten(maze_data, path, observations=broken), capsys)
    assert "observations has a non-finite value, first in row 17" in message
    message = load_error(rewritten(maze_data, path, actions=rows["actions"][:-1]), capsys)
    assert "key actions has shape" in message
    message = load_error(rewritten(maze_data, path, actions=np.zeros((len(rows["actions"]), 5), np.float32)), capsys)
    assert "a row of actions has shape (5,)" in message and "(2,)" in message
    assert "a row of observations has shape (28,)" in load_error(cube_data, capsys)
    message = load_error(rewritten(maze_data, path, terminals=np.zeros(len(rows["terminals"]), bool)), capsys)
    assert "terminals" in message
    assert "terminals" in load_error(rewritten(maze_data, path, **{key: rows[key][:0] for key in rows}), capsys)
    for ends in (255 * rows["terminals"].astype(np.uint8), 0.5 * rows["terminals"], rows["terminals"][:, None]):
        assert "terminals must have 1 in each" in load_error(rewritten(maze_data, path, terminals=ends), capsys)
    env_id = "pointmaze-medium-navigate-singletask-v0"
    datasets.load_dataset(rewritten(maze_data, path, actions=2 * rows["actions"]), env_id, "cpu")
    assert "actions lie outside [-1, 1] and are clipped" in capsys.readouterr().err
    message = load_error(rewritten(maze_data, path, observations=rows["observations"].astype("U9")), capsys)
    assert "not numbers" in message
    assert "lacks the key button_states" in load_error(cube_data, capsys, "scene-play-singletask-v0")


def test_too_little_memory_is_not_damage(maze_data, tmp_path, monkeypatch, capsys):
    """Else a large set would be deleted and downloaded again and again. A damaged header may ask for any size."""
    load = np.load

    class Large(dict):
        def __getitem__(self, key):
            raise MemoryError("Unable to allocate 11.4 GiB")

    def large(path):
        with load(path) as file:
            archive = Large.fromkeys(file.files)
        archive.files = list(archive)
        return archive

    path = tmp_path / "set.npz"
    path.write_bytes(maze_data.read_bytes())
    monkeypatch.setattr(datasets.np, "load", large)
    message = load_error(path, capsys)
    assert "observations does not fit into memory (Unable to allocate 11.4 GiB)" in message and "another" not in message
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert "key observations is damaged" in load_error(path, capsys)


def test_a_header_that_is_no_python_is_damage(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        for key in ("observations", "actions", "terminals", "qpos", "qvel"):
            array = io.BytesIO()
            np.save(array, np.zeros((4, 2)))
            archive.writestr(f"{key}.npy", array.getvalue().replace(b"(4, 2)", b"(4, 2(").replace(b"}", b" "))
    assert "key observations is damaged" in load_error(tmp_path / "set.npz", capsys)


def test_frames_must_be_bytes(tmp_path, capsys):
    space = lambda *shape, dtype: SimpleNamespace(shape=shape, dtype=dtype)
    env = SimpleNamespace(spec=SimpleNamespace(id="visual-cube-single-v0"), action_space=space(5, dtype=np.float32))
    env.observation_space = space(64, 64, 3, dtype=np.uint8)
    rows = {"actions": np.zeros((4, 5)), "terminals": np.arange(4) == 3, "qpos": np.zeros((4, 2)), "qvel": np.zeros(4)}
    np.savez(tmp_path / "bytes.npz", observations=np.zeros((4, 64, 64, 3), np.uint8), **rows)
    datasets.check_file(tmp_path / "bytes.npz", env, "advice")
    np.savez(tmp_path / "floats.npz", observations=np.zeros((4, 64, 64, 3), np.float32), **rows)
    with pytest.raises(SystemExit) as stop:
        datasets.check_file(tmp_path / "floats.npz", env, "advice")
    assert stop.value.code == 2 and "holds float32, frames must be uint8" in capsys.readouterr().err


def test_files_that_cannot_be_opened_are_not_called_damaged(tmp_path, capsys):
    for path in (tmp_path, tmp_path / "missing.npz"):
        message = load_error(path, capsys)
        assert "cannot be read" in message and "delete" not in message and "not a whole" not in message


@pytest.mark.parametrize("damage", ["truncated", "key", "values", "task"])
def test_only_files_that_were_downloaded_or_made_are_to_be_deleted(maze_data, tmp_path, capsys, damage):
    with np.load(maze_data) as file:
        rows = {key: file[key] for key in file.files}
    for name, replaceable, advice in (
        ("pointmaze-medium-navigate-v0.npz", True, "delete it and run again to download it anew"),
        (maze_data.name, True, "delete it and run again to make it anew"),
        ("pointmaze-medium-navigate-v0.npz", False, "the file is yours and is left as it is"),
        (maze_data.name, False, "the file is yours and is left as it is"),
        ("rows.npz", False, "give another one with --dataset-path"),
    ):
        path = tmp_path / name
        if damage == "truncated":
            path.write_bytes(maze_data.read_bytes()[:-500])
        elif damage == "key":
            rewritten(maze_data, path, actions=None)
        elif damage == "values":
            rewritten(maze_data, path, observations=np.full_like(rows["observations"], np.nan))
        else:
            rewritten(maze_data, path, qpos=rows["qpos"][:, 0])  # the reward needs both coordinates
        with pytest.raises(SystemExit) as stop:
            datasets.load_dataset(path, "pointmaze-medium-navigate-singletask-v0", "cpu", replaceable)
        message = capsys.readouterr().err
        assert stop.value.code == 2 and str(path) in message and advice in message
        assert ("delete" in message) == replaceable
        assert path.is_file()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_says_whose_file_is_damaged(tmp_path, algorithm):
    name = "pointmaze-medium-navigate-v0"
    for file in (f"{name}.npz", f"{name}-val.npz"):
        (tmp_path / file).write_text("hello")
    words = ["--env-id", "pointmaze-medium-navigate-singletask-v0"]
    if algorithm in ("floq", "q_flow"):
        words, advice = [*words, "--dataset-dir", tmp_path], "delete it and run again"
    else:
        words, advice = [*words, "--dataset-path", tmp_path / f"{name}.npz"], "the file is yours"
    assert_refused(algorithm, words, f"{name}.npz is not a whole", advice)


@pytest.mark.parametrize("replaceable", [True, False])
def test_a_file_with_an_official_name_and_another_sum_is_custom(maze_data, tmp_path, monkeypatch, capsys, replaceable):
    path = tmp_path / "pointmaze-medium-navigate-v0.npz"
    path.write_bytes(maze_data.read_bytes())
    load = lambda: datasets.load_dataset(path, "pointmaze-medium-navigate-singletask-task1-v0", "cpu", replaceable)[1]
    assert load()["source"] == "official"  # by its name alone: nothing is known of its content
    monkeypatch.setitem(datasets.KNOWN, path.name, (path.stat().st_size, sha256(path)))
    assert load()["source"] == "official" and capsys.readouterr().err == ""
    monkeypatch.setitem(datasets.KNOWN, path.name, (path.stat().st_size, "0" * 64))
    identity = load()
    assert identity["source"] == "custom" and identity["sha256"] == sha256(path)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and warning.count("\n") == 1
    for words in (str(path), sha256(path), "0" * 64, "not OGBench's"):
        assert words in warning
    assert ("delete it and run again to download" in warning) == replaceable


def test_names_of_environments_and_datasets():
    assert envs.dataset_name("cube-single-play-singletask-task2-v0") == "cube-single-play-v0"
    assert envs.gym_id("cube-single-play-singletask-task2-v0") == "cube-single-singletask-task2-v0"
    assert envs.gym_id("puzzle-4x4-noisy-singletask-v0") == "puzzle-4x4-singletask-v0"
    ids = envs.known_env_ids()
    for env_id in (
        "antmaze-giant-navigate-singletask-task5-v0",
        "visual-cube-double-play-singletask-v0",
        "scene-play-singletask-v0",
    ):
        assert env_id in ids
        envs.check_env_id(env_id)


@pytest.mark.parametrize(
    "dataset", ["antmaze-large-navigate-v0", "humanoidmaze-medium-navigate-v0", "antsoccer-arena-navigate-v0"]
)
def test_experts_data_cannot_be_generated(dataset, capsys):
    with pytest.raises(SystemExit) as stop:
        generate.check_collectable(dataset)
    assert stop.value.code == 2 and "--dataset-source official" in capsys.readouterr().err
