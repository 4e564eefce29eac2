"""Jobs as one array of a SLURM cluster, by submitit."""

import os
import signal
import subprocess
import time

from benchmarks.launch import local, state
from benchmarks.launch.table import Screen, report_failures, table
from common import fail, python_environment, warn

WATCH_SECONDS = 5


def train(job, gpus, cpus, max_restarts, grace):
    """What runs in a process of SLURM's: trains a job. Its RuntimeError for a job given up makes SLURM's a failed one.

    At SIGTERM the algorithm saves and leaves, and SLURM decides what follows. At SIGUSR2, which SLURM sends before the
    time limit, it saves, and the job is queued again.
    """
    import submitit

    code = local.run([job], local.find_devices((), gpus)[:1], cpus, max_restarts, grace)
    if code == 128 + signal.SIGUSR2:
        subprocess.run(["scontrol", "requeue", submitit.JobEnvironment().job_id], check=True)
    if code >= 128:
        time.sleep(600)  # a process that ends by itself counts as finished and is not queued again
    elif code != 0:
        raise RuntimeError(f"{job.folder.name}: {job.note}")


def run(jobs, options):
    """Submits the jobs that wait, with --watch until all have ended; returns the exit code (2: sbatch refuses)."""
    import submitit

    os.environ.update(python_environment())  # SLURM's processes import `train`
    executor = submitit.SlurmExecutor(jobs[0].runs_dir / "launch" / "submitit")
    executor.update_parameters(
        job_name="cleanflow", time=options.timeout_min, mem=f"{options.mem_gb}GB", cpus_per_task=options.cpus_per_task,
        partition=options.partition, account=options.account, qos=options.qos,  # None leaves it to the cluster
        gpus_per_node=options.gpus_per_node or None, signal_delay_s=options.signal_delay_s,
        srun_args=[f"--cpus-per-task={options.cpus_per_task}"],  # srun does not take it over from sbatch
        array_parallelism=options.array_parallelism, additional_parameters={"requeue": True},
    )  # fmt: skip
    grace = max(5, options.signal_delay_s - 15)  # the rest is for queueing again
    words = options.gpus_per_node, options.cpus_per_task, options.max_restarts, grace
    waiting = [job for job in jobs if job.state == "waiting"]
    try:
        with executor.batch():
            tasks = [executor.submit(train, job, *words) for job in waiting]
    except submitit.core.utils.FailedJobError as error:
        fail(f"sbatch refuses the jobs: {str(error).strip().splitlines()[-1]}")
    for job, task in zip(waiting, tasks):
        state.write_state(job, slurm=task.job_id)
        job.note = f"SLURM {task.job_id}"
    print("\n".join(table(jobs)))
    if waiting and not options.watch:
        print(f"{len(waiting)} jobs submitted; the same command with --status shows how far they are")
    return show(jobs, watch=True) if options.watch else 0


def queue(jobs):
    """{SLURM job id: state} of the user's queue; {} if none of `jobs` was submitted, None if it is not known."""
    if not any(state.read_state(job).get("slurm") for job in jobs):
        return {}
    words = ["squeue", "--me", "--noheader", "--array", "--format=%i %T"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        return dict(line.split() for line in done.stdout.splitlines())
    except (OSError, subprocess.CalledProcessError) as error:
        text = getattr(error, "stderr", None) or str(error)
        warn(f"SLURM's queue is not known: {text.strip().splitlines()[-1]}")
        return None


def look(jobs):
    """Sets the jobs' states, here or on SLURM, to what the disk, their locks and SLURM's queue tell."""
    queued = queue(jobs)
    for job in jobs:
        finished, holder, stored = state.refresh(job), state.locked_by(job), state.read_state(job)
        number = stored.get("slurm")
        place = (queued or {}).get(number)
        failure = stored.get("failed") or (number and queued is not None and f"SLURM job {number} has left the queue")
        job.note = holder or (f"SLURM {number} {place}" if place else "")
        if finished:
            job.state, job.note = "done", ""
        elif holder or place in ("RUNNING", "COMPLETING"):
            job.state = "running"
        elif failure and not place:
            job.state, job.note = "failed", failure
        else:
            job.state = "waiting"


def show(jobs, watch):
    """Shows the table once, or with `watch` until every job has ended; returns the exit code."""
    screen = Screen(jobs)
    while True:
        look(jobs)
        if not watch:
            print("\n".join(table(jobs)))
            return 0
        screen.draw()
        if all(job.state in ("done", "failed") for job in jobs):
            return report_failures(jobs)
        time.sleep(WATCH_SECONDS)
