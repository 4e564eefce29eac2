"""What there is of a job: its runs, its state.json, and its lock.

Runs are looked at while they are written, and after machines that vanished: what is torn counts as not there.
"""

import contextlib
import fcntl
import glob
import json
import os
import socket
from types import SimpleNamespace

from benchmarks.launch.jobs import absolute
from benchmarks.tables import read_rows
from common.files import DAMAGE, check_zip, try_lock


def find_runs(job):
    """The job's runs, oldest first: same algorithm, environment, seeds and arguments, but those that a continuation may
    change; started by this launcher or by hand.

    Each has path, step (the last one in its csv files), success (of its last evaluation), rate (updates per second),
    is finished if it has the job's lengths and an evaluation of every seed at the end, and fits if its continuation to
    the job's lengths is the job. A run of another online phase does not: it is another job's.
    """
    runs = []
    for path in job.runs_dir.glob(glob.escape(f"{job.env_id}__{job.args['exp_name']}__{job.seeds[0]}__") + "*"):
        info = read_json(path / "args.json")
        args = job.defaults | info.get("args", {})
        args["dataset_path"] = absolute(args["dataset_path"])
        if info.get("algorithm") != job.file.stem or any(args[name] != job.identity[name] for name in job.identity):
            continue
        evaluations, timing = read_rows(path / "eval.csv"), read_rows(path / "timing.csv")
        step = max([int(rows[-1]["step"]) for rows in (evaluations, timing) if rows], default=0)
        last = [float(row["success"]) for row in evaluations if row["step"] == evaluations[-1]["step"]]
        success = sum(last) / len(last) if last else None
        rate = float(timing[-1]["updates_per_second"]) if timing else None
        ended = {int(row["seed"]) for row in evaluations if int(row["step"]) == sum(job.lengths)}
        lengths = args["total_timesteps"], args["online_timesteps"]
        finished = lengths == job.lengths and ended >= set(job.seeds)
        reached = min(step + args["log_interval"] - 1, sum(lengths))  # a checkpoint may be so far past the csv files
        same_border = lengths[0] == job.lengths[0] or reached <= min(lengths[0], job.lengths[0])  # of the phases
        fits = lengths[1] == job.lengths[1] and same_border and reached <= sum(job.lengths)
        runs.append(SimpleNamespace(path=path, step=step, success=success, rate=rate, finished=finished, fits=fits))
    return sorted(runs, key=lambda run: (len(run.path.name), run.path.name))  # the name ends with the time


def read_json(path):
    """The content of a json file; {} if it is missing or torn."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def choose(job):
    """What to do for a job: ("skip", finished run), ("resume", interrupted run) or ("new", None).

    A run that was killed before its first checkpoint is left alone: it has nothing to continue from.
    """
    if finished := refresh(job):
        return "skip", finished
    fitting = sorted((run for run in find_runs(job) if run.fits), key=lambda run: run.step)
    for run in fitting[::-1]:  # of equal steps, the newest first
        for path in run.path.glob("checkpoint*.pt"):
            with contextlib.suppress(*DAMAGE):  # it must be whole; torch, which takes seconds to import, is not needed
                check_zip(path)
                return "resume", run.path
    return "new", None


def refresh(job):
    """Reads from the disk how far a job is; returns its finished run directory, or None."""
    runs = find_runs(job)
    finished = [run for run in runs if run.finished]
    if runs:
        latest = (finished or runs)[-1]
        job.step, job.success, job.rate = latest.step, latest.success, latest.rate
    job.restarts = max(0, read_state(job).get("starts", 0) - 1)
    return finished[-1].path if finished else None


def read_state(job):
    """The job's state.json: its starts, the last one's process, its id on slurm, and why it was given up (failed)."""
    return read_json(job.folder / "state.json")


def write_state(job, **changes):
    """Changes entries of the job's state.json, whole or not at all; on a full disk not at all."""
    temporary = job.folder / f"state.json.{socket.gethostname()}.{os.getpid()}"
    with contextlib.suppress(OSError):
        job.folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(read_state(job) | changes))
        os.replace(temporary, job.folder / "state.json")


def take_lock(job):
    """Takes the job's lock, so that one process at a time trains it; None if another has it. It is held for as long as
    this process, or a child that inherits the returned file, has that open.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    file = open(job.folder / "lock", "a")
    if try_lock(file, file.name):
        return file
    file.close()
    return None


def held_device(job):
    """The device of this machine on which another process trains the job now, or None."""
    mine = (locked_by(job) or "").startswith(f"{socket.gethostname()} ")
    return read_state(job).get("device") if mine else None


def locked_by(job):
    """Who trains the job now ("host process 123"), or None. It is found out by taking the lock for a moment."""
    with contextlib.suppress(OSError), open(job.folder / "lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return read_state(job).get("process") or "another process"
    return None
