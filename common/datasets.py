"""OGBench datasets: find, download or generate the file, check it, put it on the device, gather batches; online replay.

Official files lie in OGBench's own layout, `{dataset_dir}/{name}.npz` and `{name}-val.npz`; what is missing is
downloaded. Generated ones (`common.collect`) carry `-generated-` in their name and never pass for official. OGBench's
own loader and relabelling are used in both cases.
"""

import contextlib
import fcntl
import hashlib
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import torch

from common import envs, fail, pixels, python_environment, warn

# Hosts that serve OGBench's files; CLEANFLOW_DATASET_MIRRORS (comma-separated base URLs) is tried first.
MIRRORS = ("https://rail.eecs.berkeley.edu/datasets/ogbench",)
ATTEMPTS = 4  # tries of one mirror that drops connections or sends short files
BACK_OFF = float(os.environ.get("CLEANFLOW_DOWNLOAD_BACKOFF", 1.0))  # seconds before the second try, then doubled
BLOCK = 2**20


def find_dataset(env_id, dataset_dir, dataset_path=None, source="official", episodes=None, seed=0):
    """Path of the training file of an environment's dataset, downloaded or generated if need be.

    Args:
        env_id: single-task id; the dataset is `envs.dataset_name(env_id)`.
        dataset_dir: directory of the files.
        dataset_path: a file of the user's own, which wins.
        source: `official` or `generated`.
        episodes, seed: of a generated set; None for as many as the official one has.

    Raises:
        SystemExit: (code 2) where the file is missing and cannot be had.
    """
    name = envs.dataset_name(env_id)
    if dataset_path is not None:
        path = Path(dataset_path).expanduser()
        if not path.is_file():
            fail(f"--dataset-path {path} is not a file")
        return path
    if source == "official":
        directory = Path(dataset_dir).expanduser()
        for file in (f"{name}-val.npz", f"{name}.npz"):
            if not (directory / file).exists():
                with only_one(directory / file):
                    if not (directory / file).exists():
                        download(file, directory)
        return directory / file

    from common import collect

    collect.check_collectable(name)
    episodes = collect.OFFICIAL_SIZES[name][0] if episodes is None else episodes
    path = collect.generated_path(name, dataset_dir, episodes, seed)
    if not (path.exists() and collect.val_path(path).exists()):
        # A process of its own, so that the collecting workers load neither torch nor the algorithm.
        flags = {"--dataset": name, "--dataset-dir": dataset_dir, "--num-episodes": episodes, "--seed": seed}
        command = [sys.executable, "-m", "common.collect", *(str(word) for flag in flags.items() for word in flag)]
        with only_one(path):  # the second of two processes finds everything made
            status = subprocess.run(command, env=python_environment()).returncode
        if status != 0:
            fail(f"collecting {name} failed (exit code {status}); its finished parts are kept, run again to go on")
    return path


@contextlib.contextmanager
def only_one(path):
    """Lets one process at a time make `path`: the jobs of a cluster may all start at once and want the same file."""
    lock = path.with_name(path.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "w")
    except OSError as error:
        fail(f"--dataset-dir {path.parent} is not writable: {error}")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that is making {path.name}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
        lock.unlink(missing_ok=True)


# --- Download ---


def download(file, directory):
    """Downloads one file from the first mirror that has it; a `.part` file is resumed, and renamed when whole.

    Raises:
        SystemExit: (code 2) when no mirror served it; says what each answered, and the three ways out.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--dataset-dir {directory} cannot be made: {error}")
    own = os.environ.get("CLEANFLOW_DATASET_MIRRORS", "")
    mirrors = [mirror.strip().rstrip("/") for mirror in own.split(",") if mirror.strip()] + list(MIRRORS)
    answers = []
    for mirror in mirrors:
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(BACK_OFF * 2 ** (attempt - 1))
            try:
                _fetch(f"{mirror}/{file}", directory / file)
                return
            except urllib.error.HTTPError as error:
                answer = f"HTTP {error.code} {error.reason}"
                if error.code < 500:  # the mirror does not have it, and asking again will not change that
                    break
            except (OSError, EOFError, zipfile.BadZipFile) as error:
                answer = str(getattr(error, "reason", error))
        answers.append(f"  {mirror}: {answer}")
    name = file.removesuffix(".npz").removesuffix("-val")
    fail(
        f"{file} is not in {directory} and could not be downloaded:\n" + "\n".join(answers) + "\nThree ways out: "
        f"(1) --dataset-source generated makes a set here with OGBench's scripted collectors; "
        f"(2) put {name}.npz and {name}-val.npz from another machine into {directory} (or name a file with "
        "--dataset-path); (3) set CLEANFLOW_DATASET_MIRRORS to a host that serves them"
    )


def _fetch(url, path):
    """One try: the rest of `path`'s `.part` file from `url`, then check and rename. A short file raises EOFError."""
    from tqdm import tqdm

    part = path.with_name(path.name + ".part")
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        part.unlink()  # nothing is left to send: the part is whole or another file's, so begin anew
        raise EOFError("the partial file did not fit the server's") from None
    with response:
        if done and response.status != 206:  # the server sends everything again
            done = 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=f"downloading {path.name}")
        with bar, open(part, "ab" if done else "wb") as file:
            while block := response.read(BLOCK):
                file.write(block)
                bar.update(len(block))
                done += len(block)
    if total is not None and done < total:
        raise EOFError(f"connection closed after {done} of {total} bytes")
    try:
        with zipfile.ZipFile(part) as archive:
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"damaged member {damaged}")
    except zipfile.BadZipFile as error:
        part.unlink()
        raise zipfile.BadZipFile(f"what arrived is not a whole npz file ({error})") from None
    os.replace(part, path)


# --- Load ---


def load_dataset(path, env_id, device):
    """Loads, checks and relabels a dataset file, and puts its transitions on the device.

    Args:
        path: npz file with OGBench's rows (observations, actions, terminals, qpos, qvel, maybe button_states).
        env_id: single-task id whose task the rewards are computed for.
        device: torch device.

    Returns:
        dataset: {observations, next_observations (N, D), actions (N, A), rewards, masks (N,)} float32 (pixels uint8)
            tensors; actions clipped to +-(1 - 1e-5); masks = 1 - success; the last row of a trajectory is not a
            transition. Pixels also have starts (N,): the row of the trajectory's first transition.
        identity: {source, file, size, sha256, transitions}; source is official, generated or custom.

    Raises:
        SystemExit: (code 2) for a damaged or incomplete file, non-finite values, or shapes unlike the environment's.
    """
    path = Path(path)
    ogbench = envs.import_ogbench(render=envs.is_pixels(env_id))
    env = envs.make_env(env_id)
    check_file(path, env)
    ob_dtype = np.uint8 if envs.is_pixels(env_id) else np.float32
    data = ogbench.load_dataset(path, ob_dtype=ob_dtype, add_info=True)
    np.random.seed(0)  # the relabelling resets the environment, which draws from the global generator
    try:
        ogbench.relabel_utils.relabel_dataset(envs.gym_id(env_id), env, data)
    except (KeyError, ValueError, IndexError) as error:
        fail(f"{path}: its rows do not fit {env_id}, so that rewards cannot be computed ({error!r})")
    env.close()
    if data["masks"].all():
        warn(f"{path.name} holds no success on {env_id}: there is nothing to learn but the negative rewards")

    keys = ("observations", "next_observations", "actions", "rewards", "masks")
    dataset = {key: torch.as_tensor(data[key]).to(device) for key in keys}
    if envs.is_pixels(env_id):
        dataset["starts"] = pixels.trajectory_starts(data["terminals"]).to(device)
    dataset["actions"] = dataset["actions"].clamp(-1 + 1e-5, 1 - 1e-5)
    name = envs.dataset_name(env_id)
    source = "official" if path.name == f"{name}.npz" else "generated" if "-generated-" in path.name else "custom"
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            sha256.update(block)
    identity = {"source": source, "file": path.name, "size": path.stat().st_size, "sha256": sha256.hexdigest()}
    return dataset, identity | {"transitions": len(data["rewards"])}


def check_file(path, env):
    """Ends with exit code 2 unless the npz file is whole and its arrays fit the environment; names file and key."""
    advice = "delete it and run again to get a new one"
    try:
        file = np.load(path)
        keys = file.files  # a single array (.npy) has none
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        fail(f"{path} is not a whole npz file ({error}); {advice}")
    needed = ["observations", "actions", "terminals", "qpos", "qvel"]
    needed += ["button_states"] if any(kind in env.spec.id for kind in ("scene", "puzzle")) else []
    missing = [key for key in needed if key not in keys]
    if missing:
        fail(
            f"{path} lacks the key{'s' * (len(missing) > 1)} {', '.join(missing)} (it has: {', '.join(keys)}); {advice}"
        )

    rows, arrays = None, {}
    for key in needed:
        try:
            arrays[key] = array = file[key]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zipfile.zlib.error) as error:
            fail(f"{path}: key {key} is damaged ({error}); {advice}")
        rows = len(array) if rows is None and array.ndim else rows
        if array.ndim == 0 or len(array) != rows:
            fail(f"{path}: key {key} has shape {array.shape}, observations have {rows} rows")
        if array.dtype.kind not in "fiub":
            fail(f"{path}: key {key} holds {array.dtype}, not numbers")
        if not np.isfinite(array).all():
            row = int(np.argwhere(~np.isfinite(array))[0, 0])
            fail(f"{path}: key {key} has a non-finite value, first in row {row}")
    for key, space in (("observations", env.observation_space), ("actions", env.action_space)):
        if arrays[key].shape[1:] != space.shape:
            fail(f"{path}: a row of {key} has shape {arrays[key].shape[1:]}, {env.spec.id} needs {space.shape}")
    if rows < 2 or not arrays["terminals"][-1] or arrays["terminals"].all():
        fail(f"{path}: key terminals must mark each trajectory's last row, the file's last row among them")


# --- Batches and online replay ---

CAPACITY = 2_000_000  # transitions of a replay buffer, the offline ones included


def make_replay(dataset, num_seeds, online_timesteps):
    """The online part of a replay buffer that starts as the offline dataset: {key: (S, M, ...)} on its device.

    The offline part is the dataset itself, shared by all seeds. Slot i < N of the whole buffer is offline transition i,
    and the n-th online transition goes to slot (N + n) mod capacity: a full buffer overwrites its oldest ones. The
    capacity is 2M, or N + 1 for a larger dataset. Row n mod M of this part holds that transition.
    """
    rows = min(online_timesteps, max(CAPACITY, len(dataset["rewards"]) + 1))
    return {key: value.new_zeros(num_seeds, rows, *value.shape[1:]) for key, value in dataset.items()}


def append(replay, transitions, number):
    """Writes each seed's online transition `number` (0, 1, ...) into its replay; transitions {key: (S, ...)}."""
    for key, rows in replay.items():
        rows[:, number % rows.shape[1]] = transitions[key]


def restore_replay(replay, saved):
    """Puts the rows of a checkpoint, {key: (S, rows, ...)}, back into a new replay."""
    for key, rows in saved.items():
        replay[key][:, : rows.shape[1]] = rows


def gather(dataset, replay, inputs):
    """A batch of transitions, uniform over the offline and, in the online phase, the online ones.

    Args:
        dataset: the offline transitions {key: (N, ...)}.
        replay: of `make_replay`.
        inputs: "indices" (S, B): offline, of transitions. Online, with "count", a 0-d integer tensor on the device: the
            online transitions so far; "indices" are then uniform integers of a range far above the buffer's size.

    Returns:
        {key: (S, B, ...)}.
    """
    indices = inputs["indices"]
    if "starts" in dataset:
        return pixels.gather_frames(dataset, indices)
    if "count" not in inputs:
        return {key: value[indices] for key, value in dataset.items()}
    N, (S, M), count = len(dataset["rewards"]), replay["rewards"].shape, inputs["count"]
    capacity = max(CAPACITY, N + 1)
    slots = indices % (count + N).clamp(max=capacity)  # (S, B)
    numbers = (slots - N) % capacity  # (S, B), of the online transition that lies there, if one does
    seeds = torch.arange(S, device=indices.device).unsqueeze(1)
    batch = {}
    for key, offline in dataset.items():
        is_online = (numbers < count).view(*slots.shape, *[1] * (offline.ndim - 1))  # (S, B, ...)
        batch[key] = torch.where(is_online, replay[key][seeds, numbers % M], offline[slots.clamp(max=N - 1)])
    return batch
