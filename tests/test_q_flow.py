"""Q-Flow's parts against closed forms, its stop-gradients, and a bandit whose improvement is known to first order."""

import functools
import math

import pytest
import torch

from conftest import assert_refused, gradients, make_agent, networks, random_inputs
from conftest import small_args as small_args_of
from q_flow import embed_time, time_frequencies

small_args = functools.partial(small_args_of, "q_flow")


def constant_flow(agent, velocity):
    """Makes the policy's velocity the same vector everywhere."""
    with torch.no_grad():
        agent.actor_flow.weights[-1].zero_()
        agent.actor_flow.biases[-1].copy_(torch.tensor(velocity).view(1, 1, -1).expand_as(agent.actor_flow.biases[-1]))


# --- Flow time and roll-out ---


def test_time_embedding_is_sines_and_cosines_of_geometric_frequencies():
    t = torch.rand(2, 5, 1, dtype=torch.float64)
    embedding = embed_time(t, time_frequencies(16))
    for i in range(8):
        frequency = 256 ** (i / 7)
        torch.testing.assert_close(embedding[..., i], torch.sin(frequency * t[..., 0]), rtol=0, atol=1e-4)
        torch.testing.assert_close(embedding[..., 8 + i], torch.cos(frequency * t[..., 0]), rtol=0, atol=1e-4)
    assert embedding.shape == (2, 5, 16)


@pytest.mark.parametrize("actor_time_embed", [False, True])
def test_roll_out_from_zero_is_euler_integration(actor_time_embed):
    agent = make_agent(small_args(actor_time_embed=actor_time_embed), seeds=(0, 1))
    observations, x = torch.randn(2, 6, 5), 0.1 * torch.randn(2, 6, 3)
    expected = x
    for k in range(5):
        t = torch.full((2, 6, 1), k / 5)
        inputs = torch.cat(
            [observations, expected, embed_time(t, time_frequencies(8)) if actor_time_embed else t], dim=-1
        )
        expected = expected + agent.actor_flow(inputs) / 5
    rolled = agent.roll_out(observations, x, torch.zeros(2, 6, 1))
    torch.testing.assert_close(rolled, expected.clamp(-1, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(agent.act(observations, x), rolled)


def test_roll_out_ends_at_one_from_every_time():
    agent = make_agent(small_args(flow_steps=10))
    constant_flow(agent, [0.5, -0.5, 0.25])
    t = torch.tensor([0.0, 0.05, 0.1, 0.33, 0.5, 0.77, 0.9, 0.95, 0.999, 1.0]).view(1, -1, 1)
    x = 0.2 * torch.rand(1, 10, 3)
    rolled = agent.roll_out(torch.randn(1, 10, 5), x, t)
    torch.testing.assert_close(rolled, x + (1 - t) * torch.tensor([0.5, -0.5, 0.25]), rtol=1e-5, atol=1e-5)


def test_roll_out_clips_at_the_end_only():
    agent = make_agent(small_args())
    constant_flow(agent, [-2.0, 4.0, 0.0])
    rolled = agent.roll_out(torch.randn(1, 4, 5), torch.full((1, 4, 3), 2.5), torch.zeros(1, 4, 1))
    # A clip on the way would have taken 2.5 to 1 at once, and the first coordinate to -1.
    torch.testing.assert_close(rolled, torch.tensor([0.5, 1.0, 1.0]).expand(1, 4, 3))


def test_without_the_embedding_the_value_sees_the_raw_time_alone_and_stacked():
    """No recorded case has it off (tests/parity), so it is compared with the plain network and across seeds."""
    args, seeds = small_args(use_time_embed=False), (3, 4)
    stacked = make_agent(args, seeds)
    s, x, t = torch.randn(2, 4, 5), torch.randn(2, 4, 3), torch.rand(2, 4, 1)
    rows = torch.cat([s, x, t], dim=-1).unsqueeze(1).expand(-1, 2, -1, -1)  # (S, E, N, D + A + 1)
    torch.testing.assert_close(stacked.inner_values(s, x, t), stacked.inner_value(rows).squeeze(-1))
    alone = [make_agent(args, (seed,)) for seed in seeds]
    for update in range(3):
        out = stacked.update(*random_inputs(stacked, seeds, update))
        for index, seed in enumerate(seeds):
            for name, value in alone[index].update(*random_inputs(alone[index], (seed,), update)).items():
                torch.testing.assert_close(out[name][index], value[0], rtol=1e-4, atol=1e-5)


# --- Losses ---


def test_guidance_is_the_gradient_of_the_ensemble_mean_and_a_constant():
    for q_agg in ("mean", "min"):
        agent = make_agent(small_args(q_agg=q_agg)).double()
        observations, x, t = (torch.randn(1, 4, n, dtype=torch.float64) for n in (5, 3, 1))
        guidance = agent.guidance(observations, x, t)
        assert not guidance.requires_grad
        h = 1e-6
        for d in range(3):
            shift = h * torch.eye(3, dtype=torch.float64)[d]
            mean = lambda x: agent.inner_values(observations, x, t).mean(dim=1)
            slope = (mean(x + shift) - mean(x - shift)) / (2 * h)
            torch.testing.assert_close(guidance[..., d], slope.detach(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("actor_time_embed", [False, True])
def test_actor_label_is_the_data_velocity_plus_guidance_over_lambda(actor_time_embed):
    agent = make_agent(small_args(alpha=0.7, actor_time_embed=actor_time_embed))
    batch, noise = random_inputs(agent)
    x_0, t = noise["policy_action"], noise["policy_time"]
    x_t = (1 - t) * x_0 + t * batch["actions"]
    label = batch["actions"] - x_0 + agent.guidance(batch["observations"], x_t, t) / 0.7
    embedded = embed_time(t, time_frequencies(8)) if actor_time_embed else t
    velocity = agent.actor_flow(torch.cat([batch["observations"], x_t, embedded], dim=-1))
    loss, metrics = agent.actor_loss(batch, noise)
    torch.testing.assert_close(loss, (velocity - label).square().mean(dim=(1, 2)), rtol=1e-4, atol=1e-5)
    loss.sum().backward()
    assert networks(gradients(agent)) == {"actor_flow"}  # the guidance moves neither the value nor, twice, the policy
    grad = {name: p.grad.clone() for name, p in agent.named_parameters() if p.grad is not None}
    agent.zero_grad()
    (velocity - label.detach()).square().mean().backward()
    for name, value in gradients(agent).items():
        torch.testing.assert_close(value, grad[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("q_agg, use_time_embed", [("mean", True), ("min", True), ("mean", False)])
def test_critic_loss_equals_one_with_two_separate_roll_outs(q_agg, use_time_embed):
    agent = make_agent(small_args(q_agg=q_agg, use_time_embed=use_time_embed))
    batch, noise = random_inputs(agent)
    s, a, t = batch["observations"], batch["actions"], noise["value_time"]
    reduce = lambda q: q.mean(dim=1) if q_agg == "mean" else q.amin(dim=1)
    next_a = agent.roll_out(batch["next_observations"], noise["next_action"], torch.zeros_like(t))
    next_q = reduce(agent.q_values(agent.target_critic, batch["next_observations"], next_a))
    y = batch["rewards"] + 0.99 * batch["masks"] * next_q
    x = (1 - t) * noise["value_action"] + t * a
    end_q = reduce(agent.q_values(agent.target_critic, s, agent.roll_out(s, x, t)))
    # The critics are squared one by one, the intermediate values after their aggregation.
    outer = (agent.q_values(agent.critic, s, a) - y.unsqueeze(1)).square().mean(dim=(1, 2))
    inner = (reduce(agent.inner_values(s, x, t)) - end_q).square().mean(dim=1)
    _, metrics = agent.critic_loss(batch, noise)
    torch.testing.assert_close(metrics["critic/outer_loss"], outer, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["critic/distillation_loss"], inner, rtol=1e-4, atol=1e-5)
    each = (agent.inner_values(s, x, t) - end_q.unsqueeze(1)).square().mean(dim=(1, 2))
    assert not torch.isclose(inner, each, rtol=1e-2).all()


# --- Arguments ---


@pytest.mark.parametrize(
    "words, message",
    [
        ("--time-embed-dim 7", "--time-embed-dim 7 must be even"),
        ("--alpha 0", "--alpha 0.0: must be above zero"),
        ("--alpha -2", "--alpha -2.0: must be above zero"),
        ("--flow-steps 0", "--flow-steps 0: must be above zero"),
        ("--env-id visual-scene-play-singletask-v0", "state observations"),
    ],
)
def test_bad_arguments(words, message):
    assert_refused("q_flow", words, message)


# --- A bandit with a known answer ---


def improved_means(alphas, spread, num_seeds=2, num_updates=2_000):
    """Mean actions (alphas,) of policies trained on actions N(0, spread^2) with the reward a - a^2 / 2, over the seeds.

    Every alpha's agents are trained stacked, with alpha as a tensor over the seed axis.
    """
    args = small_args(
        batch_size=256, learning_rate=1e-3, tau=0.02, flow_steps=10, time_embed_dim=16, value_hidden_dims=(64, 64),
        actor_hidden_dims=(64, 64), alpha=torch.tensor(alphas).repeat_interleave(num_seeds).view(-1, 1, 1),
    )  # fmt: skip
    S = len(alphas) * num_seeds
    agent = make_agent(args, seeds=[*range(num_seeds)] * len(alphas), obs_dim=1, action_dim=1)
    generator, shape = torch.Generator().manual_seed(0), (S, 256, 1)
    alike = lambda draw: draw.repeat(len(alphas), *[1] * (draw.ndim - 1))  # the same numbers for every alpha
    for update in range(num_updates):
        for group in agent.optimizer.param_groups:  # a rate that falls to zero averages the last updates' noise
            group["lr"] = 1e-3 * (1 - update / num_updates)
        noise = [agent.draw_noise(generator, 1) for _ in range(num_seeds)]
        actions = alike(spread * torch.randn(num_seeds, 256, 1, generator=generator))
        batch = {"observations": torch.zeros(shape), "next_observations": torch.zeros(shape), "actions": actions}
        batch |= {"rewards": (actions - actions.square() / 2).squeeze(-1), "masks": torch.zeros(shape[:2])}
        agent.update(batch, {name: alike(torch.cat([n[name] for n in noise])) for name in noise[0]})
    noise = torch.randn(1, 20_000, 1, generator=generator).expand(S, -1, -1)
    means = agent.act(torch.zeros(S, 20_000, 1), noise).mean(dim=(1, 2))
    return means.view(len(alphas), num_seeds).mean(dim=1).tolist()


def first_order_constant(s, K=10):
    """c in: shift of the mean = c Q'(mean) / lambda, for the behaviour N(0, s^2), K Euler steps and small 1 / lambda.

    The behaviour's velocity is rate(tau) x. At each step the guidance is Q' times the growth of a roll-out from there, and
    what it adds grows over the steps that remain. (For K to infinity c is the integral of s^2 / ((1 - tau)^2 + tau^2 s^2)
    over tau, which is pi s / 2.)
    """
    rate = lambda t: (t * s * s - (1 - t)) / ((1 - t) ** 2 + t * t * s * s)
    constant = 0.0
    for k in range(K):
        growth_of_the_rest = math.prod(1 + rate(j / K) / K for j in range(k + 1, K))
        constant += (1 + rate(k / K) / K) * growth_of_the_rest * growth_of_the_rest / K
    return constant


def test_a_quadratic_reward_moves_a_gaussian_policy_as_first_order_says():
    """Q(a) = a - a^2 / 2 pulls towards 1, as the KL-regularised optimum, proportional to N exp(Q / beta), does: to first
    order its mean is s^2 / beta. The guided flow's mean m solves m = c Q'(m) / lambda with Q'(m) = 1 - m.
    """
    spread = 0.3
    assert abs(first_order_constant(spread, 2_000) - math.pi * spread / 2) < 1e-3
    at_4, at_8, cloning = improved_means((4.0, 8.0, 1e6), spread)
    c = first_order_constant(spread)
    assert abs(cloning) < 0.01
    assert 0.8 < at_4 / (c / (4 + c)) < 1.2 and 0.8 < at_8 / (c / (8 + c)) < 1.2, (at_4, at_8, c)
    assert 1.7 < at_4 / at_8 < 2.2
