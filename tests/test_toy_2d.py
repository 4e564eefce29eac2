"""The two-dimensional study: its data, its measures by hand, its three losses, and a small run."""

import csv
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, gradients, networks

from benchmarks.studies import toy_2d

SMALL = toy_2d.ToyArgs(seeds=2, batch_size=8, width=8, depth=2, flow_steps=4)
NAMES = toy_2d.ToyArgs().datasets


# --- Data and measures ---


@pytest.mark.parametrize("name", NAMES)
def test_points_have_rewards_and_good_and_bad_modes(name):
    points, rewards, modes = toy_2d.make_points(name, 5_000)
    assert points.shape == (5_000, 2) and np.abs(points).max() < 1 - toy_2d.SUPPORT  # the border is off the support
    assert rewards.min() >= 0 and rewards.max() <= 1 and rewards.max() - rewards.min() > 0.9
    means = [rewards[modes == mode].mean() for mode in np.unique(modes)]
    good = sum(mean >= toy_2d.GOOD for mean in means)
    assert good == {"swiss_roll": 3, "two_spirals": 2, "eight_gaussians": 4, "moons": 2}[name] and good < len(means)
    again = toy_2d.make_points(name, 5_000)
    assert all(np.array_equal(a, b) for a, b in zip((points, rewards, modes), again))


def test_judge_by_hand():
    points = np.array([[0.0, 0.0], [0.5, 0.0], [-0.5, 0.0]], np.float32)
    rewards, modes = np.array([0.0, 1.0, 0.8], np.float32), np.array([0, 1, 2])
    samples = [[0.0, 0.06], [0.5, 0.06], [0.5, -0.08], [-0.44, 0.0], [0.25, 0.0], [9.0, 9.0], [np.nan, 0.0], [0.51, 0]]
    judged = toy_2d.judge(np.array(samples, np.float32), points, rewards, modes)
    # Rows 0, 1, 3 and 7 are within 0.07 of a point; the good modes 1 and 2 hold two and one of eight.
    assert judged == {"reward": pytest.approx((0 + 1 + 0.8 + 1) / 8), "on_support": 0.5, "good_modes": 1.0}
    far = np.array([[0.5, 0.0]] * 8 + [[-0.5, 0.0]], np.float32)  # one of nine is below a quarter of a half
    assert toy_2d.judge(far, points, rewards, modes)["good_modes"] == 0.5


def test_the_data_themselves_are_judged_to_be_on_support_with_every_mode():
    for name in NAMES:
        points, rewards, modes = toy_2d.make_points(name, 5_000)
        judged = toy_2d.judge(toy_2d.make_points(name, 2_000, seed=1)[0], points, rewards, modes)
        assert judged["on_support"] > 0.98 and judged["good_modes"] == 1.0
        assert abs(judged["reward"] - rewards.mean()) < 0.05


# --- Losses ---


def make(strength=1.0):
    """A small agent with its lambda, a batch and noise."""
    torch.manual_seed(0)
    agent = toy_2d.Study(toy_2d.make_agents(SMALL, (1.0,), "cpu").agent.args, 1, 2)
    agent.strength.data.fill_(strength)
    B = SMALL.batch_size
    zeros = torch.zeros(B, 1)
    batch = {"observations": zeros, "next_observations": zeros, "actions": torch.rand(B, 2) - 0.5}
    batch |= {"rewards": torch.rand(B), "masks": torch.zeros(B)}
    return agent, batch, {name: value[0] for name, value in agent.draw_noise(torch.Generator(), 1).items()}


@pytest.mark.parametrize("method", toy_2d.LOSSES)
def test_a_methods_losses_move_the_networks_that_they_name(method):
    agents = toy_2d.make_agents(SMALL, (1.0,), "cpu")
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


def test_lambdas_stacked_equal_each_alone():
    points, rewards, _ = toy_2d.make_points("moons", 100)
    data = torch.as_tensor(points), torch.as_tensor(rewards)
    for method in toy_2d.METHODS:
        trained = []
        for lambdas in ((0.3, 5.0), (0.3,), (5.0,)):
            agents = toy_2d.make_agents(SMALL, lambdas, "cpu")
            norms = toy_2d.train(method, agents, *data, 50, 1e-3, SMALL.seeds, 0, lambda done: None)
            assert norms.shape == (1, len(lambdas) * SMALL.seeds)
            trained.append(agents.parameters)
        for name, value in trained[0].items():
            torch.testing.assert_close(value, torch.cat([trained[1][name], trained[2][name]]), rtol=0, atol=2e-4)


def test_flow_consistency_is_zero_at_the_end_and_of_a_constant_value():
    agent, *_ = make()
    noise = torch.randn(5, 2)
    consistency = agent.flow_consistency(noise)
    assert consistency.shape == (5,) and consistency[-1] == 0 and consistency[0] > 0
    with torch.no_grad():
        agent.inner_value.weights[-1].zero_()
    assert (agent.flow_consistency(noise) == 0).all()


# --- The script ---


def start(*words):
    command = [sys.executable, "-m", "benchmarks.studies.toy_2d", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def test_a_small_study_writes_pictures_and_the_same_summary_twice(tmp_path):
    small = (
        "--datasets moons eight_gaussians --seeds 2 --pretrain-updates 50 --updates 50 --width 8 --depth 1 --no-cuda"
    )
    for name in ("a", "b"):
        done = start(*small.split(), "--output-dir", tmp_path / name)
        assert done.returncode == 0 and "good modes" in done.stdout, done.stderr[-3000:]
    rows = list(csv.DictReader(open(tmp_path / "a" / "summary.csv")))
    assert len(rows) == 2 * 3 * 5 * 2 and {row["seed"] for row in rows} == {"0", "1"}
    assert (tmp_path / "a" / "summary.csv").read_bytes() == (tmp_path / "b" / "summary.csv").read_bytes()
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
