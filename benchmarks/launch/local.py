"""The processes of jobs on one machine: this one, or a node of SLURM's that has one job."""

import collections
import contextlib
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

from benchmarks.launch import state
from benchmarks.launch.table import Screen, report_failures
from common import fail, python_environment
from common.signals import StopRequest

POLL_SECONDS = 0.5
SPARE_BYTES = 100e6  # jobs wait while the disk has less than this and a checkpoint


def find_devices(wanted, num_gpus):
    """Names of devices: the wanted ones, else the visible GPUs, else the CPU."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    gpus = visible[:num_gpus] if visible else [str(i) for i in range(num_gpus)]
    for name in wanted:
        if name != "cpu" and name not in gpus:
            fail(f"--devices {name}: visible here are {', '.join([*gpus, 'cpu'])}")
    return list(wanted) or gpus or ["cpu"]


def unoccupied(devices, taken):
    """The devices, one name per job at a time, without those that are taken."""
    taken = collections.Counter(taken)
    free = []
    for device in devices:
        if taken[device]:
            taken[device] -= 1
        else:
            free.append(device)
    return free


def command(job, python, action, run_dir):
    """The words of the command that starts or continues a job, to its lengths; action, run_dir: of `state.choose`."""
    resume = ["--resume", run_dir, "--total-timesteps", job.lengths[0], "--online-timesteps", job.lengths[1]]
    return [python, str(job.file), *(map(str, resume) if action == "resume" else ()), *job.words]


def missing_space(job):
    """How the disk is too full for a job's next checkpoint, in words; "" if it is not."""
    sizes = [path.stat().st_size for run in state.find_runs(job) for path in run.path.glob("checkpoint*.pt")]
    free, needed = shutil.disk_usage(job.runs_dir).free, SPARE_BYTES + max(sizes, default=0)
    return "" if free >= needed else f"the disk has {free / 1e6:.0f} MB left, {needed / 1e6:.0f} are needed"


def start(job, device, threads):
    """Starts the process that trains a waiting job, unless the job is done, has a process, or finds the disk full: then
    its state and note say so, and None is returned. An OSError means that it cannot be started.

    The process holds the job's lock until it ends. It gets no signal of the terminal and outlives a killed launcher.
    """
    lock = state.take_lock(job)
    if lock is None:  # of another launcher, or of one that was killed
        job.note = f"with {state.locked_by(job) or 'another process'}"
        return None
    with lock:
        action, run_dir = state.choose(job)
        full = missing_space(job)
        if action == "skip" or full:
            job.state, job.note = ("done", "") if action == "skip" else (job.state, full)
            return None
        environment = {"TQDM_MININTERVAL": "30"} | python_environment()  # a log, not a terminal
        environment |= {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": "" if device == "cpu" else device}
        words = command(job, sys.executable, action, run_dir)
        with open(job.folder / "stdout.log", "a") as out, open(job.folder / "stderr.log", "a") as err:
            print(f"+ {shlex.join(words)}", file=out, flush=True)
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment, pass_fds=[lock.fileno()],
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),  # SLURM's, which the launcher answers
            )  # fmt: skip
        who = f"{socket.gethostname()} process {process.pid}"
        state.write_state(job, starts=state.read_state(job).get("starts", 0) + 1, process=who, device=device)
    job.state, job.note = "running", f"on {device if device == 'cpu' else 'GPU ' + device}"
    return process


def run(jobs, devices, cores, max_restarts, grace=math.inf):
    """Trains jobs until each is done or given up, or a signal comes; returns the exit code: 0, 1 or 128 + the signal.

    `devices` has a name per job that runs at a time; these share the `cores`, unless OMP_NUM_THREADS is set. Of a job's
    early ends, those on a full disk do not count for `max_restarts`. `grace`: seconds to save in, after a signal.
    """
    screen, running = Screen(jobs), {}  # running: {job: (process, device)}
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // len(devices))))
    stop = StopRequest((signal.SIGINT, signal.SIGTERM, signal.SIGUSR2))
    deaths, deadline = collections.Counter(), None

    def ended_early(job, how, mistake=False):
        full = missing_space(job)
        if not full and (mistake or deaths[job] == max_restarts):
            job.state, job.note = "failed", how
            state.write_state(job, failed=how)
        else:
            job.state, job.note = "waiting", f"{how}, to be restarted"
            deaths[job] += 0 if full else 1

    while True:
        for job, (process, _) in list(running.items()):
            code, finished = process.poll(), state.refresh(job)
            if code is None:
                continue
            del running[job]
            if finished or stop:
                job.state, job.note = "done" if finished else "waiting", ""
            else:
                how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                ended_early(job, how, mistake=code == 2)
        screen.draw()
        held = [state.held_device(job) for job in jobs if job.state == "waiting"]  # by another launcher's processes
        free = unoccupied(devices, [device for _, device in running.values()] + held)
        for job in jobs:
            if job.state == "waiting" and free and not stop:
                try:
                    if process := start(job, free[0], threads):
                        running[job] = process, free.pop(0)
                except OSError as error:
                    ended_early(job, str(error))
        screen.draw()
        if stop and deadline is None:
            deadline = time.monotonic() + grace
            screen.say("\nstopping: every job saves a checkpoint (Ctrl-C again: do not wait for them)")
            for process, _ in running.values():
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                    os.killpg(process.pid, signal.SIGCONT)  # one that was stopped could not save
        if stop and (not running or time.monotonic() > deadline):
            return 128 + stop.signal
        if all(job.state not in ("waiting", "running") for job in jobs):
            return report_failures(jobs)
        time.sleep(POLL_SECONDS)
