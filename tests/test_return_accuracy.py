"""The known MDPs, the truth about their returns, and the measures, by hand."""

import sys

import numpy as np
import pytest
import torch
from conftest import run_module
from scipy import stats

from benchmarks.studies import return_accuracy


def test_a_table_holds_every_transition_with_every_action():
    coin = return_accuracy.make_mdp("coin", num_actions=4)
    state = coin["observations"].argmax(dim=1)
    assert len(state) == 16 and (coin["observations"].sum(dim=1) == 1).all()
    last = state == 2
    assert torch.equal(coin["masks"], 1 - last.float()) and (coin["rewards"][~last] == 0).all()
    assert torch.equal(coin["next_observations"].argmax(dim=1)[~last], state[~last] + 1)
    for action in coin["actions"].unique():
        here = last & (coin["actions"].flatten() == action)
        assert sorted(coin["rewards"][here].tolist()) == [-1.0, 1.0]
    geometric = return_accuracy.make_mdp("geometric", num_actions=1)
    assert geometric["masks"].sum() == 9 and len(geometric["masks"]) == 10 and (geometric["rewards"] == -1).all()


def test_true_returns_have_their_closed_forms():
    coin = return_accuracy.make_mdp("coin")
    for state, size in enumerate((0.81, 0.9, 1.0)):
        truth = return_accuracy.true_returns(coin, state, 0.9, n=100)
        np.testing.assert_allclose(np.abs(truth), size)
        assert 45 < (truth > 0).sum() < 55
    chain = return_accuracy.make_mdp("chain")
    for state in range(4):
        expected = -(1 - 0.99 ** (4 - state)) / 0.01
        np.testing.assert_allclose(return_accuracy.true_returns(chain, state, 0.99, n=10), expected)
    geometric = return_accuracy.true_returns(return_accuracy.make_mdp("geometric"), 0, 0.9)
    # E[sum gamma^t, t < T] for P(T > t) = 0.9^t is the sum of (0.9 gamma)^t.
    np.testing.assert_allclose(geometric.mean(), -1 / (1 - 0.9 * 0.9), rtol=0.01)
    np.testing.assert_allclose(np.mean(geometric == geometric.max()), 0.1, atol=0.01)  # over after one step


def test_measures_of_samples_that_are_the_truth_or_far_from_it(monkeypatch):
    mdp = return_accuracy.make_mdp("coin")

    def learned(agents, mdp, state, n=2_000):
        truth = return_accuracy.true_returns(mdp, state, 0.9, n)
        return np.sort(np.stack([truth, np.zeros(n), np.full(n, 0.5)]), axis=1)

    monkeypatch.setattr(return_accuracy, "learned_returns", learned)
    rows = {(row["state"], row["seed_index"]): row for row in return_accuracy.accuracy(None, mdp, 0.9)}
    for state, size in enumerate((0.81, 0.9, 1.0)):
        truth, zeros, halves = (rows[state, seed] for seed in range(3))
        assert truth["wasserstein"] == truth["mean_error"] == 0 and abs(truth["low_mode"] - 0.5) < 0.01
        np.testing.assert_allclose([zeros["wasserstein"], zeros["low_mode"], zeros["high_mode"]], [size, 0, 0])
        np.testing.assert_allclose(halves["wasserstein"], size, atol=0.01)  # (|0.5 + c| + |0.5 - c|) / 2 = c
        np.testing.assert_allclose(halves["mean_error_share"], 0.25, atol=0.01)  # 0.5 of the range from -1 to 1


def test_variants_are_changes_to_an_algorithms_arguments(capsys):
    module, changes = return_accuracy.parse_variant("evor:td_target=published,latents=target,num_ensembles=1")
    assert module.__name__ == "evor"
    assert changes == {"td_target": "published", "latents": "target", "num_ensembles": 1}
    _, changes = return_accuracy.parse_variant("evor:value_hidden_dims=(16,32),tau=0.1,latents=data")
    assert changes == {"value_hidden_dims": (16, 32), "tau": 0.1, "latents": "data"}
    for variant, message in (("floq", "learns no return distribution"), ("evor:bcfm=1", "has no argument bcfm")):
        with pytest.raises(SystemExit) as stop:
            return_accuracy.parse_variant(variant)
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_script_writes_a_table_and_a_picture(tmp_path):
    words = "--mdps coin chain --gammas 0.9 --variants evor value_flows:bcfm_lambda=0".split()
    words += ["--seeds", "2", "--updates", "20", "--no-compile", "--output", str(tmp_path / "new" / "a.png")]
    done = run_module("benchmarks.studies.return_accuracy", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    header, *rows = (tmp_path / "new" / "a.csv").read_text().splitlines()
    assert header.startswith("mdp,gamma,variant,updates,state,seed_index,wasserstein,mean_error,")
    assert len(rows) == 2 * 2 * (3 + 4)
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "new" / "a.partial").exists() and "| variant | coin, 0.9 | chain, 0.9 |" in done.stdout


def test_measures_within_a_training_are_those_of_shorter_trainings(tmp_path):
    words = "--mdps coin --gammas 0.9 --variants evor c51 --seeds 2 --no-compile --output".split()
    rows = {}
    for name, updates in (("both", ["7", "--measure-after", "3", "7", "20"]), ("short", ["3"]), ("long", ["7"])):
        done = run_module("benchmarks.studies.return_accuracy", *words, str(tmp_path / name), "--updates", *updates)
        assert done.returncode == 0, done.stderr[-2000:]
        rows[name] = (tmp_path / f"{name}.csv").read_text().splitlines()[1:]
    of = lambda updates: [row for row in rows["both"] if row.split(",")[3] == updates]
    assert of("3") == rows["short"] and of("7") == rows["long"]
    assert len(of("7")) == len(of("3")) == len(rows["both"]) / 2 == 2 * 2 * 3
    assert (tmp_path / "both_curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "short_curves.png").exists()


def test_a_training_ends_at_a_non_finite_loss(monkeypatch):
    """Which is looked for every 50 updates."""
    module, _ = return_accuracy.parse_variant("evor")
    losses = iter([1.0] * 40 + [np.nan] * 100)
    monkeypatch.setattr(module, "update", lambda *inputs: {"critic/critic_loss": torch.tensor([next(losses)])})
    inputs = module, return_accuracy.small_args(module), return_accuracy.make_mdp("coin")
    found = [measured[1:] for measured in return_accuracy.training(*inputs, [3, 45, 90], seeds=[0])]
    assert found == [(3, False), (45, False), (50, True)]
    losses = iter([1.0] * 40 + [np.nan] * 100)
    assert return_accuracy.train(*inputs, 90, seeds=[0])[1] == 50
    losses = iter([1.0] * 100)
    assert return_accuracy.train(*inputs, 90, seeds=[0])[1] is None


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["return_accuracy", "--output", str(tmp_path / "file" / "a")])
    monkeypatch.setattr(return_accuracy, "training", None)
    with pytest.raises(SystemExit) as stop:
        return_accuracy.main()
    assert stop.value.code == 2 and "file is not writable" in capsys.readouterr().err


def test_a_study_continues_with_what_it_has_finished(tmp_path, monkeypatch, capsys):
    """The second of two trainings fails; the same command then makes that one alone."""
    words = "--mdps chain --gammas 0.9 --seeds 2 --updates 1 --no-compile --variants evor evor:num_ensembles=1 --output"
    monkeypatch.setattr(sys, "argv", ["return_accuracy", *words.split(), str(tmp_path / "a")])
    trained, training = [], return_accuracy.training

    def train_or_fail(module, args, *others):
        trained.append(args.num_ensembles)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return training(module, args, *others)

    monkeypatch.setattr(return_accuracy, "training", train_or_fail)
    with pytest.raises(KeyboardInterrupt):
        return_accuracy.main()
    first = (tmp_path / "a.csv").read_text()
    assert len(first.splitlines()) == 1 + 2 * 4
    for change in ("--seeds", "--updates"):  # another study would lose what is finished
        monkeypatch.setattr(sys, "argv", ["return_accuracy", *words.split(), str(tmp_path / "a"), change, "3"])
        with pytest.raises(SystemExit) as stop:
            return_accuracy.main()
        assert (
            stop.value.code == 2 and "of a study with --seeds 2 --updates 1 that was cut off" in capsys.readouterr().err
        )
    monkeypatch.setattr(sys, "argv", ["return_accuracy", *words.split(), str(tmp_path / "a")])
    return_accuracy.main()
    assert trained == [2, 1, 1]
    whole = (tmp_path / "a.csv").read_text()
    assert whole.startswith(first) and len(whole.splitlines()) == 1 + 2 * 2 * 4
    return_accuracy.main()  # it was whole, so it begins anew
    assert trained == [2, 1, 1, 2, 1] and (tmp_path / "a.csv").read_text() == whole


def test_the_summary_has_intervals_over_seeds():
    measures = {"mean_error_share": 0.02, "low_mode": 0.5, "high_mode": 0.25}
    rows = [
        {"mdp": mdp, "gamma": 0.9, "variant": "x", "updates": n, "state": state, "seed_index": s}
        | {"wasserstein": str(s + state if n == 9 else 100)}
        for n in (3, 9)
        for mdp in ("chain", "coin")
        for state in (0, 1)
        for s in (0, 1, 2)
    ]
    header, _, line = return_accuracy.summary([row | measures for row in rows]).splitlines()
    assert header == "| variant | chain, 0.9 | coin, 0.9 |"
    # Seeds' means over the states: 0.5, 1.5, 2.5; t(0.975, 2) = 4.303; 4.303 / sqrt(3) = 2.484.
    cell = "1.500 +- 2.484; 2.0% +- 0.0"
    assert line == f"| `x` | {cell} | {cell}; 0.50 +- 0.00, 0.25 +- 0.00 |"


def test_learned_returns_of_histograms_and_quantiles_are_their_inverse_distribution_functions():
    """Each baseline is given a distribution by hand: what is read is its value at each middle level, in order."""
    mdp = return_accuracy.make_mdp("coin")
    levels = (np.arange(40) + 0.5) / 40

    module, _ = return_accuracy.parse_variant("c51")
    args = return_accuracy.small_args(module, 0.5, num_atoms=5)  # atoms -2, -1, 0, 1, 2
    agents, _ = return_accuracy.train(module, args, mdp, 0, seeds=[0, 1])
    for name, parameter in agents.parameters.items():
        if name.startswith("target_critic."):
            parameter.data.zero_()
    agents.parameters["target_critic.biases.2"].data[:] = torch.tensor([0.1, 0.2, 0.3, 0.4, 1e-9]).log()
    read = return_accuracy.learned_returns(agents, mdp, 0, 40)
    expected = np.select([levels < 0.1, levels < 0.3, levels < 0.6], [-2.0, -1.0, 0.0], 1.0)
    np.testing.assert_array_equal(read, np.stack([expected, expected]))

    module, _ = return_accuracy.parse_variant("iqn")
    agents, _ = return_accuracy.train(module, return_accuracy.small_args(module), mdp, 0, seeds=[0])
    read = return_accuracy.learned_returns(agents, mdp, 1, 40)
    pair, q = torch.tensor([[[0.0, 1, 0]]]), lambda agent, s, a, x: agent.quantiles(agent.target_critic, s, a, x)
    quantiles = agents.function(q)(pair, torch.zeros(1, 1, 1), torch.tensor(levels, dtype=torch.float32)[None, None])
    np.testing.assert_allclose(read[0], np.sort(quantiles[0, :, 0].mean(dim=0).numpy()), atol=1e-6)


def test_all_of_c51s_error_on_the_coin_is_the_spacing_of_its_atoms():
    """docs/claims.md: the distance of its update's exact fixed point from the true returns, last state to first."""
    atoms, gamma, distances = np.linspace(-10, 10, 51), 0.9, []
    project = lambda z, p: (p[:, None] * np.clip(1 - np.abs(z[:, None] - atoms) / 0.4, 0, None)).sum(axis=0)
    masses = project(np.array([-1.0, 1.0]), np.array([0.5, 0.5]))
    for step in range(3):
        distances.append(stats.wasserstein_distance(atoms, [-(gamma**step), gamma**step], masses))
        masses = project(gamma * atoms, masses)
    assert distances == pytest.approx([0.2, 0.21, 0.1911], abs=1e-4)
