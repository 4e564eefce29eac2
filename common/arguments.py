"""A run's arguments: the command line, published settings of the environment, a stored run's, and their checks."""

import dataclasses
import sys
from pathlib import Path

import torch

from common import checkpoint, envs, export, fail

# What may differ between a run and its continuation; everything else would change its numbers.
LENGTHS = {"total_timesteps", "online_timesteps"}
MAY_CHANGE = LENGTHS | {
    "resume", "runs_dir", "cuda", "track", "wandb_project_name", "wandb_entity", "capture_video", "dataset_dir",
    "dataset_path", "eval_workers", "save_interval", "compile", "cudagraphs", "matmul_precision",
}  # fmt: skip
EVALUATING = {"evaluate", "export", "export_seed", "seed", "eval_episodes"}

NOT_A_NAME = (
    "the file's name must be letters, digits and underscores (my_floq.py), since other programs import the file"
)


def parse(Args, tuned, tuned_online, quick, inference=(), may_be_zero=(), words=None):
    """Reads the command line; a flag that the user passes wins over everything.

    Without it: the stored arguments with --resume or --evaluate; else Args' defaults, then
    `tuned` of the environment, then `tuned_online` of it with --online-timesteps, then `quick` with --quick.

    Args:
        Args: the algorithm's dataclass.
        tuned, tuned_online: {environment and dataset type: {field: value}}.
        quick: {field: value}.
        may_be_zero: numbers that may be zero beside those whose default is zero; all others must be above it (tuples: each
            element).
        inference: the algorithm's own fields that training does not use: --evaluate may change them.
        words: of the command line; None for this program's.

    Returns:
        args, and the checkpoint to continue from or to evaluate (None for a new run).

    Raises:
        SystemExit: (code 2) for a flag that does not exist, a value out of range, an unknown environment, or a
            --resume that cannot be continued (or an --evaluate of another algorithm's run); the message lists the
            arguments that contradict the stored ones.
    """
    import tyro

    if not Path(sys.modules[Args.__module__].__file__).stem.isidentifier():
        fail(f"{sys.modules[Args.__module__].__file__}: {NOT_A_NAME}")
    read = lambda default: tyro.cli(Args, args=words, default=default, description=sys.modules[Args.__module__].__doc__)
    args, resumed = read(Args()), None
    evaluate = args.evaluate
    if args.resume is not None and evaluate is not None:
        fail("--resume and --evaluate exclude each other: one trains on, the other does not train")
    if args.export is not None and evaluate is None:
        fail(f"--export {args.export} needs --evaluate RUN_DIR, the run whose policy it writes")
    if args.export_seed is not None and args.export is None:
        fail(f"--export-seed {args.export_seed} needs --export DIR, the folder that it writes to")
    if args.resume is not None or evaluate is not None:
        flag, run_dir = ("--resume", args.resume) if evaluate is None else ("--evaluate", evaluate)
        resumed = checkpoint.load(run_dir, flag) if evaluate is None else export.read_any(run_dir, flag)
        names = {field.name for field in dataclasses.fields(Args)}
        if resumed["algorithm"] != algorithm(args):
            fail(f"{flag} {run_dir} is a run of {resumed['algorithm']}.py")
        default = Args(**{name: value for name, value in resumed["args"].items() if name in names})
        args = read(default)
        may_change = MAY_CHANGE if evaluate is None else MAY_CHANGE - LENGTHS | EVALUATING | set(inference)
        differing = [name for name in sorted(names - may_change) if getattr(args, name) != getattr(default, name)]
        if differing:
            listed = ", ".join(
                f"--{n.replace('_', '-')} {getattr(args, n)} (the run has {getattr(default, n)})" for n in differing
            )
            fail(f"{flag} {run_dir} cannot go on with other arguments: {listed}")
        if resumed["step"] > default.total_timesteps != args.total_timesteps:
            fail(f"--total-timesteps {args.total_timesteps}: the run in {run_dir} is in its online phase already")
        if args.total_timesteps + args.online_timesteps < resumed["step"]:
            fail(
                f"--total-timesteps {args.total_timesteps} --online-timesteps {args.online_timesteps}: the run in "
                f"{run_dir} is at step {resumed['step']} already"
            )
    else:
        if args.quick:
            args = read(Args(**quick))  # --quick may choose another environment, whose tuned values apply
        environment = args.env_id.split("-singletask")[0]
        settings = dict(tuned.get(environment, {}))
        if args.online_timesteps and environment in tuned_online:
            settings |= tuned_online[environment]
        elif args.online_timesteps:
            print(f"note: no offline-to-online settings for {environment}: using the offline ones")
        args = read(Args(**settings | (quick if args.quick else {})))

    for name, value in dataclasses.asdict(args).items():
        numbers = value if isinstance(value, tuple) else (value,)
        if all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers):
            zero = name in may_be_zero or getattr(Args(), name) == 0
            if not all(number >= 0 if zero else number > 0 for number in numbers):
                fail(f"--{name.replace('_', '-')} {value}: must be {'at least' if zero else 'above'} zero")
    if not 0 < args.gamma < 1 or not 0 < args.tau <= 1:
        fail(f"--gamma {args.gamma} must lie between 0 and 1, --tau {args.tau} above 0 and at most 1")
    if resumed is None:
        envs.check_env_id(args.env_id)
    if "--cudagraphs" in (sys.argv if words is None else words) and not (args.cuda and torch.cuda.is_available()):
        print("note: --cudagraphs is ignored: there are no CUDA graphs on the CPU")
    return args, resumed


def algorithm(args):
    """Name of the algorithm, its file's without `.py`: a copy of a file is an algorithm of its own."""
    return Path(sys.modules[type(args).__module__].__file__).stem
