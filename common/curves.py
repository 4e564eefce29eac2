"""Learning curves: read from a run's eval.csv, and drawn."""

import csv

import numpy as np


def read_evaluations(path):
    """The rows of an eval.csv, numbers as numbers."""
    kinds = {"phase": str} | dict.fromkeys(("step", "seed", "episodes"), int)
    with open(path) as file:
        return [{name: kinds.get(name, float)(value) for name, value in row.items()} for row in csv.DictReader(file)]


def read_success(path, phase=None):
    """{seed: {step: success in percent}} of an eval.csv, or of one phase of it."""
    curves = {}
    for row in read_evaluations(path):
        if phase in (None, row["phase"]):
            curves.setdefault(row["seed"], {})[row["step"]] = 100 * row["success"]
    return curves


def draw(axes, curves, label="mean", color="tab:blue"):
    """Draws success against updates: a thin line per seed, their mean thick.

    Args:
        axes: matplotlib axes; several calls draw into one.
        curves: [{step: success in percent}], one per seed. The mean is drawn at the steps that all seeds have.
        label, color: of the mean, for the legend, and of all lines.
    """
    for curve in curves:
        axes.plot(*zip(*sorted(curve.items())), color=color, linewidth=0.8, alpha=0.5)
    steps = sorted(set.intersection(*map(set, curves)))
    mean = [np.mean([curve[step] for curve in curves]) for step in steps]
    axes.plot(steps, mean, color=color, linewidth=2.5, marker=".", label=label)
    axes.set(xlabel="updates", ylim=(-3, 103))
    axes.grid(alpha=0.3)


def plot_curve(run_dir):
    """Draws a run's curve.png: its learning curve, with a mark where the online phase begins."""
    from matplotlib.figure import Figure

    offline, online = (read_success(run_dir / "eval.csv", phase) for phase in ("offline", "online"))
    figure = Figure(figsize=(6, 3.6), layout="constrained")  # not pyplot's: needs no display and is freed by itself
    axes = figure.subplots()
    draw(axes, [curve | online.get(seed, {}) for seed, curve in offline.items()])
    if online:
        axes.axvline(max(map(max, offline.values())), color="grey", linestyle="--", label="online phase begins")
    axes.set(ylabel="success (%)", title=run_dir.name.split("__")[0])
    axes.legend(loc="upper left", fontsize="small")
    figure.savefig(run_dir / "curve.png", dpi=120)
