"""A run's directory: its arguments and its csv rows."""

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import torch

from common import checkpoint, fail, versions, warn
from common.arguments import algorithm
from common.files import try_lock, written_whole


def start_run(args, resumed, device, identity):
    """Makes the run directory and its args.json, or takes a resumed run's csv files back to its checkpoint; returns the
    directory and its lock (see `hold`).

    An evaluation comes after the checkpoint of its step: where all its rows are there, they stay, and
    resumed["evaluated"] becomes that step. An unwritable directory, a dataset different from the checkpoint's, and csv
    files that have lost rows since end the program with exit code 2. So does a run that another process is training.
    """
    run_dir = _new_directory(args) if resumed is None else Path(args.resume)
    lock = hold(run_dir)
    if resumed is not None:
        _cut_back(run_dir, args, resumed, identity)
        checkpoint.make_latest(run_dir, resumed["file"][0])
    git, here = shutil.which("git"), Path(__file__).parent
    commit = git and subprocess.run([git, "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True).stdout.strip()
    info = {
        "algorithm": algorithm(args),
        "args": dataclasses.asdict(args),
        "versions": versions(),
        "git_commit": commit or None,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)",
        "dataset": identity,
    }
    if resumed is not None:
        info["earlier"] = _earlier(run_dir, info, resumed["step"])
    write_text(run_dir / "args.json", json.dumps(info, indent=2))
    return run_dir, lock


def _earlier(run_dir, info, step):
    """What made the run up to its checkpoint's `step` otherwise than now: [{until, versions, device, ...}]."""
    try:
        before = json.loads((run_dir / "args.json").read_text())
    except (OSError, ValueError):
        return []
    of = lambda about: (
        {name: about.get(name) for name in ("versions", "git_commit", "device")}
        | {"matmul_precision": about.get("args", {}).get("matmul_precision")}
    )
    old, new = of(before), of(info)
    others = [name for name, version in (old["versions"] or {}).items() if new["versions"].get(name) != version]
    for name in others:
        warn(f"{run_dir}: the run had {name} {old['versions'][name]}, it continues with {new['versions'].get(name)}")
    return before.get("earlier", []) + ([{"until": step} | old] if old != new else [])


def _new_directory(args):
    """A new directory, {env_id}__{exp_name}__{seed}__{unix time}, or a later second where that exists."""
    try:
        Path(args.runs_dir).mkdir(parents=True, exist_ok=True)
        for second in itertools.count(int(time.time())):
            run_dir = Path(args.runs_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}__{second}"
            with contextlib.suppress(FileExistsError):
                run_dir.mkdir()
                return run_dir
    except OSError as error:
        fail(f"--runs-dir {args.runs_dir} is not writable: {error}")


def hold(run_dir):
    """Locks a run's directory until the returned file is closed: two processes that train one run would mix its files.

    Where another process has it, the program ends with exit code 2.
    """
    path = Path(run_dir) / "lock"  # a file of its own: NFS does not lock directories
    try:
        file = open(path, "a")
    except OSError as error:
        fail(f"{path} cannot be written ({error.strerror})")
    if not try_lock(file, path):
        fail(f"--resume {run_dir}: another process is training this run; let it end first")
    return file


def _cut_back(run_dir, args, resumed, identity):
    """Takes the csv files of --resume back to the checkpoint; later rows will be written again."""
    path, saved_at = run_dir / resumed["file"][0], resumed["file"][1]
    if not path.exists() or path.stat().st_mtime_ns != saved_at:  # it was read before the lock was taken
        fail(f"--resume {run_dir}: another process has trained this run in the meantime; give the command again")
    if identity["sha256"] != resumed["dataset"]["sha256"]:
        fail(f"--resume {run_dir}: the run's dataset is {resumed['dataset']}, found here: {identity}")
    for name, size in resumed["csv_sizes"].items():
        path = run_dir / name
        if size and (not path.exists() or path.stat().st_size < size):
            fail(f"--resume {run_dir}: {name} has lost rows that were written before the checkpoint")
        if path.exists():
            if name == "eval.csv" and (rows := evaluation_after(path, size, resumed["step"], args.num_seeds)):
                size, resumed["evaluated"] = size + rows, resumed["step"]
            os.truncate(path, size)


def evaluation_after(path, size, step, num_seeds):
    """Bytes of the evaluation of `step` after the first `size` bytes of an eval.csv; 0 unless its rows are whole."""
    rows = re.match(rb"(step,.*\n)?(%d,.*\n){%d}" % (step, num_seeds), path.read_bytes()[size:])  # a header, if new
    return rows.end() if rows else 0


def write_text(path, text):
    """Writes a small file whole or not at all; an OSError ends the program with exit code 1."""
    try:
        with written_whole(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise SystemExit(f"error: could not write {path} ({error})") from None


def append_rows(path, rows):
    """Appends dictionaries to a csv file, with a header if it is new; on return they are in the kernel's hands.

    Floats are written so that they read back to the same bits. A failed write ends the program with exit code 1; the
    last checkpoint stays.
    """
    text, size = io.StringIO(), os.path.getsize(path) if os.path.exists(path) else 0
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    if size == 0:
        writer.writeheader()
    writer.writerows(rows)
    try:
        with open(path, "ab") as file:
            file.write(text.getvalue().encode())
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, size)  # a full disk may have taken a part of a row
        raise SystemExit(f"error: could not write {path} ({error}); the last checkpoint is kept") from None


def csv_sizes(run_dir):
    """{file: bytes} of the run's csv files, flushed to the disk, for its checkpoint."""
    sizes = dict.fromkeys(("train.csv", "eval.csv", "timing.csv"), 0)
    for name in sizes:
        with contextlib.suppress(FileNotFoundError), open(run_dir / name, "rb") as file:
            os.fsync(file.fileno())
            sizes[name] = os.fstat(file.fileno()).st_size
    return sizes
