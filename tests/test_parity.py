"""Parity with the authors' agents (Q-Flow: its published rule): recorded updates (see tests/parity/README.md).

Every `<method>*.npz` in the folder PARITY_DIR (default: tests/parity) whose method is built runs, sizes and settings
read from its `meta`; so does every one in its folder `pixels`.
"""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BASELINES, EVERY, update

from common import pixels
from common.stacked import Stacked

PARITY_DIR = Path(os.environ.get("PARITY_DIR", Path(__file__).parent / "parity"))
CASES = [path for method in EVERY for path in sorted(PARITY_DIR.glob(f"{method}*.npz"))]
CASES += sorted(PARITY_DIR.glob("pixels/*.npz"))


# Settings that have the same name here as in `meta`; a recording may lack some, which then have their defaults.
SAME_NAME = {
    "floq": (
        "tau", "q_agg", "alpha", "actor_flow_steps", "critic_flow_steps", "normalize_q_loss", "flow_num_ensembles",
        "distill_num_ensembles", "noise_samples", "noise_coverage", "num_bins", "sigma", "reward_offset", "layer_norm",
        "actor_layer_norm", "use_prob_embed", "train_at_zero_only",
    ),
    "value_flows": (
        "tau", "ret_agg", "q_agg", "clip_flow_actions", "clip_flow_returns", "confidence_weight_temp", "dcfm_lambda",
        "bcfm_lambda", "alpha", "normalize_q_loss", "num_samples", "num_flow_steps", "actor_layer_norm",
        "value_layer_norm",
    ),
    "q_flow": (
        "tau", "q_agg", "alpha", "flow_steps", "use_time_embed", "time_embed_dim", "layer_norm", "actor_layer_norm",
    ),
    "fql": ("tau", "q_agg", "alpha", "actor_flow_steps", "normalize_q_loss", "layer_norm", "actor_layer_norm"),
    "c51": (
        "tau", "q_agg", "num_atoms", "num_samples", "num_flow_steps", "clip_flow_actions", "actor_layer_norm",
        "value_layer_norm",
    ),
    "iqn": (
        "tau", "quantile_agg", "kappa", "num_quantiles", "num_cosines", "embedding_dim", "num_samples",
        "num_flow_steps", "clip_flow_actions", "actor_layer_norm", "value_layer_norm",
    ),
}  # fmt: skip
RENAMED = {"batch_size": "B", "gamma": "discount", "learning_rate": "lr"}


def make_recorded_agent(meta, seeds):
    """The agent of a recorded case."""
    method, hidden = meta["method"], tuple(meta["hidden"])
    settings = {name: meta[name] for name in SAME_NAME[method] if name in meta}
    settings |= {name: meta[recorded] for name, recorded in RENAMED.items()}
    settings |= dict(value_hidden_dims=hidden, actor_hidden_dims=hidden)
    rewards = (-1.0, 0.0) if method == "q_flow" else (meta["min_reward"], meta["max_reward"])  # Q-Flow uses none
    if method == "floq":
        settings["block_width"] = meta.get("block_width", hidden[0])
        settings["block_depth"] = meta.get("block_depth", len(hidden))
        if not meta.get("time_embedding", "cos").startswith("cos(t)"):
            settings["time_embedding"] = "fourier"
    module = EVERY[method]
    args = replace(module.Args(), **settings)
    obs_dim = tuple(meta["obs_shape"]) if "obs_shape" in meta else meta["obs_dim"]
    make_agent = lambda: module.Agent(args, obs_dim, meta["action_dim"], *rewards)
    return Stacked(make_agent, seeds, "cpu", args.learning_rate)


# Recorded names of networks and noise that have another name here.
NETWORKS = {"floq": "critic_flow", "target_floq": "target_critic_flow"}
PARTS = {"sa_embedding_net": "condition_embedding", "tau_embedding_net": "level_embedding"}  # of IQN's critic
NOISE = {"next_return_ratio": "next_start", "return_ratio": "start", "weight": "confidence"}


def parameter_of(agents, key):
    """The parameter, or the ensemble member's part, that `params_*/<network>/.../<layer>/<kind>` names: (S, ...)."""
    _, network, *inner, layer, kind = key.split("/")
    member = re.fullmatch(r"(target_critic_flow|critic_flow)([12])", network)  # value_flows: two recorded networks
    network = member[1] if member else NETWORKS.get(network, network)
    name, index = layer.split("_")
    if inner and inner[0] == "encoder":  # both fields share the first one's
        encoder = f"{network}.encoder."
        if name == "Dense":
            return agents.parameters[encoder + ("weight" if kind == "kernel" else "bias")].data
        index = 3 * int(inner[1].removeprefix("stack_blocks_")) + int(index)
        if kind == "bias":
            return agents.parameters[f"{encoder}kernel_biases.{index}"].data
        return agents.parameters[f"{encoder}kernels.{index}"].data.permute(0, 3, 4, 2, 1)  # recorded (3, 3, in, out)
    kinds = {"kernel": "weights", "bias": "biases" if name == "Dense" else "shifts", "scale": "scales"}
    part = PARTS.get(inner[0], "mlp") if inner else "mlp"
    mlp = f"{network}.{part}" if f"{network}.{part}.weights.0" in agents.parameters else network
    parameter = agents.parameters[f"{mlp}.{kinds[kind]}.{index}"].data
    return parameter[:, int(member[2]) - 1] if member else parameter


def in_our_order(key, array):
    """Recorded return fields expect [z, t, s, a], value_flows.py's [s, a, z, t]: the first kernel's rows move."""
    moves = "critic_flow" in key and "encoder" not in key and key.endswith("Dense_0/kernel")
    return np.roll(array, -2, axis=-2) if moves else array


# Recorded, but neither a loss nor logged here.
NOT_LOGGED = re.compile("grad/.*|actor/mse|actor/q|critic/q_(max|min|std_max|std_min)")
NOT_LOGGED_BY = {"value_flows": "critic/q_mean"}
# Means of values of either sign, whose terms cancel: they are as exact as the terms are, not as they are themselves.
CANCELLING = ("actor/q_loss", "critic/q_mean", "critic/q_outer_mean", "critic/q_inner_mean")


def term_size(recorded):
    """Size of the values that an update's losses are made of: the root of the critic's mean square, at least."""
    squares = ("critic/critic_loss", "critic/outer_loss", "critic/distillation_loss")
    return max(float(recorded[name]) ** 0.5 for name in squares if name in recorded)


@pytest.mark.parametrize("num_seeds", [1, 3], ids=["alone", "stacked"])
@pytest.mark.parametrize("path", CASES, ids=[path.stem for path in CASES])
def test_parity(path, num_seeds):
    """Losses within 1e-4 (baselines: 1e-5), weights within 1e-5: exp, sin, matrix products differ less by processor.

    A weight whose gradient vanishes moves by the sign of rounding: one in 10,000 may.
    """
    with np.load(path) as file:
        data = {key: in_our_order(key, file[key]) for key in file.files}
    meta = json.loads(str(data["meta"]))
    agents = make_recorded_agent(meta, list(range(num_seeds)))
    stack = lambda array: torch.as_tensor(array).unsqueeze(0).repeat(num_seeds, *[1] * array.ndim)
    before = [key for key in data if key.startswith("params_before/")]
    for key in before:
        parameter = parameter_of(agents, key)
        parameter.copy_(stack(data[key]).reshape(parameter.shape))
    assert sum(parameter_of(agents, key).numel() for key in before) == sum(
        p.numel() for p in agents.parameters.values()
    )
    assert len({parameter_of(agents, key).data_ptr() for key in before}) == len(before)

    for number in range(meta["updates"]):
        pick = lambda kind: {
            k.split("/")[-1]: stack(v) for k, v in data.items() if k.startswith(f"update{number}/{kind}/")
        }
        batch, noise = pick("batch"), {NOISE.get(name, name): value for name, value in pick("noise").items()}
        if "obs_shape" in meta:  # recorded without crops
            noise["crop"] = torch.full((num_seeds, meta["B"], 2), pixels.PADDING)
        out = update(agents, batch, noise)
        recorded = {k.split("/out/")[1]: v for k, v in data.items() if k.startswith(f"update{number}/out/")}
        recorded = {name: value for name, value in recorded.items() if not NOT_LOGGED.fullmatch(name)}
        recorded.pop(NOT_LOGGED_BY.get(meta["method"]), None)
        assert recorded
        for name, value in recorded.items():  # value_flows: some are recorded for each row
            rtol = 1e-5 if meta["method"] in BASELINES else 1e-4
            atol = rtol * term_size(recorded) if name in CANCELLING else 0
            message = f"{name}, update {number}"
            expected = stack(np.asarray(value.mean(dtype=np.float64)))
            np.testing.assert_allclose(out[name], expected, rtol=rtol, atol=atol, err_msg=message)

    weights, off = 0, 0
    for key in [key for key in data if key.startswith("params_after")]:
        parameter = parameter_of(agents, key).reshape(num_seeds, -1).numpy()
        parameter = parameter[:, :: 17 if key.startswith("params_after_every17/") else 1]
        differences = np.abs(parameter - data[key].reshape(1, -1))
        assert differences.max() <= 2 * meta["updates"] * meta["lr"], key  # Adam's steps there and back
        weights, off = weights + differences.size, off + (differences > 1e-5).sum()
    assert off <= weights / 10_000, f"{off} of {weights} weights differ by more than 1e-5"


@pytest.mark.parametrize("method", sorted(set(EVERY) - {"evor"}))  # EVOR's code could not be read here
def test_every_built_method_has_cases(method):
    assert any(path.stem.startswith(method) for path in CASES), f"no {method}*.npz in {PARITY_DIR}"
