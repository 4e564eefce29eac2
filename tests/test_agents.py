"""What every algorithm has in common: the MLP, initial weights, whose gradients go where, EMA, targets, seed axis."""

import math
import shutil

import numpy as np
import pytest
import torch

from common import draws, graphs
from conftest import ALGORITHMS, gradients, make_agent, networks, random_inputs, small_args

pytestmark = pytest.mark.parametrize("algorithm", ALGORITHMS)

CRITICS = {
    "floq": {"floq", "critic"},
    "value_flows": {"critic_flow"},
    "q_flow": {"critic", "inner_value"},
    "evor": {"critic_flow"},
}
POLICIES = {
    "floq": {"actor_bc_flow", "actor_onestep_flow"},
    "value_flows": {"actor_flow", "actor_onestep_flow"},
    "q_flow": {"actor_flow"},
    "evor": {"actor_flow"},
}
TARGETS = {
    "floq": ("target_floq", "floq"),
    "value_flows": ("target_critic_flow", "critic_flow"),
    "q_flow": ("target_critic", "critic"),
    "evor": ("target_critic_flow", "critic_flow"),
}
# The network that each part of the losses moves, alone.
MOVED_BY = {
    "floq": {
        "critic/floq_loss": "floq",
        "critic/distilled_critic_loss": "critic",
        "actor/bc_flow_loss": "actor_bc_flow",
        "actor/distill_loss": "actor_onestep_flow",
        "actor/q_loss": "actor_onestep_flow",
    },
    "value_flows": {
        "critic/bcfm_loss": "critic_flow",
        "critic/dcfm_loss": "critic_flow",
        "actor/bc_flow_loss": "actor_flow",
        "actor/distill_loss": "actor_onestep_flow",
        "actor/q_loss": "actor_onestep_flow",
    },
    "q_flow": {
        "critic/outer_loss": "critic",
        "critic/distillation_loss": "inner_value",
        "actor/total_loss": "actor_flow",
    },
    "evor": {"critic/critic_loss": "critic_flow", "actor/bc_flow_loss": "actor_flow"},
}


# --- Networks ---


def test_mlp_equals_the_plain_formula(algorithm):
    mlp = ALGORITHMS[algorithm].MLP((2, 3), (4, 8, 8, 1), layer_norm=True)
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


def test_weights_are_glorot_uniform_with_zero_biases(algorithm):
    module = ALGORITHMS[algorithm]
    mlp = module.MLP((2, 2), (64, 256, 1), layer_norm=True)
    module.init_weights(torch.nn.ModuleDict({"mlp": mlp}), [0, 1])
    bound = math.sqrt(6 / (64 + 256))
    for member in mlp.weights[0].flatten(0, 1):
        assert member.abs().max() <= bound
        np.testing.assert_allclose(member.std().item(), bound / math.sqrt(3), rtol=0.02)
    assert not torch.equal(mlp.weights[0][0, 0], mlp.weights[0][0, 1])
    assert not torch.equal(mlp.weights[0][0], mlp.weights[0][1])
    assert all((bias == 0).all() for bias in mlp.biases)


def test_targets_start_as_copies(algorithm):
    agent = ALGORITHMS[algorithm].Agent(small_args(algorithm), 5, 3, [0, 1], -1.0, 0.0)
    target, online = (getattr(agent, name) for name in TARGETS[algorithm])
    for a, b in zip(target.parameters(), online.parameters()):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()


# --- Gradients and EMA ---


def test_critic_loss_moves_only_the_critics(algorithm):
    agent = make_agent(small_args(algorithm))
    agent.critic_loss(*random_inputs(agent))[0].sum().backward()
    assert networks(gradients(agent)) == CRITICS[algorithm]


def test_actor_loss_moves_only_the_policies(algorithm):
    agent = make_agent(small_args(algorithm))
    agent.actor_loss(*random_inputs(agent))[0].sum().backward()
    assert networks(gradients(agent)) == POLICIES[algorithm]


def test_each_part_of_the_losses_moves_one_network(algorithm):
    for part, network in MOVED_BY[algorithm].items():
        agent = make_agent(small_args(algorithm))
        loss = agent.critic_loss if part.startswith("critic/") else agent.actor_loss
        loss(*random_inputs(agent))[1][part].sum().backward()
        assert networks(gradients(agent)) == {network}, part


def test_every_weight_of_online_networks_moves_and_targets_only_by_ema(algorithm):
    agent = make_agent(small_args(algorithm, tau=0.3))
    target, online = (getattr(agent, name) for name in TARGETS[algorithm])
    before = {name: p.detach().clone() for name, p in agent.named_parameters()}
    agent.update(*random_inputs(agent))
    for name, parameter in agent.named_parameters():
        assert not torch.equal(parameter, before[name]), name
        # The EMA takes the weights before the step: targets lag by one update, as in the released code.
        if name.startswith(TARGETS[algorithm][0]):
            was = before[name.replace(*TARGETS[algorithm])]
            torch.testing.assert_close(parameter, 0.3 * was + 0.7 * before[name])
    assert all(p.is_leaf and not p.requires_grad for p in target.parameters())  # no graph that grows
    assert all(p.requires_grad for p in online.parameters())


# --- Targets ---


def test_terminal_rows_have_their_reward_as_target(algorithm):
    agent = make_agent(small_args(algorithm))
    batch, noise = random_inputs(agent)
    batch["masks"] = torch.zeros_like(batch["masks"])
    target = agent.critic_loss(batch, noise)[1]["critic/target_mean"]  # value_flows: of every row, (S, B)
    rewards = batch["rewards"] - (noise["return"].squeeze(-1) if algorithm == "evor" else 0)  # evor's is a velocity
    expected = rewards if algorithm == "value_flows" else rewards.mean(dim=1)
    torch.testing.assert_close(target, expected)


# --- Random numbers ---

UNIFORM = {
    "floq": {"next_return_ratio", "return_ratio", "time", "bc_time"},
    "value_flows": {"time", "bc_time"},
    "q_flow": {"value_time", "policy_time"},
    "evor": {"time", "policy_time"},
}


def test_random_numbers_are_normal_or_uniform_and_independent(algorithm):
    """Parity and closed forms are given their random numbers; here are the distributions that updates draw them from."""
    agent = make_agent(small_args(algorithm))
    noise = agent.draw_noise(torch.Generator().manual_seed(0), 4_000)
    noise["act"] = agent.draw_act_noise(torch.Generator().manual_seed(1), 4_000)
    assert UNIFORM[algorithm] < set(noise)
    draws = []
    for name, value in noise.items():
        draw = value.flatten(1)  # (4000, columns)
        if name in UNIFORM[algorithm]:
            assert 0 <= draw.min() < 1e-3 and 1 - 1e-3 < draw.max() < 1, name
            draw = (draw - 0.5) * 12**0.5
        else:
            assert draw.abs().max() > 3.5, name
        assert draw.mean().abs() < 5 / draw.numel() ** 0.5, name
        assert (draw.std() - 1).abs() < 5 / draw.numel() ** 0.5, name
        draws.append(draw)
    draws = torch.cat(draws, dim=1)  # every single number of an update, and of another seed's action
    correlations = draws.T @ draws / len(draws) - torch.eye(draws.shape[1])
    assert correlations.abs().max() < 6.5 / len(draws) ** 0.5


# --- Seeds as an axis ---

# Settings beside the default whose code mixes rows, and might mix seeds.
STACKED = {
    "floq": [
        {},
        dict(normalize_q_loss=True, train_at_zero_only=True, q_agg="min", use_resnets=True, time_embedding="fourier"),
        dict(use_prob_embed=False, layer_norm=False, actor_layer_norm=True, noise_samples=1, flow_num_ensembles=3),
    ],
    "value_flows": [
        {},
        dict(normalize_q_loss=True, q_agg="min", ret_agg="min", num_samples=1, clip_flow_returns=False),
    ],
    "q_flow": [
        {},
        dict(q_agg="min", use_time_embed=False, actor_time_embed=True, num_ensembles=3, actor_layer_norm=True),
    ],
    "evor": [{}, dict(td_target="published", latents="target", num_ensembles=1, clip_flow_returns=False)],
}


def test_stacked_seeds_equal_each_seed_alone(algorithm):
    seeds = (3, 4, 5)
    for changes in STACKED[algorithm]:
        args = small_args(algorithm, **changes)
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


@pytest.mark.parametrize("online", [False, True])
def test_stacked_seeds_start_and_draw_as_each_seed_alone(algorithm, online):

    args, seeds = small_args(algorithm), [3, 4, 5]
    stacked = make_agent(args, seeds)
    chunk = draws.draw_chunk(stacked, args, seeds, 1000, 7, "cpu", online)
    for s, seed in enumerate(seeds):
        alone = make_agent(args, (seed,))
        for stacked_parameter, parameter in zip(stacked.parameters(), alone.parameters()):
            assert torch.equal(stacked_parameter[s], parameter[0])
        for name, value in draws.draw_chunk(alone, args, [seed], 1000, 7, "cpu", online).items():
            assert torch.equal(chunk[name][:, s], value[:, 0]), name
    name = next(name for name in chunk if name not in ("indices", "act"))
    assert not torch.equal(chunk[name][:, 0], chunk[name][:, 1])
    later = draws.draw_chunk(stacked, args, seeds, 1000, 8, "cpu", online)
    assert not torch.equal(chunk["indices"], later["indices"])
    assert ("act" in chunk) == online and chunk["indices"].shape == (50, 3, 6)


# --- Other ways to run the update ---


@pytest.mark.gpu
def test_graph_replay_equals_eager_updates_and_uses_fresh_noise(algorithm):
    agents = [make_agent(small_args(algorithm), (0, 1)).cuda() for _ in range(2)]
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
    for update in range(100):
        batch, noise = on_gpu(update)
        expected = eager(batch | noise)
        for name, value in replay(batch | noise).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-3)
    for a, b in zip(agents[0].parameters(), agents[1].parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    # The same batch with other noise gives another loss: nothing random is frozen in the graph.
    first = {name: value.clone() for name, value in replay(batch | noise).items()}
    second = replay(batch | on_gpu(7)[1])
    assert any(not torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_losses_equal_eager_ones(algorithm):
    few_steps = {
        "floq": dict(critic_flow_steps=2, actor_flow_steps=2),
        "value_flows": dict(num_flow_steps=2),
        "q_flow": dict(flow_steps=2),
        "evor": dict(flow_steps=2),
    }
    args = small_args(algorithm, **few_steps[algorithm])
    eager, compiled = make_agent(args), make_agent(args)
    graphs.compile_losses(compiled)
    for update in range(3):
        expected = eager.update(*random_inputs(eager, update=update))
        for name, value in compiled.update(*random_inputs(compiled, update=update)).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    for a, b in zip(compiled.parameters(), eager.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
