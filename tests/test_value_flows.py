"""Value Flows' parts against closed forms and a plain reference, its stop-gradients, and a return distribution it must learn."""

import csv
import functools

import numpy as np
import pytest
import torch

from common import datasets
from conftest import ENV_ID, SMALL_FLAGS, assert_refused, gradients, make_agent, networks, only_run, random_inputs, run
from conftest import small_args as small_args_of
import value_flows
from value_flows import aggregate, to_ensemble

small_args = functools.partial(small_args_of, "value_flows")


def wide(**changes):
    """An agent in float64 whose returns are never clipped (with the chain of rewards +-100)."""
    return make_agent(small_args(**changes), min_reward=-100.0, max_reward=100.0).double()


def condition_of(agent, rows):
    return to_ensemble(torch.randn(1, rows, 8, dtype=agent.critic_flow.weights[0].dtype))


# --- Fields ---


def test_field_is_the_network_on_condition_state_and_time():
    agent = make_agent(small_args(), seeds=(0, 1))
    condition, x, t = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 12, 1), torch.rand(2, 2, 12, 1)
    inputs = torch.cat([condition.repeat_interleave(3, dim=2), x, t], dim=-1)
    field = agent.critic_flow.field(condition, repeats=3)
    torch.testing.assert_close(field(x, t), agent.critic_flow(inputs), rtol=1e-4, atol=1e-5)
    inputs = torch.cat([condition.repeat_interleave(3, dim=2), x, torch.full_like(t, 0.3)], dim=-1)
    torch.testing.assert_close(field(x, 0.3), agent.critic_flow(inputs), rtol=1e-4, atol=1e-5)


def test_detached_field_has_the_same_values_and_moves_no_weight():
    agent = make_agent(small_args())
    condition, x = condition_of(agent, 4), torch.randn(1, 2, 4, 1, requires_grad=True)
    detached = agent.critic_flow.field(condition, detach=True)(x, 0.5)
    torch.testing.assert_close(detached, agent.critic_flow.field(condition)(x, 0.5))
    detached.sum().backward()
    assert x.grad.abs().min() > 0 and not gradients(agent)


def test_derivative_of_the_field_equals_autograd():
    agent = wide()
    velocity = agent.critic_flow.field(condition_of(agent, 6))
    x = torch.randn(1, 2, 6, 1, dtype=torch.float64, requires_grad=True)
    v, dv = velocity(x, 0.4, torch.full_like(x[:, :, :4], 2.0))
    (grad,) = torch.autograd.grad(velocity(x, 0.4).sum(), x)
    torch.testing.assert_close(v, velocity(x, 0.4))
    torch.testing.assert_close(dv, 2 * grad[:, :, :4])


# --- Return flow and its derivative ---


def test_flow_and_derivative_on_a_linear_field_are_the_compound_interest_formula():
    agent, c = wide(num_flow_steps=7), -1.5
    z, end_time = torch.randn(1, 2, 5, 1).double(), torch.rand(1, 2, 5, 1).double()
    z_end, J = agent.return_flow(lambda z, t, dz: (c * z, c * dz), z, end_time, num_derivatives=3)
    growth = (1 + c * end_time / 7) ** 7
    torch.testing.assert_close(z_end, z * growth)
    torch.testing.assert_close(J, growth[:, :, :3])


def test_flow_evaluates_a_time_dependent_field_at_left_end_points_of_each_rows_interval():
    agent = wide(num_flow_steps=5)
    z, end_time = torch.zeros(1, 2, 4, 1).double(), torch.rand(1, 2, 4, 1).double()
    z_end, _ = agent.return_flow(lambda z, t, dz: (2 * t, dz), z, end_time)
    torch.testing.assert_close(z_end, end_time**2 * (1 - 1 / 5))  # sum over k < K of 2 (k h) h with h = T / K


def test_derivative_equals_finite_differences_of_the_integrated_flow():
    agent, B = wide(), 6
    velocity = agent.target_critic_flow.field(condition_of(agent, B))
    z, end_time = torch.randn(1, 2, B, 1).double(), torch.rand(1, 2, B, 1).double()
    flow = lambda z: agent.return_flow(velocity, z, end_time, num_derivatives=B)
    h = 1e-5
    torch.testing.assert_close(flow(z)[1], (flow(z + h)[0] - flow(z - h)[0]) / (2 * h), rtol=1e-6, atol=1e-8)
    (grad,) = torch.autograd.grad(flow(z.requires_grad_())[0].sum(), z)
    torch.testing.assert_close(flow(z)[1], grad)


def test_returns_are_clipped_after_every_step_and_the_clip_is_not_differentiated():
    agent = make_agent(small_args(gamma=0.9, num_flow_steps=4))  # returns in [-10, 0]
    z = torch.tensor([5.0, -3.0, -30.0]).view(1, 1, 3, 1).expand(1, 2, 3, 1)
    z_end, J = agent.return_flow(lambda z, t, dz: (8 + 0 * z, 3 * dz), z, torch.ones_like(z), num_derivatives=3)
    # 5 -> clip(7) = 0 -> 0; -3 -> -1 -> clip(1) = 0; -30 -> -10 (clipped) -> -8 -> -6 -> -4.
    torch.testing.assert_close(z_end[0, 0].flatten(), torch.tensor([0.0, 0.0, -4.0]))
    torch.testing.assert_close(J, torch.full_like(J, (1 + 3 / 4) ** 4))
    agent.args.clip_flow_returns = False
    z_end, _ = agent.return_flow(lambda z, t, dz: (8 + 0 * z, dz), z, torch.ones_like(z))
    torch.testing.assert_close(z_end, z + 8)


# --- Actions ---


def test_flow_actions_are_euler_steps_clipped_each_time():
    agent = make_agent(small_args())
    with torch.no_grad():
        agent.actor_flow.biases[-1] += 2.0
    observations, noise = torch.randn(1, 3, 5), torch.randn(1, 3, 4, 3)
    for clip in (True, False):
        agent.args.clip_flow_actions = clip
        x = noise
        for k in range(5):
            s = observations.unsqueeze(2).expand(-1, -1, 4, -1)
            v = agent.actor_flow(torch.cat([s, x, torch.full_like(x[..., :1], k / 5)], dim=-1).flatten(1, 2))
            x = x + v.view_as(x) / 5
            x = x.clamp(-1, 1) if clip else x
        torch.testing.assert_close(agent.flow_actions(observations, noise), x.clamp(-1, 1), rtol=1e-4, atol=1e-5)
        assert (agent.flow_actions(observations, noise).abs() == 1).any()


@pytest.mark.parametrize("q_agg", ["mean", "min"])
def test_q_is_one_clipped_euler_step_of_the_online_fields(q_agg):
    agent = make_agent(small_args(q_agg=q_agg, gamma=0.5), seeds=(0, 1))  # returns in [-2, 0]: some are clipped
    observations, actions, noise = torch.randn(2, 3, 5), torch.randn(2, 3, 4, 3), torch.randn(2, 3, 4, 1)
    q = agent.q_values(observations, actions, noise)
    for s in range(2):
        for n in range(3):
            for c in range(4):
                row = torch.cat([observations[s, n], actions[s, n, c], noise[s, n, c], torch.zeros(1)])
                values = agent.critic_flow(row.expand(2, 2, 1, -1))[s, :, 0, 0]
                values = (noise[s, n, c] + values).clamp(-2, 0)
                expected = values.mean() if q_agg == "mean" else values.min()
                torch.testing.assert_close(q[s, n, c], expected, rtol=1e-4, atol=1e-5)


def test_rejection_sampling_takes_the_best_candidate():
    agent = make_agent(small_args(), seeds=(0, 1))
    observations, noise = torch.randn(2, 7, 5), torch.randn(2, 7, 4, 4)
    actions = agent.flow_actions(observations, noise[..., :3])
    q = agent.q_values(observations, actions, noise[..., 3:])
    chosen = agent.act(observations, noise)
    assert chosen.shape == (2, 7, 3) and len(q.argmax(dim=2).unique()) > 1
    for s in range(2):
        for n in range(7):
            torch.testing.assert_close(chosen[s, n], actions[s, n, q[s, n].argmax()])


def test_one_candidate_is_the_cloning_flow_and_online_acts_the_onestep_policy():
    agent = make_agent(small_args(num_samples=1))
    observations = torch.randn(1, 7, 5)
    noise = agent.draw_act_noise(torch.Generator().manual_seed(0), 7).unsqueeze(0)  # (S, N, 1, A + 1)
    torch.testing.assert_close(
        agent.act(observations, noise), agent.flow_actions(observations, noise[..., :3])[:, :, 0]
    )
    online = agent.act_online(observations, noise)
    torch.testing.assert_close(online, agent.onestep_action(observations, noise[:, :, 0, :3]).detach())
    assert online.abs().max() <= 1


# --- Losses ---


def reference_critic_loss(agent, batch, noise):
    """The critic loss of one seed written without any batching of flows: three integrations, two evaluations."""
    args, fields = agent.args, lambda network, s, a: network.field(to_ensemble(torch.cat([s, a], dim=-1)))
    s, a, next_s = batch["observations"], batch["actions"], batch["next_observations"]
    r, mask, t, eps = batch["rewards"][..., None], batch["masks"][..., None], noise["time"], noise["return"]
    one = to_ensemble(torch.ones_like(t))
    with torch.no_grad():
        next_a = agent.rejection_sampling(next_s, noise["next_action_candidates"], noise["next_q"])
        target = fields(agent.target_critic_flow, next_s, next_a)
        z = to_ensemble(noise["weight"])
        _, J = agent.return_flow(fields(agent.target_critic_flow, s, a), z, one, num_derivatives=z.shape[2])
        full, _ = agent.return_flow(target, to_ensemble(eps), one)
        part, _ = agent.return_flow(target, to_ensemble(eps), to_ensemble(t))
        weight = torch.sigmoid(-args.confidence_weight_temp / aggregate(J.abs(), args.q_agg)) + 0.5
        G = r + args.gamma * mask * aggregate(full, args.ret_agg)
        next_z = aggregate(part, args.ret_agg)
        f = aggregate(target(to_ensemble(next_z), to_ensemble(t)), args.ret_agg)
    online = fields(agent.critic_flow, s, a)
    bcfm = (online(to_ensemble(t * G + (1 - t) * eps), to_ensemble(t)) - to_ensemble(G - eps)).square().sum(dim=1)
    dcfm = (online(to_ensemble(r + args.gamma * mask * next_z), to_ensemble(t)) - to_ensemble(f)).square().sum(dim=1)
    return (weight * (args.bcfm_lambda * bcfm + args.dcfm_lambda * dcfm)).mean(dim=(1, 2))


@pytest.mark.parametrize("ret_agg, q_agg, bcfm, dcfm", [("mean", "min", 1.0, 1.0), ("min", "mean", 3.0, 0.5)])
def test_batched_integration_equals_three_separate_ones_and_labels_are_constants(ret_agg, q_agg, bcfm, dcfm):
    args = small_args(ret_agg=ret_agg, q_agg=q_agg, bcfm_lambda=bcfm, dcfm_lambda=dcfm)
    results = []
    for compute in (lambda agent, *inputs: agent.critic_loss(*inputs)[0], reference_critic_loss):
        agent = make_agent(args, seeds=(0, 1))
        batch, noise = random_inputs(agent, seeds=(0, 1))
        assert 0 < batch["masks"].mean() < 1
        # Networks that enter labels and weights only: were a label not a constant, they would get gradients.
        agent.target_critic_flow.requires_grad_(True)
        loss = compute(agent, batch, noise)
        loss.sum().backward()
        assert networks(gradients(agent)) == {"critic_flow"}
        results.append((loss.detach(), gradients(agent)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    for name, gradient in results[1][1].items():
        torch.testing.assert_close(results[0][1][name], gradient, rtol=1e-3, atol=1e-4)


def test_confidence_weights_lie_in_their_range_and_grow_with_the_deviation():
    agent = make_agent(small_args(batch_size=200, confidence_weight_temp=0.5))
    metrics = agent.critic_loss(*random_inputs(agent))[1]
    weight, deviation = metrics["critic/weight"][0], metrics["critic/q_std"][0]
    assert (0.5 <= weight).all() and (weight < 1).all() and deviation.std() > 0.01
    assert (weight[deviation.argsort()].diff() >= 0).all()
    torch.testing.assert_close(weight, torch.sigmoid(-0.5 / deviation) + 0.5)


@pytest.mark.parametrize("q_agg", ["mean", "min"])
def test_deviations_are_absolute_before_they_are_aggregated(q_agg):
    """With two long steps of steep fields, where dz_1/dz_0 of many rows is below zero, and of other sign in each field."""
    agent = make_agent(small_args(batch_size=200, num_flow_steps=2, q_agg=q_agg), min_reward=-100.0, max_reward=100.0)
    with torch.no_grad():
        agent.target_critic_flow.weights[-1].mul_(20)
    batch, noise = random_inputs(agent)
    condition = to_ensemble(torch.cat([batch["observations"], batch["actions"]], dim=-1))
    e = to_ensemble(noise["weight"])
    _, J = agent.return_flow(agent.target_critic_flow.field(condition), e, torch.ones_like(e), num_derivatives=200)
    assert 0.2 < (J < 0).float().mean() < 0.8 and (J[:, 0] * J[:, 1] < 0).any()
    expected = J.abs().mean(dim=1) if q_agg == "mean" else J.abs().amin(dim=1)
    torch.testing.assert_close(
        agent.critic_loss(batch, noise)[1]["critic/q_std"], expected.squeeze(-1), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("name, key", [("ret_agg", "critic/target_mean"), ("q_agg", "critic/q_std")])
def test_min_is_below_mean(name, key):
    values = {}
    for how in ("mean", "min"):
        agent = make_agent(small_args(**{name: how}), min_reward=-100.0)
        batch, noise = random_inputs(agent)
        batch["masks"] = torch.ones_like(batch["masks"])
        values[how] = agent.critic_loss(batch, noise)[1][key]
    assert (values["min"] <= values["mean"]).all() and not torch.equal(values["min"], values["mean"])


def test_scale_of_the_normalized_q_loss_is_a_constant():
    agent = make_agent(small_args(), min_reward=-100.0)
    batch, noise = random_inputs(agent)
    agent.actor_loss(batch, noise)[1]["actor/q_loss"].sum().backward()
    plain = gradients(agent)
    policy_actions = agent.onestep_action(batch["observations"], noise["distill"]).unsqueeze(2)
    scale = agent.q_values(batch["observations"], policy_actions, noise["actor_q"].unsqueeze(2)).abs().mean().item()
    agent.zero_grad()
    agent.args.normalize_q_loss = True
    agent.actor_loss(batch, noise)[1]["actor/q_loss"].sum().backward()
    for name, gradient in gradients(agent).items():
        torch.testing.assert_close(gradient, plain[name] / scale, rtol=1e-4, atol=1e-7)


def test_the_logged_q_draw_changes_the_statistics_only():
    agent = make_agent(small_args())
    batch, noise = random_inputs(agent)
    other = noise | {"logged_q": noise["logged_q"] + 1}
    assert agent.statistics(batch, noise)["critic/q_mean"] != agent.statistics(batch, other)["critic/q_mean"]
    torch.testing.assert_close(agent.critic_loss(batch, noise)[0], agent.critic_loss(batch, other)[0], rtol=0, atol=0)


# --- Arguments ---


@pytest.mark.parametrize(
    "words, message",
    [
        ("--num-samples 0", "--num-samples 0: must be above zero"),
        ("--num-flow-steps -1", "--num-flow-steps -1: must be above zero"),
        ("--bcfm-lambda -0.5", "--bcfm-lambda -0.5: must be at least zero"),
        ("--confidence-weight-temp 0", "--confidence-weight-temp 0.0: must be above zero"),
        ("--ret-agg max", "--ret-agg"),
        ("--resume /nowhere", "/nowhere is not a directory"),
    ],
)
def test_bad_arguments(words, message):
    assert_refused("value_flows", words, message)


def test_a_run_takes_the_range_of_returns_from_its_data(maze_data, tmp_path):
    """Without a success all rewards are -1: returns are clipped to -100 at both ends, and so is every target."""
    with np.load(maze_data) as file:
        arrays = {key: file[key] for key in file.files}
    rows = len(arrays["terminals"]) // 10  # a trajectory's
    dataset, _ = datasets.load_dataset(maze_data, ENV_ID, "cpu")
    failures = [i for i in range(10) if dataset["rewards"][i * (rows - 1) : (i + 1) * (rows - 1)].max() < 0]
    start = rows * failures[0]
    path = tmp_path / "failure.npz"
    np.savez(path, **{key: value[start : start + rows] for key, value in arrays.items()})
    words = ("--env-id", ENV_ID, "--dataset-path", path, *SMALL_FLAGS["value_flows"], "--runs-dir", tmp_path / "runs")
    done = run("value_flows", *words, "--total-timesteps", 2, "--log-interval", 1, "--eval-episodes", 1)
    assert "holds no success" in done.stderr
    logged = list(csv.DictReader(open(only_run(tmp_path / "runs") / "train.csv")))
    assert [float(row["critic/target_mean"]) for row in logged] == pytest.approx([-100.0, -100.0])


# --- A return distribution that is known ---


def test_value_flows_learns_a_two_mode_return_distribution():
    """The coin chain: +-0.9^k with equal probability, k steps before the end (benchmarks/return_accuracy.py).

    An untrained flow is at a distance of 0.5 or more; see docs/value_flows.md for the spread over seeds and weights.
    """
    from benchmarks import return_accuracy

    mdp, args = return_accuracy.make_mdp("coin"), return_accuracy.small_args(value_flows, batch_size=256)
    agent, diverged = return_accuracy.train(value_flows, args, mdp, updates=2_000, seeds=[0])
    assert diverged is None
    for row in return_accuracy.accuracy(agent, mdp, 0.9):
        assert row["wasserstein"] < 0.2, row
        assert abs(row["mean_error"]) < 0.15, row
        assert row["low_mode"] > 0.4 and row["high_mode"] > 0.4, row
