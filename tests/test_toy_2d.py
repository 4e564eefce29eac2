"""The two-dimensional study: its data, its measures by hand, its three losses, and a small run."""

import csv
import math
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import gradients, networks, run_module

from benchmarks.studies import toy_2d
from common.draws import CHUNK

SMALL = toy_2d.ToyArgs(seeds=2, batch_size=8, width=8, depth=2, flow_steps=4)
B = SMALL.batch_size
NAMES, METHODS = toy_2d.ToyArgs().datasets, toy_2d.METHODS


# --- Data and measures ---


@pytest.mark.parametrize("name", NAMES)
def test_points_have_rewards_and_good_and_bad_modes(name):
    points, rewards, modes, centres, noise = toy_2d.make_points(name, 5_000)
    assert points.shape == centres.shape == (5_000, 2)
    assert np.abs(centres).max() + toy_2d.SUPPORT * noise < 1  # the border is off the support
    assert points - centres == pytest.approx(0, abs=5 * noise) and (points - centres).std() == pytest.approx(
        noise, rel=0.05
    )
    assert rewards.min() >= 0 and rewards.max() <= 1 and rewards.max() - rewards.min() > 0.9
    means = [rewards[modes == mode].mean() for mode in np.unique(modes)]
    good = sum(mean >= toy_2d.GOOD for mean in means)
    assert good == {"swiss_roll": 3, "two_spirals": 2, "eight_gaussians": 4, "moons": 2}[name] and good < len(means)
    again = toy_2d.make_points(name, 5_000)
    assert all(np.array_equal(a, b) for a, b in zip((points, rewards, modes, centres, noise), again))


def test_judge_by_hand():
    centres = np.array([[0.0, 0.0], [0.5, 0.0], [-0.5, 0.0]], np.float32)
    rewards, modes = np.array([0.0, 1.0, 0.8], np.float32), np.array([0, 1, 2])
    data = toy_2d.Data(centres + 0.3, rewards, modes, centres, noise=0.02)  # the support ends at 0.066
    samples = [[0.0, 0.06], [0.5, 0.06], [0.5, -0.08], [-0.44, 0.0], [0.25, 0.0], [9.0, 9.0], [np.nan, 0.0], [0.51, 0]]
    judged = toy_2d.judge(np.array(samples, np.float32), data)
    # Rows 0, 1, 3 and 7 are within 0.066 of a noise-free point; the good modes 1 and 2 hold two and one of eight.
    assert judged == {"reward": pytest.approx((0 + 1 + 0.8 + 1) / 8), "on_support": 0.5, "good_modes": 1.0}
    far = np.array([[0.5, 0.0]] * 8 + [[-0.5, 0.0]], np.float32)  # one of nine is below a quarter of a half
    assert toy_2d.judge(far, data)["good_modes"] == 0.5


@pytest.mark.parametrize("name", NAMES)
def test_the_data_are_on_their_support_and_what_lies_between_is_not(name):
    data = toy_2d.make_points(name, 10_000)
    fresh = toy_2d.make_points(name, 4_000, seed=1).points
    judged = toy_2d.judge(fresh, data)
    # Across a curve the noise is one normal number, around a Gaussian's centre two: P(|z| < 3.3), 1 - exp(-3.3^2 / 2).
    expected = 1 - np.exp(-(3.3**2) / 2) if name == "eight_gaussians" else math.erf(3.3 / math.sqrt(2))
    assert judged["on_support"] == pytest.approx(expected, abs=0.003) and judged["good_modes"] == 1.0
    assert abs(judged["reward"] - data.rewards.mean()) < 0.05
    square = np.random.default_rng(0).uniform(-1, 1, (4_000, 2)).astype(np.float32)
    assert toy_2d.judge(square, data)["on_support"] < 0.3


def test_bridges_between_gaussians_and_between_spirals_are_off_the_support():
    angles = np.pi / 4 * np.arange(8)
    corners = 0.65 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    bridges = (corners + np.roll(corners, 1, axis=0)) / 2  # halfway between neighbours
    assert toy_2d.judge(bridges.astype(np.float32), toy_2d.make_points("eight_gaussians", 10_000))["on_support"] == 0
    gaps = np.array([[0.6, 0.0], [-0.6, 0.0]], np.float32)  # the arms cross the axis at 0.4 and 0.8
    assert toy_2d.judge(gaps, toy_2d.make_points("two_spirals", 10_000))["on_support"] == 0


# --- Losses ---


def make(strength=1.0):
    """A small agent with its lambda, a batch and noise."""
    torch.manual_seed(0)
    agent = toy_2d.PlaneStudy(toy_2d.make_agents(SMALL, (1.0,), "cpu", B).agent.args, 1, 2)
    agent.strength.data.fill_(strength)
    zeros = torch.zeros(B, 1)
    batch = {"observations": zeros, "next_observations": zeros, "actions": torch.rand(B, 2) - 0.5}
    batch |= {"rewards": torch.rand(B), "masks": torch.zeros(B)}
    batch |= {"x": torch.randn(2 * B, 2), "t": torch.rand(2 * B, 1), "end_points": torch.rand(2 * B, 2) - 0.5}
    return agent, batch, {name: value[0] for name, value in agent.draw_noise(torch.Generator(), 1).items()}


@pytest.mark.parametrize("method", toy_2d.LOSSES)
def test_a_methods_losses_move_the_networks_that_they_name(method):
    agents = toy_2d.make_agents(SMALL, (1.0,), "cpu", B)
    _, batch, noise = make()
    stack = lambda inputs: {name: torch.stack([value] * SMALL.seeds) for name, value in inputs.items()}
    for loss, trains in toy_2d.LOSSES[method].items():
        agents.optimizer.zero_grad()
        agents.backward(loss, stack(batch), stack(noise), trains)
        assert networks(gradients(agents)) == set(trains), loss


def test_the_q_flow_loss_is_q_flows_with_the_agents_lambda():
    agent, batch, noise = make(strength=0.5)
    agent.args.alpha = 0.5
    torch.testing.assert_close(agent.q_flow(batch, noise)[0], agent.actor_loss(batch, noise)[0])
    agent.args.alpha = 5.0
    assert abs(agent.q_flow(batch, noise)[0] - agent.actor_loss(batch, noise)[0]) > 1e-4
    torch.testing.assert_close(agent.values(batch, noise)[0], agent.critic_loss(batch, noise)[0])


def test_solving_is_q_flows_roll_out_and_carries_gradients():
    agent, batch, noise = make()
    x = 0.3 * noise["next_action"]
    rolled = agent.roll_out(batch["observations"], x, torch.zeros_like(x[..., :1]))
    torch.testing.assert_close(agent.solve(batch["observations"], x), rolled, rtol=1e-4, atol=1e-5)
    agent.solve(batch["observations"], x).sum().backward()
    assert networks(gradients(agent)) == {"actor_flow"}


def test_improvement_terms_are_minus_q_over_lambda():
    for method in ("backprop", "improved_one_step"):
        agent, batch, noise = make(strength=0.5)
        weak = getattr(agent, method)(batch, noise)[0]
        agent.strength.data.fill_(toy_2d.CLONING)
        cloning = getattr(agent, method)(batch, noise)[0]
        observations, start = batch["observations"], noise["next_action"]
        end = agent.solve(observations, start) if method == "backprop" else agent.one_step_action(observations, start)
        q = agent.mean_q(batch, end.clamp(-1, 1))
        torch.testing.assert_close(cloning - weak, q / 0.5, rtol=1e-3, atol=1e-5)


def test_fitting_is_three_regressions_on_the_end_points():
    agent, batch, noise = make()
    observations, (x_0, x) = batch["observations"], batch["x"].chunk(2)
    q = agent.q_values(agent.critic, observations, batch["actions"])  # (E, B)
    of_noise, of_latents = batch["end_points"].chunk(2)
    target = agent.q_values(agent.critic, observations, of_latents).mean(dim=0)
    value = agent.inner_values(observations, x, batch["t"][B:]).mean(dim=0)
    mu = agent.one_step_action(observations, x_0)
    expected = ((q - batch["rewards"]) ** 2).mean() + ((value - target) ** 2).mean() + ((mu - of_noise) ** 2).mean()
    torch.testing.assert_close(agent.fitting(batch, noise)[0], expected)


def test_solved_batches_repeat_and_hold_the_flows_end_points():
    data = toy_2d.make_points("moons", 100)
    agents = toy_2d.make_agents(SMALL, (1.0,), "cpu", B)
    inputs = torch.as_tensor(data.points), torch.as_tensor(data.rewards), SMALL.seeds
    batches = [batch for batch, _ in islice(toy_2d.solved_batches(agents, *inputs), CHUNK + 1)]
    assert batches[0] is batches[-1]
    batch = batches[3]
    assert (batch["t"][:, :B] == 0).all() and (batch["t"][:, B:] > 0).all()
    weights = {name: value[1] for name, value in agents.parameters.items()}
    agents.agent.load_state_dict(weights)  # the second seed's flow, alone
    end_points = agents.agent.roll_out(torch.zeros(2 * B, 1), batch["x"][1], batch["t"][1])
    torch.testing.assert_close(batch["end_points"][1], end_points, rtol=1e-4, atol=1e-5)


def test_policies_see_a_point_and_its_waves():
    x = torch.tensor([[0.1, -0.7]])
    waves = toy_2d.waves(x)
    assert waves.shape == (1, 2 + 4 * len(toy_2d.WAVES))
    expected = [0.1, -0.7, math.sin(0.2), math.sin(-1.4), math.cos(0.2), math.cos(-1.4), math.sin(0.4)]
    torch.testing.assert_close(waves[0, :7], torch.tensor(expected))
    agent, batch, _ = make()
    t = torch.full((B, 1), 0.3)
    seen = torch.cat([batch["observations"], toy_2d.waves(batch["actions"]), t], dim=1)
    embedded = torch.cat([seen[:, :-1], toy_2d.q_flow.embed_time(t, agent.frequencies)], dim=1)
    velocity = agent.velocity(batch["observations"], batch["actions"], t)
    torch.testing.assert_close(velocity, agent.actor_flow(embedded))
    mu = agent.one_step_action(batch["observations"], batch["actions"])
    torch.testing.assert_close(mu, agent.one_step(seen[:, :-1]))


def test_lambdas_stacked_equal_each_alone():
    """By Adam's mean gradients of three updates: later, rounding grows where the solver is differentiated through."""
    data = toy_2d.make_points("moons", 100)
    inputs = torch.as_tensor(data.points), torch.as_tensor(data.rewards), SMALL.seeds
    for method in toy_2d.METHODS:
        trained = []
        for lambdas in ((0.3, 5.0), (0.3,), (5.0,)):
            agents = toy_2d.make_agents(SMALL, lambdas, "cpu", B)
            batches = toy_2d.draw_batches(agents, method, *inputs)
            toy_2d.train(method, agents, batches, 3, 1e-3, lambda done: None)
            each = [agents.optimizer.state[p]["exp_avg"] for p in agents.parameters.values() if p.requires_grad]
            trained.append(torch.cat([mean.flatten(1) for mean in each], dim=1))  # (lambdas * seeds, all weights)
        both, first, second = trained
        error = both - torch.cat([first, second])
        assert (error.norm(dim=1) <= 0.01 * torch.cat([first, second]).norm(dim=1)).all(), method
        assert ((first - second).norm(dim=1) > 0.1 * first.norm(dim=1)).all(), method  # what a mix-up would make
    agents = toy_2d.make_agents(SMALL, (0.3, 5.0), "cpu", B)
    norms = toy_2d.train("q_flow", agents, toy_2d.draw_batches(agents, "q_flow", *inputs), 50, 1e-3, lambda done: None)
    assert norms.shape == (1, 2 * SMALL.seeds) and (norms > 0).all()


def test_every_method_sees_the_same_draws_and_what_comes_before_others():
    data = toy_2d.make_points("moons", 100)
    inputs = torch.as_tensor(data.points), torch.as_tensor(data.rewards), SMALL.seeds
    agents = toy_2d.make_agents(SMALL, (0.3, 5.0), "cpu", B)
    first = {method: next(toy_2d.draw_batches(agents, method, *inputs)) for method in toy_2d.LOSSES}
    for method in ("cloning", *toy_2d.METHODS):
        for part, other in zip(first[method], first["q_flow"]):
            assert all(torch.equal(part[name], other[name]) for name in other)
    actions = first["q_flow"][0]["actions"]  # (S, B, 2), lambdas x seeds
    assert torch.equal(actions[:2], actions[2:]) and not torch.equal(actions[0], actions[1])
    assert not torch.equal(first["flow"][0]["actions"], actions) and not torch.equal(
        first["fit"][0]["actions"], actions
    )


def test_flow_consistency_is_zero_at_the_end_and_of_a_constant_value():
    agent, *_ = make()
    noise = torch.randn(5, 2)
    consistency = agent.flow_consistency(noise)
    assert consistency.shape == (5,) and consistency[-1] == 0 and consistency[0] > 0
    with torch.no_grad():
        agent.inner_value.weights[-1].zero_()
    assert (agent.flow_consistency(noise) == 0).all()


# --- The guard ---


def make_rows(on_support):
    """Rows of a data set with one seed, where the cloning flow has this share of its samples on the support."""
    rows = []
    for method in toy_2d.METHODS:
        for value in (toy_2d.CLONING, *toy_2d.LAMBDAS):
            share = on_support if value == toy_2d.CLONING and method != "one_step" else 0.99
            row = {"dataset": "moons", "method": method, "lambda": value, "seed": 0, "reward": 0.5}
            rows.append(row | {"on_support": share, "good_modes": 1.0})
    return rows


@pytest.mark.parametrize("share, warned", [(0.969, True), (0.97, False)])
def test_a_data_set_where_cloning_is_off_the_data_is_marked(share, warned):
    rows = make_rows(share)
    assert toy_2d.cloning_on_support(rows) == pytest.approx(share)
    assert ("moons: 96.9% of cloning's samples" in toy_2d.summarize(rows)) == warned
    assert ("nothing there may be compared" in toy_2d.summarize(rows)) == warned


# --- The script ---


def start(*words):
    return run_module("benchmarks.studies.toy_2d", *words)


def test_a_small_study_writes_pictures_and_the_same_summary_twice(tmp_path):
    small = (
        "--seeds 2 --pretrain-updates 50 --fit-updates 50 --updates 50 --width 8"
        " --depth 1 --flow-steps 4 --batch-size 16 --pretrain-batch-size 16 --no-cuda"
    )
    for name, datasets in (("a", ("moons", "eight_gaussians")), ("b", ("moons",))):
        done = start(*small.split(), "--datasets", *datasets, "--output-dir", tmp_path / name)
        assert done.returncode == 0 and "good modes" in done.stdout, done.stderr[-3000:]
    lost = start(*small.split(), "--datasets", "moons", "--output-dir", tmp_path / "a")
    assert lost.returncode == 2 and "has the results of eight_gaussians, which would be lost" in lost.stderr
    rows = list(csv.DictReader(open(tmp_path / "a" / "summary.csv")))
    assert len(rows) == 2 * 3 * 4 * 2 and {row["seed"] for row in rows} == {"0", "1"}
    assert {row["comparable"] for row in rows} == {"no"} and "nothing there may be compared" in done.stdout
    cloning = {method: [row for row in rows if (row["method"], row["lambda"]) == (method, "inf")] for method in METHODS}
    assert [row | {"method": ""} for row in cloning["q_flow"]] == [row | {"method": ""} for row in cloning["backprop"]]
    first, again = ((tmp_path / name / "summary.csv").read_bytes().splitlines() for name in ("a", "b"))
    assert len(first) == 1 + 48 and first[: 1 + 24] == again  # the rows of moons come first
    for name in ("moons", "eight_gaussians"):
        assert (tmp_path / "a" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words, message",
    [
        ("--datasets torus", "--datasets torus is unknown; known: swiss_roll"),
        ("--updates 20", "--updates must be at least 50"),
        ("--width 0", "--width 0: must be above zero"),
        ("--reward-scale 0", "--reward-scale 0.0: must be above zero"),
    ],
)
def test_bad_arguments(words, message):
    failed = start(*words.split())
    assert failed.returncode == 2 and message in failed.stderr and "Traceback" not in failed.stderr


def test_full_size_counts_epochs():
    full = replace(toy_2d.ToyArgs(), full=True, batch_size=250)
    assert toy_2d.num_updates("moons", full) == 2_100 * 40 and toy_2d.num_updates("two_spirals", full) == 5_100 * 40
