"""Checkpoints: written whole or not at all, verified when read, the previous one kept.

`checkpoint.pt` is the latest and `checkpoint_previous.pt` the one before. A checkpoint holds tensors, numbers, strings
and containers of them only, and is read with `torch.load(weights_only=True)`, so that a stranger's file runs no code.
"""

import contextlib
import os
from pathlib import Path

import torch

from common import fail, warn
from common.files import DAMAGE, check_zip, written_whole

LATEST, PREVIOUS, DAMAGED = "checkpoint.pt", "checkpoint_previous.pt", "checkpoint_damaged.pt"
NEEDED = {"algorithm", "args", "step", "agent"}  # what every checkpoint holds


def save(run_dir, payload):
    """Saves `payload` as the run's latest checkpoint; a kill at any moment leaves a whole one behind.

    Non-finite weights, a full disk or an unwritable directory end the program with exit code 1; the last one stays.
    """
    latest = Path(run_dir) / LATEST
    kept = f"the last checkpoint is kept: {latest}" if latest.exists() else "there is no earlier checkpoint"
    for name, value in payload["agent"].items():
        if not torch.isfinite(value).all():
            raise SystemExit(f"error: weights {name} are non-finite at step {payload['step']}; not saved, {kept}")
    try:
        with written_whole(latest, latest.with_name(PREVIOUS)) as file:
            torch.save(payload, file)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        raise SystemExit(f"error: could not save a checkpoint in {run_dir} ({error}); {kept}") from None


def load(run_dir, flag="--resume"):
    """The latest whole checkpoint of a run; a damaged one is reported and the previous one used.

    Where there is none, the program ends with exit code 2; `flag`, which named run_dir, is for the messages.
    """
    run_dir = Path(run_dir)
    if not os.path.isdir(run_dir):  # also where a folder forbids to look
        fail(f"{flag} {run_dir} is not a directory")
    problems = []
    for name in (LATEST, PREVIOUS):
        try:
            file = name, (run_dir / name).stat().st_mtime_ns
            check_zip(run_dir / name)  # torch.load does not look at checksums
            payload = torch.load(run_dir / name, map_location="cpu", weights_only=True)
            if missing := NEEDED - set(payload if isinstance(payload, dict) else ()):  # another program's file
                raise ValueError(f"it lacks {', '.join(sorted(missing))}")
            payload["file"] = file
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except DAMAGE as error:
            problems.append(f"{name} is damaged ({(str(error) or type(error).__name__).splitlines()[0]})")
        else:
            if problems:
                warn(f"{run_dir}: {'; '.join(problems)}; continuing from {name} at step {payload['step']}")
            return payload
    fail(f"{flag} {run_dir} has no usable checkpoint: {'; '.join(problems)}")


def make_latest(run_dir, name):
    """Makes the checkpoint `name`, which `load` has read, the latest: the next save keeps it as the previous one.

    A damaged latest one is put aside as `checkpoint_damaged.pt`: the damage may be the reading's.
    """
    if name != LATEST:
        with contextlib.suppress(FileNotFoundError):
            os.replace(run_dir / LATEST, run_dir / DAMAGED)
        os.replace(run_dir / name, run_dir / LATEST)
