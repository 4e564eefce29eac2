"""floq's parts against closed forms, its stop-gradients and its options."""

import functools
import math

import pytest
import torch
from conftest import gradients, make_agent, make_agents, networks, random_inputs, stacked_inputs, update
from conftest import small_args as small_args_of

import floq

small_args = functools.partial(small_args_of, "floq")

# --- Euler integration ---


def test_euler_is_exact_on_a_constant_field():
    x = torch.randn(2, 3, 5, 1)
    torch.testing.assert_close(floq.euler(lambda x, t: torch.full_like(x, 0.7), x, 4), x + 0.7)


def test_euler_on_a_linear_field_is_the_compound_interest_formula():
    x = torch.randn(2, 3, dtype=torch.float64)
    for steps in (1, 4, 16):
        torch.testing.assert_close(floq.euler(lambda x, t: -1.5 * x, x, steps), x * (1 - 1.5 / steps) ** steps)


def test_euler_evaluates_a_time_dependent_field_at_left_end_points():
    x = torch.zeros(1, dtype=torch.float64)
    for steps in (1, 5, 10):  # the sum of 2 k / K over k < K, divided by K
        torch.testing.assert_close(floq.euler(lambda x, t: torch.full_like(x, 2 * t), x, steps), x + 1 - 1 / steps)


def test_euler_converges_at_first_order():
    x = torch.ones(1, dtype=torch.float64)
    errors = [abs(floq.euler(lambda x, t: -x + t, x, k).item() - 2 / math.e) for k in (32, 64, 128)]  # x(1) = 2/e
    assert 1.9 < errors[0] / errors[1] < 2.1 and 1.9 < errors[1] / errors[2] < 2.1


# --- HL-Gauss embedding ---

EDGES = torch.linspace(-101.0, 1.0, 51)


def test_hl_gauss_equals_truncated_gaussian_masses():
    z = torch.tensor([[-120.0], [-101.0], [-50.0], [0.0], [1.0], [30.0]], dtype=torch.float64)
    edges = EDGES.double()
    sigma = 16 * (edges[1] - edges[0])
    normal = torch.distributions.Normal(z, sigma)
    expected = normal.cdf(edges).diff(dim=-1) / (normal.cdf(edges[-1:]) - normal.cdf(edges[:1]))
    embedding = floq.hl_gauss(z, edges, 16.0)
    torch.testing.assert_close(embedding, expected)
    torch.testing.assert_close(embedding.sum(dim=-1), torch.ones(6, dtype=torch.float64))
    assert embedding.shape == (6, 50)


@pytest.mark.parametrize("z", [1e3, -1e3, 1e6, -1e6, 1e30])
def test_hl_gauss_stays_finite_far_outside_with_a_finite_gradient(z):
    z = torch.tensor([[z]], requires_grad=True)
    embedding = floq.hl_gauss(z, EDGES, 16.0)
    embedding.square().sum().backward()
    assert torch.isfinite(embedding).all() and torch.isfinite(z.grad).all()
    assert (embedding >= 0).all() and embedding.sum() <= 1 + 1e-5


def test_hl_gauss_gradient_equals_finite_differences():
    z = torch.tensor([[-70.0], [-3.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: floq.hl_gauss(z, EDGES.double(), 16.0), z)


# --- Networks ---


@pytest.mark.parametrize("time_embedding", ["cos", "fourier"])
@pytest.mark.parametrize("use_prob_embed", [True, False])
def test_velocity_equals_the_network_written_out(time_embedding, use_prob_embed):
    agent = make_agent(small_args(time_embedding=time_embedding, use_prob_embed=use_prob_embed))
    flow, mlp = agent.critic_flow, agent.critic_flow.mlp
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    s, a, t = torch.randn(4, 5), torch.rand(4, 3), torch.rand(4, 1)
    q_min, q_max = -1.01 / 0.01, 0.01 / 0.01
    for z in (-30 * torch.rand(2, 4, 1), -30 * torch.rand(4, 1)):  # each member's own state, and one for all
        for time in (t, 0.25):
            z_embedding = floq.hl_gauss(z, flow.edges, 16.0) if use_prob_embed else (z - q_min) / (q_max - q_min)
            t_all = torch.as_tensor(time).expand(*z.shape)
            t_embedding = torch.cos(t_all if time_embedding == "cos" else math.pi * torch.arange(1, 65) * t_all)
            condition = torch.cat([s, a], -1).expand(*z.shape[:-1], -1)
            x = torch.cat([condition, z_embedding, t_embedding], dim=-1)
            for i in range(2):
                x = torch.nn.functional.gelu(x @ mlp.weights[i] + mlp.biases[i], approximate="tanh")
                x = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * mlp.scales[i] + mlp.shifts[i]
            expected = x @ mlp.weights[-1] + mlp.biases[-1]
            torch.testing.assert_close(flow(s, a, z, time), expected, rtol=1e-4, atol=1e-4)


# --- Losses ---


def test_labels_are_constants_of_the_critic_losses():
    """With every network allowed to move, each regression moves the network that it fits and nothing that its label is
    made of: the policy, the target flow and, for the distilled critic, the flow itself.
    """
    for part, network in (("critic/floq_loss", "critic_flow"), ("critic/distilled_critic_loss", "critic")):
        agent = make_agent(small_args()).requires_grad_(True)
        agent.critic_loss(*random_inputs(agent))[1][part].backward()
        assert networks(gradients(agent)) == {network}


def test_q_loss_moves_the_onestep_policy_alone_and_its_scale_is_a_constant():
    args = small_args()
    agent, agents = make_agent(args), make_agents(args)
    batch, noise = random_inputs(agent)
    q = agent.q_values(
        batch["observations"], agent.onestep_action(batch["observations"], noise["distill"]).clamp(-1, 1)
    )
    scale = q.mean(dim=0).abs().mean().item()
    grads = {}
    for normalize in (False, True):
        agent.args.normalize_q_loss = normalize
        agent.zero_grad()
        agent.actor_loss(batch, noise)[1]["actor/q_loss"].backward()
        grads[normalize] = {k: v for k, v in gradients(agent).items() if k.startswith("actor_onestep_flow")}
    for name, gradient in grads[True].items():
        torch.testing.assert_close(gradient, grads[False][name] / scale, rtol=1e-4, atol=1e-7)
    agents.backward("actor_loss", *stacked_inputs(agents), trains=("actor_onestep_flow",))
    assert networks(gradients(agents)) == {"actor_onestep_flow"}


def test_the_ensemble_is_aggregated_for_each_noise_sample_before_the_mean():
    """Members that cross in z: velocities z and -z carry z to 2z and 0 in one step; the smaller depends on z's sign."""
    for q_agg, expected in (("mean", lambda z: z), ("min", lambda z: (2 * z).clamp(max=0))):
        agent = make_agent(small_args(q_agg=q_agg, critic_flow_steps=1), min_reward=-1.0, max_reward=1.0)
        agent.target_critic_flow.forward = lambda s, a, z, t: torch.stack([z, -z])
        batch, noise = random_inputs(agent)
        z = -10 + 20 * noise["next_start"].view(6, 3)  # kappa [r_min, r_max] / (1 - gamma), (B, m)
        target = batch["rewards"] + 0.99 * batch["masks"] * expected(z).mean(dim=1)
        target_mean = agent.critic_loss(batch, noise)[1]["critic/target_mean"]
        torch.testing.assert_close(target_mean, target.mean())


def test_the_flow_loss_is_summed_over_noise_samples_and_averaged_over_fields_and_rows():
    agent = make_agent(small_args())
    batch, noise = random_inputs(agent)
    agent.critic_flow.forward = lambda s, a, z, t: torch.tensor([0.0, 1.0]).view(2, 1, 1).expand(2, len(s), 1)
    batch["masks"] = torch.zeros(6)  # y = r
    z_0 = -10 * (1 - noise["start"]).view(6, 3)
    label = batch["rewards"].unsqueeze(1) - z_0  # (B, m)
    expected = torch.stack([label.square().sum(dim=1), (label - 1).square().sum(dim=1)]).mean()
    torch.testing.assert_close(agent.critic_loss(batch, noise)[1]["critic/floq_loss"], expected)


def test_train_at_zero_only_is_the_loss_at_time_zero():
    agent = make_agent(small_args(train_at_zero_only=True, critic_flow_steps=1))
    batch, noise = random_inputs(agent)
    first = agent.critic_loss(batch, noise)[0]
    agent.args.train_at_zero_only = False
    torch.testing.assert_close(agent.critic_loss(batch, noise | {"time": torch.zeros_like(noise["time"])})[0], first)


def test_ranges_steps_and_norms_follow_the_arguments():
    args = small_args(noise_coverage=0.25, gamma=0.9, layer_norm=False, actor_layer_norm=True, actor_flow_steps=3)
    agent = make_agent(args, min_reward=-2.0, max_reward=1.0)
    assert (agent.z_low, agent.z_high) == pytest.approx((-5.0, 2.5))
    assert (agent.critic_flow.edges[0].item(), agent.critic_flow.edges[-1].item()) == pytest.approx((-20.1, 10.1))
    normed = {
        name for name, module in agent.named_children() if any("scales" in n for n, _ in module.named_parameters())
    }
    assert normed == {"actor_bc_flow", "actor_onestep_flow"}
    batch, noise = random_inputs(agent)
    x, s = noise["distill"], batch["observations"]
    with torch.no_grad():
        for k in range(3):
            x = x + agent.bc_velocity(s, x, torch.full_like(noise["bc_time"], k / 3)) / 3
        distance = (agent.onestep_action(s, noise["distill"]) - x.clamp(-1, 1)).square().mean()
    torch.testing.assert_close(agent.actor_loss(batch, noise)[1]["actor/distill_loss"], distance)


def test_value_flow_learns_a_constant_return():
    """One terminal state with reward -3: the flow and the distilled critic must both end at -3."""
    torch.manual_seed(0)
    args = small_args(batch_size=32, learning_rate=3e-3, gamma=0.9, block_width=32)
    agents = make_agents(args, min_reward=-3.0, max_reward=0.0)  # values in [-30, 0]
    batch, _ = stacked_inputs(agents)
    batch |= {"rewards": torch.full((1, 32), -3.0), "masks": torch.zeros(1, 32)}
    noises = agents.agent.draw_noise(torch.Generator().manual_seed(0), 1000)
    for number in range(1000):
        out = update(agents, batch, {name: value[number].unsqueeze(0) for name, value in noises.items()})
    assert out["critic/td_error"].sqrt().item() < 0.3
    assert abs(out["critic/q_mean"].item() + 3) < 0.3


def test_act_is_the_clipped_onestep_policy():
    agent = make_agent(small_args())
    with torch.no_grad():
        agent.actor_onestep_flow.biases[-1] += 3.0
    observations, noise = torch.randn(7, 5), torch.randn(7, 3)
    actions = agent.act(observations, noise)
    assert actions.shape == (7, 3) and actions.max() == 1.0
    torch.testing.assert_close(actions, agent.onestep_action(observations, noise).detach().clamp(-1, 1))


@pytest.mark.parametrize(
    "rewards, low, high", [((-3.0, -1.0), -3.0, 0.0), ((-2.0, 0.0), -2.0, 0.0), ((0.5, 2.0), 0.0, 2.0)]
)
def test_the_range_of_rewards_has_zero_in_it(rewards, low, high):
    """As in the released code, whose replay buffer has rows of zeros: also where the data hold no success."""
    agent = make_agent(small_args(noise_coverage=0.25), min_reward=rewards[0], max_reward=rewards[1])
    assert (agent.z_low, agent.z_high) == pytest.approx((0.25 * low * 100, 0.25 * high * 100))
    assert agent.critic_flow.edges[0].item() == pytest.approx((low - 0.01) * 100, rel=1e-5)
    assert agent.critic_flow.edges[-1].item() == pytest.approx((high + 0.01) * 100, rel=1e-5)
