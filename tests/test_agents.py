"""What all algorithms have in common: MLP, initial weights, whose gradients go where, EMA, targets, stacked seeds."""

import contextlib
import math
import shutil
import types

import numpy as np
import pytest
import torch
from conftest import (
    EVERY,
    gradients,
    make_agent,
    make_agents,
    networks,
    random_inputs,
    small_args,
    stacked_inputs,
    update,
)

from common import graphs
from common.draws import Draws
from common.stacked import Stacked

pytestmark = pytest.mark.parametrize("algorithm", EVERY)

CRITICS = {
    "floq": {"critic_flow", "critic"},
    "value_flows": {"critic_flow"},
    "q_flow": {"critic", "inner_value"},
    "evor": {"critic_flow"},
    "fql": {"critic"},
    "c51": {"critic"},
    "iqn": {"critic"},
}
POLICIES = {
    "floq": {"actor_bc_flow", "actor_onestep_flow"},
    "value_flows": {"actor_flow", "actor_onestep_flow"},
    "q_flow": {"actor_flow"},
    "evor": {"actor_flow"},
    "fql": {"actor_bc_flow", "actor_onestep_flow"},
    "c51": {"actor_flow"},
    "iqn": {"actor_flow"},
}
TARGETS = {
    "floq": ("target_critic_flow", "critic_flow"),
    "value_flows": ("target_critic_flow", "critic_flow"),
    "q_flow": ("target_critic", "critic"),
    "evor": ("target_critic_flow", "critic_flow"),
    "fql": ("target_critic", "critic"),
    "c51": ("target_critic", "critic"),
    "iqn": ("target_critic", "critic"),
}
# The network that each part of the losses moves, alone.
MOVED_BY = {
    "floq": {
        "critic/floq_loss": "critic_flow",
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
    "fql": {
        "critic/critic_loss": "critic",
        "actor/bc_flow_loss": "actor_bc_flow",
        "actor/distill_loss": "actor_onestep_flow",
        "actor/q_loss": "actor_onestep_flow",
    },
    "c51": {"critic/critic_loss": "critic", "actor/bc_flow_loss": "actor_flow"},
    "iqn": {"critic/critic_loss": "critic", "actor/bc_flow_loss": "actor_flow"},
}


# --- Networks ---


def test_mlp_equals_the_plain_formula(algorithm):
    mlp = EVERY[algorithm].MLP((4, 8, 8, 1), layer_norm=True, ensemble=(3,))
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.normal_()
    for x in (torch.randn(5, 4), torch.randn(3, 5, 4)):  # rows that all networks share, and each one's own
        h = x
        for i in range(2):
            h = torch.nn.functional.gelu(h @ mlp.weights[i] + mlp.biases[i], approximate="tanh")
            h = (h - h.mean(-1, keepdim=True)) / torch.sqrt(h.var(-1, unbiased=False, keepdim=True) + 1e-6)
            h = h * mlp.scales[i] + mlp.shifts[i]
        expected = h @ mlp.weights[2] + mlp.biases[2]
        torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mlp(x[..., :3], x[..., 3:]), expected, rtol=1e-4, atol=1e-4)
    shared, own = torch.randn(5, 3), torch.randn(3, 5, 1)
    expected = mlp(torch.cat([shared.expand(3, -1, -1), own], dim=-1))
    torch.testing.assert_close(mlp(shared, own), expected, rtol=1e-4, atol=1e-4)


def test_weights_are_glorot_uniform_with_zero_biases(algorithm):
    mlp = EVERY[algorithm].MLP((64, 256, 1), layer_norm=True, ensemble=(2,))
    bound = math.sqrt(6 / (64 + 256))
    for member in mlp.weights[0]:
        assert member.abs().max() <= bound
        np.testing.assert_allclose(member.std().item(), bound / math.sqrt(3), rtol=0.02)
    assert not torch.equal(mlp.weights[0][0], mlp.weights[0][1])
    assert all((bias == 0).all() for bias in mlp.biases)


def test_targets_start_as_copies(algorithm):
    agent = EVERY[algorithm].Agent(small_args(algorithm), 5, 3, -1.0, 0.0)
    target, online = (getattr(agent, name) for name in TARGETS[algorithm])
    for a, b in zip(target.parameters(), online.parameters()):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
        assert b.requires_grad and not a.requires_grad


# --- Gradients and EMA ---


def backward(algorithm, agents, loss):
    """One loss's part of the update alone."""
    trains = (CRITICS if loss == "critic_loss" else POLICIES)[algorithm]
    return agents.backward(loss, *stacked_inputs(agents), trains=trains)


def test_the_update_trains_with_each_loss_its_own_networks(algorithm, monkeypatch):
    agents, calls = make_agents(small_args(algorithm)), []
    original = agents.backward
    watch = lambda loss, *inputs, trains: calls.append((loss, set(trains))) or original(loss, *inputs, trains=trains)
    monkeypatch.setattr(agents, "backward", watch)
    update(agents, *stacked_inputs(agents))
    assert calls == [("critic_loss", CRITICS[algorithm]), ("actor_loss", POLICIES[algorithm])]


@pytest.mark.parametrize("loss", ["critic_loss", "actor_loss"])
def test_a_loss_moves_the_networks_that_it_trains_and_no_other(algorithm, loss):
    agents = make_agents(small_args(algorithm))
    backward(algorithm, agents, loss)
    assert networks(gradients(agents)) == (CRITICS if loss == "critic_loss" else POLICIES)[algorithm]


def test_each_part_of_the_losses_moves_one_network(algorithm):
    """With every network it reaches allowed to move, but those that the other loss trains."""
    for part, network in MOVED_BY[algorithm].items():
        agent = make_agent(small_args(algorithm))
        loss = "critic_loss" if part.startswith("critic/") else "actor_loss"
        trained = (CRITICS if loss == "critic_loss" else POLICIES)[algorithm]
        for name, parameter in agent.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in trained)
        getattr(agent, loss)(*random_inputs(agent))[1][part].backward()
        assert networks(gradients(agent)) == {network}, part


def test_every_weight_of_online_networks_moves_and_targets_only_by_ema(algorithm):
    agents = make_agents(small_args(algorithm, tau=0.3))
    before = {name: p.detach().clone() for name, p in agents.parameters.items()}
    update(agents, *stacked_inputs(agents))
    target, online = TARGETS[algorithm]
    for name, parameter in agents.parameters.items():
        assert not torch.equal(parameter, before[name]), name
        # The EMA takes the weights before the step: targets lag by one update, as in the released code.
        if name.startswith(target + "."):
            torch.testing.assert_close(parameter, 0.3 * before[name.replace(target, online)] + 0.7 * before[name])
        assert parameter.is_leaf and parameter.requires_grad == (not name.startswith(target + "."))


# --- Targets ---


def test_terminal_rows_have_their_reward_as_target(algorithm):
    agent = make_agent(small_args(algorithm))
    batch, noise = random_inputs(agent)
    batch["masks"] = torch.zeros_like(batch["masks"])
    target = agent.critic_loss(batch, noise)[1]["critic/target_mean"]
    rewards = batch["rewards"] - (noise["return"].squeeze(-1) if algorithm == "evor" else 0)  # evor's is a velocity
    torch.testing.assert_close(target, rewards.mean())


# --- Random numbers ---

UNIFORM = {
    "floq": {"next_start", "start", "time", "bc_time"},
    "value_flows": {"time", "bc_time"},
    "q_flow": {"value_time", "policy_time"},
    "evor": {"time", "bc_time"},
    "fql": {"bc_time"},
    "c51": {"bc_time"},
    "iqn": {"next_q", "next_level", "level", "bc_time"},
}


def test_random_numbers_are_normal_or_uniform_and_independent(algorithm):
    """Parity and closed forms are given their random numbers; here are the distributions that updates draw from."""
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
        dict(normalize_q_loss=True, train_at_zero_only=True, q_agg="min", time_embedding="fourier"),
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
    "fql": [{}, dict(normalize_q_loss=True, q_agg="min", layer_norm=False, actor_layer_norm=True, num_ensembles=3)],
    "c51": [{}, dict(loss="cross_entropy", q_agg="min", num_samples=1, num_atoms=11, clip_flow_actions=False)],
    "iqn": [{}, dict(quantile_agg="min", num_samples=1, num_quantiles=3, kappa=0.1, value_layer_norm=False)],
}


def test_stacked_seeds_equal_each_seed_alone(algorithm):
    """The update's losses and weights, and actions."""
    seeds = (3, 4, 5)
    for changes in STACKED[algorithm]:
        args = small_args(algorithm, **changes)
        stacked, alone = make_agents(args, seeds), [make_agents(args, (seed,)) for seed in seeds]
        for number in range(3):
            out = update(stacked, *stacked_inputs(stacked, seeds, number))
            for s, seed in enumerate(seeds):
                for name, value in update(alone[s], *stacked_inputs(alone[s], (seed,), number)).items():
                    torch.testing.assert_close(out[name][s], value[0], rtol=1e-4, atol=1e-5)
        noise = torch.stack([stacked.agent.draw_act_noise(torch.Generator().manual_seed(s), 7) for s in seeds])
        observations = torch.randn(3, 7, 5)
        actions = stacked.function("act")(observations, noise)
        for s in range(3):
            own = alone[s].function("act")(observations[s : s + 1], noise[s : s + 1])
            torch.testing.assert_close(actions[s], own[0], rtol=1e-4, atol=1e-5)
            for name, parameter in stacked.parameters.items():
                torch.testing.assert_close(parameter[s], alone[s].parameters[name][0], rtol=0, atol=1e-5)


def test_one_stacked_agent_is_the_agent_itself(algorithm):
    """Losses and actions of the vectorised agent are those of the plain module."""
    args = small_args(algorithm)
    agent, agents = make_agent(args, 3), make_agents(args, (3,))
    batch, noise = random_inputs(agent, 3)
    for loss in ("critic_loss", "actor_loss"):
        _, metrics = getattr(agent, loss)(batch, noise)
        for name, value in agents.function(loss)(*stacked_inputs(agents, (3,)))[1].items():
            torch.testing.assert_close(value[0], metrics[name], rtol=1e-5, atol=1e-6)
    noise = agent.draw_act_noise(torch.Generator(), 7)
    observations = torch.randn(7, 5)
    acted = agents.function("act")(observations.unsqueeze(0), noise.unsqueeze(0))
    torch.testing.assert_close(acted[0], agent.act(observations, noise), rtol=1e-5, atol=1e-6)
    assert not acted.requires_grad


def test_a_network_that_the_agent_lacks_is_not_trained_in_silence(algorithm):
    agents, (network, *_) = make_agents(small_args(algorithm)), CRITICS[algorithm]
    for trains in ((network, "critc"), network, f"{network}s"):
        with pytest.raises(ValueError, match="the agent has no network"):
            agents.backward("critic_loss", *stacked_inputs(agents), trains=trains)


class Streams:
    """Stands in for CUDA's streams: notes what each one launches, and which one waits for which."""

    def __init__(self, monkeypatch):
        self.events, self.made, self.current = [], 0, "main"
        monkeypatch.setattr(torch.cuda, "Stream", self.make)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.named(self.current))
        monkeypatch.setattr(torch.cuda, "stream", self.within)

    def named(self, name):
        wait = lambda other: self.events.append(f"{name} waits for {other.name}")
        return types.SimpleNamespace(name=name, wait_stream=wait)

    def make(self):
        self.made += 1
        return self.named(f"side {self.made}")

    @contextlib.contextmanager
    def within(self, stream):
        before, self.current = self.current, stream.name
        yield
        self.current = before

    def watch(self, monkeypatch, where, what):
        original = getattr(where, what)
        note = lambda *inputs, **named: self.events.append(f"{self.current}: {what}") or original(*inputs, **named)
        monkeypatch.setattr(where, what, note)


def test_on_a_gpu_each_loss_has_a_stream_and_the_rest_waits_for_both(algorithm, monkeypatch):
    agents, alone = (make_agents(small_args(algorithm)) for _ in range(2))
    streams = Streams(monkeypatch)
    agents.on_gpu = True
    for loss in ("critic_loss", "actor_loss"):
        streams.watch(monkeypatch, type(agents.agent), loss)
    for where, what in ((agents, "ema"), (agents.optimizer, "step")):
        streams.watch(monkeypatch, where, what)
    for number in range(2):
        update(agents, *stacked_inputs(agents, update=number))
        before = ["side 1 waits for main", "side 1: critic_loss", "side 2 waits for main", "side 2: actor_loss"]
        after = ["main waits for side 1", "main waits for side 2", "main: ema", "main: step"]
        assert streams.events == before + after
        streams.events.clear()
    for number in range(2):
        update(alone, *stacked_inputs(alone, update=number))
    assert all(torch.equal(a, b) for a, b in zip(agents.state_tensors(), alone.state_tensors()))


def test_losses_side_by_side_train_different_networks(algorithm):
    agents, (network, *_) = make_agents(small_args(algorithm)), CRITICS[algorithm]
    inputs = stacked_inputs(agents)
    for _ in range(2):  # a refusal leaves nothing behind
        with pytest.raises(ValueError, match=f"critic_loss and actor_loss, side by side, both train {network}"):
            with agents.side_by_side():
                agents.backward("critic_loss", *inputs, trains=(network,))
                agents.backward("actor_loss", *inputs, trains=(network,))
    for _ in range(2):  # one after the other they may
        agents.backward("critic_loss", *inputs, trains=(network,))


def test_a_file_of_ones_own_may_use_any_module(algorithm):
    """Layers of torch start from the seed like the files' own, and train."""
    module = EVERY[algorithm]

    class Mine(module.Agent):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.extra = torch.nn.Linear(2, 3)

        def critic_loss(self, batch, noise):
            loss, metrics = super().critic_loss(batch, noise)
            return loss + self.extra(batch["actions"][:, :2]).square().mean(), metrics

    args = small_args(algorithm)
    agents = Stacked(lambda: Mine(args, 5, 3, -1.0, 0.0), (3, 4), "cpu", 1e-3)
    alone = Stacked(lambda: Mine(args, 5, 3, -1.0, 0.0), (4,), "cpu", 1e-3)
    weight = agents.parameters["extra.weight"]
    assert weight.shape == (2, 3, 2) and torch.equal(weight[1], alone.parameters["extra.weight"][0])
    assert weight.abs().min() > 0 and not torch.equal(weight[0], weight[1])
    agents.backward("critic_loss", *stacked_inputs(agents, (3, 4)), trains=("extra",))
    assert set(gradients(agents)) == {"extra.weight", "extra.bias"}


@pytest.mark.parametrize("online", [False, True])
def test_stacked_seeds_start_and_draw_as_each_seed_alone(algorithm, online):
    args, seeds = small_args(algorithm), [3, 4, 5]
    stacked = make_agents(args, seeds)
    draw = Draws(stacked.agent, args, seeds, 1000, "cpu")
    chunk = draw.chunk(7, online)
    for s, seed in enumerate(seeds):
        alone = make_agents(args, (seed,))
        for name, parameter in stacked.parameters.items():
            assert torch.equal(parameter[s], alone.parameters[name][0]), name
        for name, value in Draws(alone.agent, args, [seed], 1000, "cpu").chunk(7, online).items():
            assert torch.equal(chunk[name][:, s], value[:, 0]), name
    name = next(name for name in chunk if name not in ("indices", "act"))
    assert not torch.equal(chunk[name][:, 0], chunk[name][:, 1])
    later = draw.chunk(8, online)["indices"]
    assert not torch.equal(chunk["indices"], later) and not torch.equal(chunk["indices"][:, 1], later[:, 0])
    for name, value in draw(7 * 50 + 3, online).items():
        assert torch.equal(value, chunk[name][3]), name
    assert ("act" in chunk) == online and chunk["indices"].shape == (50, 3, 6)
    indices = chunk["indices"]
    assert 2**61 < indices.max() < 2**62 if online else indices.min() < 10 and 990 < indices.max() < 1000


def test_a_checkpoint_of_other_networks_is_refused_by_name(algorithm):
    small, large = make_agents(small_args(algorithm)), make_agents(small_args(algorithm, actor_hidden_dims=(16, 17)))
    with pytest.raises(RuntimeError, match=r"do not fit this agent: actor_\w+\.(mlp\.)?"):
        large.load_state_dict(small.state_dict())
    saved = small.state_dict()
    saved["agent"] = {name: value for name, value in saved["agent"].items() if not name.endswith("biases.0")}
    with pytest.raises(RuntimeError, match="biases.0"):
        small.load_state_dict(saved)


# --- Other ways to run the update ---


@pytest.fixture
def deterministic(monkeypatch):
    """Deterministic algorithms, as in a run: the compiler writes other kernels without them."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def split_inputs(agents, batch_names):
    """The update as a function of batch and noise in one dictionary."""
    pick = lambda inputs, inside: {k: v for k, v in inputs.items() if (k in batch_names) == inside}
    return lambda inputs: update(agents, pick(inputs, True), pick(inputs, False))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_graph_replay_equals_eager_updates_and_uses_fresh_noise(algorithm, compiled, deterministic):
    agents = [make_agents(small_args(algorithm), (0, 1), "cuda") for _ in range(2)]
    agents[1].compiled = compiled
    on_gpu = lambda n: [{k: v.cuda() for k, v in d.items()} for d in stacked_inputs(agents[0], (0, 1), n)]
    batch, noise = on_gpu(0)
    eager, captured = (split_inputs(a, set(batch)) for a in agents)
    replay = graphs.capture(captured, batch | noise, agents[1].state_tensors())
    for number in range(100):
        batch, noise = on_gpu(number)
        expected = eager(batch | noise)
        for name, value in replay(batch | noise).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-3)
    for name, parameter in agents[0].parameters.items():
        torch.testing.assert_close(parameter, agents[1].parameters[name], rtol=0, atol=1e-4)
    # The same batch with other noise gives another loss: nothing random is frozen in the graph.
    first = {name: value.clone() for name, value in replay(batch | noise).items()}
    second = replay(batch | on_gpu(7)[1])
    assert any(not torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
def test_losses_side_by_side_are_those_that_take_turns(algorithm, captured, deterministic, monkeypatch):
    side_by_side, in_turn = (make_agents(small_args(algorithm), (0, 1), "cuda") for _ in range(2))
    monkeypatch.setattr(in_turn, "side_by_side", contextlib.nullcontext)
    on_gpu = lambda n: [{k: v.cuda() for k, v in d.items()} for d in stacked_inputs(in_turn, (0, 1), n)]
    batch, noise = on_gpu(0)
    updates = [split_inputs(agents, set(batch)) for agents in (side_by_side, in_turn)]
    if captured:
        agents = (side_by_side, in_turn)
        updates = [graphs.capture(u, batch | noise, a.state_tensors()) for u, a in zip(updates, agents)]
    for number in range(100):
        batch, noise = on_gpu(number)
        one, other = (u(batch | noise) for u in updates)
        assert all(torch.equal(one[name], other[name]) for name in other)
    assert all(torch.equal(a, b) for a, b in zip(side_by_side.state_tensors(), in_turn.state_tensors()))


def test_the_compiler_leaves_out_a_fusion_that_can_give_wrong_gradients(algorithm, monkeypatch):
    """pytorch's issues 193061 and 195845, of GPUs; with the option off no kernel has that fusion."""
    taken = []
    monkeypatch.setattr(torch, "compile", lambda function, options: taken.append(options) or function)
    agents = make_agents(small_args(algorithm))
    agents.compiled = True
    update(agents, *stacked_inputs(agents))
    assert len(taken) == 2 and all(options["triton.mix_order_reduction"] is False for options in taken)


@pytest.mark.gpu
def test_compiled_gradients_of_the_published_size_equal_eager_ones(algorithm, deterministic, device="cuda"):
    compiled, eager = (make_agents(EVERY[algorithm].Args(), (0, 1), device) for _ in range(2))
    compiled.compiled = True
    inputs = [{name: value.to(device) for name, value in part.items()} for part in stacked_inputs(eager, (0, 1))]
    for agents in (compiled, eager):
        update(agents, *inputs)
    mine, theirs = gradients(compiled), gradients(eager)
    assert mine.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert (mine[name] - expected).norm() <= 1e-3 * expected.norm(), name


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_losses_equal_eager_ones(algorithm):
    few_steps = {  # and one hidden layer: compiling takes long
        "floq": dict(critic_flow_steps=2, actor_flow_steps=2, block_depth=1),
        "value_flows": dict(num_flow_steps=2),
        "q_flow": dict(flow_steps=2),
        "evor": dict(flow_steps=2),
        "fql": dict(actor_flow_steps=2),
        "c51": dict(num_flow_steps=1),
        "iqn": dict(num_flow_steps=1),
    }
    layers = dict(value_hidden_dims=(16,), actor_hidden_dims=(16,))
    args, seeds = small_args(algorithm, **few_steps[algorithm], **layers), (0, 1)
    eager, compiled = make_agents(args, seeds), make_agents(args, seeds)
    compiled.compiled = True
    for number in range(3):
        expected = update(eager, *stacked_inputs(eager, seeds, number))
        for name, value in update(compiled, *stacked_inputs(compiled, seeds, number)).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    for name, parameter in compiled.parameters.items():
        torch.testing.assert_close(parameter, eager.parameters[name], rtol=0, atol=1e-5)
