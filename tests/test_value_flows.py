"""Value Flows' parts against closed forms and a plain reference, stop-gradients, a return distribution to be
learned."""

import csv
import functools

import numpy as np
import pytest
import torch
from conftest import (
    ENV_ID,
    SMALL_FLAGS,
    assert_refused,
    gradients,
    make_agent,
    networks,
    only_run,
    random_inputs,
    run,
)
from conftest import small_args as small_args_of

import value_flows
from common import datasets
from common.returns import cvar
from value_flows import aggregate

small_args = functools.partial(small_args_of, "value_flows")


def wide(**changes):
    """An agent in float64 whose returns are never clipped (with the chain of rewards +-100)."""
    return make_agent(small_args(**changes), min_reward=-100.0, max_reward=100.0).double()


# --- Fields ---


def test_velocity_is_the_network_on_condition_state_and_time():
    agent = make_agent(small_args())
    condition, t = torch.randn(12, 8), torch.rand(12, 1)
    for z in (torch.randn(12, 1), torch.randn(2, 12, 1)):  # one state for both fields, and each field's own
        rows = lambda x: x.expand(2, -1, -1)
        inputs = torch.cat([rows(condition), rows(z), rows(t)], dim=-1)
        expected = agent.critic_flow.mlp(inputs)
        torch.testing.assert_close(agent.critic_flow(condition, z, t), expected, rtol=1e-4, atol=1e-5)
        inputs[..., -1] = 0.3
        torch.testing.assert_close(
            agent.critic_flow(condition, z, 0.3), agent.critic_flow.mlp(inputs), rtol=1e-4, atol=1e-5
        )


# --- Return flow and its derivative ---


def test_flow_and_derivative_on_a_linear_field_are_the_compound_interest_formula():
    agent, c = wide(num_flow_steps=7), -1.5
    z, end_time = torch.randn(5, 1).double(), torch.rand(5, 1).double()
    linear = lambda condition, z, t: (c * z).expand(2, 5, 1)
    returns = agent.returns(linear, None, z, end_time)
    torch.testing.assert_close(returns, (z * (1 + c * end_time / 7) ** 7).expand(2, 5, 1))
    J = agent.return_derivatives(linear, None, z)
    torch.testing.assert_close(J, torch.full_like(J, (1 + c / 7) ** 7))
    assert J.shape == (2, 5, 1)


def test_flow_evaluates_a_time_dependent_field_at_left_end_points_of_each_rows_interval():
    agent = wide(num_flow_steps=5)
    z, end_time = torch.zeros(4, 1).double(), torch.rand(4, 1).double()
    returns = agent.returns(lambda condition, z, t: 2 * torch.as_tensor(t) + 0 * z, None, z, end_time)
    torch.testing.assert_close(returns, end_time**2 * (1 - 1 / 5))  # sum over k < K of 2 (k h) h with h = T / K


def test_derivative_equals_finite_differences_of_the_integrated_flow():
    agent, B = wide(), 6
    condition = torch.randn(B, 8, dtype=torch.float64)
    z = torch.randn(B, 1).double()
    flow = lambda z: agent.returns(agent.target_critic_flow, condition, z, 1.0)
    J, h = agent.return_derivatives(agent.target_critic_flow, condition, z), 1e-5
    torch.testing.assert_close(J, (flow(z + h) - flow(z - h)) / (2 * h), rtol=1e-6, atol=1e-8)
    for e in range(2):
        z = z.detach().requires_grad_()
        (grad,) = torch.autograd.grad(flow(z)[e].sum(), z)
        torch.testing.assert_close(J[e], grad)


def test_returns_are_clipped_after_every_step_and_the_clip_is_not_differentiated():
    agent = make_agent(small_args(gamma=0.9, num_flow_steps=4))  # returns in [-10, 0]
    z = torch.tensor([[5.0], [-3.0], [-30.0]])
    # 5 -> clip(7) = 0 -> 0; -3 -> -1 -> clip(1) = 0; -30 -> -10 (clipped) -> -8 -> -6 -> -4.
    ends = agent.returns(lambda condition, z, t: 8 + 0 * z, None, z, 1.0)
    torch.testing.assert_close(ends.flatten(), torch.tensor([0.0, 0.0, -4.0]))
    J = agent.return_derivatives(lambda condition, z, t: 3 * z, None, z)
    torch.testing.assert_close(J, torch.full((2, 3, 1), (1 + 3 / 4) ** 4))
    agent.args.clip_flow_returns = False
    torch.testing.assert_close(agent.returns(lambda condition, z, t: 8 + 0 * z, None, z, 1.0), z + 8)


def test_the_derivative_follows_the_clipped_path():
    """dv/dz is taken where the clipped flow is: a field whose slope is 3 inside the range and 0 outside."""
    agent = make_agent(small_args(gamma=0.9, num_flow_steps=2))  # returns in [-10, 0]
    field = lambda condition, z, t: torch.where(z > 0, 100 + 0 * z, 3 * z)
    J = agent.return_derivatives(field, None, torch.tensor([[4.0]]))  # 4 -> clip(54) = 0, where the slope is 3
    torch.testing.assert_close(J, torch.full((2, 1, 1), 1 + 3 / 2))


# --- Actions ---


def test_flow_actions_are_euler_steps_clipped_each_time():
    agent = make_agent(small_args())
    with torch.no_grad():
        agent.actor_flow.mlp.biases[-1] += 2.0
    observations, noise = torch.randn(3, 5), torch.randn(3, 4, 3)
    for clip in (True, False):
        agent.args.clip_flow_actions = clip
        x = noise
        for k in range(5):
            s = observations.unsqueeze(1).expand(-1, 4, -1)
            v = agent.actor_flow.mlp(torch.cat([s, x, torch.full_like(x[..., :1], k / 5)], dim=-1).flatten(0, 1))
            x = x + v.view_as(x) / 5
            x = x.clamp(-1, 1) if clip else x
        torch.testing.assert_close(agent.flow_actions(observations, noise), x.clamp(-1, 1), rtol=1e-4, atol=1e-5)
        assert (agent.flow_actions(observations, noise).abs() == 1).any()


@pytest.mark.parametrize("q_agg", ["mean", "min"])
def test_q_is_one_clipped_euler_step_of_the_online_fields(q_agg):
    agent = make_agent(small_args(q_agg=q_agg, gamma=0.5))  # returns in [-2, 0]: some are clipped
    observations, actions, noise = torch.randn(3, 5), torch.randn(3, 4, 3), torch.randn(3, 4, 1)
    q = agent.q_values(observations, actions, noise)
    for n in range(3):
        for c in range(4):
            row = torch.cat([observations[n], actions[n, c], noise[n, c], torch.zeros(1)])
            values = agent.critic_flow.mlp(row.unsqueeze(0))[:, 0, 0]
            values = (noise[n, c] + values).clamp(-2, 0)
            expected = values.mean() if q_agg == "mean" else values.min()
            torch.testing.assert_close(q[n, c], expected, rtol=1e-4, atol=1e-5)


def test_rejection_sampling_takes_the_best_candidate():
    agent = make_agent(small_args())
    observations, noise = torch.randn(14, 5), torch.randn(14, 4, 4)
    actions = agent.flow_actions(observations, noise[..., :3])
    q = agent.q_values(observations, actions, noise[..., 3:])
    chosen = agent.act(observations, noise)
    assert chosen.shape == (14, 3) and len(q.argmax(dim=1).unique()) > 1
    for n in range(14):
        torch.testing.assert_close(chosen[n], actions[n, q[n].argmax()])


def test_one_candidate_is_the_cloning_flow_and_online_acts_the_onestep_policy():
    agent = make_agent(small_args(num_samples=1))
    observations = torch.randn(7, 5)
    noise = agent.draw_act_noise(torch.Generator().manual_seed(0), 7)  # (N, 1, A + 1)
    torch.testing.assert_close(agent.act(observations, noise), agent.flow_actions(observations, noise[..., :3])[:, 0])
    online = agent.act_online(observations, noise)
    torch.testing.assert_close(online, agent.onestep_action(observations, noise[:, 0, :3]))
    assert online.abs().max() <= 1


# --- A risk-averse choice ---


@pytest.mark.parametrize(
    "level, expected",
    [(0.1, -3.0), (0.25, -3.0), (0.375, -2.0), (0.5, -1.5), (0.75, -1 / 3), (0.875, 3 / 7), (1.0, 1.0)],
)
def test_cvar_is_the_mean_of_the_lowest_share_the_last_value_in_part(level, expected):
    returns = torch.tensor([5.0, -3.0, 2.0, 0.0])
    torch.testing.assert_close(cvar(returns, level), torch.tensor(expected))
    of_many = cvar(torch.stack([returns, 10 * returns.flip(0)], dim=1).view(4, 2, 1), level)
    torch.testing.assert_close(of_many, torch.tensor([[expected], [10 * expected]]))


class TwoBets(torch.nn.Module):
    """Return fields by hand: actions above 0 return 1 + 2 z, the others 0.5 + 0.1 z, for z from N(0, 1), K = 2.

    The first Euler step goes half of the way to the mean, the second to the end point. Field 1 is higher by 0.2.
    """

    encoder = torch.nn.Identity()

    def forward(self, condition, x, t):
        mean = torch.where(condition[..., -1:] > 0, 1.0, 0.5) + torch.tensor([0.0, 0.2]).view(2, 1, 1)  # (E, N, 1)
        deviation = torch.where(condition[..., -1:] > 0, 2.0, 0.1)
        z = 2 * x - mean  # that the second step's x began from
        return mean - x if t == 0 else 2 * (mean + deviation * z - x)


def with_two_bets(**changes):
    agent = make_agent(small_args(num_flow_steps=2, clip_flow_returns=False, **changes), action_dim=1)
    agent.critic_flow = TwoBets()
    return agent


@pytest.mark.parametrize("q_agg, above", [("mean", 0.1), ("min", 0.0)])
def test_candidates_below_level_one_are_valued_by_the_lower_tail_of_their_returns(q_agg, above):
    agent = with_two_bets(q_agg=q_agg)
    observations, actions, noise = (
        torch.randn(3, 5),
        torch.tensor([[-0.3], [0.7]]).repeat(3, 1, 1),
        torch.randn(3, 2, 1),
    )
    z = torch.distributions.Normal(0, 1).icdf((torch.arange(64) + 0.5) / 64)
    for level in (0.05, 0.25, 0.5, 0.99):
        q = agent.q_values(observations, actions, noise, level)
        tail = cvar(z, level)
        expected = above + torch.stack([0.5 + 0.1 * tail, 1 + 2 * tail]).expand(3, 2)
        torch.testing.assert_close(q, expected, rtol=1e-5, atol=1e-5)
        density = torch.distributions.Normal(0, 1).log_prob(torch.distributions.Normal(0, 1).icdf(torch.tensor(level)))
        torch.testing.assert_close(tail, -density.exp() / level, rtol=0.03, atol=0.01)  # the normal's closed form
    expected = (above + torch.tensor([0.5, 1.0])).expand(3, 2)
    torch.testing.assert_close(agent.q_values(observations, actions, noise), expected)  # level 1: the mean, in a step


def test_a_risk_averse_choice_is_another_than_the_means():
    observations = torch.randn(20, 5)
    chosen = {}
    for level in (1.0, 0.9, 0.1):
        agent = with_two_bets(cvar_level=level, num_samples=8)
        noise = agent.draw_act_noise(torch.Generator().manual_seed(0), 20)
        candidates = agent.flow_actions(observations, noise[..., :1])
        both = (candidates > 0).any(dim=1) & (candidates <= 0).any(dim=1)  # (N, 1)
        assert both.float().mean() > 0.5
        chosen[level] = agent.act(observations, noise)[both]
        of_targets = agent.rejection_sampling(observations, noise[..., :1], noise[..., 1:])
        assert (of_targets[both] > 0).all()
    assert (chosen[1.0] > 0).all() and (chosen[0.9] > 0).all()  # the CVaR of 1 + 2 z at 0.9 is 0.61
    assert (chosen[0.1] <= 0).all()


def test_training_does_not_see_the_level_of_a_risk_averse_choice():
    losses = {}
    for level in (1.0, 0.1):
        agent = make_agent(small_args(cvar_level=level, batch_size=64))
        batch, noise = random_inputs(agent)
        losses[level] = torch.stack([agent.critic_loss(batch, noise)[0], agent.actor_loss(batch, noise)[0]])
    assert torch.equal(losses[1.0], losses[0.1])


# --- Losses ---


def reference_critic_loss(agent, batch, noise):
    """The critic loss written out, with the networks as plain functions of rows, and derivatives by autograd."""
    args, K = agent.args, agent.args.num_flow_steps
    s, a, next_s = batch["observations"], batch["actions"], batch["next_observations"]
    r, mask, t, eps = batch["rewards"][:, None], batch["masks"][:, None], noise["time"], noise["return"]
    clip = lambda z: z.clamp(agent.z_min, agent.z_max)

    def velocity(network, s, a, z, t):  # z (E, B, 1)
        rows = torch.cat([s, a], dim=-1).expand(2, -1, -1)
        return network.mlp(torch.cat([rows, z, torch.as_tensor(t).expand_as(z)], dim=-1))

    def flow(s, a, z, end_time):
        z, J = z.expand(2, -1, -1), 1.0
        for k in range(K):
            z = z.detach().requires_grad_()
            v = velocity(agent.target_critic_flow, s, a, z, k * end_time / K)
            (dv,) = torch.autograd.grad(v.sum(), z)
            z, J = clip(z + v * end_time / K), J * (1 + dv * end_time / K)
        return z.detach(), J.detach()

    next_a = agent.rejection_sampling(next_s, noise["next_action_candidates"], noise["next_q"]).detach()
    _, J = flow(s, a, noise["confidence"], torch.ones_like(t))
    weight = torch.sigmoid(-args.confidence_weight_temp / aggregate(J.abs(), args.q_agg)) + 0.5
    G = r + args.gamma * mask * aggregate(flow(next_s, next_a, eps, torch.ones_like(t))[0], args.ret_agg)
    next_z = aggregate(flow(next_s, next_a, eps, t)[0], args.ret_agg)
    f = aggregate(
        velocity(agent.target_critic_flow, next_s, next_a, next_z.expand(2, -1, -1), t), args.ret_agg
    ).detach()
    online = lambda z: velocity(agent.critic_flow, s, a, z.expand(2, -1, -1), t)
    bcfm = (online(t * G + (1 - t) * eps) - (G - eps)).square().sum(dim=0)
    dcfm = (online(r + args.gamma * mask * next_z) - f).square().sum(dim=0)
    return (weight * (args.bcfm_lambda * bcfm + args.dcfm_lambda * dcfm)).mean()


@pytest.mark.parametrize("ret_agg, q_agg, bcfm, dcfm", [("mean", "min", 1.0, 1.0), ("min", "mean", 3.0, 0.5)])
def test_critic_loss_equals_the_equations_written_out_and_its_labels_are_constants(ret_agg, q_agg, bcfm, dcfm):
    args = small_args(ret_agg=ret_agg, q_agg=q_agg, bcfm_lambda=bcfm, dcfm_lambda=dcfm)
    results = []
    for compute in (lambda agent, *inputs: agent.critic_loss(*inputs)[0], reference_critic_loss):
        agent = make_agent(args)
        batch, noise = random_inputs(agent)
        assert 0 < batch["masks"].mean() < 1
        # Networks that enter labels and weights only: were a label not a constant, they would get gradients.
        agent.target_critic_flow.requires_grad_(True)
        loss = compute(agent, batch, noise)
        loss.backward()
        assert networks(gradients(agent)) == {"critic_flow"}
        results.append((loss.detach(), gradients(agent)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    for name, gradient in results[1][1].items():
        torch.testing.assert_close(results[0][1][name], gradient, rtol=1e-3, atol=1e-4)


def test_confidence_weights_lie_in_their_range_and_grow_with_the_deviation():
    deviation = torch.logspace(-3, 3, 200)
    weight = value_flows.confidence_weight(deviation, 0.5)
    assert (0.5 <= weight).all() and (weight < 1).all() and (weight.diff() >= 0).all()
    agent = make_agent(small_args(batch_size=200, confidence_weight_temp=0.5))
    batch, noise = random_inputs(agent)
    condition = torch.cat([batch["observations"], batch["actions"]], dim=-1)
    J = agent.return_derivatives(agent.target_critic_flow, condition, noise["confidence"])
    metrics = agent.critic_loss(batch, noise)[1]
    torch.testing.assert_close(metrics["critic/q_std"], J.abs().mean())
    expected = torch.sigmoid(-0.5 / J.abs().mean(dim=0)) + 0.5
    torch.testing.assert_close(metrics["critic/weight"], expected.mean())


@pytest.mark.parametrize("q_agg", ["mean", "min"])
def test_deviations_are_absolute_before_they_are_aggregated(q_agg):
    """Two long steps of steep fields, where dz_1/dz_0 of many rows is below zero, and of another sign in each field."""
    agent = make_agent(small_args(batch_size=200, num_flow_steps=2, q_agg=q_agg), min_reward=-100.0, max_reward=100.0)
    with torch.no_grad():
        agent.target_critic_flow.mlp.weights[-1].mul_(20)
    batch, noise = random_inputs(agent)
    condition = torch.cat([batch["observations"], batch["actions"]], dim=-1)
    J = agent.return_derivatives(agent.target_critic_flow, condition, noise["confidence"])
    assert 0.2 < (J < 0).float().mean() < 0.8 and (J[0] * J[1] < 0).any()
    expected = J.abs().mean(dim=0) if q_agg == "mean" else J.abs().amin(dim=0)
    torch.testing.assert_close(
        agent.critic_loss(batch, noise)[1]["critic/q_std"], expected.mean(), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("name, key", [("ret_agg", "critic/target_mean"), ("q_agg", "critic/q_std")])
def test_min_is_below_mean(name, key):
    values = {}
    for how in ("mean", "min"):
        agent = make_agent(small_args(**{name: how}), min_reward=-100.0)
        batch, noise = random_inputs(agent)
        batch["masks"] = torch.ones_like(batch["masks"])
        values[how] = agent.critic_loss(batch, noise)[1][key]
    assert values["min"] < values["mean"]


def test_scale_of_the_normalized_q_loss_is_a_constant():
    agent = make_agent(small_args(), min_reward=-100.0)
    batch, noise = random_inputs(agent)
    policy_actions = agent.onestep_action(batch["observations"], noise["distill"]).unsqueeze(1)
    scale = agent.q_values(batch["observations"], policy_actions, noise["actor_q"].unsqueeze(1)).abs().mean().item()
    grads = {}
    for normalize in (False, True):
        agent.args.normalize_q_loss = normalize
        agent.zero_grad()
        agent.actor_loss(batch, noise)[1]["actor/q_loss"].backward()
        grads[normalize] = {k: v for k, v in gradients(agent).items() if k.startswith("actor_onestep_flow")}
    for name, gradient in grads[True].items():
        torch.testing.assert_close(gradient, grads[False][name] / scale, rtol=1e-4, atol=1e-7)


# --- Arguments ---


@pytest.mark.parametrize(
    "words, message",
    [
        ("--num-samples 0", "--num-samples 0: must be above zero"),
        ("--num-flow-steps -1", "--num-flow-steps -1: must be above zero"),
        ("--cvar-level 0", "--cvar-level 0.0 must lie above 0 and be at most 1"),
        ("--cvar-level 1.5", "--cvar-level 1.5 must lie above 0 and be at most 1"),
        ("--cvar-level nan", "--cvar-level nan must lie above 0 and be at most 1"),
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
    """The coin chain: +-0.9^k with equal probability, k steps before the end (benchmarks/studies/return_accuracy.py).

    An untrained flow is at a distance of 0.5 or more; see docs/value_flows.md for the spread over seeds and weights.
    One Euler step from a single start noise gives the mean return on average only: G's flow starts from the same noise.
    """
    from benchmarks.studies import return_accuracy

    mdp = return_accuracy.make_mdp("coin")
    args = return_accuracy.small_args(value_flows, batch_size=128, learning_rate=3e-3)
    agent, diverged = return_accuracy.train(value_flows, args, mdp, updates=600, seeds=[0])
    assert diverged is None
    for row in return_accuracy.accuracy(agent, mdp, 0.9):
        assert row["wasserstein"] < 0.2, row
        assert abs(row["mean_error"]) < 0.15, row
        assert row["low_mode"] > 0.4 and row["high_mode"] > 0.4, row

    starts = torch.special.ndtri((torch.arange(200) + 0.5) / 200).view(1, 1, 200, 1)
    read = lambda agent, s, a, z: agent.q_values(s, a.expand(1, 200, 1), z)  # (1, 200)
    q = agent.function(read)(torch.eye(3)[:1].unsqueeze(0), torch.zeros(1, 1, 1, 1), starts)  # of the first state
    assert abs(q.mean()) < 0.15 and q.std() > 0.4, (q.mean(), q.std())
