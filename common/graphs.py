"""Faster updates and policies: compiled losses, and CUDA graphs (on the CPU both are called as they are)."""

import gc

import torch

from common import warn


class FastUpdate:
    """An update of the agents, its losses compiled and, on a GPU, the whole of it replayed as one CUDA graph.

    Where compiling or capturing fails, a warning says so and the updates continue without it. `update` is a function of
    a dictionary of tensors and of options (strings, or tuples of them) that updates the agents (of common/stacked.py)
    and returns a dictionary of tensors.
    """

    def __init__(self, agents, update, compile, cudagraphs):
        self.agents, self.update = agents, update
        agents.compiled = compile
        if compile:  # later runs find torch's cache (TORCHINDUCTOR_CACHE_DIR, else in the system's temporary directory)
            print("compiling the losses: up to two minutes, less in later runs (disable with --no-compile)", flush=True)
        self.captured = cudagraphs and agents.on_gpu
        self.known = {}  # an update for each set of inputs and options; of captured ones the last only
        self.new = False  # whether the last call compiled or captured, and so took longer than an update does

    def __call__(self, draws, *options):
        """One update; on a GPU the next call overwrites what it returns."""
        key = (*draws, *options)
        self.new = key not in self.known
        if not self.new:
            return self.known[key](draws)
        update = lambda draws: self.update(draws, *options)
        state = self.agents.state_tensors()
        saved = [tensor.detach().clone() for tensor in state]
        while True:
            try:
                if self.captured:
                    self.known.clear()  # a run's phases do not come back; their graphs would keep their memory
                self.known[key] = capture(update, draws, state, saved) if self.captured else update
                return self.known[key](draws)
            except Exception as error:  # torch has an exception for each way of failing
                if memory := [e for e in (error, error.__context__) if "ried to allocate" in str(e)]:
                    raise memory[0] from None
                if not (self.agents.compiled or self.captured):
                    raise
                flag, cause = what_failed(error, self.agents.compiled, self.captured)
                if flag == "compile":
                    self.agents.compiled = False
                else:
                    self.captured = False
                with torch.no_grad():
                    torch._foreach_copy_(state, saved)
                warn_of_failure(flag, cause, "updates continue")
                del cause  # its traceback holds what the failed attempt has allocated


class FastPolicy:
    """A policy of the agents (of common/stacked.py, by its method's name), on a GPU replayed as one CUDA graph.

    Eager, an action of ten flow steps launches hundreds of kernels from Python, which takes longer than the
    environments' step. There is one graph for each shape of the inputs; it acts with the agents' present weights.
    An agent whose actions have much to compute says so (`COMPILE_ACT`): with --compile they are compiled, too. Where
    one of both fails, a warning says so and policies act without it.
    """

    def __init__(self, agents, method, cudagraphs):
        self.agents, self.method, self.known = agents, method, {}
        self.compiled = agents.agent.args.compile and getattr(agents.agent, "COMPILE_ACT", False)
        self.captured = cudagraphs and agents.on_gpu
        if self.compiled:
            print("the first evaluation compiles the policy: up to a minute, less in later runs", flush=True)

    def __call__(self, observations, noise):
        """Actions (S, N, A); on a GPU the next call overwrites them."""
        inputs, shapes = {"observations": observations, "noise": noise}, (observations.shape, noise.shape)
        while shapes not in self.known:
            try:
                self.known[shapes] = self._prepare(inputs)
            except Exception as error:  # torch has an exception for each way of failing
                flag, cause = what_failed(error, self.compiled, self.captured)
                if flag == "compile":
                    self.compiled = False
                else:
                    self.captured = False
                warn_of_failure(flag, cause, "policies act")
                del cause  # its traceback holds what the failed attempt has allocated
        return self.known[shapes](inputs)["actions"]

    def _prepare(self, inputs):
        """The policy for inputs of these shapes, compiled and captured as it can be."""
        policy = self.agents.function(self.method, self.compiled)
        act = lambda inputs: {"actions": policy(*inputs.values())}
        if self.captured:
            return capture(act, inputs, state=[])
        if self.compiled:
            act(inputs)  # which compiles it
        return act


def what_failed(error, compiled, captured):
    """The flag that an error came from, "compile" or "cudagraphs", one of them being on, and the error's cause."""
    cause = error.__context__ or error  # a broken capture raises a second error when it ends
    compiler = ("torch._dynamo", "torch._inductor", "triton")
    by_compiler = any(type(e).__module__.startswith(compiler) for e in (error, cause))
    flag = "compile" if compiled and (by_compiler or not captured) else "cudagraphs"
    return flag, error if by_compiler else cause


def warn_of_failure(flag, error, who):
    """Warns that --FLAG failed with this error; `who` says what goes on without it: "policies act"."""
    reason = next((line for line in str(error).splitlines() if line), type(error).__name__)
    warn(f"--{flag} fails here ({reason}); {who} without it, more slowly (--no-{flag} silences this)")


def capture(update, inputs, state, saved=None):
    """Captures `update(inputs)` in a CUDA graph, so that an update costs one launch instead of hundreds.

    Returns a function like `update`. On a GPU its outputs live in the graph's memory: the next call overwrites them.

    Args:
        update: function of a dictionary of tensors that changes `state` in place and returns a dictionary of tensors;
            no host synchronisation, no random numbers.
        inputs: example inputs, of the shapes that every call will have.
        state: every tensor that `update` changes (weights, targets, optimizer state); none for a policy.
        saved: copies of them, with which they are left; None for their present values.
    """
    saved = [tensor.detach().clone() for tensor in state] if saved is None else saved
    static_inputs = {name: value.clone() for name, value in inputs.items()}
    # Libraries allocate their workspaces in the first calls, which must not be captured; their effect is undone.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            update(static_inputs)
    torch.cuda.current_stream().wait_stream(stream)
    if state:
        with torch.no_grad():
            torch._foreach_copy_(state, saved)
    gc.collect()  # so that no memory is freed within the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):  # which a failed capture would change
        outputs = update(static_inputs)

    def replay(inputs):
        torch._foreach_copy_(list(static_inputs.values()), [inputs[name] for name in static_inputs])
        graph.replay()
        return outputs

    return replay
