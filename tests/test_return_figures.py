"""The figures of returns: Monte-Carlo returns by hand, neighbours, and a picture from a run's checkpoint."""

import numpy as np
import pytest
import torch
from conftest import make_agents, run_module, small_args
from matplotlib.figure import Figure

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
    returns, cut_off = reward_to_go(data, 0.5), return_figures.cut_off_discounts(data, 0.5)
    np.testing.assert_allclose(returns, [-1.5, -1.0, 0.0, -1.0, -1.5, -1.0])  # row 3 ends the first trajectory
    np.testing.assert_allclose(cut_off, [0, 0, 0, 0.5, 0.25, 0.5])
    data = chain([-1.0] * 10, [1.0] * 10, starts=[0])
    returns, cut_off = reward_to_go(data, 0.5), return_figures.cut_off_discounts(data, 0.5)
    np.testing.assert_allclose(returns, [-2 * (1 - 0.5 ** (10 - i)) for i in range(10)])
    np.testing.assert_allclose(cut_off, [0.5 ** (10 - i) for i in range(10)])


def test_longest_way_to_success_stays_within_a_trajectory():
    data = chain([0.0] * 10, [1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0], starts=[0, 5])
    assert return_figures.longest_way_to_success(data).tolist() == [5, 6, 7]


@pytest.mark.parametrize("success", [True, False])
def test_the_figure_shows_one_trajectory_and_says_whether_it_succeeds(success, monkeypatch):
    masks = [1.0] * 500
    masks[249] = 0.0 if success else 1.0
    data = chain([-1.0] * 500, masks, starts=[0, 200])
    way = return_figures.longest_way_to_success(data).tolist()
    assert way == (list(range(200, 250)) if success else list(range(200)))

    figures, args = [], small_args("value_flows", gamma=0.9)
    monkeypatch.setattr(Figure, "savefig", lambda figure, *words, **options: figures.append(figure))
    agents = make_agents(args, obs_dim=1, action_dim=1)
    return_figures.draw(agents, 0, data, 20, "title", "a.png")
    axes = figures[0].axes[4]
    assert axes.get_xlabel() == f"step of one trajectory, {'until its success' if success else 'without a success'}"
    assert len(axes.lines[0].get_xdata()) == len(way)


def test_nearest_rows_include_the_row_itself():
    data = chain([0.0] * 10, [1.0] * 10, starts=[0])
    assert sorted(return_figures.nearest(data, 4, np.arange(10), 3).tolist()) == [3, 4, 5]
    assert sorted(return_figures.nearest(data, 4, np.array([0, 1, 8]), 2).tolist()) == [0, 1]


def test_agreement_of_learned_and_monte_carlo_returns():
    returns = np.array([-30.0, -20.0, -10.0, 0.0])
    np.testing.assert_allclose(return_figures.agreement(returns + 2, returns), (1.0, 2.0, 2.0))
    np.testing.assert_allclose(return_figures.agreement(-returns - 30, returns), (-1.0, 0.0, 20.0))


def draw(*words):
    return run_module("benchmarks.studies.return_figures", *words)


def test_figure_of_a_run(online_runs, tmp_path):
    words = ("value_flows", "--run", online_runs["value_flows"], "--samples", 50)
    done = draw(*words, "--output", tmp_path / "a.png", "--seed", 1)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and done.stdout.count("learned") == 4
    other = draw(*words, "--output", tmp_path / "b.png")
    assert other.returncode == 0
    values = lambda shown: [line for line in shown.stdout.splitlines() if "learned" in line]
    assert len(values(done)) == len(values(other)) == 4 and values(other) != values(done)  # another seed's agent

    failed = draw(*words, "--seed", 7)
    assert failed.returncode == 2 and "has the seeds [0, 1]" in failed.stderr
    failed = draw("value_flows", "--run", online_runs["floq"])
    assert failed.returncode == 2 and "is a run of floq.py" in failed.stderr
    failed = draw("value_flows", "--run", tmp_path)
    assert failed.returncode == 2 and f"--run {tmp_path} has no usable checkpoint" in failed.stderr


def test_figure_of_an_evor_run(online_runs, tmp_path):
    done = draw("evor", "--run", online_runs["evor"], "--samples", 50, "--output", tmp_path / "a.png")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "rank correlation" in done.stdout and done.stdout.count("learned") == 4
