"""Updates, policies, replay and graph capture on a GPU, as far as they can be tested without one."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ALGORITHMS, ROOT, make_agents, small_args, stacked_inputs, update

from common import graphs


@pytest.fixture(scope="module")
def pretended():
    """{case: None or an error} of pretend_gpu.py, in a process of its own: a pretended device cannot be taken back."""
    command = [sys.executable, ROOT / "tests" / "pretend_gpu.py"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    return dict(json.loads(line) for line in result.stdout.splitlines())


CASES = [f"{algorithm} {phase}" for algorithm in ALGORITHMS for phase in ("offline", "online")] + ["value_flows pixels"]
CASES += ["fql", "c51", "iqn", "floq fourier", "evor published"]


@pytest.mark.parametrize("case", CASES)
def test_an_update_stays_on_the_device_and_never_waits_for_it(case, pretended):
    """Which is also what a CUDA graph needs: no copy from or to the host, no value read, no random number drawn."""
    assert pretended[case] is None


MISTAKES = {
    "reads a value": "local_scalar_dense",
    "branches on a value": "local_scalar_dense",
    "copies to the host": "copies between",
    "brings an index from the host": "copies between",
    "mixes devices": "two devices",
    "has a shape that depends on values": "nonzero",
    "draws random numbers": "draws random numbers",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_pretended_device_notices_an_update_that(mistake, pretended):
    assert MISTAKES[mistake] in pretended[f"floq {mistake}"]


# --- The logic around a CUDA graph, with a stand-in for the graph ---


class PretendGraph:
    """Stands in for torch.cuda.CUDAGraph: a replay computes from the captured inputs into the captured outputs."""

    def replay(self):
        for name, value in self.update(self.inputs).items():
            self.outputs[name].copy_(value)


class PretendStream:
    """Stands in for torch.cuda.Stream and, given a graph, for torch.cuda.graph."""

    graph = None  # being captured

    def __init__(self, graph=None):
        self.own = graph

    def __enter__(self):
        PretendStream.graph = self.own

    def __exit__(self, *_):
        PretendStream.graph = None

    def wait_stream(self, other):
        pass


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_capturing_leaves_the_agent_as_it_was_and_replays_take_fresh_inputs(algorithm, monkeypatch):
    for name in ("Stream", "current_stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, PretendStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PretendGraph)
    eager, captured = (make_agents(small_args(algorithm), (0, 1)) for _ in range(2))
    batch, noise = stacked_inputs(eager, (0, 1), 0)
    calls = []

    def capturing(inputs):
        calls.append(PretendStream.graph is not None)
        split = [{name: inputs[name] for name in names} for names in (batch, noise)]
        graph = PretendStream.graph
        if graph is None:
            return update(captured, *split)
        graph.update, graph.inputs = capturing, inputs  # while capturing, nothing is computed
        graph.outputs = {name: torch.full_like(value, torch.nan) for name, value in shapes.items()}
        return graph.outputs

    shapes = update(make_agents(small_args(algorithm), (0, 1)), batch, noise)
    replay = graphs.capture(capturing, batch | noise, captured.state_tensors())
    assert calls == [False, False, False, True]
    for number in range(3):
        batch, noise = stacked_inputs(eager, (0, 1), number)
        expected = update(eager, batch, noise)
        for name, value in replay(batch | noise).items():
            assert torch.equal(value, expected[name]), (name, number)
    for a, b in zip(eager.state_tensors(), captured.state_tensors()):
        assert torch.equal(a, b)


# --- What fails at run time ---


def graph_break(message):
    """An exception as torch.compile raises it."""
    return type("BackendCompilerFailed", (RuntimeError,), {"__module__": "torch._dynamo.exc"})(message)


def fast_update(agents, batch_names, compiled=False, captured=False):
    """A FastUpdate whose compilation and capture are stand-ins."""
    pick = lambda inputs, inside: {name: x for name, x in inputs.items() if (name in batch_names) == inside}
    split = lambda inputs: (pick(inputs, True), pick(inputs, False))
    fast = graphs.FastUpdate(agents, lambda inputs: update(agents, *split(inputs)), compile=False, cudagraphs=False)
    agents.compiled, fast.captured = compiled, captured
    return fast


@pytest.mark.parametrize("compiled, captured", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("when", ["first call", "after an update"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_updates_continue_when_compiling_or_capturing_fails(algorithm, compiled, captured, when, monkeypatch, capsys):
    """The failed attempt leaves no trace in weights and optimizer, and the updates are the eager ones."""
    eager, agents = (make_agents(small_args(algorithm), (0, 1)) for _ in range(2))
    batch, noise = stacked_inputs(eager, (0, 1))
    fast = fast_update(agents, set(batch), compiled, captured)

    def broken(*inputs):
        raise graph_break("inductor cannot\nmore lines")

    def compile(function, options):  # one loss is compiled already, in the second case
        return function if when == "after an update" and function.__name__ == "critic_loss" else broken

    def capture(update, inputs, state, saved):
        if when == "after an update":  # warm-up updates that a failed capture did not undo
            update(inputs)
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        except RuntimeError:
            raise RuntimeError("the capture was invalidated") from None  # as torch does when it ends one

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(graphs, "capture", capture)
    for number in range(3):
        batch, noise = stacked_inputs(eager, (0, 1), number)
        expected = update(eager, batch, noise)
        for name, value in fast(batch | noise).items():
            assert torch.equal(value, expected[name]), (name, number)
        assert fast.new == (number == 0)
    for a, b in zip(eager.state_tensors(), agents.state_tensors()):
        assert torch.equal(a, b)
    warnings = capsys.readouterr().err
    assert ("--compile fails here (inductor cannot); updates continue" in warnings) == compiled
    assert ("--cudagraphs fails here (operation not permitted when stream is capturing)" in warnings) == captured


@pytest.mark.parametrize("is_cuda, cudagraphs", [*itertools.product((False, True), repeat=2)])
def test_updates_are_captured_where_there_is_a_gpu_and_the_flag_says_so(is_cuda, cudagraphs):
    agents = SimpleNamespace(on_gpu=is_cuda)
    assert graphs.FastUpdate(agents, None, False, cudagraphs).captured == (is_cuda and cudagraphs)


def test_other_failures_are_not_hidden(monkeypatch, capsys):
    agents = make_agents(small_args("evor"))
    batch, noise = stacked_inputs(agents)

    def wrong(agent, batch, noise):
        raise ValueError("a mistake in the loss")

    monkeypatch.setattr(type(agents.agent), "critic_loss", wrong)
    with pytest.raises(ValueError, match="a mistake in the loss"):
        fast_update(agents, set(batch))(batch | noise)

    def too_large(agent, batch, noise):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(type(agents.agent), "critic_loss", too_large)
    monkeypatch.setattr(torch, "compile", lambda function, options: function)
    with pytest.raises(RuntimeError, match="tried to allocate"):  # which is explained, see device.explain_out_of_memory
        fast_update(agents, set(batch), compiled=True)(batch | noise)

    def capture(*inputs):  # the end of a capture in which memory ran out raises a second error
        try:
            too_large(*inputs[:3])
        finally:
            raise RuntimeError("the capture was invalidated")

    monkeypatch.setattr(graphs, "capture", capture)
    with pytest.raises(RuntimeError, match="tried to allocate"):
        fast_update(agents, set(batch), captured=True)(batch | noise)
    assert capsys.readouterr().err == ""  # the updates do not continue without a graph


def test_one_graph_for_each_set_of_inputs_and_options(monkeypatch):
    captured = []
    monkeypatch.setattr(graphs, "capture", lambda update, draws, *state: captured.append(sorted(draws)) or update)
    agents = make_agents(small_args("evor"))
    seen = []
    fast = graphs.FastUpdate(agents, lambda draws, trains: seen.append(trains) or {}, compile=False, cudagraphs=False)
    fast.captured = True
    for draws, trains in (("a", "p"), ("a", "p"), ("a", "r"), ("ab", "r"), ("ab", "r")):
        fast(dict.fromkeys(draws, 0), (trains,))
        assert len(fast.known) == 1  # the graph of a phase that is over has no memory left
    assert captured == [["a"], ["a"], ["a", "b"]]
    assert seen == [("p",), ("p",), ("r",), ("r",), ("r",)]


# --- Policies ---


def acting_inputs(agents, num_environments, device="cpu"):
    """Observations (2, P, 5) and an action's noise (2, P, ...) of two seeds."""
    generator = torch.Generator().manual_seed(num_environments)
    observations = torch.randn(2, num_environments, 5, generator=generator)
    noise = torch.stack([agents.agent.draw_act_noise(generator, num_environments) for _ in range(2)])
    return observations.to(device), noise.to(device)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_captured_policy_acts_with_the_present_weights_for_each_shape(algorithm, monkeypatch):
    captured = []

    def capture(act, inputs, state):  # as graphs.capture: its own inputs and outputs, which each replay overwrites
        assert state == []
        own = {name: value.clone() for name, value in inputs.items()}
        outputs = {name: value.clone() for name, value in act(own).items()}
        captured.append(own["observations"].shape)

        def replay(inputs):
            for name, value in own.items():
                value.copy_(inputs[name])
            for name, value in act(own).items():
                outputs[name].copy_(value)
            return outputs

        return replay

    monkeypatch.setattr(graphs, "capture", capture)
    agents = make_agents(small_args(algorithm), (0, 1))
    policy = graphs.FastPolicy(agents, "act", cudagraphs=True)
    assert not policy.captured  # there is no GPU
    policy.captured = True
    before = []
    for number in range(3):
        for num_environments in (4, 1):
            inputs = acting_inputs(agents, num_environments)
            actions = policy(*inputs)
            assert torch.equal(actions, agents.function("act")(*inputs))
        before.append(actions.clone())
        update(agents, *stacked_inputs(agents, (0, 1), number))
    assert captured == [(2, 4, 5), (2, 1, 5)]
    assert not torch.equal(before[0], before[-1])


def test_a_policy_acts_on_when_capturing_fails(monkeypatch, capsys):
    def capture(*_, **__):
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        except RuntimeError:
            raise RuntimeError("the capture was invalidated") from None

    monkeypatch.setattr(graphs, "capture", capture)
    agents = make_agents(small_args("evor"), (0, 1))
    policy, inputs = graphs.FastPolicy(agents, "act", cudagraphs=True), acting_inputs(agents, 4)
    policy.captured = True
    for _ in range(2):
        assert torch.equal(policy(*inputs), agents.function("act")(*inputs))
    warning = "--cudagraphs fails here (operation not permitted when stream is capturing); policies act without it"
    assert capsys.readouterr().err.count(warning) == 1


@pytest.mark.parametrize("captured", [False, True])
def test_a_policy_acts_where_compiling_fails(captured, monkeypatch, capsys):
    """It is not compiled again, and still captured where it can be."""
    calls = []

    def compile(function, options):
        calls.append("compile")
        raise graph_break("inductor cannot")

    def capture(act, inputs, state):
        outputs = act(inputs)
        calls.append("captured")
        return lambda inputs: calls.append("replayed") or outputs

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(graphs, "capture", capture)
    agents = make_agents(small_args("evor", compile=True), (0, 1))
    policy, inputs = graphs.FastPolicy(agents, "act", cudagraphs=True), acting_inputs(agents, 4)
    policy.captured = captured
    for _ in range(2):
        assert torch.equal(policy(*inputs), agents.function("act")(*inputs))
    assert calls == ["compile"] + captured * ["captured", "replayed", "replayed"]
    printed = capsys.readouterr()
    assert printed.err.count("--compile fails here (inductor cannot); policies act without it") == 1
    assert "the first evaluation compiles the policy" in printed.out


def test_an_error_of_the_policy_itself_is_raised():
    agents = make_agents(small_args("evor"), (0, 1))
    inputs = acting_inputs(agents, 4)
    with pytest.raises(RuntimeError):
        graphs.FastPolicy(agents, "act", cudagraphs=True)(inputs[0], inputs[1][..., :-1])


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_policy_acts_as_the_eager_one_with_the_weights_of_the_moment():
    few = dict(flow_steps=2, value_hidden_dims=(16,), actor_hidden_dims=(16,))
    agents = make_agents(small_args("evor", compile=True, **few), (0, 1))
    policy = graphs.FastPolicy(agents, "act", cudagraphs=False)
    for number in range(3):
        inputs = acting_inputs(agents, 4)
        torch.testing.assert_close(policy(*inputs), agents.function("act")(*inputs))
        update(agents, *stacked_inputs(agents, (0, 1), number))
    assert policy.compiled and len(policy.known) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_policy_captured_on_a_gpu_acts_as_the_eager_one(algorithm):
    agents = make_agents(small_args(algorithm), (0, 1), "cuda")
    policy = graphs.FastPolicy(agents, "act", cudagraphs=True)
    for number in range(3):
        for num_environments in (4, 1):
            inputs = acting_inputs(agents, num_environments, "cuda")
            torch.testing.assert_close(policy(*inputs), agents.function("act")(*inputs))
        batches = stacked_inputs(agents, (0, 1), number)
        update(agents, *[{name: value.cuda() for name, value in part.items()} for part in batches])
    assert policy.captured and len(policy.known) == 2
