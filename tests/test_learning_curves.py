"""Learning curves: what is drawn of several runs' evaluations, and the command that draws a picture."""

import pytest
from conftest import run_module
from matplotlib.figure import Figure

from common import curves

HEADER = "step,seed,phase,success,episode_return,episode_length,episodes\n"
ROWS = ("1,0,offline,0.0", "1,1,offline,0.5", "10,0,offline,0.2", "10,1,offline,0.6", "20,0,online,1.0")


@pytest.fixture
def evaluations(tmp_path):
    """An eval.csv of two seeds, the second of which lacks the last evaluation."""
    path = tmp_path / "eval.csv"
    path.write_text(HEADER + "".join(f"{row},0,0,10\n" for row in ROWS))
    return path


def test_curves_are_read_by_seed_and_phase(evaluations):
    assert curves.read_success(evaluations) == {0: {1: 0, 10: 20, 20: 100}, 1: {1: 50, 10: 60}}
    assert curves.read_success(evaluations, "online") == {0: {20: 100}}


def test_a_thin_line_per_seed_and_their_mean_where_all_have_one(evaluations):
    axes = Figure().subplots()
    curves.draw(axes, list(curves.read_success(evaluations).values()), "both")
    first, second, mean = [list(zip(*line.get_data())) for line in axes.lines]
    assert first == [(1, 0), (10, 20), (20, 100)] and second == [(1, 50), (10, 60)]
    assert mean == [(1, 25), (10, 40)] and axes.lines[-1].get_label() == "both"


def test_the_command_draws_several_runs(evaluations, tmp_path):
    command = lambda *words: run_module("benchmarks.studies.learning_curves", *words)
    done = command(tmp_path / "a.png", f"floq={tmp_path}", f"cloning (alpha 1e6)={evaluations}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    for words, message in (((tmp_path / "b.png",), "usage: "), ((tmp_path / "b.png", "a=nowhere"), "is not an eval")):
        done = command(*words)
        assert done.returncode == 2 and message in done.stderr and not (tmp_path / "b.png").exists()
