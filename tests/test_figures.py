"""The figure script: Monte-Carlo returns by hand, neighbours, and a picture from a run's checkpoint."""

import csv
import os
import subprocess
import sys

import numpy as np
import torch
from conftest import ROOT

from benchmarks.studies import return_figures
from common.returns import reward_to_go


def chain(rewards, masks, starts):
    """Transitions of trajectories that begin at the rows `starts`; a row's observation is its number."""
    n = len(rewards)
    observations = torch.arange(n, dtype=torch.float32).unsqueeze(-1)
    following = observations + 1
    following[[start - 1 for start in starts[1:]]] = -5.0
    data = {"observations": observations, "next_observations": following, "actions": torch.zeros(n, 1)}
    return data | {"rewards": torch.tensor(rewards), "masks": torch.tensor(masks)}


def test_reward_to_go_by_hand():
    data = chain([-1.0, -1.0, 0.0, -1.0, -1.0, -1.0], [1.0, 1.0, 0.0, 1.0, 1.0, 1.0], starts=[0, 4])
    returns, cut_off = reward_to_go(data, 0.5)
    np.testing.assert_allclose(returns, [-1.5, -1.0, 0.0, -1.0, -1.5, -1.0])  # row 3 ends the first trajectory
    np.testing.assert_allclose(cut_off, [0, 0, 0, 0.5, 0.25, 0.5])
    data = chain([-1.0] * 10, [1.0] * 10, starts=[0])
    returns, cut_off = reward_to_go(data, 0.5)
    np.testing.assert_allclose(returns, [-2 * (1 - 0.5 ** (10 - i)) for i in range(10)])
    np.testing.assert_allclose(cut_off, [0.5 ** (10 - i) for i in range(10)])


def test_longest_way_to_success_stays_within_a_trajectory():
    data = chain([0.0] * 10, [1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0], starts=[0, 5])
    assert return_figures.longest_way_to_success(data).tolist() == [5, 6, 7]


def test_nearest_rows_include_the_row_itself():
    data = chain([0.0] * 10, [1.0] * 10, starts=[0])
    assert sorted(return_figures.nearest(data, 4, np.arange(10), 3).tolist()) == [3, 4, 5]
    assert sorted(return_figures.nearest(data, 4, np.array([0, 1, 8]), 2).tolist()) == [0, 1]


def test_agreement_of_learned_and_monte_carlo_returns():
    returns = np.array([-30.0, -20.0, -10.0, 0.0])
    np.testing.assert_allclose(return_figures.agreement(returns + 2, returns), (1.0, 2.0, 2.0))
    np.testing.assert_allclose(return_figures.agreement(-returns - 30, returns), (-1.0, 0.0, 20.0))


def draw(*words, script="return_figures"):
    command = [sys.executable, "-m", f"benchmarks.studies.{script}", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120)


def test_figure_of_a_run(online_runs, tmp_path):
    words = ("value_flows", "--run", online_runs["value_flows"], "--samples", 50)
    done = draw(*words, "--output", tmp_path / "a.png", "--seed", 1)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and done.stdout.count("learned") == 4
    other = draw(*words, "--output", tmp_path / "b.png")
    assert other.returncode == 0 and other.stdout != done.stdout  # another seed's agent

    failed = draw(*words, "--seed", 7)
    assert failed.returncode == 2 and "has the seeds [0, 1]" in failed.stderr
    failed = draw("value_flows", "--run", online_runs["floq"])
    assert failed.returncode == 2 and "is a run of floq.py" in failed.stderr
    failed = draw("value_flows", "--run", tmp_path)
    assert failed.returncode == 2 and "no usable checkpoint" in failed.stderr


def test_figure_of_an_evor_run(online_runs, tmp_path):
    done = draw("evor", "--run", online_runs["evor"], "--samples", 50, "--output", tmp_path / "a.png")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "rank correlation" in done.stdout and done.stdout.count("learned") == 4


# --- Inference scaling ---


def test_one_seed_has_a_mean_and_no_interval(tmp_path):
    from benchmarks.studies import evor_inference

    rows = [{"success": 0.25}, {"success": 0.75}]
    assert evor_inference.success_text(rows[:1]) == "25.0%"
    assert evor_inference.success_text(rows).startswith("50.0% +- ")
    base = dict(num_actions=16, tau_q=1.0, tau_r=10.0, num_returns=8)
    rows = [{"sweep": name, "seed": 0, "success": 0.5} | base for name in base]
    evor_inference.draw(tmp_path / "scaling.png", rows, base)
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_inference_scaling_of_a_run(online_runs, tmp_path):
    words = ("--run", online_runs["evor"], "--episodes", 1, "--output", tmp_path / "scaling", "--no-cuda")
    sweeps = ("--num-actions", 1, 3, "--tau-q", 0.1, "--tau-r", 10, "--num-returns", 2)
    done = draw(*words, *sweeps, script="evor_inference")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = list(csv.DictReader(open(tmp_path / "scaling.csv")))
    columns = ("sweep", "num_actions", "tau_q", "tau_r", "num_returns")
    settings = [tuple(row[column] for column in columns) for row in rows]
    assert settings[::2] == settings[1::2] and [row["seed"] for row in rows] == 5 * ["0", "1"]
    assert settings[::2] == [
        ("num_actions", "1", "1.0", "10.0", "4"),
        ("num_actions", "3", "1.0", "10.0", "4"),
        ("tau_q", "3", "0.1", "10.0", "4"),
        ("tau_r", "3", "1.0", "10.0", "4"),
        ("num_returns", "3", "1.0", "10.0", "2"),
    ]
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")

    failed = draw("--run", online_runs["floq"], script="evor_inference")
    assert failed.returncode == 2 and "is a run of floq.py, not of evor.py" in failed.stderr
    failed = draw(*words, "--tau-q", 0, script="evor_inference")
    assert failed.returncode == 2 and "--tau-q (0.0,): must be above zero" in failed.stderr
    failed = draw("--run", tmp_path, script="evor_inference")
    assert failed.returncode == 2 and "--run" in failed.stderr and "no usable checkpoint" in failed.stderr
