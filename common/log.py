"""What a run writes and shows: csv rows, progress bar, learning curve, Weights & Biases, and its result at the end."""

import dataclasses
import time

import numpy as np
import torch
from tqdm import tqdm

from common import fail, runs, warn
from common.arguments import algorithm
from common.curves import plot_curve, read_success

CHECK_INTERVAL = 50  # updates between checks for non-finite losses


class Log:
    """All that a run writes and shows: its directory, csv rows, learning curve, progress bar, Weights & Biases.

    Losses stay on the device until a row or a check is due, since reading one would wait for all updates before it.

    Args:
        args, device: the run's arguments and torch device.
        resumed: the checkpoint to continue from, or None.
        identity: of the dataset, see `datasets.load_dataset`.
        columns: names of all losses, where not every update computes all of them.
    """

    def __init__(self, args, resumed, device, identity, columns=None):
        self.args, self.columns, self.identity = args, columns, identity
        self.seeds = list(range(args.seed, args.seed + args.num_seeds))
        self.run_dir, self.lock = runs.start_run(args, resumed, device, identity)
        for name, value in dataclasses.asdict(args).items():
            print(f"  {name} = {value}")
        print(f"dataset: {identity['file']} ({identity['source']}, {identity['transitions']:,} transitions)")
        print(f"device: {device}\nrun: {self.run_dir}", flush=True)
        self.wandb_runs = start_wandb(args, self.run_dir)
        self.names, self.history = [], []  # of updates since the last flush: losses (number of names, S) each
        self.step = 0 if resumed is None else resumed["step"]
        # No smoothing: the estimate is of the mean pace, evaluations included. A delay: shown with the first update.
        look = dict(desc="training", unit=" updates", smoothing=0, delay=1e-3, dynamic_ncols=True)
        self.bar = tqdm(total=args.total_timesteps + args.online_timesteps, initial=self.step, **look)
        self.warming_up = False
        self.updates = 0  # of this process, without warm-up
        zero = {"training": 0.0, "evaluating": 0.0}
        self.seconds = zero if resumed is None else resumed.get("seconds", zero)  # of the run, without warm-up
        self.reported = 0, self.seconds["training"]  # updates and seconds of the last row of timing.csv
        self.last = time.perf_counter()

    def training(self, step, metrics, warm_up=False):
        """Takes note of the update that made `step`, and writes its rows every log_interval.

        Args:
            metrics: {name: (S,)} on the device.
            warm_up: whether it compiled or captured; its time is left out of timing.csv and of the bar's estimate.
        """
        if self.history and self.names != list(metrics):
            self.warming_up = self.warming_up or warm_up  # it compiled since the last flush
            self.flush()
        self.step, self.names, self.warming_up = step, list(metrics), self.warming_up or warm_up
        self.history.append(torch.stack(tuple(metrics.values())))
        row_due = step % self.args.log_interval == 0
        if row_due or warm_up or step % CHECK_INTERVAL == 0:
            losses = self.flush()
            if row_due:
                self._write_rows(losses)

    def flush(self):
        """Waits for the updates so far, books their time, and ends the program at a non-finite loss; returns the last
        update's losses (number of names, S), None if there is no new one.
        """
        if not self.history:
            return None
        history = torch.stack(self.history).cpu()  # (updates, losses, S)
        if found := torch.nonzero(~torch.isfinite(history)).tolist():
            update, loss, s = found[0]
            value, step = history[update, loss, s].item(), self.step - len(history) + 1 + update
            where = f"{self.names[loss]} is {value} at step {step} (seed {self.seeds[s]})"
            earlier = f"a checkpoint in {self.run_dir} is from an earlier step"
            raise SystemExit(f"error: {where}; training stops; {earlier}")
        self.history = []
        now = time.perf_counter()
        if self.warming_up:
            self.bar.unpause()  # leaves the time since its last look out of the estimate
        else:
            self.seconds["training"] += now - self.last
            self.updates += len(history)
        self.bar.update(len(history))
        self.warming_up, self.last = False, now
        return history[-1]

    def _write_rows(self, losses):
        """One row per seed in train.csv and one row in timing.csv; losses (number of names, S)."""
        rows = [dict(zip(self.names, values)) for values in losses.T.tolist()]
        rows = [{"step": self.step, "seed": seed} | row for seed, row in zip(self.seeds, rows)]
        empty = dict.fromkeys(["step", "seed", *(self.columns or self.names)])
        runs.append_rows(self.run_dir / "train.csv", [empty | row for row in rows])
        updates, seconds = self.updates - self.reported[0], self.seconds["training"] - self.reported[1]
        self.reported = self.updates, self.seconds["training"]
        timing = {"step": self.step, "updates_per_second": f"{updates / seconds if seconds else 0.0:.4g}"}
        timing |= {f"seconds_{kind}": f"{self.seconds[kind]:.1f}" for kind in ("training", "evaluating")}
        runs.append_rows(self.run_dir / "timing.csv", [timing])
        log_wandb(self.wandb_runs, rows, "training", self.step)

    def evaluation(self, rows, phase):
        """Writes an evaluation's rows to eval.csv and the terminal, and redraws the curve; None: it was given up."""
        now = time.perf_counter()
        self.seconds["evaluating"] += now - self.last
        self.last = now
        if rows is None:
            return
        rows = [{"step": row["step"], "seed": row["seed"], "phase": phase} | row for row in rows]
        runs.append_rows(self.run_dir / "eval.csv", rows)
        log_wandb(self.wandb_runs, rows, "evaluation", rows[0]["step"])
        if not self.updates:  # no update has counted yet
            self.bar.unpause()
        success = " ".join(f"{row['success']:.2f}" for row in rows)
        self.bar.write(f"step {rows[0]['step']:>8}: success {success}" + (" (one per seed)" if len(rows) > 1 else ""))
        try:
            plot_curve(self.run_dir)
        except OSError as error:
            warn(f"curve.png is not drawn anew ({error})")

    def state(self):
        """What a checkpoint needs of the run: where it comes from, and the sizes of its csv files."""
        self.flush()  # ends the program at a non-finite loss
        origin = {"algorithm": algorithm(self.args), "args": dataclasses.asdict(self.args), "dataset": self.identity}
        return origin | {"csv_sizes": runs.csv_sizes(self.run_dir), "seconds": self.seconds}

    def close(self):
        """Ends the bar and the Weights & Biases runs, and prints the run's result."""
        self.bar.close()
        for run in self.wandb_runs:
            run.finish()
        print(f"{result(self.run_dir)}; see {self.run_dir}/curve.png")


def result(run_dir):
    """A run's success by the published statistics, as text: offline, the mean of the last three evaluations; with an
    online phase, the last evaluation of each phase; mean and standard deviation over the seeds.
    """
    offline, online = (read_success(run_dir / "eval.csv", phase) for phase in ("offline", "online"))

    def over_seeds(curves, num_last):
        last = sorted({step for curve in curves.values() for step in curve})[-num_last:]
        means = [np.mean([curve[step] for step in last if step in curve]) for curve in curves.values()]
        spread = f" +- {np.std(means, ddof=1):.1f} over {len(means)} seeds" if len(means) > 1 else ""
        return last, f"{np.mean(means):.1f}%{spread}"

    if not online:
        last, mean = over_seeds(offline, 3)
        return f"success, mean of the evaluations at {last}: {mean}"
    ([start], before), ([end], after) = over_seeds(offline, 1), over_seeds(online, 1)
    return f"success: {before} at {start}, where the online phase begins, {after} at {end}"


def start_wandb(args, run_dir):
    """One Weights & Biases run per seed, grouped by run directory; [] without --track (wandb is then not imported)."""
    if not args.track:
        return []
    import wandb

    name, config = run_dir.name, dataclasses.asdict(args)
    common = dict(project=args.wandb_project_name, entity=args.wandb_entity, group=name, dir=str(run_dir))
    common |= dict(resume="allow", reinit="create_new")
    seeds = range(args.seed, args.seed + args.num_seeds)
    try:
        made = [wandb.init(**common, id=f"{name}-{s}", name=f"{name}-s{s}", config=config | {"seed": s}) for s in seeds]
    except wandb.errors.Error as error:
        fail(f"--track: {error}; `wandb login` first, or set WANDB_MODE=offline")
    for run in made:  # its own count only grows, but a resumed run repeats the steps after its checkpoint
        run.define_metric("*", step_metric="step")
    return made


def log_wandb(wandb_runs, rows, prefix, step):
    """Logs one row per seed under OGBench's names: `training/critic/critic_loss`, `evaluation/success`, ..."""
    for run, row in zip(wandb_runs, rows):
        values = {f"{prefix}/{name}": value for name, value in row.items() if name not in ("step", "seed", "phase")}
        run.log(values | {"step": step})
