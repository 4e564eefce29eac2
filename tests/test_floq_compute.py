"""The study of floq's compute: known values, curvature, sizes, freezing, the rule, restarts."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import in_this_process, run_module
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.studies import floq_compute as study

SMALL = study.ComputeArgs(seeds=2, updates=6, width=8, batch_size=16, transitions=100)
FEW = [
    study.Variant("floq", 2, study.WIDE),
    study.Variant("equal", noise=1.0),
    study.Variant("residual", change="last"),
]


# --- Known values ---


def test_values_at_places_whose_returns_are_known_by_hand():
    # r(0) = 0 for ever; 1/2 -> 0: one reward of -1; 1/4 -> 1/2 -> 0; 1/3 -> 2/3 -> 1/3: r = -3/4 for ever.
    places = np.array([0, 1 / 2, 1 / 4, 1 / 3])
    for phase_free, expected in zip(study.true_value(places), (0, -1, -0.5 - 0.8, -0.75 / 0.2)):
        assert phase_free == pytest.approx(expected, abs=3e-4)
    # 1/8 further by a = 1: from 3/16 to 1/2.
    assert study.true_q(np.array([3 / 16]), np.array([1.0]))[0] == pytest.approx(study.reward(3 / 16) - 0.8)


@pytest.mark.parametrize("phase", [0.0, study.PHASE])
def test_values_are_the_discounted_rewards_of_an_episode(phase):
    rng = np.random.default_rng(0)
    x, a = rng.random(20), rng.uniform(-1, 1, 20)
    q, place, action = np.zeros(20), x, a
    for k in range(50):
        q += 0.8**k * (np.cos(2 * np.pi * place + phase) - 1) / 2
        place, action = (2 * place + action / 8) % 1, np.zeros(20)
    np.testing.assert_allclose(study.true_q(x, a, phase), q, atol=5e-4)
    assert q.min() > -5 and q.max() < 0 and study.true_value(x, phase).std() > 0.3


def test_data_are_the_tasks_transitions():
    data = study.make_data(50, seed=3)
    angle = 2 * np.pi * data["x"]
    np.testing.assert_allclose(data["observations"][:, 1], np.sin(angle), atol=1e-6)
    following = 2 * angle + 2 * np.pi * data["a"] / 8
    np.testing.assert_allclose(data["next_observations"][:, 0], np.cos(following), atol=1e-5)
    np.testing.assert_allclose(data["rewards"], (np.cos(angle) - 1) / 2, atol=1e-6)
    np.testing.assert_allclose(data["new_rewards"], (np.cos(angle + math.pi / 4) - 1) / 2, atol=1e-6)
    np.testing.assert_allclose(data["actions"].flatten(), data["a"], atol=1e-6)


# --- Critics ---


@pytest.mark.parametrize("width", [32, 64])
def test_single_passes_have_as_many_parameters_and_operations(width):
    options = replace(SMALL, width=width)
    flow = study.make_agent(options, study.BEST).critic_flow
    networks = {critic: study.make_agent(options, study.Variant(critic)).critic for critic in study.MONOLITHIC}
    parameters = {critic: study.num_parameters(network) for critic, network in networks.items()}
    assert parameters["equal"] == pytest.approx(study.num_parameters(flow), rel=0.015)
    assert parameters["ensemble"] == 8 * parameters["equal"]
    (_, equal, _), (_, wide, _) = (networks[critic].weights[1].shape for critic in ("equal", "wide"))
    assert wide == 4 * equal
    assert study.operations(networks["residual"]) == pytest.approx(study.operations(flow, 8), rel=0.05)
    assert networks["residual"].weights[1].shape == (1, width, width)


def test_operations_are_those_that_torch_counts():
    s, a, z = torch.zeros(1, 2), torch.zeros(1, 1), torch.zeros(1, 1)
    agent = study.make_agent(SMALL, study.BEST)
    with FlopCounterMode(display=False) as counter:
        study.paths(agent, s, a, z, 8)
    assert counter.get_total_flops() == study.operations(agent.target_critic_flow, 8)
    for critic in study.MONOLITHIC:
        agent = study.make_agent(SMALL, study.Variant(critic))
        with FlopCounterMode(display=False) as counter:
            agent.q_values(agent.critic, s, a)
        assert counter.get_total_flops() == study.operations(agent.critic), critic


def test_a_residual_network_by_hand():
    torch.manual_seed(0)
    network = study.Residual((3, 8, 8, 1), True, (2,))
    x = torch.randn(5, 3)
    hidden = torch.stack([x @ network.weights[0][e] for e in range(2)])
    norm = lambda h: (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    gelu = lambda h: 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    hidden = hidden + gelu(norm(hidden)) @ network.weights[1]
    torch.testing.assert_close(network(x), gelu(norm(hidden)) @ network.weights[2])


def test_the_policy_is_zero_and_rests():
    data = study.make_data(100, seed=0)
    for variant in FEW:
        agents = study.train(SMALL, variant, data, lambda: None)
        actions = agents.function("onestep_action")(torch.randn(2, 4, 2), torch.randn(2, 4, 1))
        assert (actions == 0).all()


@pytest.mark.parametrize("critic, network", [("floq", "critic_flow"), ("equal", "critic"), ("residual", "critic")])
def test_frozen_features_stay_and_the_last_layer_learns(critic, network):
    """The same updates up to half-way; from there the weights below the last layer no longer move."""
    data, variant = study.make_data(100, seed=0), study.Variant(critic, 2, study.WIDE, change="last")
    half = study.train(replace(SMALL, updates=3), replace(variant, change="none"), data, lambda: None).parameters
    whole = study.train(SMALL, variant, data, lambda: None).parameters
    frozen = study.features(whole, network)
    for name in whole:
        if name.startswith(f"{network}."):
            assert torch.equal(half[name], whole[name]) == (name in frozen), name
    same = study.train(SMALL, replace(variant, change="none"), data, lambda: None).parameters
    free = study.train(SMALL, replace(variant, change="all"), data, lambda: None).parameters
    assert not any(torch.equal(free[name], same[name]) for name in frozen if ".weights." in name)  # other rewards
    noisy = study.train(SMALL, replace(variant, change="none", noise=1.0), data, lambda: None).parameters
    assert not any(torch.equal(noisy[name], same[name]) for name in frozen if ".weights." in name)
    assert not any(torch.equal(free[name], whole[name]) for name in frozen if ".weights." in name)


# --- Measures ---


def test_curvature_of_known_paths():
    t = np.linspace(0, 1, 33)[:, None]
    starts, ends = np.array([-3.0, 0.0, 2.0]), np.array([-1.0, -5.0, 3.0])
    straight = starts + t * (ends - starts)
    assert study.curvature(straight) == pytest.approx(0, abs=1e-12)
    # z = t^2 is a quarter away from the line, half-way; on paths of mean way 8 / 3 a quarter is 3 / 32.
    assert study.curvature(t**2) == pytest.approx(0.25)
    assert study.curvature(straight + t**2 - t) == pytest.approx(0.25 / (8 / 3))


def test_paths_and_values_are_the_agents_own():
    agents = study.train(SMALL, FEW[0], study.make_data(100, seed=0), lambda: None)
    s, a = study.observe(np.array([0.1, 0.7])), torch.tensor([[0.5], [-0.5]])
    z = study.run_paths(agents, s, a, 4, 2)  # (S, K + 1, E, N, starts)
    np.testing.assert_allclose(z[1, 0, 0, 1], [-5 * 0.25 * (1 - level) for level in (0.125, 0.375, 0.625, 0.875)])
    flow = lambda agent, s, a, z: agent.flow_q(agent.target_critic_flow, s, a, z)
    ends = study.every(agents, flow, s, a, torch.tensor(z[0, 0, 0, :, 3], dtype=torch.float32).unsqueeze(1))
    np.testing.assert_allclose(z[0, -1, 0, :, 3], ends[0, 0], atol=1e-5)
    np.testing.assert_allclose(study.learned_q(agents, FEW[0], s, a), z[:, -1].mean(axis=(1, 3)))


@pytest.mark.parametrize("change, phase", [("none", 0.0), ("all", study.PHASE)])
def test_the_error_of_a_constant_is_one_and_of_the_truth_zero(change, phase, monkeypatch):
    agents = study.train(SMALL, FEW[1], study.make_data(100, seed=0), lambda: None)
    test = study.make_data(500, seed=1)
    truth = study.true_q(test["x"], test["a"], phase)
    q = lambda agents, variant, s, a: (
        np.stack([truth, np.full(500, truth.mean())]) if len(s) == 500 else np.zeros((2, 1))
    )
    monkeypatch.setattr(study, "learned_q", q)
    errors = [float(row["error"]) for row in study.measure(agents, replace(FEW[1], change=change))["rows"]]
    np.testing.assert_allclose(errors, [0, 1], atol=1e-4)


@pytest.mark.parametrize(
    "values, expected",
    [
        ([0.3, 0.31, 0.29], "seen"),
        ([-0.3, -0.31, -0.29], "not seen"),
        ([0.001, -0.001, 0.002], "not seen"),  # an effect of MARGIN would have shown
        ([0.3, -0.31, 0.2], "not resolved"),
        ([0.3, math.nan, 0.3], "not resolved"),
    ],
)
def test_the_rule(values, expected):
    assert study.verdict(values)[2] == expected


def test_comparisons_are_positive_where_the_claims_hold():
    """Made-up errors that agree with every claim: each comparison is above zero."""
    known = set(study.VARIANTS)

    def of(v, column):
        assert v in known, f"{v} is not trained"
        if column == "curvature":
            return np.full(4, v.coverage)
        better = v.steps + v.coverage if v.critic == "floq" else 0
        worse = (v.noise + 2 * (v.change == "last")) * (0.1 if v.critic == "floq" else 1) + 100 * (v.rate != 3e-3)
        return 10 - better + worse + np.zeros(4)

    assert len(study.VARIANTS) == len(known) == 3 * 4 + 4 * 5 + 4
    rows = [(claim, name, values()) for claim, name, values in study.comparisons(of)]
    assert {claim for claim, _, _ in rows} == {
        "more steps", "wide interval", "curved paths", "single passes", "noise", "frozen features",
    }  # fmt: skip
    assert all((values > 0).all() for _, _, values in rows)
    judged = study.judge(study.comparisons(of))
    assert len(judged) == 3 * 4 + 2 * 2 + 3 * 4 and {row["verdict"] for row in judged} == {"seen"}


def test_comparisons_without_their_variants_are_not_run():
    errors = {study.Variant("floq", 8, study.WIDE): np.array([0.5, 0.6])}
    errors[study.Variant("floq", 1, study.WIDE)] = np.array([0.8, 0.9])
    judged = study.judge(study.comparisons(lambda v, column: errors[v]))
    run = [row for row in judged if row["verdict"] != "not run"]
    (row,) = run
    assert row["comparison"] == "wide interval: error with K = 1 - with K = 8" and row["mean"] == "0.3000"


# --- The program ---


@pytest.fixture
def command(monkeypatch):
    """The program, with its variants made few."""
    error = lambda of, i: of(FEW[i], "error")
    monkeypatch.setattr(study, "VARIANTS", FEW)
    monkeypatch.setattr(study, "comparisons", lambda of: [("noise", "one", lambda: error(of, 0) - error(of, 1))])
    monkeypatch.setattr(study, "draw", lambda path, parts: Path(path).touch())
    return lambda *words: in_this_process(study.main, ["floq_compute", *words])


TINY = "--seeds 2 --updates 4 --width 8 --batch-size 8 --transitions 50".split()


def test_a_small_study_repeats_and_continues_after_an_interruption(command, tmp_path):
    for name in ("a", "b"):
        done = command(*TINY, "--output", tmp_path / name)
        assert done.returncode == 0, done.stderr[-2000:]
    table = (tmp_path / "a.csv").read_bytes()
    assert table == (tmp_path / "b.csv").read_bytes()
    assert (tmp_path / "a_verdicts.csv").read_text().startswith("claim,comparison,mean,half,verdict\nnoise,one,")
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["critic"] for row in rows] == ["floq"] * 2 + ["equal"] * 2 + ["residual"] * 2
    assert rows[0]["curvature"] and not rows[2]["curvature"] and float(rows[5]["error"]) > 0

    # Stopped between two variants: what was trained is read, the rest is trained; the table is the same.
    first, second, third = sorted((tmp_path / "b_parts").iterdir(), key=lambda path: path.stat().st_mtime)
    third.unlink()
    (tmp_path / "b.csv").unlink()
    times = [path.stat().st_mtime_ns for path in (first, second)]
    done = command(*TINY, "--output", tmp_path / "b")
    assert done.returncode == 0 and (tmp_path / "b.csv").read_bytes() == table
    assert [path.stat().st_mtime_ns for path in (first, second)] == times and third.exists()

    failed = command(*TINY, "--updates", 5, "--output", tmp_path / "b")
    assert failed.returncode == 2 and "remove" in failed.stderr and "Traceback" not in failed.stderr


def test_the_picture_is_drawn_from_parts(tmp_path):
    rows = [{"error": "0.5", "curvature": "0.1"}, {"error": "0.6", "curvature": "0.2"}]
    part = {"rows": rows, "values": [0.0] * 256, "paths": np.zeros((9, study.FINE + 1)).tolist()}
    study.draw(tmp_path / "a.png", {variant: part for variant in study.VARIANTS})
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words, message",
    [
        ("--seeds 1", "--seeds 1: must be at least 2"),
        ("--updates 1", "--updates 1: must be at least 2"),
        ("--width 0", "--width 0: must be at least 1"),
        ("--batch-size -3", "--batch-size -3: must be at least 1"),
        ("--output {}/file/a", "a_parts cannot be made"),
    ],
)
def test_bad_arguments(words, message, tmp_path):
    (tmp_path / "file").touch()
    failed = run_module("benchmarks.studies.floq_compute", *words.format(tmp_path).split())
    assert failed.returncode == 2 and message in failed.stderr and "Traceback" not in failed.stderr
