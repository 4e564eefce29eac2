"""A run's arguments: the command line, published settings of the environment, a stored run's, and their checks."""

import importlib.util
import sys
from dataclasses import fields
from pathlib import Path

import torch
import tyro

from common import checkpoint, envs, export, fail
from common.files import check_writable

# What may differ between a run and its continuation; everything else would change its numbers.
LENGTHS = {"total_timesteps", "online_timesteps"}
MAY_CHANGE = LENGTHS | set(
    "resume runs_dir cuda track wandb_project_name wandb_entity capture_video dataset_dir dataset_path eval_workers "
    "save_interval compile cudagraphs matmul_precision".split()
)
EVALUATING = {"evaluate", "export", "export_seed", "seed", "eval_episodes"}  # what --evaluate may change
# In --help.
DEFAULTS = "Defaults are those of Args. --env-id (TUNED) and --quick (QUICK) change some: a run prints what it takes."
# The numbers that every algorithm has; a file checks its own by `check_numbers`.
INTERVALS = ("total_timesteps", "eval_interval", "log_interval", "save_interval")
ABOVE_ZERO = (*INTERVALS, "num_seeds", "generated_episodes", "eval_episodes", "batch_size", "learning_rate")
AT_LEAST_ZERO = ("seed", "online_timesteps", "eval_workers")


def parse(Args, tuned, tuned_online, quick, inference=(), words=None):
    """Reads the command line and checks what all algorithms share; a flag that the user passes wins over everything.

    Without it: with --resume or --evaluate the stored arguments; else Args' defaults, then
    `tuned` of the environment, then with --online-timesteps `tuned_online` of it, then with --quick `quick`.

    Returns args, and the checkpoint to continue from or to evaluate (None for a new run). A flag that does not exist, a
    value out of range, an unknown environment, or a run that cannot be continued or evaluated end the program with exit
    code 2; the message lists the arguments that contradict the stored ones.

    Args:
        tuned, tuned_online: {environment and dataset type: {field: value}}.
        quick: {field: value}.
        inference: the algorithm's own fields that --evaluate may change: acting reads them.
        words: of the command line; None for this program's.
    """
    module = sys.modules[Args.__module__]
    if not Path(module.__file__).stem.isidentifier():  # other programs import the file
        fail(f"{module.__file__}: the file's name must be letters, digits and underscores (my_floq.py)")
    read = lambda default: tyro.cli(Args, args=words, default=default, description=f"{module.__doc__}\n{DEFAULTS}")
    args, saved = read(Args()), None
    if args.resume is not None and args.evaluate is not None:
        fail("--resume and --evaluate exclude each other: one trains further, the other does not train")
    if args.export is not None and args.evaluate is None:
        fail(f"--export {args.export} needs --evaluate RUN_DIR, the run whose policy it writes")
    if args.export_seed is not None and args.export is None:
        fail(f"--export-seed {args.export_seed} needs --export DIR, the folder that it writes to")
    if args.resume is not None:
        args, saved = _of_stored_run(read, args, "--resume", MAY_CHANGE)
    elif args.evaluate is not None:
        args, saved = _of_stored_run(read, args, "--evaluate", MAY_CHANGE - LENGTHS | EVALUATING | set(inference))
    else:
        if args.quick:
            args = read(Args(**quick))  # --quick may choose another environment, whose tuned values apply
        environment = args.env_id.split("-singletask")[0]
        settings = tuned.get(environment, {}) | (tuned_online.get(environment, {}) if args.online_timesteps else {})
        if args.online_timesteps and environment not in tuned_online:
            print(f"note: no offline-to-online settings for {environment}: using the offline ones")
        args = read(Args(**settings | (quick if args.quick else {})))

    check_numbers(args, ABOVE_ZERO, AT_LEAST_ZERO)
    if not 0 < args.gamma < 1 or not 0 < args.tau <= 1:
        fail(f"--gamma {args.gamma} must lie between 0 and 1, --tau {args.tau} above 0 and at most 1")
    if "/" in args.exp_name:
        fail(f"--exp-name {args.exp_name}: it is a part of the run directory's name and has no /")
    if saved is None:
        envs.check_env_id(args.env_id)
        check_writable(args.runs_dir, "--runs-dir")
    if args.track and importlib.util.find_spec("wandb") is None:
        fail("--track: wandb is not installed; pip install -r requirements.txt")
    if "--cudagraphs" in (sys.argv if words is None else words) and not (args.cuda and torch.cuda.is_available()):
        print("note: --cudagraphs is ignored: there are no CUDA graphs on the CPU")
    return args, saved


def _of_stored_run(read, args, flag, may_change):
    """A run's stored arguments, changed by the command line in the fields `may_change`, and the run's checkpoint."""
    run_dir = args.resume if flag == "--resume" else args.evaluate
    saved = checkpoint.load(run_dir) if flag == "--resume" else export.read_any(run_dir, flag)
    names = sorted(field.name for field in fields(args))
    stored = stored_args(type(args), saved, f"{flag} {run_dir}")
    args = read(stored)
    differing = [name for name in names if name not in may_change and getattr(args, name) != getattr(stored, name)]
    if differing:
        listed = [f"{_flag(args, name)} (the run has {getattr(stored, name)})" for name in differing]
        fail(f"{flag} {run_dir} cannot continue with other arguments: {', '.join(listed)}")
    length, step = _flag(args, "total_timesteps"), saved["step"]
    if step > stored.total_timesteps != args.total_timesteps:
        fail(f"{length}: the run in {run_dir} is in its online phase already")
    if args.total_timesteps + args.online_timesteps < step:
        fail(f"{length} {_flag(args, 'online_timesteps')}: the run in {run_dir} is at step {step} already")
    if args.total_timesteps < step <= stored.total_timesteps:
        fail(f"{length}: the run in {run_dir} is at step {step} of its offline phase already")
    return args, saved


def stored_args(Args, saved, where):
    """The arguments of a checkpoint or an exported folder, `where` for messages; those that it lacks have the default.

    Another algorithm's, arguments that this version of the file lacks (the policy would be another one), and values of
    another type than the default's end the program with exit code 2.
    """
    defaults = Args()
    if saved["algorithm"] != algorithm(defaults):
        fail(f"{where} is a run of {saved['algorithm']}.py, not of {algorithm(defaults)}.py")
    if unknown := sorted(saved["args"].keys() - {field.name for field in fields(Args)}):
        fail(f"{where} is of another version of {saved['algorithm']}.py, which had {', '.join(unknown)}")
    for name, value in saved["args"].items():
        default = getattr(defaults, name)
        kinds = (int, float) if isinstance(default, float) else type(default)
        if default is not None and not isinstance(value, kinds):
            fail(f"{where} has {name} = {value!r}, which is no {type(default).__name__}")
    return Args(**saved["args"])


def check_numbers(args, above_zero=(), at_least_zero=()):
    """Ends the program (exit code 2) unless the named arguments are above zero or at least zero.

    Of a tuple, each element is checked; None is no number.
    """
    for name in (*above_zero, *at_least_zero):
        value, bound = getattr(args, name), "above" if name in above_zero else "at least"
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        if not all(number > 0 or (number == 0 and bound == "at least") for number in numbers):
            fail(f"{_flag(args, name)}: must be {bound} zero")


def as_flags(values):
    """{name: value} as a command line's words: layer_norm False, dims (8, 8) -> --no-layer-norm --dims 8 8."""
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, (tuple, list)) else [value])]
    return words


def _flag(args, name):
    """An argument as the command line has it: --batch-size 256."""
    return " ".join(as_flags({name: getattr(args, name)}))


def algorithm(args):
    """Name of the algorithm, its file's without `.py`: a copy of a file is an algorithm of its own."""
    return Path(sys.modules[type(args).__module__].__file__).stem
