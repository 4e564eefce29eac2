"""Parity with the authors' agents: recorded updates on small random problems (see tests/parity/README.md).

Every `<method>*.npz` in the folder PARITY_DIR (default: tests/parity) whose method is built runs, sizes and settings
read from its `meta`.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import floq

PARITY_DIR = Path(os.environ.get("PARITY_DIR", Path(__file__).parent / "parity"))
CASES = sorted(PARITY_DIR.glob("floq*.npz"))


def make_floq(meta, seeds):
    """The floq agent of a recorded case."""
    hidden = tuple(meta["hidden"])
    same_name = (
        "tau", "q_agg", "alpha", "actor_flow_steps", "critic_flow_steps", "normalize_q_loss", "flow_num_ensembles",
        "distill_num_ensembles", "noise_samples", "noise_coverage", "num_bins", "sigma", "reward_offset", "layer_norm",
        "actor_layer_norm", "use_prob_embed", "use_resnets", "num_transformations", "train_at_zero_only",
    )  # fmt: skip
    settings = {name: meta[name] for name in same_name if name in meta}
    settings |= dict(batch_size=meta["B"], gamma=meta["discount"], learning_rate=meta["lr"])
    settings |= dict(block_width=meta.get("block_width", hidden[0]), block_depth=meta.get("block_depth", len(hidden)))
    settings |= dict(value_hidden_dims=hidden, actor_hidden_dims=hidden)
    if not meta.get("time_embedding", "cos").startswith("cos(t)"):
        settings["time_embedding"] = "fourier"
    args = replace(floq.Args(), **settings)
    agent = floq.Agent(args, meta["obs_dim"], meta["action_dim"], seeds, meta["min_reward"], meta["max_reward"])
    agent.make_optimizer()
    return agent


def parameter_of(agent, key):
    """The parameter that `params_*/<network>/.../<layer>/<kind>` names: every seed's, (S, [E,] ...)."""
    _, network, *_, layer, kind = key.split("/")
    module = getattr(agent, network)
    module = getattr(module, "mlp", module)
    name, index = layer.split("_")
    lists = {
        "kernel": module.weights,
        "bias": module.biases if name == "Dense" else module.shifts,
        "scale": module.scales,
    }
    return lists[kind][int(index)]


@pytest.mark.parametrize("num_seeds", [1, 3], ids=["alone", "stacked"])
@pytest.mark.parametrize("path", CASES, ids=[path.stem for path in CASES])
def test_parity(path, num_seeds):
    with np.load(path) as file:
        data = {key: file[key] for key in file.files}
    meta = json.loads(str(data["meta"]))
    agent = make_floq(meta, list(range(num_seeds)))
    stack = lambda array: torch.as_tensor(array).unsqueeze(0).repeat(num_seeds, *[1] * array.ndim)
    with torch.no_grad():
        before = [key for key in data if key.startswith("params_before/")]
        for key in before:
            parameter = parameter_of(agent, key)
            parameter.copy_(stack(data[key]).reshape(parameter.shape))
        loaded = {id(parameter_of(agent, key)) for key in before}
        assert loaded == {id(parameter) for parameter in agent.parameters()}

    for update in range(meta["updates"]):
        pick = lambda kind: {
            k.split("/")[-1]: stack(v) for k, v in data.items() if k.startswith(f"update{update}/{kind}/")
        }
        out = agent.update(pick("batch"), pick("noise"))
        recorded = {k.split("/out/")[1]: v for k, v in data.items() if k.startswith(f"update{update}/out/")}
        assert recorded
        for name, value in recorded.items():
            assert out[name].shape == (num_seeds,)
            # A loss near zero is a difference of larger terms, hence the small absolute tolerance.
            np.testing.assert_allclose(
                out[name].numpy(), value, rtol=1e-4, atol=1e-6, err_msg=f"{name}, update {update}"
            )

    for key in [key for key in data if key.startswith("params_after/")]:
        parameter = parameter_of(agent, key).detach().numpy()
        for s in range(num_seeds):
            np.testing.assert_allclose(parameter[s].reshape(data[key].shape), data[key], rtol=0, atol=1e-5, err_msg=key)


def test_every_built_method_has_cases():
    assert CASES, f"no floq*.npz in {PARITY_DIR}"
