"""floq's parts against closed forms, its stop-gradients, its options, and seeds as an axis."""

import math
import shutil

import numpy as np
import pytest
import torch

import floq
from conftest import make_agent, random_inputs, small_args

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


def test_mlp_equals_the_plain_formula():
    mlp = floq.MLP((2, 3), (4, 8, 8, 1), layer_norm=True)
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.normal_()
    x = torch.randn(2, 3, 5, 4)
    h = x
    for i in range(2):
        h = torch.nn.functional.gelu(h @ mlp.weights[i] + mlp.biases[i], approximate="tanh")
        h = (h - h.mean(-1, keepdim=True)) / torch.sqrt(h.var(-1, unbiased=False, keepdim=True) + 1e-6)
        h = h * mlp.scales[i] + mlp.shifts[i]
    torch.testing.assert_close(mlp(x), h @ mlp.weights[2] + mlp.biases[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("time_embedding", ["cos", "fourier"])
@pytest.mark.parametrize("use_prob_embed", [True, False])
@pytest.mark.parametrize("use_resnets", [False, True])
def test_field_equals_the_velocity_network_written_out(time_embedding, use_prob_embed, use_resnets):
    args = small_args(
        time_embedding=time_embedding, use_prob_embed=use_prob_embed, use_resnets=use_resnets, num_transformations=3
    )
    agent = make_agent(args, seeds=(0, 1))
    net, mlp = agent.floq, agent.floq.mlp
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    B, m = 4, 3
    s, a = torch.randn(2, B, 5), torch.rand(2, B, 3)
    z, t = -30 * torch.rand(2, 2, B * m, 1), torch.rand(2, 2, B * m, 1)
    z_embedding = floq.hl_gauss(z, net.edges, 16.0) if use_prob_embed else z
    t_embedding = torch.cos(t) if time_embedding == "cos" else torch.cos(math.pi * torch.arange(1, 65) * t)
    condition = torch.cat([s, a], -1).repeat_interleave(m, dim=1).unsqueeze(1).expand(-1, 2, -1, -1)
    x = torch.cat([condition, z_embedding, t_embedding], dim=-1)

    def layer(x, i):
        x = torch.nn.functional.gelu(x @ mlp.weights[i] + mlp.biases[i], approximate="tanh")
        return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * mlp.scales[i] + mlp.shifts[i]

    if use_resnets:  # one layer, then 3 blocks of 2 layers each
        x = layer(x, 0)
        for block in range(3):
            x = x + layer(layer(x, 1 + 2 * block), 2 + 2 * block)
    else:
        x = layer(layer(x, 0), 1)
    expected = x @ mlp.weights[-1] + mlp.biases[-1]
    torch.testing.assert_close(net.field(s, a, repeats=m)(z, t), expected, rtol=1e-4, atol=1e-4)


def test_fourier_and_float_times_agree_with_tensors():
    for embedding in ("cos", "fourier"):
        net = make_agent(small_args(time_embedding=embedding)).floq
        z = torch.randn(1, 2, 6, 1)
        torch.testing.assert_close(net.embed(z, 0.25), net.embed(z, torch.full_like(z, 0.25)))


# --- Losses ---


def grads(agent):
    return {name: p.grad for name, p in agent.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


def networks(names):
    return {name.split(".")[0] for name in names}


def test_critic_loss_moves_only_the_critics():
    agent = make_agent(small_args())
    agent.critic_loss(*random_inputs(agent))[0].sum().backward()
    assert networks(grads(agent)) == {"floq", "critic"}


def test_actor_loss_moves_only_the_policies():
    agent = make_agent(small_args())
    agent.actor_loss(*random_inputs(agent))[0].sum().backward()
    assert networks(grads(agent)) == {"actor_bc_flow", "actor_onestep_flow"}


def test_target_is_a_constant_of_the_flow_loss():
    """The flow loss's gradient equals that of a regression on the same numbers given as constants."""
    agent = make_agent(small_args())
    batch, noise = random_inputs(agent)
    _, metrics = agent.critic_loss(batch, noise)
    metrics["critic/floq_loss"].sum().backward()
    assert networks(grads(agent)) == {"floq"}
    before = {name: p.grad.clone() for name, p in agent.named_parameters() if p.grad is not None}
    # The policy and the targets enter the label only: moving them with the label held fixed is what detaching means.
    agent.zero_grad()
    for module in (agent.actor_onestep_flow, agent.target_floq):
        module.requires_grad_(True)
    _, metrics = agent.critic_loss(batch, noise)
    metrics["critic/floq_loss"].sum().backward()
    assert all(p.grad is None for module in (agent.actor_onestep_flow, agent.target_floq) for p in module.parameters())
    for name, p in agent.named_parameters():
        if name in before:
            torch.testing.assert_close(p.grad, before[name], rtol=0, atol=0)


def test_distillation_of_the_critic_moves_the_critic_alone():
    agent = make_agent(small_args())
    agent.critic_loss(*random_inputs(agent))[1]["critic/distilled_critic_loss"].sum().backward()
    assert networks(grads(agent)) == {"critic"}


def test_distillation_of_the_policy_does_not_move_the_cloning_flow():
    agent = make_agent(small_args())
    agent.actor_loss(*random_inputs(agent))[1]["actor/distill_loss"].sum().backward()
    assert networks(grads(agent)) == {"actor_onestep_flow"}


def test_q_loss_moves_the_onestep_policy_alone_and_its_scale_is_a_constant():
    agent = make_agent(small_args())
    batch, noise = random_inputs(agent)
    agent.actor_loss(batch, noise)[1]["actor/q_loss"].sum().backward()
    plain = grads(agent)
    assert networks(plain) == {"actor_onestep_flow"}
    scale = agent.q_values(
        batch["observations"], agent.onestep_action(batch["observations"], noise["distill"]).clamp(-1, 1)
    )
    scale = scale.mean(dim=1).abs().mean().item()
    plain = {name: grad / scale for name, grad in plain.items()}
    agent.zero_grad()
    agent.args.normalize_q_loss = True
    agent.actor_loss(batch, noise)[1]["actor/q_loss"].sum().backward()
    for name, grad in grads(agent).items():
        torch.testing.assert_close(grad, plain[name], rtol=1e-4, atol=1e-7)


def test_terminal_rows_have_their_reward_as_target():
    agent = make_agent(small_args())
    batch, noise = random_inputs(agent)
    batch["masks"] = torch.zeros_like(batch["masks"])
    metrics = agent.critic_loss(batch, noise)[1]
    torch.testing.assert_close(metrics["critic/target_mean"], batch["rewards"].mean(dim=1))


def test_q_agg_min_is_below_mean():
    values = {}
    for q_agg in ("mean", "min"):
        agent = make_agent(small_args(q_agg=q_agg))
        batch, noise = random_inputs(agent)
        values[q_agg] = agent.critic_loss(batch, noise)[1]["critic/target_mean"].item()
    assert values["min"] < values["mean"]


def test_train_at_zero_only_ignores_the_drawn_times():
    agent = make_agent(small_args(train_at_zero_only=True, critic_flow_steps=1))
    batch, noise = random_inputs(agent)
    first = agent.critic_loss(batch, noise)[0]
    noise["time"] = 1 - noise["time"]
    torch.testing.assert_close(agent.critic_loss(batch, noise)[0], first, rtol=0, atol=0)


def test_ema_uses_the_weights_before_the_step():
    agent = make_agent(small_args(tau=0.3))
    target, online = agent.target_floq.mlp.weights[0].detach().clone(), agent.floq.mlp.weights[0].detach().clone()
    agent.update(*random_inputs(agent))
    assert not torch.equal(agent.floq.mlp.weights[0], online)
    torch.testing.assert_close(agent.target_floq.mlp.weights[0], 0.3 * online + 0.7 * target)
    assert all(p.is_leaf and not p.requires_grad for p in agent.target_floq.parameters())  # no graph that grows


def test_value_flow_learns_a_constant_return():
    """One terminal state with reward -3: the flow and the distilled critic must both end at -3."""
    torch.manual_seed(0)
    args = small_args(batch_size=32, learning_rate=3e-3, gamma=0.9, block_width=32)
    agent = make_agent(args, min_reward=-3.0, max_reward=0.0)  # values in [-30, 0]
    batch, _ = random_inputs(agent)
    batch |= {"rewards": torch.full((1, 32), -3.0), "masks": torch.zeros(1, 32)}
    generator = torch.Generator().manual_seed(0)
    noises = agent.draw_noise(generator, 1000)
    for update in range(1000):
        out = agent.update(batch, {name: value[update].unsqueeze(0) for name, value in noises.items()})
    assert out["critic/td_error"].sqrt().item() < 0.3
    assert abs(out["critic/q_mean"].item() + 3) < 0.3


def test_act_is_the_clipped_onestep_policy():
    agent = make_agent(small_args())
    with torch.no_grad():
        agent.actor_onestep_flow.biases[-1] += 3.0
    observations, noise = torch.randn(1, 7, 5), torch.randn(1, 7, 3)
    actions = agent.act(observations, noise)
    assert actions.shape == (1, 7, 3) and actions.max() == 1.0
    torch.testing.assert_close(actions, agent.onestep_action(observations, noise).detach().clamp(-1, 1))


# --- Seeds as an axis ---


def test_stacked_seeds_equal_each_seed_alone():
    args, seeds = small_args(), (3, 4, 5)
    stacked = make_agent(args, seeds)
    alone = [make_agent(args, (seed,)) for seed in seeds]
    for update in range(3):
        out = stacked.update(*random_inputs(stacked, seeds, update))
        for s, seed in enumerate(seeds):
            single = alone[s].update(*random_inputs(alone[s], (seed,), update))
            for name, value in single.items():
                torch.testing.assert_close(out[name][s], value[0], rtol=1e-4, atol=1e-5)
    for s in range(3):
        for stacked_parameter, parameter in zip(stacked.parameters(), alone[s].parameters()):
            torch.testing.assert_close(stacked_parameter[s], parameter[0], rtol=0, atol=1e-5)


def test_stacked_seeds_start_and_draw_as_each_seed_alone():
    from common import runs

    args, seeds = small_args(), [3, 4, 5]
    stacked = make_agent(args, seeds)
    chunk = runs.draw_chunk(stacked, args, seeds, 1000, 7, "cpu")
    for s, seed in enumerate(seeds):
        alone = make_agent(args, (seed,))
        for stacked_parameter, parameter in zip(stacked.parameters(), alone.parameters()):
            assert torch.equal(stacked_parameter[s], parameter[0])
        for name, value in runs.draw_chunk(alone, args, [seed], 1000, 7, "cpu").items():
            assert torch.equal(chunk[name][:, s], value[:, 0]), name
    assert not torch.equal(chunk["bc_action"][:, 0], chunk["bc_action"][:, 1])
    later = runs.draw_chunk(stacked, args, seeds, 1000, 8, "cpu")
    assert not torch.equal(chunk["indices"], later["indices"])


def test_weights_are_glorot_uniform_with_zero_biases():
    mlp = floq.MLP((2, 2), (64, 256, 1), layer_norm=True)
    floq.init_weights(torch.nn.ModuleDict({"mlp": mlp}), [0, 1])
    bound = math.sqrt(6 / (64 + 256))
    for member in mlp.weights[0].flatten(0, 1):
        assert member.abs().max() <= bound
        np.testing.assert_allclose(member.std().item(), bound / math.sqrt(3), rtol=0.02)
    assert not torch.equal(mlp.weights[0][0, 0], mlp.weights[0][0, 1])
    assert not torch.equal(mlp.weights[0][0], mlp.weights[0][1])
    assert all((bias == 0).all() for bias in mlp.biases)


# --- On a GPU ---


@pytest.mark.gpu
def test_graph_replay_equals_eager_updates_and_uses_fresh_noise():
    from common import graphs

    args = small_args()
    agents = [make_agent(args, (0, 1)).cuda() for _ in range(2)]
    for agent in agents:
        agent.make_optimizer()
    on_gpu = lambda update: [{k: v.cuda() for k, v in d.items()} for d in random_inputs(agents[0], (0, 1), update)]

    def update_with(agent):
        split = lambda inputs: (
            {k: inputs[k] for k in batch_names},
            {k: v for k, v in inputs.items() if k not in batch_names},
        )
        return lambda inputs: agent.update(*split(inputs))

    batch, noise = on_gpu(0)
    batch_names = set(batch)
    eager = update_with(agents[0])
    replay = graphs.capture(update_with(agents[1]), batch | noise, agents[1].state_tensors())
    losses = []
    for update in range(100):
        batch, noise = on_gpu(update)
        expected = eager(batch | noise)
        got = replay(batch | noise)
        losses.append(got["critic/critic_loss"].clone())
        torch.testing.assert_close(got["critic/critic_loss"], expected["critic/critic_loss"], rtol=1e-3, atol=1e-3)
    for a, b in zip(agents[0].parameters(), agents[1].parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    # The same batch with other noise gives another loss: nothing random is frozen in the graph.
    first = replay(batch | noise)["critic/critic_loss"].clone()
    second = replay(batch | on_gpu(7)[1])["critic/critic_loss"].clone()
    assert not torch.equal(first, second)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_losses_equal_eager_ones():
    eager, compiled = make_agent(small_args(critic_flow_steps=2)), make_agent(small_args(critic_flow_steps=2))
    compiled.critic_loss, compiled.actor_loss = torch.compile(compiled.critic_loss), torch.compile(compiled.actor_loss)
    for update in range(3):
        expected = eager.update(*random_inputs(eager, update=update))
        for name, value in compiled.update(*random_inputs(compiled, update=update)).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    for a, b in zip(compiled.parameters(), eager.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
