"""Trains many algorithms, environments and seeds: on this machine, on a SLURM cluster, or as printed commands.

    python -m benchmarks.launch --methods floq q_flow --env-ids 'cube-double-play-singletask-task{1..5}-v0' --seeds 8
    python -m benchmarks.launch --methods floq --env-ids 'scene-play-*' --seeds 8 --executor slurm --partition gpu
    python -m benchmarks.launch --methods floq --env-ids 'scene-play-*' --seeds 8 --status      # what is done, no start
    python -m benchmarks.launch --methods floq --env-ids 'scene-*-task2-v0' --executor print -- --quick --alpha 10

One job is one method on one environment, its seeds side by side in one process. Flags after `--` go to every job.
The same command again goes on: what is done is skipped, what was interrupted continues, the rest starts.
"""

import contextlib
import csv
import difflib
import fcntl
import fnmatch
import functools
import glob
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from common import envs, fail, num_cores, python_environment, warn

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.5
# Flags of the algorithms that the launcher sets itself.
OWN_FLAGS = ("--env-id", "--seed", "--num-seeds", "--runs-dir", "--resume", "--evaluate")


@dataclass
class LaunchArgs:
    methods: tuple[str, ...]
    """algorithms: names of files here (floq, value_flows, ...), or paths of your own with the same interface"""
    env_ids: tuple[str, ...]
    """environments; {1..5}, {a,b}, * and ? are expanded (quote them)"""
    seeds: int = 1
    """number of seeds"""
    seed: int = 0
    """first seed"""
    seeds_per_job: int | None = None
    """seeds trained side by side in one job (default: all)"""
    runs_dir: str = "runs"
    """directory of the run directories; logs and locks go to its folder `launch`"""
    executor: Literal["local", "slurm", "print"] = "local"
    """local: on this machine's devices; slurm: a job array; print: the commands, one a line"""
    status: bool = False
    """show the table of these jobs and start nothing"""
    watch: bool = False
    """with --status or --executor slurm: keep the table until every job has ended"""

    # On this machine
    devices: tuple[str, ...] = ()
    """GPUs by their CUDA_VISIBLE_DEVICES names, or cpu (default: the visible GPUs, cpu where there are none)"""
    slots_per_device: int = 1
    """jobs at a time on each device"""
    max_restarts: int = 3
    """restarts of a job whose process died, before it is given up"""

    # SLURM
    partition: str | None = None
    """SLURM partition (default: the cluster's)"""
    account: str | None = None
    """SLURM account"""
    qos: str | None = None
    """SLURM quality of service"""
    timeout_min: int = 1440
    """time limit of a job in minutes; a job that reaches it is queued again and goes on"""
    signal_delay_s: int = 120
    """seconds before the time limit at which a job saves and leaves"""
    gpus_per_node: int = 1
    """GPUs of a job (0: none)"""
    cpus_per_task: int = 8
    """cores of a job"""
    mem_gb: int = 32
    """memory of a job"""
    array_parallelism: int = 256
    """jobs at a time"""


@dataclass
class Job:
    """One run to have: what it is, and where it stands."""

    method: str
    file: str
    env_id: str
    seeds: tuple[int, ...]
    runs_dir: str
    words: list  # its flags, without --resume
    args: dict = field(default_factory=dict)  # what the algorithm makes of them
    identity: dict = field(default_factory=dict)  # those of them that a continuation must share
    defaults: dict = field(default_factory=dict)  # for runs from before a flag existed

    state: str = "waiting"  # waiting, running, done, skipped or failed
    note: str = ""
    step: int = 0
    success: float | None = None
    rate: float | None = None  # updates per second
    restarts: int = 0

    @property
    def last_step(self):
        """The step of the last evaluation."""
        return self.args["total_timesteps"] + self.args["online_timesteps"]

    @property
    def name(self):
        """Names the job's folder; two jobs have one name only if one run would serve both."""
        digest = hashlib.sha1(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.method}__{self.env_id}__{self.seeds[0]}-{self.seeds[-1]}__{digest}"

    @property
    def folder(self):
        """Where the job's lock, state and output are."""
        return Path(self.runs_dir) / "launch" / self.name


# --- Which jobs ---


def find_method(name):
    """The file of a method; an unknown one ends the program with exit code 2 and close matches."""
    if name.endswith(".py") and Path(name).is_file():
        return Path(name)
    known = sorted(path.stem for path in ROOT.glob("*.py"))  # the top level holds algorithms only
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or known
        fail(f"--methods {name} is unknown; nearest: {', '.join(near)} (or the path of a .py file)")
    path = ROOT / f"{name}.py"
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def expand_env_ids(patterns):
    """Environment ids that the patterns stand for, each once, in order.

    Args:
        patterns: ids with {1..5}, {a,b} and shell wildcards.

    Raises:
        SystemExit: (code 2) if one of the expanded patterns matches nothing; the message has close matches.
    """
    import bracex

    known, found = envs.known_env_ids(), []
    for pattern in patterns:
        try:
            pieces = bracex.expand(pattern)
        except bracex.ExpansionLimitException as error:
            fail(f"--env-ids {pattern}: {error}")
        for piece in pieces:
            matching = fnmatch.filter(known, piece)
            if not matching:
                near = difflib.get_close_matches(re.sub(r"[*?\[\]]", "", piece), known, n=3, cutoff=0.4)
                nearest = f"; nearest: {', '.join(near)}" if near else ""
                fail(f"--env-ids {piece} matches no environment of ogbench{nearest}")
            found += matching
    return list(dict.fromkeys(found))


def make_jobs(options, extra):
    """The jobs of a command line, with their arguments checked by the algorithms' own parsers; and the number of GPUs.

    Raises:
        SystemExit: (code 2) for anything that an algorithm would refuse.
    """
    if min(options.seeds, options.slots_per_device, options.seeds_per_job or 1) < 1 or options.max_restarts < 0:
        fail("--seeds, --seeds-per-job and --slots-per-device must be above zero, --max-restarts at least zero")
    for word in extra:
        if word.split("=")[0].replace("_", "-") in OWN_FLAGS:
            fail(f"{word} after --: the launcher sets it itself (--env-ids, --seed, --seeds, --runs-dir; see --help)")
    seeds = range(options.seed, options.seed + options.seeds)
    size = options.seeds_per_job or options.seeds
    jobs = []
    for file in dict.fromkeys(find_method(name) for name in options.methods):
        for env_id in expand_env_ids(options.env_ids):
            for part in (seeds[i : i + size] for i in range(0, len(seeds), size)):
                words = ["--env-id", env_id, "--seed", str(part[0]), "--num-seeds", str(len(part))]
                words += ["--runs-dir", options.runs_dir, *extra]
                jobs.append(Job(file.stem, str(file), env_id, tuple(part), options.runs_dir, words))

    # In a process of its own: torch and the algorithms are not needed afterwards.
    command = [sys.executable, "-m", "benchmarks.launch", "--resolve"]
    words = json.dumps([[job.file, job.words] for job in jobs])
    done = subprocess.run(command, input=words, stdout=subprocess.PIPE, text=True, env=python_environment())
    if done.returncode or not done.stdout:  # the message is on stderr already
        raise SystemExit(done.returncode)
    answer = json.loads(done.stdout)
    for job, resolved in zip(jobs, answer["jobs"]):
        for name, value in resolved.items():
            setattr(job, name, value)
    names = [job.name for job in jobs]
    if len(set(names)) < len(names):
        fail("two of the jobs are the same run; --methods and --env-ids must differ")
    return jobs, answer["gpus"]


def load_method(file):
    """The module of an algorithm's file, wherever that lies; one without `parse_args` ends the program with code 2."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where its dataclass looks itself up
    spec.loader.exec_module(module)
    if not hasattr(module, "parse_args"):
        fail(f"--methods {file} has no parse_args(words), which gives an algorithm's checked arguments")
    return module


def resolve(jobs):
    """Each job's arguments, as its algorithm's parse_args reads and checks them.

    Args:
        jobs: [[file, flags], ...].

    Returns:
        The jobs' args, identity and defaults, and the number of GPUs, as JSON knows them.

    Raises:
        SystemExit: an algorithm's own refusal.
    """
    import torch

    from common import arguments, generate

    answers, modules = [], {}
    for file, words in jobs:
        module = modules[file] = modules.get(file) or load_method(file)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                args, _ = module.parse_args(words)
        except SystemExit as error:
            if error.code:
                print(f"error: {Path(file).stem} refuses {shlex.join(words)}; nothing was started", file=sys.stderr)
            raise
        resolved = {"args": asdict(args), "defaults": asdict(type(args)())}
        if args.dataset_path is not None and not Path(args.dataset_path).expanduser().is_file():
            fail(f"--dataset-path {args.dataset_path} is not a file")
        if args.dataset_path is None and args.dataset_source == "generated":
            generate.check_collectable(envs.dataset_name(args.env_id))
        compared = set(resolved["args"]) - arguments.MAY_CHANGE | {"dataset_path"}
        resolved["identity"] = {name: resolved["args"][name] for name in sorted(compared)}
        resolved["identity"]["dataset_path"] = absolute(args.dataset_path)
        answers.append(resolved)
    return {"jobs": answers, "gpus": torch.cuda.device_count()}


# --- What there is of a job ---


@functools.cache
def read_info(path, modified):
    """An args.json; {} if it is none. `modified`: its time stamp, so that a changed file is read again."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def info_of(run_dir):
    """What a run directory's args.json says."""
    path = Path(run_dir) / "args.json"
    try:
        return read_info(path, path.stat().st_mtime_ns)
    except OSError:
        return {}


def find_runs(job):
    """The job's run directories, oldest first: same algorithm, environment, seeds and arguments, but those that a
    continuation may change; started by this launcher or by hand.
    """
    found = []
    prefix = glob.escape(f"{job.env_id}__{job.args['exp_name']}__{job.seeds[0]}__")
    for run_dir in Path(job.runs_dir).glob(prefix + "*"):
        info = info_of(run_dir)
        stored = job.defaults | info.get("args", {})
        stored["dataset_path"] = absolute(stored["dataset_path"])
        same = all(stored[name] == value for name, value in job.identity.items())
        if same and info.get("algorithm") == job.method:
            found.append(run_dir)
    return sorted(found, key=lambda run_dir: (len(run_dir.name), run_dir.name))  # the name ends with the time


def absolute(path):
    """A path in one form for comparisons; None stays None."""
    return path and str(Path(path).expanduser().resolve())


def read_rows(path):
    """The rows of a csv file; [] if it is missing."""
    try:
        with open(path) as file:
            return list(csv.DictReader(file))
    except OSError:
        return []


def is_finished(job, run_dir):
    """Whether a run of the job has its length, and an evaluation of every seed at the end."""
    args = job.defaults | info_of(run_dir).get("args", {})
    if any(args[name] != job.args[name] for name in ("total_timesteps", "online_timesteps")):
        return False
    rows = read_rows(run_dir / "eval.csv")
    evaluated = {int(row["seed"]) for row in rows if int(row["step"]) == job.last_step}
    return evaluated >= set(job.seeds)


def progress(run_dir):
    """(last step in the csv files, mean success of the last evaluation, updates per second); None: not known."""
    evaluations, timing = read_rows(run_dir / "eval.csv"), read_rows(run_dir / "timing.csv")
    step = max([int(rows[-1]["step"]) for rows in (evaluations, timing) if rows], default=0)
    last = [float(row["success"]) for row in evaluations if row["step"] == evaluations[-1]["step"]]
    rate = float(timing[-1]["updates_per_second"]) if timing else None
    return step, sum(last) / len(last) if last else None, rate


def has_checkpoint(run_dir):
    """Whether one of the run's checkpoints is whole (torch, which takes seconds to import, is not needed for that)."""
    for path in sorted(run_dir.glob("checkpoint*.pt")):
        try:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is None:
                    return True
        except (OSError, zipfile.BadZipFile):
            continue
    return False


def choose(job):
    """What to do for a job: ("skip", finished run), ("resume", interrupted run) or ("new", None).

    A run that was killed before its first checkpoint is left alone: there is nothing to go on from.
    """
    found = find_runs(job)
    for run_dir in reversed(found):
        if is_finished(job, run_dir):
            return "skip", run_dir
    steps = {run_dir: progress(run_dir)[0] for run_dir in found}
    for run_dir in sorted(reversed(found), key=steps.get, reverse=True):
        if steps[run_dir] <= job.last_step and has_checkpoint(run_dir):
            return "resume", run_dir
    return "new", None


def command(job, python, action, run_dir):
    """The words of the command that starts or continues a job."""
    resume = ["--resume", str(run_dir)] if action == "resume" else []
    return [python, job.file, *resume, *job.words]


def read_state(job):
    """The job's state.json: how often it was started, and why it was given up."""
    try:
        return json.loads((job.folder / "state.json").read_text())
    except (OSError, ValueError):
        return {}


def write_state(job, **changes):
    """Changes entries of the job's state.json, whole or not at all."""
    job.folder.mkdir(parents=True, exist_ok=True)
    temporary = job.folder / f"state.json.{socket.gethostname()}.{os.getpid()}"
    temporary.write_text(json.dumps(read_state(job) | changes))
    os.replace(temporary, job.folder / "state.json")


def last_lines(job, number=5):
    """The last lines of the job's stderr, without progress bars."""
    try:
        text = (job.folder / "stderr.log").read_text(errors="replace")[-20_000:]
    except OSError:
        return ""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text)]
    return "\n".join([line for line in lines if line and not re.search(r"\d+%\|", line)][-number:])


# --- Locks: one process at a time trains a job ---


def take_lock(job, patience=2):
    """Takes the job's lock for as long as this process, or a child that inherits the file, lives.

    Args:
        job: the job.
        patience: seconds to wait for it; others look whether it is taken by taking it for a moment.

    Returns:
        The open lock file, or None if another process has the lock.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    file = open(job.folder / "lock", "a+")
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                return None
            time.sleep(0.1)
            continue
        except OSError as error:  # a file system without locks
            warn(f"{job.folder}/lock cannot be locked ({error}): two launchers would not notice each other")
        file.truncate(0)
        file.write(f"{socket.gethostname()} process {os.getpid()}\n")
        file.flush()
        return file


def locked_by(job):
    """Who trains the job now ("host process 123"), or None."""
    try:
        with open(job.folder / "lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        with open(job.folder / "lock") as file:
            return file.read().strip() or "another process"
    except OSError:
        return None
    return None


# --- The process of one job, started by submitit ---


class Worker:
    """What submitit calls in a process of its own: trains a job, and hands SLURM's signals on to the training process.

    SIGTERM makes an algorithm save and leave (exit code 143). submitit's own signal, SIGUSR2, which SLURM sends before
    the time limit, comes to `checkpoint`, after which submitit queues the job again.

    Args:
        job: the job.
        environment: further environment variables.
        attempts: how often training is started here before giving up.
        patience: seconds to wait for the job's lock.
        grace: seconds that saving may take.
    """

    def __init__(self, job, environment, attempts=1, patience=2, grace=600):
        self.job, self.environment = job, environment
        self.attempts, self.patience, self.grace = attempts, patience, grace
        self.child, self.stopping = None, False

    def __call__(self):
        """Trains; returns the algorithm's exit code, or "locked" if another process trains this job."""
        self.child, self.stopping = None, False
        signal.signal(signal.SIGTERM, self.stop)
        on_slurm = os.environ.get("SUBMITIT_EXECUTOR") == "slurm"
        lock = take_lock(self.job, self.patience)
        if lock is None:
            print(f"{self.job.name} is trained by {locked_by(self.job)}")
            return "locked"
        code = 143
        for _ in range(self.attempts):
            action, run_dir = choose(self.job)
            if action == "skip" or self.stopping:
                return 0 if action == "skip" else code
            code = self.train(command(self.job, sys.executable, action, run_dir), lock)
            if code in (0, 2) or self.stopping:  # 2: a mistake that stays one
                break
        if self.stopping and on_slurm:
            time.sleep(600)  # a process that ends by itself counts as finished and is not queued again
        if code != 0 and not self.stopping and on_slurm:
            write_state(self.job, failed=f"exit code {code}\n{last_lines(self.job)}")
            raise RuntimeError(f"{self.job.name}: exit code {code}\n{last_lines(self.job)}")
        return code

    def train(self, words, lock):
        """Runs the training process to its end; returns its exit code (negative: killed by that signal)."""
        environment = python_environment() | self.environment
        environment.setdefault("TQDM_MININTERVAL", "30")  # a log, not a terminal
        write_state(self.job, starts=read_state(self.job).get("starts", 0) + 1)
        with open(self.job.folder / "stdout.log", "a") as out, open(self.job.folder / "stderr.log", "a") as err:
            print(f"+ {shlex.join(words)}", file=out, flush=True)
            self.child = subprocess.Popen(
                words, stdout=out, stderr=err, env=environment, start_new_session=True, pass_fds=[lock.fileno()],
                preexec_fn=functools.partial(end_with_parent, os.getpid(), load_libc()),
            )  # fmt: skip
        if self.stopping:  # the signal came before there was a child
            self.child.terminate()
        while self.child.poll() is None:  # not wait(): `checkpoint` interrupts this at any place
            time.sleep(0.2)
        return self.child.returncode

    def stop(self, number=None, frame=None):
        """On SIGTERM: the training process saves and leaves."""
        self.stopping = True
        if self.child is not None and self.child.returncode is None:
            self.child.terminate()

    def checkpoint(self):
        """Called by submitit before the time limit: saves; returns the submission that goes on after the requeue."""
        import submitit

        self.stop()
        deadline = time.monotonic() + self.grace
        while self.child is not None and time.monotonic() < deadline:
            try:  # leaves the exit code to `train`
                if os.waitid(os.P_PID, self.child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                    break
            except ChildProcessError:
                break
            time.sleep(0.2)
        return submitit.helpers.DelayedSubmission(
            Worker(self.job, self.environment, self.attempts, self.patience, self.grace)
        )


def load_libc():
    """The C library, where it has prctl (Linux)."""
    import ctypes

    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "prctl") else None


def end_with_parent(parent, libc):
    """In a new child: SIGTERM when its parent dies; submitit's signal is not for it, Ctrl-C is."""
    if libc is not None:
        libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if os.getppid() != parent:  # it died before
        os._exit(143)


# --- The table ---


def refresh(job):
    """Reads from the disk how far a job is; returns its finished run directory, or None."""
    found = find_runs(job)
    finished = [run_dir for run_dir in found if is_finished(job, run_dir)]
    if found:
        job.step, job.success, job.rate = progress((finished or found)[-1])
    job.restarts = max(0, read_state(job).get("starts", 0) - 1)
    return finished[-1] if finished else None


def show_state(job, queued):
    """Sets a job's state to what the disk, its lock and SLURM's queue (`queued`: {job id: state}, or None) tell."""
    finished, state = refresh(job), read_state(job)
    place = (queued or {}).get(state.get("slurm"))
    holder = locked_by(job)
    job.note = holder or (f"SLURM {state['slurm']} {place}" if place else "")
    if finished:
        job.state, job.note = "done", ""
    elif holder or place in ("RUNNING", "COMPLETING"):
        job.state = "running"
    elif state.get("failed") and not place:
        job.state, job.note = "failed", state["failed"].splitlines()[0]
    elif state.get("slurm") and not place and queued is not None:
        job.state, job.note = "failed", f"SLURM job {state['slurm']} has left the queue"
    else:
        job.state = "waiting"


def table(jobs, height=None):
    """The table of all jobs as lines; with `height`, at most so many: the ended jobs are left out first."""
    header = ("method", "environment", "seeds", "state", "step", "success", "updates/s", "restarts", "")
    counts = {state: sum(job.state == state for job in jobs) for state in dict.fromkeys(job.state for job in jobs)}
    summary = f"{len(jobs)} jobs: " + ", ".join(f"{number} {state}" for state, number in counts.items())
    shown = jobs
    if height is not None and len(jobs) > height - 3:
        order = {"failed": 0, "running": 1, "waiting": 2, "done": 3, "skipped": 4}
        chosen = sorted(range(len(jobs)), key=lambda i: order[jobs[i].state])[: max(1, height - 3)]
        shown = [jobs[i] for i in sorted(chosen)]
        summary += f" ({len(jobs) - len(shown)} not shown)"
    rows = [header]
    for job in shown:
        seeds = f"{job.seeds[0]}-{job.seeds[-1]}" if len(job.seeds) > 1 else str(job.seeds[0])
        success = "" if job.success is None else f"{job.success:.2f}"
        rate = "" if job.rate is None else f"{job.rate:.4g}"
        step = f"{job.step:,}/{job.last_step:,}"
        rows.append((job.method, job.env_id, seeds, job.state, step, success, rate, str(job.restarts), job.note))
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    right = {4, 5, 6, 7}
    align = lambda cell, i: cell.rjust(widths[i]) if i in right else cell.ljust(widths[i])
    return ["  ".join(align(cell, i) for i, cell in enumerate(row)).rstrip() for row in rows] + [summary]


class Screen:
    """Shows the table: redrawn in place on a terminal, else a line for every job whose state or success has changed."""

    def __init__(self, jobs):
        self.jobs, self.lines, self.known = jobs, [], {}
        self.terminal = sys.stdout.isatty()

    def draw(self):
        if self.terminal:
            columns, height = shutil.get_terminal_size()
            lines = [line[: columns - 1] for line in table(self.jobs, height)]
            if lines != self.lines:
                up = f"\033[{len(self.lines)}F\033[J" if self.lines else ""
                print(up + "\n".join(lines), flush=True)
                self.lines = lines
            return
        for job in self.jobs:
            now = job.state, job.success, job.restarts, job.note
            if self.known.get(job.name) != now:
                self.known[job.name] = now
                seeds = f"seeds {job.seeds[0]}-{job.seeds[-1]}"
                success = "" if job.success is None else f", success {job.success:.2f}"
                rate = "" if job.rate is None else f", {job.rate:.4g} updates/s"
                restarts = f", restarts {job.restarts}" if job.restarts else ""
                note = f" ({job.note})" if job.note else ""
                step = f"step {job.step:,}/{job.last_step:,}"
                print(
                    f"{job.method} {job.env_id} {seeds}: {job.state}{note}, {step}{success}{rate}{restarts}", flush=True
                )


def report_failures(jobs):
    """Names the jobs given up, with the end of their stderr and their logs; returns the exit code."""
    failed = [job for job in jobs if job.state == "failed"]
    for job in failed:
        print(f"failed: {job.method} {job.env_id} seeds {job.seeds[0]}-{job.seeds[-1]}: {job.note}", file=sys.stderr)
        print("".join(f"    {line}\n" for line in last_lines(job).splitlines()), end="", file=sys.stderr)
        print(f"    log: {job.folder}/stderr.log", file=sys.stderr)
    return 1 if failed else 0


# --- Executors ---


def print_commands(jobs):
    """Prints the command of every job that is not done."""
    for job in jobs:
        action, run_dir = choose(job)
        if action == "skip":
            print(f"done already: {run_dir}", file=sys.stderr)
        else:
            print(shlex.join(command(job, "python", action, run_dir)))


def find_devices(options, num_gpus):
    """Names of the devices that local jobs use."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    gpus = visible[:num_gpus] if visible else [str(i) for i in range(num_gpus)]
    for name in options.devices:
        if name != "cpu" and name not in gpus:
            fail(f"--devices {name}: visible here are {', '.join([*gpus, 'cpu'])}")
    return list(options.devices) or gpus or ["cpu"]


def submit(executor, worker):
    """Submits a worker; Ctrl-C, which a terminal sends to all processes of a command, will not reach its process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return executor.submit(worker)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def outcome(task):
    """What an ended submitit job's worker returned; None if its process died."""
    if not task.paths.result_pickle.exists():
        return None
    error = task.exception()
    if error is None:
        return task.result()
    trace = re.split("-{9,}\n", str(error))  # its middle part is the traceback
    return trace[len(trace) // 2].strip().splitlines()[-1]


def run_local(jobs, options, num_gpus):
    """Trains jobs on this machine, as many at a time as there are slots; returns the exit code.

    submitit starts and watches the processes; it has no queue on one machine, so the queue is here.
    """
    import submitit

    devices = find_devices(options, num_gpus)
    slots = [device for device in devices for _ in range(options.slots_per_device)]
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, num_cores() // len(slots))))
    executor = submitit.LocalExecutor(Path(options.runs_dir) / "launch" / "submitit")
    executor.update_parameters(timeout_min=10 * 365 * 24 * 60)  # the queue here has no time limit
    screen, stopped = Screen(jobs), []

    def stop(number, frame):
        stopped.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C does not wait
        print("\nstopping: every job saves a checkpoint (Ctrl-C again: do not wait for them)", flush=True)
        screen.lines = []  # the table is drawn anew below

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)

    tasks, used = {}, {}  # by the job's place in `jobs`: submitit's job, and its slot
    ended = [0] * len(jobs)  # how often a process of the job ended too early
    signalled = 0.0
    while True:
        for i, task in list(tasks.items()):
            job = jobs[i]
            if not task.done():
                refresh(job)
                continue
            tasks.pop(i), used.pop(i)
            result, finished = outcome(task), refresh(job)
            if finished:
                job.state, job.note = "done", ""
            elif stopped or result == "locked":
                job.state, job.note = "waiting", ""
            elif result == 2 or ended[i] == options.max_restarts:
                job.state, job.note = "failed", describe(result)
                write_state(job, failed=job.note)
            else:
                ended[i] += 1
                job.state, job.note = "waiting", f"{describe(result)}, to be restarted"
        screen.draw()
        free = [slot for slot in range(len(slots)) if slot not in used.values()]
        for i, job in enumerate(jobs):
            if job.state != "waiting" or i in tasks or stopped or not free:
                continue
            holder = locked_by(job)
            if holder:  # a launcher elsewhere, or the rest of a worker that was killed
                job.note = f"with {holder}"
                continue
            if refresh(job):
                job.state, job.note = "done", ""
                continue
            used[i] = free.pop(0)
            device = slots[used[i]]
            environment = {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": "" if device == "cpu" else device}
            tasks[i] = submit(executor, Worker(job, environment))
            job.state, job.note = "running", f"on {device if device == 'cpu' else 'GPU ' + device}"
        screen.draw()
        if stopped and tasks and time.monotonic() > signalled + 5:  # again: a worker that was just starting misses it
            signalled = time.monotonic()
            for task in tasks.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(task.job_id), signal.SIGTERM)  # submitit's process hands it on
        if not tasks and (stopped or all(job.state not in ("waiting", "running") for job in jobs)):
            break
        time.sleep(POLL_SECONDS)
    if stopped:
        print(f"stopped; go on with the same command: {shlex.join(own_command())}")
        return 128 + stopped[0]
    return report_failures(jobs)


def describe(result):
    """How a worker ended, in words: by its exit code (negative: a signal), its error, or None: killed."""
    if result is None:
        return "its process was killed"
    if isinstance(result, int):
        return f"killed by {signal.Signals(-result).name}" if result < 0 else f"exit code {result}"
    return result


def own_command():
    """The words of this command, for messages."""
    return ["python", "-m", "benchmarks.launch", *sys.argv[1:]]


def slurm_queue(jobs):
    """{SLURM job id: state} of the user's queue; {} if none of `jobs` was submitted, None if it is not known."""
    if not any(read_state(job).get("slurm") for job in jobs):
        return {}
    words = ["squeue", "--me", "--noheader", "--array", "--format=%A %F %K %T"]
    try:
        lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError) as error:
        text = getattr(error, "stderr", None) or str(error)
        warn(f"SLURM's queue is not known: {text.strip().splitlines()[-1]}")
        return None
    queued = {}
    for line in lines:
        own, array, index, state = line.split(maxsplit=3)
        queued[own if index == "N/A" else f"{array}_{index}"] = state
    return queued


def run_slurm(jobs, options):
    """Submits jobs as one SLURM array; returns their SLURM ids. If sbatch refuses: exit code 2."""
    import submitit

    executor = submitit.SlurmExecutor(Path(options.runs_dir) / "launch" / "submitit", max_num_timeout=1000)
    names = ("partition", "account", "qos", "cpus_per_task", "signal_delay_s", "array_parallelism")
    parameters = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.gpus_per_node:
        parameters["gpus_per_node"] = options.gpus_per_node
    executor.update_parameters(
        job_name="cleanflow", time=options.timeout_min, mem=f"{options.mem_gb}GB",
        srun_args=[f"--cpus-per-task={options.cpus_per_task}"],  # srun does not take it over from sbatch
        additional_parameters={"requeue": True}, **parameters,
    )  # fmt: skip
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(options.cpus_per_task))}
    grace = max(5, options.signal_delay_s - 15)
    workers = [Worker(job, environment, options.max_restarts + 1, patience=60, grace=grace) for job in jobs]
    try:
        tasks = executor.submit_array(workers)
    except submitit.core.utils.FailedJobError as error:
        fail(f"sbatch refuses the jobs: {str(error).strip().splitlines()[-1]}")
    for job, task in zip(jobs, tasks):
        write_state(job, slurm=task.job_id)
    return [task.job_id for task in tasks]


def watch(jobs):
    """Shows the table until every job has ended; returns the exit code."""
    screen = Screen(jobs)
    while True:
        queued = slurm_queue(jobs)
        for job in jobs:
            show_state(job, queued)
        screen.draw()
        if all(job.state in ("done", "failed") for job in jobs):
            return report_failures(jobs)
        time.sleep(10 * POLL_SECONDS)


def main():
    """Reads the command line and launches; ends with exit code 0, 1 if a job failed at last, or 2."""
    words = sys.argv[1:]
    if words == ["--resolve"]:  # the process that checks the jobs' arguments
        answer = resolve(json.load(sys.stdin))
        print(json.dumps(answer))
        return

    import tyro

    own, extra = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    options = tyro.cli(LaunchArgs, args=own, description=__doc__)
    if options.executor == "slurm" and not options.status and shutil.which("sbatch") is None:
        fail("sbatch not found: install SLURM or use --executor local / print")
    jobs, num_gpus = make_jobs(options, extra)

    if options.status:
        if options.watch:
            raise SystemExit(watch(jobs))
        queued = slurm_queue(jobs)
        for job in jobs:
            show_state(job, queued)
        print("\n".join(table(jobs)))
        return
    if options.executor == "print":
        print_commands(jobs)
        return

    try:
        (Path(options.runs_dir) / "launch").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--runs-dir {options.runs_dir} is not writable: {error}")
    queued = (slurm_queue(jobs) if options.executor == "slurm" else None) or {}
    for job in jobs:
        finished = refresh(job)
        busy = locked_by(job) or queued.get(read_state(job).get("slurm"))
        if finished:
            job.state, job.note = "skipped", f"done: {finished}"
        elif busy and options.executor == "slurm":
            job.state, job.note = "skipped", f"runs or waits already: {busy}"
        elif not busy:
            write_state(job, starts=0, failed=None, slurm=None)
            job.restarts = 0
    os.environ.update(python_environment())  # submitit's processes import this file
    if options.executor == "local":
        raise SystemExit(run_local(jobs, options, num_gpus))
    waiting = [job for job in jobs if job.state == "waiting"]
    if waiting:
        ids = run_slurm(waiting, options)
        for job, number in zip(waiting, ids):
            job.note = f"SLURM {number}"
    print("\n".join(table(jobs)))
    if options.watch:
        raise SystemExit(watch(jobs))
    if waiting:
        print(f"{len(waiting)} jobs submitted; the same command with --status shows how far they are")


if __name__ == "__main__":
    from benchmarks import launch  # so that submitit's processes find `Worker` in a module

    try:
        launch.main()
    except KeyboardInterrupt:  # before the first job, or the second time
        raise SystemExit(130) from None
