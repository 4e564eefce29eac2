"""Trains many algorithms, environments and seeds: on this machine, on a SLURM cluster, or as printed commands.

    python -m benchmarks.launch --methods floq q_flow --env-ids 'cube-double-play-singletask-task{1..5}-v0' --seeds 8
    python -m benchmarks.launch --methods floq --env-ids 'scene-play-*' --seeds 8 --executor slurm --partition gpu
    python -m benchmarks.launch --methods floq --env-ids 'scene-play-*' --seeds 8 --status      # what is done, no start
    python -m benchmarks.launch --methods floq --env-ids 'scene-*-task2-v0' --executor print -- --quick --alpha 10

One job is one method on one environment, its seeds side by side in one process. Flags after `--` go to every job.
The same command again continues: what is done is skipped, what was interrupted continues, the rest starts.
"""

import shlex
import shutil
import sys
from dataclasses import dataclass
from typing import Literal

from benchmarks.launch import local, slurm, state
from benchmarks.launch.jobs import make_jobs
from common import fail, num_cores
from common.files import check_writable


@dataclass
class LaunchArgs:
    methods: tuple[str, ...]  # algorithms: names of files here (floq, value_flows, ...), or paths of your own like them
    env_ids: tuple[str, ...]  # environments; {1..5}, {a,b}, * and ? are expanded (quote them)
    seeds: int = 1  # number of seeds
    seed: int = 0  # first seed
    seeds_per_job: int | None = None  # seeds trained side by side in one job (default: all)
    runs_dir: str = "runs"  # directory of the run directories; logs and locks go to its folder `launch`
    executor: Literal["local", "slurm", "print"] = "local"  # this machine, a job array, or the commands one per line
    status: bool = False  # show the table of these jobs and start nothing
    watch: bool = False  # with --status or --executor slurm: keep the table until every job has ended

    # On this machine
    devices: tuple[str, ...] = ()  # GPUs by their CUDA_VISIBLE_DEVICES names, or cpu (default: visible GPUs, else cpu)
    slots_per_device: int = 1  # jobs at a time on each device
    max_restarts: int = 3  # restarts of a job whose process died, before it is given up

    # SLURM
    partition: str | None = None  # SLURM partition (default: the cluster's)
    account: str | None = None  # SLURM account
    qos: str | None = None  # SLURM quality of service
    timeout_min: int = 1440  # time limit of a job in minutes; a job that reaches it is queued again and continues
    signal_delay_s: int = 120  # seconds before the time limit at which a job saves and leaves
    gpus_per_node: int = 1  # GPUs of a job (0: none)
    cpus_per_task: int = 8  # cores of a job
    mem_gb: int = 32  # memory of a job
    array_parallelism: int = 256  # jobs at a time


def main():
    """Reads the command line and launches; returns the exit code: 0, 1 if a job failed at last, or 2."""
    import tyro

    words = sys.argv[1:]
    own, extra = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    options = tyro.cli(LaunchArgs, args=own, prog="python -m benchmarks.launch", description=__doc__)
    on_slurm = options.executor == "slurm"
    if on_slurm and not options.status and shutil.which("sbatch") is None:
        fail("sbatch not found: install SLURM or use --executor local / print")
    jobs, num_gpus = make_jobs(options, extra)
    if options.status:
        return slurm.show(jobs, options.watch)
    if options.executor == "print":
        return print_commands(jobs)
    check_writable(options.runs_dir, "--runs-dir")
    prepare(jobs, on_slurm)
    if on_slurm:
        return slurm.run(jobs, options)
    devices = local.find_devices(options.devices, num_gpus) * options.slots_per_device
    code = local.run(jobs, devices, num_cores(), options.max_restarts)
    if code >= 128:
        print(f"stopped; continue with the same command: python -m benchmarks.launch {shlex.join(words)}")
    return code


def print_commands(jobs):
    """Prints the command of every job that is not done; returns the exit code."""
    for job in jobs:
        action, run_dir = state.choose(job)
        if action == "skip":
            print(f"done already: {run_dir}", file=sys.stderr)
        else:
            print(shlex.join(local.command(job, "python", action, run_dir)))
    return 0


def prepare(jobs, on_slurm):
    """Sets jobs that are done, or at work on SLURM, to `skipped`; forgets the earlier failures of those that wait."""
    queued = slurm.queue(jobs) if on_slurm else {}
    if queued is None:
        fail("without SLURM's queue, jobs that wait there would be submitted twice; try again when squeue works")
    for job in jobs:
        finished = state.refresh(job)
        busy = state.locked_by(job) or queued.get(state.read_state(job).get("slurm"))
        if finished:
            job.state, job.note = "skipped", f"done: {finished}"
        elif busy and on_slurm:
            job.state, job.note = "skipped", f"runs or waits already: {busy}"
        elif not busy:
            state.write_state(job, starts=0, failed=None, slurm=None)
            job.restarts = 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:  # before the first job, or the second time
        raise SystemExit(130) from None
