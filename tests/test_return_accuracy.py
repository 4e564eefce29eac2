"""The coin chain and its measures, by hand."""

import numpy as np
import torch

from benchmarks import return_accuracy


def test_coin_chain_is_a_fair_coin_that_no_action_foresees():
    chain = return_accuracy.coin_chain(num_actions=4)
    state = chain["observations"].argmax(dim=1)
    assert len(state) == 24 and (chain["observations"].sum(dim=1) == 1).all()
    last = state == 2
    assert torch.equal(chain["masks"], 1 - last.float()) and (chain["rewards"][~last] == 0).all()
    assert torch.equal(chain["next_observations"].argmax(dim=1)[~last], state[~last] + 1)
    for s in range(3):
        for action in chain["actions"].unique():
            here = (state == s) & (chain["actions"].flatten() == action)
            assert here.sum() == 2 and chain["rewards"][here].sum() == 0
            assert chain["rewards"][here].abs().sum() == (2 if s == 2 else 0)


def test_measures_of_samples_that_are_the_truth_or_far_from_it(monkeypatch):
    class Seeds:
        samples = None

    def learned(agent, state, n=2_000):
        return np.sort(np.stack([return_accuracy.true_quantiles(state, n), np.zeros(n), np.full(n, 0.5)]), axis=1)

    monkeypatch.setattr(return_accuracy, "learned_returns", learned)
    rows = {(row["state"], row["seed_index"]): row for row in return_accuracy.accuracy(Seeds())}
    for state, size in enumerate((0.81, 0.9, 1.0)):
        truth, zeros, halves = (rows[state, seed] for seed in range(3))
        assert (truth["wasserstein"], truth["low_mode"], truth["high_mode"]) == (0.0, 0.5, 0.5)
        np.testing.assert_allclose([zeros["wasserstein"], zeros["low_mode"], zeros["high_mode"]], [size, 0, 0])
        np.testing.assert_allclose([halves["wasserstein"], halves["mean"]], [size, 0.5])  # (|0.5+c| + |0.5-c|) / 2 = c
