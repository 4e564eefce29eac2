"""A run: its directory, csv rows, progress, Weights & Biases and signals."""

import csv
import dataclasses
import importlib.metadata
import io
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from common import fail
from common.arguments import algorithm
from common.curves import plot_curve, read_success

CHECK_INTERVAL = 50  # updates between checks for non-finite losses

# --- Run directory ---


def start_run(args, resumed, device, identity):
    """Makes the run directory and its args.json, or takes a resumed run's csv files back to its checkpoint.

    An evaluation comes after the checkpoint of its step: where all its rows are there, they stay, and
    resumed["evaluated"] becomes that step.

    Raises:
        SystemExit: (code 2) for an unwritable directory, another dataset than the checkpoint's, or csv files that
            have lost rows since.
    """
    if resumed is None:
        for attempt in range(100):
            run_dir = Path(args.runs_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time()) + attempt}"
            try:
                run_dir.mkdir(parents=True)
                break
            except FileExistsError:
                if not run_dir.parent.is_dir():
                    fail(f"--runs-dir {args.runs_dir} is not a directory")
            except OSError as error:
                fail(f"--runs-dir {args.runs_dir} is not writable: {error}")
    else:
        run_dir = Path(args.resume)
        if identity["sha256"] != resumed["dataset"]["sha256"]:
            fail(f"--resume {run_dir}: the run's dataset is {resumed['dataset']}, found here: {identity}")
        for name, size in resumed["csv_sizes"].items():
            path = run_dir / name
            if size and (not path.exists() or path.stat().st_size < size):
                fail(f"--resume {run_dir}: {name} has lost rows that were written before the checkpoint")
            if path.exists():
                if name == "eval.csv" and (rows := evaluation_after(path, size, resumed["step"], args.num_seeds)):
                    size, resumed["evaluated"] = size + rows, resumed["step"]
                os.truncate(path, size)  # later rows will be written again, to the same numbers

    packages = ("torch", "ogbench", "mujoco", "gymnasium", "numpy")
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    info = {
        "algorithm": algorithm(args),
        "args": dataclasses.asdict(args),
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
        "git_commit": git.stdout.strip() or None,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)",
        "dataset": identity,
    }
    write_text(run_dir / "args.json", json.dumps(info, indent=2))
    return run_dir


def evaluation_after(path, size, step, num_seeds):
    """Bytes of the evaluation of `step` that follows the first `size` bytes of an eval.csv; 0 unless its rows are whole."""
    lines = path.read_bytes()[size:].splitlines(keepends=True)
    header, rows = (lines[:1], lines[1:]) if size == 0 else ([], lines)
    rows = rows[:num_seeds]
    whole = len(rows) == num_seeds and all(row.startswith(b"%d," % step) and row.endswith(b"\n") for row in rows)
    return sum(map(len, header + rows)) if whole else 0


def write_text(path, text):
    """Writes a small file whole or not at all; an OSError ends the program with exit code 1."""
    try:
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        raise SystemExit(f"error: could not write {path} ({error})") from None


def append_rows(path, rows):
    """Appends dictionaries to a csv file, with a header if it is new; on return they are in the kernel's hands.

    Floats are written so that they read back to the same bits. A failed write ends the program with exit code 1; the
    last checkpoint stays.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    try:
        with open(path, "ab") as file:  # one unbuffered write: a row is written whole or not at all
            if file.tell() == 0:
                writer.writeheader()
            writer.writerows(rows)
            file.write(text.getvalue().encode())
    except OSError as error:
        raise SystemExit(f"error: could not write {path} ({error}); the last checkpoint is kept") from None


def csv_sizes(run_dir):
    """{file: bytes} of the run's csv files, flushed to the disk, for its checkpoint."""
    sizes = {}
    for name in ("train.csv", "eval.csv", "timing.csv"):
        path = Path(run_dir) / name
        sizes[name] = 0
        if path.exists():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                sizes[name] = os.fstat(file.fileno()).st_size
    return sizes


def check_finite(history, names, first_step, seeds, run_dir):
    """Ends with exit code 1 at the first non-finite loss: its name, step and seed.

    Args:
        history: (updates, losses, S), the losses of consecutive updates.
        names: of the losses.
        first_step: the first update's step.
    """
    if torch.isfinite(history).all():
        return
    update, loss, seed = torch.nonzero(~torch.isfinite(history))[0].tolist()
    raise SystemExit(
        f"error: {names[loss]} is {history[update, loss, seed].item()} at step {first_step + update} (seed {seeds[seed]}); "
        f"stopped; a checkpoint in {run_dir} is from before it"
    )


# --- Progress and logs ---


class Log:
    """All that a run writes and shows: its directory, csv rows, learning curve, progress bar, Weights & Biases.

    Losses stay on the device until a row or a check is due, since reading one would wait for all updates before it.

    Args:
        args: the run's arguments.
        resumed: the checkpoint to continue from, or None.
        device: torch device.
        identity: of the dataset, see `datasets.load_dataset`.
        columns: names of all losses, where not every update computes all of them.
    """

    def __init__(self, args, resumed, device, identity, columns=None):
        self.args, self.columns, self.identity = args, columns, identity
        self.seeds = list(range(args.seed, args.seed + args.num_seeds))
        self.run_dir = start_run(args, resumed, device, identity)
        print(describe(args, self.run_dir, identity, device), flush=True)
        self.wandb_runs = start_wandb(args, self.run_dir)
        self.names, self.history = [], []  # of updates since the last flush: losses (number of names, S) each
        self.step = 0 if resumed is None else resumed["step"]
        self.bar, self.warming_up = None, False
        self.seconds, self.updates = {"training": 0.0, "evaluating": 0.0}, 0  # without warm-up
        self.reported = 0, 0.0  # updates and seconds of the last row of timing.csv
        self.last = time.perf_counter()

    def training(self, step, metrics, warm_up=False, statistics=None):
        """Takes note of the update that made `step`, and writes its rows every log_interval.

        Args:
            metrics: {name: (S,)} on the device.
            warm_up: whether it compiled or captured; its time is left out of timing.csv and of the bar's estimate.
            statistics: more values {name: (S,)} for the row, if one is due.
        """
        if self.history and self.names != list(metrics):
            self.flush()
        self.step, self.names, self.warming_up = step, list(metrics), self.warming_up or warm_up
        self.history.append(torch.stack(tuple(metrics.values())))
        if warm_up or step % CHECK_INTERVAL == 0 or self.row_due(step):
            last = self.flush()
            if self.row_due(step):
                more = torch.stack(tuple(statistics.values())).cpu() if statistics else last[:0]
                self._write_rows([*self.names, *(statistics or {})], torch.cat([last, more]))

    def row_due(self, step):
        """Whether the update that makes `step` gets rows."""
        return step % self.args.log_interval == 0

    def flush(self):
        """Waits for the updates so far, books their time, and ends the program at a non-finite loss; returns the last
        update's losses (number of names, S), None if there is no new one.
        """
        if not self.history:
            return None
        history = torch.stack(self.history).cpu()  # (updates, losses, S)
        check_finite(history, self.names, self.step - len(history) + 1, self.seeds, self.run_dir)
        self.history = []
        self._open_bar(self.step - len(history))
        now = time.perf_counter()
        if self.warming_up:
            self.bar.n += len(history)
            restart_estimate(self.bar)
        else:
            self.seconds["training"] += now - self.last
            self.updates += len(history)
            self.bar.update(len(history))
        self.warming_up, self.last = False, now
        return history[-1]

    def _write_rows(self, names, losses):
        """One row per seed in train.csv and one row in timing.csv; losses (number of names, S)."""
        empty = {"step": self.step, "seed": None} | dict.fromkeys(self.columns or names)
        values = [dict(zip(names, losses[:, s].tolist())) for s in range(len(self.seeds))]
        rows = [{"step": self.step, "seed": seed} | row for seed, row in zip(self.seeds, values)]
        append_rows(self.run_dir / "train.csv", [empty | row for row in rows])
        updates, seconds = self.updates - self.reported[0], self.seconds["training"] - self.reported[1]
        self.reported = self.updates, self.seconds["training"]
        timing = {"step": self.step, "updates_per_second": f"{updates / seconds if seconds else 0.0:.4g}"}
        timing |= {f"seconds_{kind}": f"{self.seconds[kind]:.1f}" for kind in ("training", "evaluating")}
        append_rows(self.run_dir / "timing.csv", [timing])
        log_wandb(self.wandb_runs, rows, "training", self.step)

    def evaluation(self, rows, phase):
        """Writes an evaluation's rows to eval.csv and the terminal, and draws the curve anew; None: it was given up."""
        now = time.perf_counter()
        self.seconds["evaluating"] += now - self.last
        self.last = now
        if rows is None:
            return
        order = ("step", "seed", "phase", "success", "episode_return", "episode_length", "episodes")
        rows = [{name: (row | {"phase": phase})[name] for name in order} for row in rows]
        append_rows(self.run_dir / "eval.csv", rows)
        log_wandb(self.wandb_runs, rows, "evaluation", rows[0]["step"])
        success = " ".join(f"{row['success']:.2f}" for row in rows)
        self._open_bar(self.step)
        self.bar.write(f"step {rows[0]['step']:>8}: success {success}" + (" (one per seed)" if len(rows) > 1 else ""))
        if self.bar.n == self.bar.initial:  # no update has counted yet
            restart_estimate(self.bar)
        plot_curve(self.run_dir)

    def _open_bar(self, step):
        """Shows the bar, if this has not happened yet."""
        if self.bar is None:
            self.bar = progress_bar(self.args.total_timesteps + self.args.online_timesteps, step, "training")

    def state(self):
        """What a checkpoint needs of the run, once all its losses are known to be finite: where it comes from, and the
        sizes of its csv files.
        """
        self.flush()
        origin = {"algorithm": algorithm(self.args), "args": dataclasses.asdict(self.args), "dataset": self.identity}
        return origin | {"csv_sizes": csv_sizes(self.run_dir)}

    def close(self):
        """Ends the bar and the Weights & Biases runs, and says how the run ended."""
        if self.bar is not None:
            self.bar.close()
        finish(self.run_dir, self.wandb_runs)


def progress_bar(total, done, text):
    """A tqdm bar over the updates."""
    from tqdm import tqdm

    # No smoothing: the estimate is of the mean pace, evaluations included.
    return tqdm(total=total, initial=done, desc=text, unit=" updates", smoothing=0, dynamic_ncols=True)


def restart_estimate(bar):
    """Lets the bar's pace count from now: the first update compiles, and its pace is not the run's."""
    bar.initial = bar.last_print_n = bar.n
    bar.start_t = bar.last_print_t = time.time()
    bar.refresh()


def describe(args, run_dir, identity, device):
    """What is about to run, for the terminal: every argument, the dataset, the device, the directory."""
    lines = [f"  {name} = {value}" for name, value in dataclasses.asdict(args).items()]
    data = f"{identity['file']} ({identity['source']}, {identity['transitions']:,} transitions)"
    return "\n".join([*lines, f"dataset: {data}", f"device: {device}", f"run: {run_dir}"])


def finish(run_dir, wandb_runs):
    """Says how the run ended, by the published statistics: offline, the mean of the last three evaluations; with an online
    phase, the last evaluation of each phase; mean and standard deviation over the seeds.
    """
    for run in wandb_runs:
        run.finish()
    offline, online = (read_success(run_dir / "eval.csv", phase) for phase in ("offline", "online"))

    def over_seeds(curves, num_last):
        last = sorted({step for curve in curves.values() for step in curve})[-num_last:]
        means = [np.mean([curve[step] for step in last if step in curve]) for curve in curves.values()]
        spread = f" +- {np.std(means, ddof=1):.1f} over {len(means)} seeds" if len(means) > 1 else ""
        return last, f"{np.mean(means):.1f}%{spread}"

    if online:
        (start, before), (end, after) = over_seeds(offline, 1), over_seeds(online, 1)
        print(f"success: {before} at {start[0]}, where the online phase begins, {after} at {end[0]}", end="")
    else:
        last, mean = over_seeds(offline, 3)
        print(f"success, mean of the evaluations at {last}: {mean}", end="")
    print(f"; see {run_dir}/curve.png")


# --- Weights & Biases ---


def start_wandb(args, run_dir):
    """One Weights & Biases run a seed, grouped by run directory; [] without --track (wandb is then not imported)."""
    if not args.track:
        return []
    import wandb

    common = dict(project=args.wandb_project_name, entity=args.wandb_entity, group=run_dir.name, resume="allow")
    return [
        wandb.init(
            **common, id=f"{run_dir.name}-{seed}", name=f"{run_dir.name}-s{seed}", dir=str(run_dir), reinit="create_new",
            config=dataclasses.asdict(args) | {"seed": seed},
        )
        for seed in range(args.seed, args.seed + args.num_seeds)
    ]  # fmt: skip


def log_wandb(wandb_runs, rows, prefix, step):
    """Logs one row a seed under OGBench's names: `training/critic/critic_loss`, `evaluation/success`, ..."""
    for run, row in zip(wandb_runs, rows):
        values = {f"{prefix}/{name}": value for name, value in row.items() if name not in ("step", "seed", "phase")}
        run.log(values, step=step)


# --- Signals ---


class StopRequest:
    """True once SIGTERM (schedulers send it) or SIGINT (Ctrl-C) has arrived; the loop then saves and leaves.

    A second SIGINT interrupts at once.
    """

    def __init__(self):
        self.signal = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __bool__(self):
        return self.signal is not None

    def leave(self, run_dir, step):
        """Ends the program with the signal's usual exit code (143 or 130), after the checkpoint was saved."""
        program = Path(sys.argv[0]).name
        print(
            f"stopped by {signal.Signals(self.signal).name} at step {step}; go on with: python {program} --resume {run_dir}"
        )
        raise SystemExit(128 + self.signal)
