"""How often a verdict is right: simulated pairs of measured and published scores with the scatter of real ones.

    python -m benchmarks.studies.error_rates            # the table, in a minute on one core
    python -m benchmarks.studies.error_rates --write    # and into docs/benchmarks.md

Released curves of FQL and two comparable methods, 12 seeds each: a task's last-three mean scatters over seeds with a
median deviation of 9.3, 6.0 and 16.1 points (tasks between 10 and 90%); the mean over an environment's five tasks
mostly with 3 to 10. Scores are drawn from normal distributions. An environment's are five tasks of equal deviation,
compared as `benchmarks.scores` compares them: our seeds' means over the tasks with the published tasks' means and
deviations.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from benchmarks import report, scores
from benchmarks.tables import markdown
from common import fail

# (unit, deviation over the seeds, seeds here, published seeds, whether the deviation is published)
CASES = [
    ("task", 6.0, 8, 8, True),
    ("task", 9.3, 8, 8, True),
    ("task", 16.1, 8, 8, True),
    ("environment", 3.0, 8, 8, True),
    ("environment", 6.0, 8, 8, True),
    ("environment", 10.0, 8, 8, True),
    ("task", 9.3, 3, 8, True),
    ("environment", 6.0, 3, 8, True),
    ("environment", 3.0, 8, 3, False),
    ("environment", 6.0, 8, 3, False),
]
DROPS = (0, 10, 20)
HEADER = [
    "scores of", "deviation", "seeds here", "published seeds", "half-width", "equal: reproduced", "equal: undecided",
    "equal: below or above", "10 lower: below", "10 lower: undecided", "10 lower: reproduced", "20 lower: below",
]  # fmt: skip


@dataclass
class ErrorRatesArgs:
    pairs: int = 10_000
    """simulated pairs for each row and drop"""
    write: bool = False
    """renew the table in docs/benchmarks.md"""


def simulate(unit, deviation, ours, theirs, known, drop, pairs):
    """Rates of the verdicts in percent, {verdict: rate}, and the median half-width of the difference's interval.

    Args:
        unit: task or environment.
        deviation: over the seeds, of one seed's score of that unit.
        ours, theirs: numbers of seeds.
        known: whether the published deviation is.
        drop: how many points our true score is below the published method's.
        pairs: how many are simulated.
    """
    rng = np.random.default_rng(0)
    tasks = 5 if unit == "environment" else 1
    spread = deviation * np.sqrt(tasks)  # of each task
    published = rng.normal(60, spread, (pairs, tasks, theirs))
    measured = rng.normal(60 - drop, spread, (pairs, tasks, ours)).mean(axis=1)
    verdicts, halves = [], []
    for i in range(pairs):
        rows = {
            ("method", f"x-singletask-task{k + 1}-v0" if tasks == 5 else "x", ""): {
                "mean": scores_of_task.mean(), "std": scores_of_task.std(), "num_seeds": theirs, "tasks": 1,
                "kind": "primary",
            }
            for k, scores_of_task in enumerate(published[i])
        }  # fmt: skip
        rows |= scores.environment_scores(rows)
        reported = rows["method", "x", ""] | ({} if known else {"std": None})
        verdicts.append(scores.verdict(measured[i], reported))
        halves.append(scores.difference(measured[i], reported)[1])
    return {name: 100 * verdicts.count(name) / pairs for name in report.RANK}, np.median(halves)


def rates(case, pairs):
    """A row of the table, as numbers: the half-width, then the rates that HEADER names."""
    (equal, half), (lower, _), (far, _) = (simulate(*case, drop, pairs) for drop in DROPS)
    return [
        half, equal["reproduced"], equal["undecided"], equal["below"] + equal["above"],
        lower["below"], lower["undecided"], lower["reproduced"], far["below"],
    ]  # fmt: skip


def make_table(pairs):
    """The markdown table of all CASES."""
    lines = []
    for case in CASES:
        unit, deviation, ours, theirs, known = case
        numbers = [f"{x:.1f}" for x in rates(case, pairs)]
        lines.append([unit, deviation, ours, str(theirs) + ("" if known else ", no deviation"), *numbers])
    return markdown(HEADER, lines)


if __name__ == "__main__":
    args = tyro.cli(ErrorRatesArgs, description=__doc__)
    if args.pairs < 1:
        fail(f"--pairs {args.pairs}: at least 1")
    text = make_table(args.pairs)
    print(text)
    if args.write:
        path = Path(report.REPOSITORY) / "docs" / "benchmarks.md"
        path.write_text(report.insert(path.read_text(), "error rates", text, path))
        print(f"written: {path}")
