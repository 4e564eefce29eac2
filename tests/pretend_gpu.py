"""Runs the algorithms' updates and policies on an accelerator that does not exist, and prints what went wrong there.

    python tests/pretend_gpu.py     # one line of JSON a case: [name, null or an error]

torch computes shapes and devices only (fake tensors, on the device "pretend"). It raises where an operation mixes the
devices of its inputs, or where the host would need a value (item, bool, nonzero), which stops a GPU and cannot be
captured in a CUDA graph; so does this script where an update copies between devices or draws random numbers. The last
cases are floq's with a mistake, which must be noticed.
"""

import json
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from conftest import ALGORITHMS, EVERY, small_args  # noqa: E402

from common.replay import Replay  # noqa: E402
from common.stacked import Stacked  # noqa: E402

S, ACTION_DIM, N = 2, 3, 50  # seeds, dimension of an action, transitions of the dataset
STATE, FRAME, FRAME_STACK = (7,), (16, 16, 3), (16, 16, 9)

# What an update must not do with a tensor of the device.
MISTAKES = {
    "reads a value": lambda x: x.max().item(),
    "branches on a value": lambda x: bool(x.max() > 0),
    "copies to the host": lambda x: x.cpu(),
    "brings an index from the host": lambda x: x[torch.zeros(2, dtype=torch.int64)],
    "mixes devices": lambda x: x + torch.zeros(1),
    "has a shape that depends on values": lambda x: x[x > 0],
    "draws random numbers": lambda x: torch.randn_like(x),
}


class Strict(TorchDispatchMode):
    """Counts operations; raises where one copies between devices or draws random numbers."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket._qualified_op_name.startswith("aten::"):
            self.operations += 1
            if torch.Tag.nondeterministic_seeded in function.tags:
                raise RuntimeError(f"{function} draws random numbers")
            tensors = [x for x in tree_leaves((args, kwargs, out)) if torch.is_tensor(x)]
            devices = {x.device.type for x in tensors if x.ndim or "copy" in str(function)}  # else 0-d ones are numbers
            if len(devices) > 1:
                raise RuntimeError(f"{function} copies between {sorted(devices)}")
        return out


def check(algorithm, online=False, pixels=False, mistake=lambda x: None, device="pretend:0", **settings):
    """An update and an action of two seeds and, online, a transition of theirs into the replay buffer."""
    args, generator = small_args(algorithm, **settings), torch.Generator()
    obs_dim = FRAME_STACK if pixels else STATE[0]
    module = EVERY[algorithm]
    make_agent = lambda: module.Agent(args, obs_dim, ACTION_DIM, -1.0, 0.0)
    agents = Stacked(make_agent, range(S), device, args.learning_rate)
    agent = agents.agent

    observations = torch.zeros(N, *FRAME, dtype=torch.uint8) if pixels else torch.rand(N, *STATE)
    dataset = {"observations": observations, "next_observations": observations, "actions": torch.rand(N, ACTION_DIM)}
    dataset |= {"rewards": torch.rand(N), "masks": torch.rand(N)}
    dataset |= {"starts": torch.zeros(N, dtype=torch.int64)} if pixels else {}
    dataset = {key: value.to(device) for key, value in dataset.items()}
    replay = Replay(dataset, S, 10 * online)

    inputs = {"indices": torch.zeros(S, args.batch_size, dtype=torch.int64)}
    inputs |= {key: value.expand(S, *value.shape[1:]) for key, value in agent.draw_noise(generator, 1).items()}
    inputs |= {"count": torch.full((), 3)} if online else {}
    inputs = {key: value.to(device) for key, value in inputs.items()}
    act_noise = torch.stack([agent.draw_act_noise(generator, 1) for _ in range(S)]).to(device)
    now = torch.zeros(S, 1, *(FRAME_STACK if pixels else STATE), device=device)

    with Strict() as strict:
        mistake(dataset["rewards"])
        metrics = module.update(agents, *replay.inputs(inputs))
        metrics = torch.stack(tuple(metrics.values()))
        actions = agents.function("act")(now, act_noise).squeeze(1)
        if online:
            replay.append({key: value[:S] for key, value in dataset.items()} | {"actions": actions})
    assert strict.operations > 500, strict.operations
    for tensor in (metrics, actions, *agents.state_tensors(), *replay.rows.values()):
        assert tensor.device.type == "pretend", tensor


def main():
    cases = {f"{name} {phase}": (name, phase == "online") for name in ALGORITHMS for phase in ("offline", "online")}
    cases |= {"value_flows pixels": ("value_flows", False, True)}
    cases |= {f"floq {mistake}": ("floq", False, False, action) for mistake, action in MISTAKES.items()}
    cases |= {name: (name,) for name in ("fql", "c51", "iqn", "floq fourier", "evor published")}
    settings = {"floq fourier": dict(time_embedding="fourier")}
    settings["evor published"] = dict(td_target="published", latents="target")
    for name, arguments in cases.items():
        try:
            check(arguments[0].split()[0], *arguments[1:], **settings.get(name, {}))
            error = None
        except Exception as exception:  # each kind of mistake has its own
            error = f"{type(exception).__name__}: {exception}"
        print(json.dumps([name, error]), flush=True)


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend(rename="pretend")
    FakeTensorMode.__deepcopy__ = lambda mode, memo: mode  # a deep copy of a fake tensor belongs to the same mode
    with FakeTensorMode():
        main()
