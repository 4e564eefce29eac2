"""The bets whose spread is known: their table, the truth, what is read off the agents, and the rule."""

import numpy as np
import pytest
import torch
from conftest import run_module

import value_flows
from benchmarks.studies import confidence_weights as study
from benchmarks.studies import return_accuracy

STUDY = "benchmarks.studies.confidence_weights"


def test_the_bets_have_the_deviations_that_the_study_says():
    mdp, deviations = study.make_bets(num_actions=3)
    states = len(study.STAKES) * 2
    assert mdp["observations"].shape == (states * 9 * 3, states) and len(deviations) == states
    for state in range(states):
        returns = return_accuracy.true_returns(mdp, state, study.GAMMA, n=900)
        assert np.std(returns) == pytest.approx(deviations[state].item(), rel=0.01, abs=1e-6)
        assert np.mean(returns) == pytest.approx(0, abs=0.02)
    before = mdp["observations"].argmax(dim=1) >= len(study.STAKES)
    assert (mdp["rewards"][before] == 0).all() and (mdp["masks"] == before).all()
    assert (mdp["next_observations"].argmax(dim=1)[before] == mdp["observations"].argmax(dim=1)[before] - 5).all()


def test_what_is_read_off_is_the_slope_of_the_flow_and_its_weight(monkeypatch):
    """With a field c_s z, K Euler steps have the slope (1 + c_s / K)^K, for each z."""
    args = return_accuracy.small_args(value_flows, study.GAMMA, num_flow_steps=4)
    mdp, _ = study.make_bets()
    agents, _ = return_accuracy.train(value_flows, args, mdp, 0, [0, 1])
    slopes = torch.linspace(-0.5, 0.5, 10)

    def field(self, condition, z, t):
        return z * (condition[:, :10] @ slopes).unsqueeze(-1)

    monkeypatch.setattr(value_flows.Network, "forward", field)
    deviation, weight = study.learned(agents, 10, temp=0.3, noises=7)
    expected = (1 + slopes.numpy() / 4) ** 4
    assert deviation.shape == weight.shape == (2, 10)
    assert np.allclose(deviation, expected, atol=1e-5)
    assert np.allclose(weight, 1 / (1 + np.exp(0.3 / expected)) + 0.5, atol=1e-5)


@pytest.mark.parametrize(
    "correlations, expected",
    [([0.98, 0.99, 0.97], "follow"), ([0.5, 0.6, 0.7], "follow in part"), ([0.8, 0.81, 0.79], "follow in part"),
     ([0.9, -0.9, 0.1], "not resolved"),
     ([0.99], "not resolved")],
)  # fmt: skip
def test_the_rule(correlations, expected):
    assert study.verdict(correlations) == expected


def test_trained_weights_rise_with_the_spread():
    """Before training they do not: all states are alike."""
    mdp, truth = study.make_bets()
    args, largest = return_accuracy.small_args(value_flows, study.GAMMA, num_flow_steps=5), len(study.STAKES) - 1
    agents, _ = return_accuracy.train(value_flows, args, mdp, 300, [0])
    _, weight = study.learned(agents, len(truth), args.confidence_weight_temp)
    assert weight[0, largest] - weight[0, 0] > 0.1
    agents, _ = return_accuracy.train(value_flows, args, mdp, 0, [0])
    _, weight = study.learned(agents, len(truth), args.confidence_weight_temp)
    assert abs(weight[0, largest] - weight[0, 0]) < 0.1


def test_the_script_writes_a_table_and_a_picture(tmp_path):
    words = "--seeds 2 --updates 2 --no-compile --output".split()
    done = run_module(STUDY, *words, tmp_path / "new" / "a")
    assert done.returncode == 0, done.stderr[-2000:]
    header, *rows = (tmp_path / "new" / "a.csv").read_text().splitlines()
    assert header == "temp,seed,stake,bootstrapped,true_deviation,deviation,weight" and len(rows) == 20
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    refused = run_module(STUDY, "--temps", 0)
    assert refused.returncode == 2 and "must be above zero" in refused.stderr and "Traceback" not in refused.stderr
