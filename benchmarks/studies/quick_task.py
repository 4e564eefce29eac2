"""Variants of an algorithm, or several algorithms, on the quick task: success and time per update, compared by seed.

    python -m benchmarks.studies.quick_task --grid value_flows          # ablations of Value Flows
    python -m benchmarks.studies.quick_task --variants floq floq:critic_flow_steps=1 --seeds 4
    python -m benchmarks.studies.quick_task --grid critics --output docs/value_flows_critics

A variant is FILE:argument=value,argument=value: `FILE --quick --num-seeds SEEDS` with these arguments, trained by the
file's own main program in a directory of its own below RUNS_DIR. The same command continues a study that was stopped.
The grids are

    value_flows   no bootstrapped term, half and three times its weight, no confidence weights
    flow_steps    Value Flows with 1, 2 and 10 Euler steps instead of 5
    critics       C51 and IQN beside Value Flows: the same policies, another return distribution
    floq          1, 2, 4 and 8 Euler steps, from a narrow and from a wide noise interval
    baselines     FQL, and its policy with floq's critic

**The rule.** A run's success is the mean of its last two evaluations, per seed (that after the first update is none of
them). Each variant is compared with the first
one by the differences of equal seeds, which have the same data and batches: their mean and its 95% interval.

    higher, lower  the interval is above, or below, zero
    alike          it lies within MARGIN points of zero
    not resolved   anything else, and where there is one seed only

A run that ends at a non-finite loss has the success of its evaluations before it, and is marked; one that has none is
left out. If that is the first variant, nothing is compared.
"""

import re
import signal
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from tqdm import tqdm

from benchmarks import tables
from benchmarks.scores import interval, interval_text
from benchmarks.studies.return_accuracy import parse_variant
from common import arguments, curves, export, fail, python_environment, runs, warn
from common.files import check_writable, try_lock

MARGIN = 10.0  # points of success
FILES = ("floq", "value_flows", "q_flow", "evor", "fql", "c51", "iqn")
STEPS = [f"floq:critic_flow_steps={K},noise_coverage={kappa}" for kappa in (0.25, 0.01) for K in (8, 4, 2, 1)]
GRIDS = {  # the first is what the others are compared with
    "value_flows": [
        "value_flows",
        *(f"value_flows:bcfm_lambda={weight}" for weight in (0, 0.5, 3)),
        "value_flows:confidence_weight_temp=1e-6",  # every weight is 1
    ],
    "flow_steps": ["value_flows", *(f"value_flows:num_flow_steps={K}" for K in (1, 2, 10))],
    "critics": ["value_flows", "c51", "iqn"],
    "floq": STEPS,
    "baselines": ["fql", "floq"],
}
NON_FINITE = re.compile(r"error: \S+ is \S+ at step (\d+) .*training stops")  # what common/log.py says


@dataclass
class QuickArgs:
    grid: Literal["value_flows", "flow_steps", "critics", "floq", "baselines"] | None = None
    """a list of variants, see above"""
    variants: tuple[str, ...] = ()
    """FILE or FILE:argument=value,... instead; the others are compared with the first"""
    seeds: int = 4
    """seeds, trained side by side"""
    updates: int | None = None
    """updates of every run (default: those of the file's --quick)"""
    episodes: int = 50
    """episodes of an evaluation, per seed"""
    runs_dir: str = "runs/quick_task"
    """directory of the runs"""
    output: str | None = None
    """csv and PNG get this path's stem (default: no files)"""


def run(variant, options):
    """Trains a variant, or continues; returns its run directory and the step of its first non-finite loss or None.

    A run that fails in another way ends the program with exit code 2 and the run's last line.
    """
    module, changes = parse_variant(variant, FILES)
    name = f"{variant}-{options.seeds}-{options.updates or 'quick'}-{options.episodes}"
    folder = Path(options.runs_dir).resolve() / re.sub(r"[^\w.=-]+", "_", name)
    log = folder / "log.txt"
    folder.mkdir(parents=True, exist_ok=True)
    log.touch()
    with open(folder / "lock", "a") as lock:  # the training holds it too: it may outlive a study that is killed
        if not try_lock(lock, folder / "lock"):
            fail(f"{folder}: another process trains this variant; let it end first")
        latest = lambda: max((path.parent for path in folder.glob("*/args.json")), default=None)
        stopped_at = lambda: int(found[1]) if (found := NON_FINITE.search(log.read_text())) else None
        run_dir = latest()
        if run_dir and ((run_dir / "policy").exists() or stopped_at()):
            return run_dir, stopped_at()
        words = ["--quick", "--num-seeds", options.seeds, "--eval-episodes", options.episodes, "--runs-dir", folder]
        words += ["--total-timesteps", options.updates] if options.updates else []
        words += arguments.as_flags(changes)
        if run_dir and (run_dir / "checkpoint.pt").exists():
            words = ["--resume", run_dir]
        command = [sys.executable, "-m", export.module_path(module.Agent), *map(str, words)]
        with open(log, "a") as file:
            places = dict(cwd=export.ROOT, env=python_environment(), stdout=file, stderr=file, pass_fds=[lock.fileno()])
            process = subprocess.Popen(command, **places)
            try:
                code = process.wait()
            except BaseException:  # Ctrl-C or SIGTERM: the training saves before this study ends
                process.terminate()
                process.wait()
                raise
        if code and not stopped_at():
            last = (log.read_text().splitlines() or [""])[-1]
            fail(f"{' '.join(command)} failed ({last}); see {log}. Mended, the same command of this study continues")
        return latest(), stopped_at()


def measure(variant, run_dir, stopped):
    """A row per seed: variant, seed, updates, success in percent, milliseconds per update of all seeds, stopped.

    No rows, and a warning, where a loss became non-finite before the first evaluation.
    """
    found = curves.read_success(run_dir / "eval.csv") if (run_dir / "eval.csv").exists() else {}
    found = {seed: {step: x for step, x in curve.items() if step > 1} for seed, curve in found.items()}  # trained ones
    if not any(found.values()):
        stop = f"a loss is non-finite at step {stopped}, before" if stopped else "it ended before"
        warn(f"{variant} is left out: {stop} the first evaluation after step 1")
        return []
    speeds = [float(row["updates_per_second"]) for row in tables.read_rows(run_dir / "timing.csv")]
    speeds = [speed for speed in speeds if speed]
    milliseconds = f"{1000 / statistics.median(speeds):.4g}" if speeds else ""
    rows = []
    for seed, curve in found.items():
        last = sorted(curve)[-2:]
        success = np.mean([curve[step] for step in last])
        row = {"variant": variant, "seed": seed, "updates": last[-1], "success": f"{success:.4g}"}
        rows.append(row | {"milliseconds": milliseconds, "stopped": stopped or ""})
    return rows


def success_of(rows, variant):
    """Success of a variant's seeds, in their order."""
    return np.array([float(row["success"]) for row in rows if row["variant"] == variant])


def verdict(difference, half):
    """What a mean difference in points and half of its 95% interval say, by the rule above."""
    if difference - half > 0 or difference + half < 0:
        return "higher" if difference > 0 else "lower"
    return "alike" if abs(difference) + half < MARGIN else "not resolved"


def summary(rows, first):
    """A markdown table of the variants: success, the difference to `first`, its verdict, milliseconds per update.

    Without rows of `first` there are no differences, and a line says so.
    """
    names = list(dict.fromkeys(row["variant"] for row in rows))
    base, lines = success_of(rows, first), []
    for name in names:
        of_variant = [row for row in rows if row["variant"] == name]
        success, row = success_of(rows, name), of_variant[0]
        compared = ["", ""]
        if len(base) and name != first:
            difference = success - base
            compared = [interval_text(difference, "+.1f"), verdict(*interval(difference))]
        ended = f", non-finite at {row['stopped']}" if row["stopped"] else ""
        lines.append([f"`{name}`", interval_text(success, ".1f", "%") + ended, *compared, row["milliseconds"]])
    header = ["variant", f"success, {len(success)} seeds", "minus the first", "verdict", "ms per update"]
    left_out = "" if len(base) else f"\nNo differences: the first variant, `{first}`, is left out.\n"
    return tables.markdown(header, lines) + left_out


def draw(path, rows):
    """Saves each variant's success: a dot per seed, the mean as a line and its 95% interval as a bar."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["variant"] for row in rows))
    figure = Figure(figsize=(6.4, 1.2 + 0.4 * len(names)), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(names):
        success = success_of(rows, name)
        mean, half = interval(success)
        axes.plot(success, np.full(len(success), place), "o", color="tab:blue", alpha=0.5)
        axes.errorbar(mean, place, xerr=np.nan_to_num(half), fmt="|", markersize=14, capsize=3, color="black")
    axes.set(yticks=range(len(names)), yticklabels=names, xlim=(-3, 103), xlabel="success (%)")
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main():
    """The study that the command line asks for; bad arguments end it with exit code 2, before any training."""
    options = tyro.cli(QuickArgs, description=__doc__)
    if (options.grid is None) == (not options.variants):
        fail("name --grid or --variants, one of them")
    arguments.check_numbers(options, above_zero=("seeds", "updates", "episodes"))
    variants = list(options.variants) or GRIDS[options.grid]
    for variant in variants:
        parse_variant(variant, FILES)
    check_writable(options.runs_dir, "--runs-dir")
    if options.output:
        tables.output_path(options.output)
    rows = []
    for variant in tqdm(variants, unit=" runs"):
        rows += measure(variant, *run(variant, options))
        if options.output and rows:  # as it goes: what was trained is not lost
            runs.write_text(Path(f"{options.output}.csv"), tables.csv_text(rows))
    if not rows:
        fail("no variant has an evaluation")
    print(summary(rows, variants[0]))
    if options.output:
        draw(f"{options.output}.png", rows)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):  # as exceptions, which `run` waits at
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    main()
