"""OGBench datasets: find, download or generate the file, check it, put it on the device.

Official files lie in OGBench's own layout, `{dataset_dir}/{name}.npz` and `{name}-val.npz`; what is missing is
downloaded. Generated ones (`common.generate`) carry `-generated-` in their name and never pass for official. OGBench's
own loader and relabelling are used in both cases.
"""

import contextlib
import fcntl
import hashlib
import http.client
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from common import envs, fail, pixels, python_environment, warn

# Hosts that serve OGBench's files; CLEANFLOW_DATASET_MIRRORS (comma-separated base URLs) is tried first.
MIRRORS = (
    "https://rail.eecs.berkeley.edu/datasets/ogbench",
    # The copy that OGBench's author names (OGBench's issue 49): all standard state sets, none of the 100M ones.
    "https://huggingface.co/datasets/zhouzypaul/ogbench_datasets/resolve/main",
)
# Official files whose content is known: (bytes, SHA-256). Others are checked by the checksums within the npz file.
KNOWN = {
    "cube-double-play-v0.npz": (297_435_656, "a73d1a33d029cedb8bc170ef94791ec585fa2d9450096f4f2a02b8cfbcf608c9"),
    "cube-double-play-v0-val.npz": (29_726_524, "b1fcdf4bd40750351a58d0d491d6be198366ce898f0c6a2e4cb5db331966013e"),
}
ATTEMPTS = 4  # tries of one mirror that drops connections or sends short files
BACK_OFF = float(os.environ.get("CLEANFLOW_DOWNLOAD_BACKOFF", 1.0))  # seconds before the second try, then doubled
BLOCK = 2**20
BAR_DELAY = 5  # seconds before a check of a file shows its progress
# What reading a damaged npz file raises, by where the damage is.
DAMAGE = (OSError, ValueError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)


def load(args, device):
    """The dataset of a run's arguments, on the device; see find_dataset and load_dataset."""
    path = find_dataset(args.env_id, args.dataset_dir, args.dataset_path, args.dataset_source, args.generated_episodes)
    return load_dataset(path, args.env_id, device, replaceable=args.dataset_path is None)


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

    from common import generate

    generate.check_collectable(name)
    episodes = generate.OFFICIAL_SIZES[name][0] if episodes is None else episodes
    path = generate.generated_path(name, dataset_dir, episodes, seed)
    if not (path.exists() and generate.val_path(path).exists()):
        # A process of its own, so that the collecting workers load neither torch nor the algorithm.
        flags = {"--dataset": name, "--dataset-dir": dataset_dir, "--num-episodes": episodes, "--seed": seed}
        command = [sys.executable, "-m", "common.generate", *(str(word) for flag in flags.items() for word in flag)]
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


class WrongFile(Exception):
    """A mirror serves something else under the file's name; to ask it again would not help."""


def download(file, directory):
    """Downloads one file from the first mirror that has it; a `.part` file is resumed, and renamed when it is whole.

    A part may be continued by another mirror than began it: the check of the whole file finds bytes that do not belong
    together, and the file is then fetched from its start.

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
                if error.code < 500 and error.code not in (408, 429):  # it does not have the file, and will not later
                    break
            except (WrongFile, ValueError) as error:  # ValueError: the mirror's address is not one
                answer = str(error)
                break
            except (OSError, EOFError, http.client.HTTPException, zipfile.BadZipFile) as error:
                answer = str(getattr(error, "reason", error)) or type(error).__name__
        answers.append(f"  {mirror}: {answer}")
    name = file.removesuffix(".npz").removesuffix("-val")
    fail(
        f"{file} is not in {directory} and could not be downloaded:\n" + "\n".join(answers) + "\nThree ways out: "
        f"(1) --dataset-source generated makes a set here with OGBench's scripted collectors; "
        f"(2) put {name}.npz and {name}-val.npz from another machine into {directory} (or name a file with "
        "--dataset-path); (3) set CLEANFLOW_DATASET_MIRRORS to a host that serves them"
    )


def _fetch(url, path):
    """One try: the rest of `path`'s `.part` file from `url`, then check and rename.

    Raises:
        OSError, EOFError, http.client.HTTPException: the connection broke (what came is kept), or a resumed part turned
            out not to fit (it is deleted).
        zipfile.BadZipFile: a file of unknown length did not arrive whole; it is deleted.
        WrongFile: the mirror has another file; of what it sent, nothing is kept.
    """
    from tqdm import tqdm

    part = path.with_name(path.name + ".part")
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        part.unlink(missing_ok=True)  # nothing is left to send: the part is whole or another file's, so begin anew
        raise EOFError("the partial file did not fit the server's") from None
    with response:
        if response.headers.get_content_type() == "text/html":
            raise WrongFile("answered with a web page instead of the file")
        if response.status != 206:  # the server sends everything again
            done = 0
        resumed = done > 0
        size = KNOWN[path.name][0] if path.name in KNOWN else None
        total = size if response.length is None else done + response.length
        if size is not None and total != size:
            raise WrongFile(f"its file has {total:,} bytes, OGBench's has {size:,}")
        bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=f"downloading {path.name}")
        with bar, open(part, "ab" if resumed else "wb") as file:
            while block := response.read(BLOCK):
                file.write(block)
                bar.update(len(block))
                done += len(block)
    if total is not None and done < total:
        raise EOFError(f"connection closed after {done} of {total} bytes")
    try:
        _check_content(part, path.name)
    except (WrongFile, zipfile.BadZipFile) as error:
        part.unlink()
        if resumed:
            raise EOFError(f"its bytes do not continue the partial file ({error})") from None
        raise
    os.replace(part, path)


def _check_content(part, file):
    """Checks a whole download of the official `file`: by its SHA-256 if known, else by the npz file's own checksums.

    Raises:
        WrongFile: its SHA-256 is not the known one.
        zipfile.BadZipFile: it is not a whole npz file.
    """
    from tqdm import tqdm

    if file in KNOWN:
        found, expected = sha256_of(part), KNOWN[file][1]
        if found != expected:
            raise WrongFile(f"its file has SHA-256 {found}, OGBench's has {expected}")
        return
    try:
        with zipfile.ZipFile(part) as archive:
            size = sum(member.file_size for member in archive.infolist())
            with tqdm(total=size, unit="B", unit_scale=True, desc=f"checking {file}", delay=BAR_DELAY) as bar:
                for member in archive.infolist():
                    with archive.open(member) as rows:  # to the end, where the checksum is compared
                        while block := rows.read(BLOCK):
                            bar.update(len(block))
    except DAMAGE as error:
        raise zipfile.BadZipFile(f"what arrived is not a whole npz file ({error})") from None


def sha256_of(path):
    """SHA-256 of a file as 64 hexadecimal digits; shows a progress bar when it takes longer than 5 seconds."""
    from tqdm import tqdm

    digest = hashlib.sha256()
    bar = tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=f"checking {path.name}", delay=BAR_DELAY)
    with bar, open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


# --- Load ---


def load_dataset(path, env_id, device, replaceable=False):
    """Loads, checks and relabels a dataset file, and puts its transitions on the device.

    Args:
        path: npz file with OGBench's rows (observations, actions, terminals, qpos, qvel, maybe button_states).
        env_id: single-task id whose task the rewards are computed for.
        device: torch device.
        replaceable: whether `find_dataset` would download or make the file again; one given with --dataset-path is the
            user's own, and no message advises to delete that.

    Returns:
        dataset: {observations, next_observations (N, D), actions (N, A), rewards, masks (N,)} float32 (pixels uint8)
            tensors; actions clipped to +-(1 - 1e-5); masks = 1 - success; the last row of a trajectory is not a
            transition. Pixels also have starts (N,): the row of the trajectory's first transition.
        identity: {source, file, size, sha256, transitions}; source is official, generated or custom. A file that has an
            official one's name but not its known SHA-256 is custom, and is warned of.

    Raises:
        SystemExit: (code 2) for a damaged or incomplete file, non-finite values, or shapes unlike the environment's.
    """
    path = Path(path)
    ogbench = envs.import_ogbench(render=envs.is_pixels(env_id))
    env = envs.make_env(env_id)
    check_file(path, env, replaceable)
    ob_dtype = np.uint8 if envs.is_pixels(env_id) else np.float32
    data = ogbench.load_dataset(path, ob_dtype=ob_dtype, add_info=True)
    np.random.seed(0)  # the relabelling resets the environment, which draws from the global generator
    try:
        ogbench.relabel_utils.relabel_dataset(envs.gym_id(env_id), env, data)
    except (KeyError, ValueError, IndexError) as error:
        fail(
            f"{path}: its rows do not fit {env_id}, so that rewards cannot be computed ({error!r}); "
            f"{_advice(path, replaceable)}"
        )
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
    sha256 = sha256_of(path)
    # A warning, not an end: OGBench may publish a set anew, and a user may train on a changed one. The run says custom.
    if path.name in KNOWN and sha256 != KNOWN[path.name][1]:
        source = "custom"
        warn(
            f"{path} is not OGBench's file of that name: SHA-256 {sha256}, OGBench's has {KNOWN[path.name][1]}. "
            "The run records it as custom" + (f"; for OGBench's, {_advice(path, True)}" if replaceable else "")
        )
    identity = {"source": source, "file": path.name, "size": path.stat().st_size, "sha256": sha256}
    return dataset, identity | {"transitions": len(data["rewards"])}


def _advice(path, replaceable):
    """What to do about a file that does not serve; only one that was downloaded or made here may be deleted."""
    if not replaceable:
        return "the file is yours and is left as it is; give another one with --dataset-path"
    return f"delete it and run again to {'make' if '-generated-' in path.name else 'download'} it anew"


def check_file(path, env, replaceable=False):
    """Ends with exit code 2 unless the npz file is whole and its arrays fit the environment; names file and key.

    `replaceable` as for `load_dataset`: it decides the advice.
    """

    def refuse(message):
        fail(f"{path}{message}; {_advice(path, replaceable)}")

    try:
        file = np.load(path)
        keys = file.files  # a single array (.npy) has none
    except (*DAMAGE, AttributeError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # missing, a directory, or no permission
            fail(f"{path} cannot be read: {error.strerror}")
        refuse(f" is not a whole npz file ({error})")
    needed = ["observations", "actions", "terminals", "qpos", "qvel"]
    needed += ["button_states"] if any(kind in env.spec.id for kind in ("scene", "puzzle")) else []
    missing = [key for key in needed if key not in keys]
    if missing:
        refuse(f" lacks the key{'s' * (len(missing) > 1)} {', '.join(missing)} (it has: {', '.join(keys)})")

    rows, arrays = None, {}
    for key in needed:
        try:
            arrays[key] = array = file[key]
        except DAMAGE as error:
            refuse(f": key {key} is damaged ({error})")
        rows = len(array) if rows is None and array.ndim else rows
        if array.ndim == 0 or len(array) != rows:
            refuse(f": key {key} has shape {array.shape}, observations have {rows} rows")
        if array.dtype.kind not in "fiub":
            refuse(f": key {key} holds {array.dtype}, not numbers")
        if not np.isfinite(array).all():
            row = int(np.argwhere(~np.isfinite(array))[0, 0])
            refuse(f": key {key} has a non-finite value, first in row {row}")
    for key, space in (("observations", env.observation_space), ("actions", env.action_space)):
        if arrays[key].shape[1:] != space.shape:
            refuse(f": a row of {key} has shape {arrays[key].shape[1:]}, {env.spec.id} needs {space.shape}")
    if rows < 2 or not arrays["terminals"][-1] or arrays["terminals"].all():
        refuse(": key terminals must mark each trajectory's last row, the file's last row among them")
