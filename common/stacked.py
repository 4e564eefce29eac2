"""S agents in one process: an agent is written for one seed, and torch.vmap runs it for all of them at once."""

import contextlib
import copy
import types

import torch
from torch import nn


class Stacked:
    """S independent agents, whose weights differ by a leading seed axis (S, ...).

    Losses of different seeds are summed, so that no gradient of one reaches another.

    Args:
        make_agent: function without arguments that makes an agent, its weights drawn from torch's global generator. Its
            buffers must not depend on the seed.
        seeds: the S seeds of the initial weights; an agent's do not depend on the other seeds or on the device.
        device, learning_rate: torch device, and Adam's rate.

    Attributes:
        agent: the first agent as it began: the settings that all share. Its own weights do not train.
        parameters: {name of an agent's parameter: (S, ...)}; those whose `requires_grad` is False are left to `ema`.
        optimizer: one Adam for all of them (Adam is elementwise, so several would be the same).
        compiled: whether losses run through torch.compile.
        on_gpu: whether the weights are there.
    """

    def __init__(self, make_agent, seeds, device, learning_rate):
        agents = []
        for seed in seeds:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                agents.append(make_agent())
        self.agent, self.compiled, self.functions = agents[0], False, {}
        self.streams, self.beside = {}, None  # {loss: its CUDA stream}; {loss: trains} within `side_by_side`, else None
        stacks, _ = torch.func.stack_module_state(agents)  # {name: (S, ...)}
        self.parameters = {name: nn.Parameter(p.detach().to(device), p.requires_grad) for name, p in stacks.items()}
        self.buffers = {name: buffer.to(device) for name, buffer in self.agent.named_buffers()}

        trained = [p for p in self.parameters.values() if p.requires_grad]
        self.on_gpu = trained[0].is_cuda
        self.optimizer = torch.optim.Adam(trained, learning_rate, eps=1e-8, fused=True, capturable=self.on_gpu)
        for p in trained:  # Adam makes its state in the first step, which a CUDA graph would repeat
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.optimizer.state[p] = {"step": torch.zeros((), device=p.device)} | moments

    def backward(self, loss, batch, noise, trains):
        """Adds the gradient of a loss to the weights of the networks that it trains; all other weights are constants.

        Returns {name: (S, ...)}, the loss' values at the present weights.

        Args:
            loss: name of the agent's method that maps batch and noise to (loss, {name: value}).
            batch, noise: {name: (S, ...)}.
            trains: names of the networks, the attributes of the agent; others than it has are a ValueError.
        """
        networks = {name: name.split(".")[0] for name in self.parameters}
        if unknown := set(trains) - set(networks.values()):
            raise ValueError(f"trains={trains}: the agent has no network {', '.join(sorted(unknown))}")
        parameters = {name: p if networks[name] in trains else p.detach() for name, p in self.parameters.items()}
        with self._stream_of(loss, trains):
            losses, metrics = self._vectorised(loss, self.compiled)(parameters, batch, noise)
            losses.sum().backward()
        return {name: value.detach() for name, value in metrics.items()}

    @contextlib.contextmanager
    def side_by_side(self):
        """Losses that train different networks, none of which takes what another one returned: they have no order.

        On a GPU each has a CUDA stream, for the small kernels of one loss leave room for another's. A network that two
        of them train is a ValueError.
        """
        self.beside = {}
        try:
            yield
            if self.on_gpu:
                for loss in self.beside:
                    torch.cuda.current_stream().wait_stream(self.streams[loss])
        finally:
            self.beside = None

    def _stream_of(self, loss, trains):
        """A context: within `side_by_side` the loss' own stream, which begins after all that was launched before it."""
        if self.beside is None:
            return contextlib.nullcontext()
        for other, networks in self.beside.items():
            if shared := set(trains) & set(networks):
                raise ValueError(f"{other} and {loss}, side by side, both train {', '.join(sorted(shared))}")
        self.beside[loss] = trains
        if not self.on_gpu:
            return contextlib.nullcontext()
        stream = self.streams[loss] = self.streams.get(loss) or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(stream)

    def ema(self, target, online, tau):
        """Moves the network `target` towards the network `online`: w <- (1 - tau) w + tau w_online."""
        of = lambda network: [p for name, p in self.parameters.items() if name.split(".")[0] == network]
        with torch.no_grad():
            torch._foreach_lerp_(of(target), of(online), tau)  # all weights in one launch

    def function(self, method, compiled=False):
        """A method for all seeds, without gradients: inputs and outputs have a leading axis S.

        Args:
            method: the name of the agent's method, or a function whose first argument is the agent.
            compiled: whether it runs through torch.compile, which a name can do only.
        """

        @torch.no_grad()
        def stacked(*inputs):
            return self._vectorised(method, compiled)(self.parameters, *inputs)

        stacked.__name__ = method if isinstance(method, str) else method.__name__
        return stacked

    def _vectorised(self, method, compiled):
        """f(parameters, inputs) -> what the agent's method returns for these inputs; all with a leading axis S."""
        if (method, compiled) not in self.functions:
            caller = _Caller(self.agent, getattr(type(self.agent), method) if isinstance(method, str) else method)

            def one_agent(parameters, *inputs):
                named = {f"agent.{name}": value for name, value in (parameters | self.buffers).items()}
                return torch.func.functional_call(caller, named, inputs)

            vectorised = torch.vmap(one_agent)

            def stacked(parameters, *inputs):
                return vectorised(parameters, *inputs)

            if compiled:
                # torch keeps a few compiled forms per code object, so each loss has its own. An agent's code and
                # settings do not change once it trains, so only tensors are checked for changes at each call.
                code = stacked.__code__.replace(co_name=method)
                own = types.FunctionType(code, globals(), method, None, stacked.__closure__)
                # On GPUs the fusion of row with column reductions can give wrong gradients (pytorch's issue 195845).
                options = {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe}
                stacked = torch.compile(own, options=options | {"triton.mix_order_reduction": False})
            self.functions[method, compiled] = stacked
        return self.functions[method, compiled]

    def keep(self, networks):
        """Drops the weights of all other networks; what uses one of them anyway gets NaN."""
        self.parameters = {name: p for name, p in self.parameters.items() if name.split(".")[0] in networks}
        for name, p in self.agent.named_parameters():
            if name not in self.parameters:
                p.data.fill_(torch.nan)

    def only(self, index):
        """The agent with this index alone, for acting."""
        alone = copy.copy(self)
        alone.parameters = {name: p[index : index + 1] for name, p in self.parameters.items()}  # (1, ...)
        return alone

    def state_tensors(self):
        """Every tensor that an update changes."""
        adam = [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        return [*self.parameters.values(), *adam]

    def state_dict(self):
        """Weights and Adam's moments for a checkpoint: {"agent": {name: (S, ...)}, "optimizer": ...}."""
        weights = {name: p.detach() for name, p in self.parameters.items()}
        return {"agent": weights, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, saved):
        """Takes over a checkpoint's weights and, if it has them, moments; Adam's settings stay this device's.

        Weights of other names or shapes raise a RuntimeError.
        """
        weights = saved["agent"]
        wrong = sorted(weights.keys() ^ self.parameters.keys())
        wrong += [name for name, p in self.parameters.items() if name in weights and weights[name].shape != p.shape]
        if wrong:
            raise RuntimeError(f"the checkpoint's weights do not fit this agent: {', '.join(wrong)}")
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(weights[name])
        if "optimizer" in saved:
            settings = {"param_groups": self.optimizer.state_dict()["param_groups"]}
            self.optimizer.load_state_dict(saved["optimizer"] | settings)


class _Caller(nn.Module):
    """A method of an agent as a module, which is what torch.func.functional_call calls."""

    def __init__(self, agent, method):
        super().__init__()
        self.agent, self.method = agent, method

    def forward(self, *inputs):
        return self.method(self.agent, *inputs)
