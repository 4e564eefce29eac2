"""Q-Flow's parts against closed forms, its stop-gradients, and a bandit whose improvement is known to first order."""

import functools
import math

import pytest
import torch
from conftest import assert_refused, gradients, make_agent, make_agents, networks, random_inputs, stacked_inputs, update
from conftest import small_args as small_args_of

from q_flow import embed_time, time_frequencies

small_args = functools.partial(small_args_of, "q_flow")


def constant_flow(agent, velocity):
    """Makes the policy's velocity the same vector everywhere."""
    with torch.no_grad():
        agent.actor_flow.weights[-1].zero_()
        agent.actor_flow.biases[-1].copy_(torch.tensor(velocity).expand_as(agent.actor_flow.biases[-1]))


# --- Flow time and roll-out ---


def test_time_embedding_is_sines_and_cosines_of_geometric_frequencies():
    t = torch.rand(5, 1, dtype=torch.float64)
    embedding = embed_time(t, time_frequencies(16))
    for i in range(8):
        frequency = 256 ** (i / 7)
        torch.testing.assert_close(embedding[..., i], torch.sin(frequency * t[:, 0]), rtol=0, atol=1e-4)
        torch.testing.assert_close(embedding[..., 8 + i], torch.cos(frequency * t[:, 0]), rtol=0, atol=1e-4)
    assert embedding.shape == (5, 16)


@pytest.mark.parametrize("actor_time_embed", [False, True])
def test_roll_out_from_zero_is_euler_integration(actor_time_embed):
    agent = make_agent(small_args(actor_time_embed=actor_time_embed))
    observations, x = torch.randn(6, 5), 0.1 * torch.randn(6, 3)
    expected = x
    for k in range(5):
        t = torch.full((6, 1), k / 5)
        inputs = torch.cat(
            [observations, expected, embed_time(t, time_frequencies(8)) if actor_time_embed else t], dim=-1
        )
        expected = expected + agent.actor_flow(inputs) / 5
    rolled = agent.roll_out(observations, x, torch.zeros(6, 1))
    torch.testing.assert_close(rolled, expected.clamp(-1, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(agent.act(observations, x), rolled)


def test_roll_out_ends_at_one_from_every_time():
    agent = make_agent(small_args(flow_steps=10))
    constant_flow(agent, [0.5, -0.5, 0.25])
    t = torch.tensor([0.0, 0.05, 0.1, 0.33, 0.5, 0.77, 0.9, 0.95, 0.999, 1.0]).view(-1, 1)
    x = 0.2 * torch.rand(10, 3)
    rolled = agent.roll_out(torch.randn(10, 5), x, t)
    torch.testing.assert_close(rolled, x + (1 - t) * torch.tensor([0.5, -0.5, 0.25]), rtol=1e-5, atol=1e-5)


def test_roll_out_clips_at_the_end_only():
    agent = make_agent(small_args())
    constant_flow(agent, [-2.0, 4.0, 0.0])
    rolled = agent.roll_out(torch.randn(4, 5), torch.full((4, 3), 2.5), torch.zeros(4, 1))
    # A clip on the way would have taken 2.5 to 1 at once, and the first coordinate to -1.
    torch.testing.assert_close(rolled, torch.tensor([0.5, 1.0, 1.0]).expand(4, 3))


def test_without_the_embedding_the_value_sees_the_raw_time_alone_and_stacked():
    """No recorded case has it off (tests/parity), so it is compared with the plain network and across seeds."""
    args, seeds = small_args(use_time_embed=False), (3, 4)
    agent, stacked = make_agent(args), make_agents(args, seeds)
    s, x, t = torch.randn(4, 5), torch.randn(4, 3), torch.rand(4, 1)
    torch.testing.assert_close(agent.inner_values(s, x, t), agent.inner_value(torch.cat([s, x, t], dim=-1)).squeeze(-1))
    alone = [make_agents(args, (seed,)) for seed in seeds]
    for number in range(3):
        out = update(stacked, *stacked_inputs(stacked, seeds, number))
        for index, seed in enumerate(seeds):
            for name, value in update(alone[index], *stacked_inputs(alone[index], (seed,), number)).items():
                torch.testing.assert_close(out[name][index], value[0], rtol=1e-4, atol=1e-5)


# --- Losses ---


def guidance(agent, observations, x, t):
    """grad_x mean_e V_e(s, x, t) by torch's plain autograd, a constant."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(agent.inner_values(observations, x, t).mean(dim=0).sum(), x)[0]


def test_guidance_is_the_gradient_of_the_ensemble_mean():
    for q_agg in ("mean", "min"):
        agent = make_agent(small_args(q_agg=q_agg)).double()
        observations, x, t = (torch.randn(4, n, dtype=torch.float64) for n in (5, 3, 1))
        h = 1e-6
        for d in range(3):
            shift = h * torch.eye(3, dtype=torch.float64)[d]
            mean = lambda x: agent.inner_values(observations, x, t).mean(dim=0)
            slope = (mean(x + shift) - mean(x - shift)) / (2 * h)
            torch.testing.assert_close(guidance(agent, observations, x, t)[:, d], slope.detach(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("q_agg", ["mean", "min"])
@pytest.mark.parametrize("actor_time_embed", [False, True])
def test_actor_label_is_the_data_velocity_plus_guidance_over_lambda(actor_time_embed, q_agg):
    args = small_args(alpha=0.7, actor_time_embed=actor_time_embed, q_agg=q_agg)
    agent, agents = make_agent(args), make_agents(args)
    batch, noise = random_inputs(agent)
    x_0, t = noise["policy_action"], noise["policy_time"]
    x_t = (1 - t) * x_0 + t * batch["actions"]
    g = guidance(agent, batch["observations"], x_t, t)
    embedded = embed_time(t, time_frequencies(8)) if actor_time_embed else t
    velocity = agent.actor_flow(torch.cat([batch["observations"], x_t, embedded], dim=-1))
    expected = (velocity - (batch["actions"] - x_0 + g / 0.7)).square().mean()
    loss, metrics = agent.actor_loss(batch, noise)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["actor/guidance_norm"], g.norm(dim=-1).mean())
    expected.backward()
    # The guidance moves neither the value nor, twice, the policy.
    agents.backward("actor_loss", *stacked_inputs(agents), trains=("actor_flow",))
    moved = gradients(agents)
    assert networks(moved) == {"actor_flow"}
    loss.backward()  # of the agent alone: the gradient added to the one above
    for name, value in moved.items():
        torch.testing.assert_close(2 * value[0], agent.get_parameter(name).grad, rtol=1e-3, atol=1e-5)
    assert networks(gradients(agent)) == {"actor_flow"}


@pytest.mark.parametrize("q_agg, use_time_embed", [("mean", True), ("min", True), ("mean", False)])
def test_critic_loss_equals_one_with_two_separate_roll_outs(q_agg, use_time_embed):
    agent = make_agent(small_args(q_agg=q_agg, use_time_embed=use_time_embed))
    batch, noise = random_inputs(agent)
    s, a, t = batch["observations"], batch["actions"], noise["value_time"]
    reduce = lambda q: q.mean(dim=0) if q_agg == "mean" else q.amin(dim=0)
    next_a = agent.roll_out(batch["next_observations"], noise["next_action"], torch.zeros_like(t))
    next_q = reduce(agent.q_values(agent.target_critic, batch["next_observations"], next_a))
    y = batch["rewards"] + 0.99 * batch["masks"] * next_q
    x = (1 - t) * noise["value_action"] + t * a
    end_q = reduce(agent.q_values(agent.target_critic, s, agent.roll_out(s, x, t)))
    # The critics are squared one by one, the intermediate values after their aggregation.
    outer = (agent.q_values(agent.critic, s, a) - y).square().mean()
    inner = (reduce(agent.inner_values(s, x, t)) - end_q).square().mean()
    _, metrics = agent.critic_loss(batch, noise)
    torch.testing.assert_close(metrics["critic/outer_loss"], outer, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["critic/distillation_loss"], inner, rtol=1e-4, atol=1e-5)
    each = (agent.inner_values(s, x, t) - end_q).square().mean()
    assert not torch.isclose(inner, each, rtol=1e-2)


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


def improved_means(alphas, spread, num_updates=500):
    """Mean actions (alphas,) of policies trained on actions N(0, spread^2) with reward a - a^2 / 2."""
    sizes = dict(batch_size=256, learning_rate=1e-3, tau=0.02, flow_steps=10, time_embed_dim=16)
    sizes |= dict(value_hidden_dims=(64, 64), actor_hidden_dims=(64, 64))
    means = []
    for alpha in alphas:
        agents = make_agents(small_args(**sizes, alpha=alpha), obs_dim=1, action_dim=1)
        generator, shape = torch.Generator().manual_seed(0), (1, 256, 1)  # the same numbers for every alpha
        for number in range(num_updates):
            for group in agents.optimizer.param_groups:  # a rate that falls to zero averages the last updates' noise
                group["lr"] = 1e-3 * (1 - number / num_updates)
            noise = agents.agent.draw_noise(generator, 1)
            actions = spread * torch.randn(shape, generator=generator)
            batch = {"observations": torch.zeros(shape), "next_observations": torch.zeros(shape), "actions": actions}
            batch |= {"rewards": (actions - actions.square() / 2).squeeze(-1), "masks": torch.zeros(shape[:2])}
            update(agents, batch, noise)
        noise = torch.randn(1, 20_000, 1, generator=generator)
        means.append(agents.function("act")(torch.zeros(noise.shape), noise).mean().item())
    return means


def first_order_constant(s, K=10):
    """c in: shift of the mean = c Q'(mean) / lambda, for the behaviour N(0, s^2), K Euler steps and small 1 / lambda.

    The behaviour's velocity is rate(tau) x. At each step the guidance is Q' times the growth of a roll-out from there,
    and what it adds grows over the steps that remain. (For K to infinity c is the integral of s^2 / ((1 - tau)^2 +
    tau^2 s^2) over tau, which is pi s / 2.)
    """
    rate = lambda t: (t * s * s - (1 - t)) / ((1 - t) ** 2 + t * t * s * s)
    constant = 0.0
    for k in range(K):
        growth_of_the_rest = math.prod(1 + rate(j / K) / K for j in range(k + 1, K))
        constant += (1 + rate(k / K) / K) * growth_of_the_rest * growth_of_the_rest / K
    return constant


def test_a_quadratic_reward_moves_a_gaussian_policy_as_first_order_says():
    """Q(a) = a - a^2 / 2 pulls towards 1, as the KL-regularised optimum, proportional to N exp(Q / beta), does: to
    first order its mean is s^2 / beta. The guided flow's mean m solves m = c Q'(m) / lambda with Q'(m) = 1 - m.
    """
    spread = 0.3
    assert abs(first_order_constant(spread, 2_000) - math.pi * spread / 2) < 1e-3
    at_4, at_8, cloning = improved_means((4.0, 8.0, 1e6), spread)
    c = first_order_constant(spread)
    assert abs(cloning) < 0.01
    assert 0.8 < at_4 / (c / (4 + c)) < 1.2 and 0.8 < at_8 / (c / (8 + c)) < 1.2, (at_4, at_8, c)
    assert 1.7 < at_4 / at_8 < 2.2
