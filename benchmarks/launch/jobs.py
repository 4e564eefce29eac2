"""Which runs a command line asks for."""

import contextlib
import difflib
import fnmatch
import hashlib
import importlib.util
import itertools
import json
import multiprocessing
import re
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import scores
from common import envs, fail

ROOT = Path(__file__).resolve().parent.parent.parent
# Flags of the algorithms that the launcher sets itself.
OWN_FLAGS = ("--env-id", "--seed", "--num-seeds", "--runs-dir", "--resume", "--evaluate")


@dataclass(eq=False)
class Job:
    """One run to have: what it is, and where it stands."""

    file: Path  # the algorithm's
    env_id: str
    seeds: tuple[int, ...]
    runs_dir: Path
    words: list  # its flags, without --resume
    args: dict  # what the algorithm makes of them
    identity: dict  # those of them that a continuation must share
    defaults: dict  # for runs from before a flag existed

    state: str = "waiting"  # waiting, running, done, skipped or failed
    note: str = ""
    step: int = 0
    success: float | None = None
    rate: float | None = None  # updates per second
    restarts: int = 0

    @property
    def lengths(self):
        """Updates of the offline and of the online phase; their sum is the step of the last evaluation."""
        return self.args["total_timesteps"], self.args["online_timesteps"]

    @property
    def folder(self):
        """Where the job's lock, state and output are; two jobs share it only if one run would serve both."""
        digest = hashlib.sha1(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:8]
        name = f"{self.file.stem}__{self.env_id}__{self.seeds[0]}-{self.seeds[-1]}__{digest}"
        return self.runs_dir / "launch" / name


def make_jobs(options, extra):
    """The jobs that the launcher's options ask for, each with the words `extra`, and the number of GPUs.

    What an algorithm would refuse ends the program with code 2.
    """
    per_job = 1 if options.seeds_per_job is None else options.seeds_per_job
    if min(options.seeds, options.slots_per_device, per_job) < 1 or options.max_restarts < 0:
        fail("--seeds, --seeds-per-job and --slots-per-device must be above zero, --max-restarts at least zero")
    for word in extra:
        if word.split("=")[0].replace("_", "-") in OWN_FLAGS:
            fail(f"{word} after --: the launcher sets it itself (--env-ids, --seed, --seeds, --runs-dir; see --help)")
    files = dict.fromkeys(find_method(name) for name in options.methods)
    seeds, size = range(options.seed, options.seed + options.seeds), options.seeds_per_job or options.seeds
    parts = [tuple(seeds[i : i + size]) for i in range(0, len(seeds), size)]
    wanted = []
    for file, env_id, part in itertools.product(files, expand_env_ids(options.env_ids), parts):
        words = ["--env-id", env_id, "--seed", str(part[0]), "--num-seeds", str(len(part))]
        wanted.append((file, env_id, part, Path(options.runs_dir), [*words, "--runs-dir", options.runs_dir, *extra]))

    # In a process of its own: torch and the algorithms are not needed afterwards.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        resolved, num_gpus = pool.submit(resolve, [(file, words) for file, *_, words in wanted]).result()
    jobs = [Job(*parts, *answer) for parts, answer in zip(wanted, resolved)]
    if len({job.folder for job in jobs}) < len(jobs):
        fail("two of the jobs are the same run; --methods and --env-ids must differ")
    return jobs, num_gpus


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
    """Environment ids that patterns with {1..5}, {a,b} and shell wildcards stand for, each task once, in order
    (`...-singletask-v0` is one of the five, and wildcards find that by its number). A pattern that matches nothing ends
    the program with exit code 2 and close matches.
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
            found += matching if piece in known else map(scores.canonical, matching)
    return list({scores.canonical(env_id): env_id for env_id in found[::-1]}.values())[::-1]


def resolve(commands):
    """What each algorithm's `parse_args(words)` makes of a job's words; a refusal ends the program with code 2.

    `commands` are [(file, words)]. Returns [(args, identity, defaults)], see `Job`, with values as JSON knows them, and
    the number of GPUs.
    """
    import torch

    from common import arguments, datasets

    resolved = []
    for file, words in commands:
        spec = importlib.util.spec_from_file_location(file.stem, file)  # wherever the file lies
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where its dataclass looks itself up
        spec.loader.exec_module(module)
        if not hasattr(module, "parse_args"):
            fail(f"--methods {file} has no parse_args(words), which gives an algorithm's checked arguments")
        try:
            with contextlib.redirect_stdout(sys.stderr):
                args, _ = module.parse_args(words)
        except SystemExit as error:
            if error.code:
                print(f"error: {file.stem} refuses {shlex.join(words)}; nothing was started", file=sys.stderr)
            raise
        datasets.find_dataset(args, make=False)  # refuses what could not be had
        values, defaults = (json.loads(json.dumps(asdict(a))) for a in (args, type(args)()))
        identity = {name: value for name, value in values.items() if name not in arguments.MAY_CHANGE}
        resolved.append((values, identity | {"dataset_path": absolute(args.dataset_path)}, defaults))
    return resolved, torch.cuda.device_count()


def absolute(path):
    """A path in one form for comparisons; None stays None."""
    return path and str(Path(path).expanduser().resolve())
