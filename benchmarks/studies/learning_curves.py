"""Draws the learning curves of several runs in one picture: a thin line a seed, the mean over the seeds thick.

    python -m benchmarks.studies.learning_curves docs/floq_quick.png floq=runs/A "cloning (alpha 1e6)=runs/B"

Each word is label=RUN_DIR or label=FILE.csv, a run's eval.csv.
"""

import sys
from pathlib import Path

import numpy as np

from common import fail
from common.runs import read_success


def evaluation_file(path):
    """The eval.csv that a word of the command line means."""
    path = Path(path)
    path = path / "eval.csv" if path.is_dir() else path
    if not path.is_file():
        fail(f"{path} is not an evaluation file")
    return path


def draw(output, labelled):
    """Saves the picture; `labelled` is [(label, path)]."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for (label, path), color in zip(labelled, plt.rcParams["axes.prop_cycle"].by_key()["color"]):
        curves = read_success(evaluation_file(path))
        steps = sorted(set.intersection(*(set(curve) for curve in curves.values())))
        for curve in curves.values():
            axes.plot(steps, [curve[step] for step in steps], color=color, linewidth=0.8, alpha=0.5)
        axes.plot(
            steps,
            [np.mean([c[s] for c in curves.values()]) for s in steps],
            color=color,
            linewidth=2.5,
            marker="o",
            label=label,
        )
    axes.set(xlabel="updates", ylabel="success (%)", ylim=(-3, 103))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    figure.savefig(output, dpi=120)


if __name__ == "__main__":
    words = sys.argv[1:]
    if len(words) < 2 or not all("=" in word for word in words[1:]):
        fail("usage: python -m benchmarks.studies.learning_curves OUT.png LABEL=RUN_DIR [LABEL=RUN_DIR ...]")
    draw(words[0], [tuple(word.split("=", 1)) for word in words[1:]])
