"""OGBench datasets: find, download or generate the file, check it, put it on the device.

Official files lie in OGBench's own layout, `{dataset_dir}/{name}.npz` and `{name}-val.npz`; what is missing is
downloaded. Generated ones (`common.generate`) carry `-generated-` in their name and never pass for official. OGBench's
own loader and relabelling are used in both cases.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from common import ROOT, envs, fail, generate, pixels, python_environment, warn
from common.download import KNOWN, download
from common.files import DAMAGE, check_writable, is_whole, only_one, sha256_of


def load(args, device):
    """The dataset of a run's arguments, on the device; see find_dataset and load_dataset."""
    return load_dataset(find_dataset(args), args.env_id, device, replaceable=args.dataset_path is None)


def find_dataset(args, make=True):
    """Path of the training file of a run's dataset, with `make` downloaded or generated if need be; exit code 2 where
    the file cannot be had. The user's own file, --dataset-path, wins.
    """
    if args.dataset_path is not None:
        path = Path(args.dataset_path).expanduser()
        if not os.path.isfile(path):  # also where a folder forbids to look, at which Path's own raises
            fail(f"--dataset-path {path} is not a file")
        return path
    name = envs.dataset_name(args.env_id)
    if args.dataset_source == "official":
        return fetch(name, args.dataset_dir, make)

    generate.check_collectable(name)
    episodes = args.generated_episodes or generate.OFFICIAL_SIZES[name][0]
    path = generate.generated_path(name, args.dataset_dir, episodes, seed=0)
    if make and not os.path.exists(path):
        check_writable(path.parent, "--dataset-dir")
        # A process of its own, so that the collecting workers load neither torch nor the algorithm.
        flags = ["--dataset", name, "--dataset-dir", str(path.parent.absolute()), "--num-episodes", str(episodes)]
        command = [sys.executable, "-m", "common.generate", *flags]
        process = subprocess.Popen(command, env=python_environment(), cwd=ROOT)
        try:
            status = process.wait()
        except KeyboardInterrupt:  # which it gets too
            process.wait()
            raise
        if status:
            fail(f"collecting {name} failed (exit code {status}); run again: finished parts are kept")
    return path


def fetch(name, directory, make=True):
    """Path of a dataset's official training file; with `make`, it is downloaded if missing, its validation file first
    (training needs the former only).
    """
    path = Path(directory).expanduser() / f"{name}.npz"
    wanted = (generate.val_path(path), path) if make and not os.path.exists(path) else ()
    for missing in (file for file in wanted if not os.path.exists(file)):
        with only_one(missing):
            if not missing.exists():  # else another process made it while this one waited
                download(missing.name, missing.parent)
    return path


def load_dataset(path, env_id, device, replaceable=False):
    """Loads, checks and relabels a dataset file, and puts its transitions on the device.

    A damaged or incomplete file, non-finite values, or shapes unlike the environment's end with exit code 2.

    Args:
        path: npz file with OGBench's rows (observations, actions, terminals, qpos, qvel, maybe button_states).
        env_id, device: single-task id whose task the rewards are computed for, and torch device.
        replaceable: whether `find_dataset` would download or make the file again; one given with --dataset-path is the
            user's own, and no message advises to delete that.

    Returns:
        dataset: {observations, next_observations (N, D), actions (N, A), rewards, masks (N,)} float32 (pixels uint8)
            tensors; actions clipped to +-(1 - 1e-5); masks = 1 - success; the last row of a trajectory is not a
            transition. Pixels also have starts (N,): the row of the trajectory's first transition.
        identity: {source, file, size, sha256, transitions}; source is official, generated or custom. A file that has an
            official one's name but not its known SHA-256 is custom, and is warned of.
    """
    path, is_pixels = Path(path), envs.is_pixels(env_id)
    ogbench = envs.import_ogbench(render=is_pixels)
    env = envs.make_env(env_id)
    advice = "the file is yours and is left as it is; give another one with --dataset-path"
    if replaceable:  # only what was downloaded or made here may be deleted
        advice = f"delete it and run again to {'make' if '-generated-' in path.name else 'download'} it anew"
    check_file(path, env, advice)
    data = ogbench.load_dataset(path, ob_dtype=np.uint8 if is_pixels else np.float32, add_info=True)
    np.random.seed(0)  # the relabelling resets the environment, which draws from the global generator
    try:
        ogbench.relabel_utils.relabel_dataset(envs.gym_id(env_id), env, data)
    except (KeyError, ValueError, IndexError) as error:
        fail(f"{path}: its rows do not fit {env_id}: rewards cannot be computed ({error!r}); {advice}")
    env.close()
    if data["masks"].all():
        warn(f"{path.name} holds no success on {env_id}: there is nothing to learn but the negative rewards")

    keys = ("observations", "next_observations", "actions", "rewards", "masks")
    try:
        dataset = {key: torch.as_tensor(data[key]).to(device) for key in keys}
    except torch.OutOfMemoryError:
        size = sum(data[key].nbytes for key in keys) / 2**30
        fail(f"{path.name} takes {size:.1f} GiB, more than is free on {device}; take another GPU, or --no-cuda")
    dataset["actions"] = dataset["actions"].clamp(-1 + 1e-5, 1 - 1e-5)
    if is_pixels:
        dataset["starts"] = pixels.trajectory_starts(data["terminals"]).to(device)
    found = sha256_of(path)
    official = KNOWN[path.name][1] if path.name in KNOWN else found
    name, source = envs.dataset_name(env_id), "custom"
    if path.name == f"{name}.npz" and found == official:
        source = "official"
    elif path.name.startswith(f"{name}-generated-") and not path.stem.endswith("-val"):
        source = "generated"
    # A warning, not an end: OGBench may publish a set anew, and a user may train on a changed one. The run says custom.
    if found != official:
        remedy = f"; for OGBench's, {advice}" if replaceable else ""
        sums = f"SHA-256 {found}, OGBench's has {official}"
        warn(f"{path} is not OGBench's file of that name: {sums}. The run records it as custom{remedy}")
    identity = {"source": source, "file": path.name, "size": path.stat().st_size, "sha256": found}
    return dataset, identity | {"transitions": len(data["rewards"])}


def check_file(path, env, advice):
    """Ends with exit code 2 unless the npz file is whole and its arrays fit the environment; names file and key, and
    adds the advice.
    """
    refuse = lambda message: fail(f"{path}{message}; {advice}")
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

    arrays = {}
    for key in needed:
        try:
            arrays[key] = array = file[key]
        except DAMAGE as error:
            if isinstance(error, MemoryError) and is_whole(path):  # a damaged header may ask for any size
                fail(f"{path}: key {key} does not fit into memory ({error})")
            refuse(f": key {key} is damaged ({error})")
        if array.ndim == 0 or len(array) != len(arrays["observations"]):
            refuse(f": key {key} has shape {array.shape}, observations have {arrays['observations'].shape}")
        if array.dtype.kind not in "fiub":
            refuse(f": key {key} holds {array.dtype}, not numbers")
        if not np.isfinite(array).all():
            row = int(np.argwhere(~np.isfinite(array))[0, 0])
            refuse(f": key {key} has a non-finite value, first in row {row}")
    for key, space in (("observations", env.observation_space), ("actions", env.action_space)):
        if arrays[key].shape[1:] != space.shape:
            refuse(f": a row of {key} has shape {arrays[key].shape[1:]}, {env.spec.id} needs {space.shape}")
    ends = arrays["terminals"]
    if len(ends) < 2 or ends.ndim > 1 or not np.isin(ends, (0, 1)).all() or not ends[-1] or ends.all():
        refuse(": key terminals must have 1 in each trajectory's last row, the file's last row among them, and 0 else")
    if env.observation_space.dtype == np.uint8 != arrays["observations"].dtype:
        refuse(f": key observations holds {arrays['observations'].dtype}, frames must be uint8 (0 to 255)")
    if np.abs(arrays["actions"]).max() > 1.001:
        warn(f"{path}: actions lie outside [-1, 1] and are clipped")


def download_sets(
    names: tuple[str, ...],
    dataset_dir: str = "~/.ogbench/data",
):
    """Downloads official datasets (`cube-double-play-v0`) and their validation files, where they are missing."""
    for name in names:
        print(fetch(name, dataset_dir))


if __name__ == "__main__":
    import tyro

    tyro.cli(tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(download_sets))
