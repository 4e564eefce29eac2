"""Draws the learning curves of several runs in one picture: a thin line per seed, the mean over the seeds thick.

    python -m benchmarks.studies.learning_curves docs/floq_quick.png floq=runs/A "cloning (alpha 1e6)=runs/B"

Each word is LABEL=RUN_DIR or LABEL=FILE.csv, a run's eval.csv.
"""

import sys
from pathlib import Path

from common import curves, fail

USAGE = "usage: python -m benchmarks.studies.learning_curves OUT.png LABEL=RUN_DIR [LABEL=RUN_DIR ...]"


def evaluation_file(path):
    """The eval.csv that a word of the command line means."""
    path = Path(path)
    path = path / "eval.csv" if path.is_dir() else path
    if not path.is_file():
        fail(f"{path} is not an evaluation file")
    return path


def draw(output, labelled):
    """Saves the picture; `labelled` is [(label, path)]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for i, (label, path) in enumerate(labelled):
        curves.draw(axes, list(curves.read_success(evaluation_file(path)).values()), label, f"C{i}")
    axes.set_ylabel("success (%)")
    axes.legend(loc="upper left")
    figure.savefig(output, dpi=120)


if __name__ == "__main__":
    words = sys.argv[1:]
    if len(words) < 2 or not all("=" in word for word in words[1:]):
        fail(USAGE)
    draw(words[0], [tuple(word.split("=", 1)) for word in words[1:]])
