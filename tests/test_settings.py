"""The published settings, written down a second time from the papers' tables: a slip in either place shows."""

from dataclasses import fields

import pytest
from conftest import EVERY, parse

from common import envs

DEFAULTS = {
    "floq": dict(
        batch_size=256, learning_rate=3e-4, gamma=0.99, tau=0.005, alpha=10.0, noise_samples=8, critic_flow_steps=8,
        actor_flow_steps=10, noise_coverage=0.1, q_agg="mean", normalize_q_loss=False, train_at_zero_only=False,
        flow_num_ensembles=2, distill_num_ensembles=2, use_prob_embed=True, num_bins=51, sigma=16.0, reward_offset=0.01,
        time_embedding="cos", block_width=512, block_depth=4, layer_norm=True,
        value_hidden_dims=(512,) * 4, actor_hidden_dims=(512,) * 4, actor_layer_norm=False,
    ),
    "value_flows": dict(
        batch_size=256, learning_rate=3e-4, gamma=0.99, tau=0.005, alpha=10.0, bcfm_lambda=1.0, dcfm_lambda=1.0,
        confidence_weight_temp=0.3, num_samples=16, num_flow_steps=10, ret_agg="mean", q_agg="mean",
        clip_flow_returns=True, clip_flow_actions=True, normalize_q_loss=False, value_hidden_dims=(512,) * 4,
        value_layer_norm=True, actor_hidden_dims=(512,) * 4, actor_layer_norm=True,
    ),
    "q_flow": dict(
        batch_size=256, learning_rate=3e-4, gamma=0.99, tau=0.005, alpha=1.0, flow_steps=10, q_agg="mean",
        num_ensembles=2, use_time_embed=False, time_embed_dim=16, actor_time_embed=False, layer_norm=True,
        value_hidden_dims=(512,) * 4, actor_hidden_dims=(512,) * 4, actor_layer_norm=False,
    ),
    "evor": dict(
        batch_size=256, learning_rate=3e-4, gamma=0.99, tau=0.005, flow_steps=10, num_actions=32, num_returns=50,
        tau_q=1.0, tau_r=10.0, td_target="exact", latents="data", bc_timesteps=0, num_ensembles=2,
        clip_flow_returns=True, value_hidden_dims=(512,) * 4, value_layer_norm=True,
        actor_hidden_dims=(512,) * 4, actor_layer_norm=False,
    ),
    "fql": dict(
        batch_size=256, learning_rate=3e-4, gamma=0.99, tau=0.005, alpha=10.0, actor_flow_steps=10, q_agg="mean",
        normalize_q_loss=False, num_ensembles=2, layer_norm=True, value_hidden_dims=(512,) * 4,
        actor_hidden_dims=(512,) * 4, actor_layer_norm=False,
    ),
    "c51": dict(
        batch_size=256, learning_rate=3e-4, gamma=0.99, tau=0.005, num_atoms=51, loss="released", num_samples=16,
        num_flow_steps=10, q_agg="mean", clip_flow_actions=True, value_hidden_dims=(512,) * 4, value_layer_norm=True,
        actor_hidden_dims=(512,) * 4, actor_layer_norm=True,
    ),
    "iqn": dict(
        batch_size=256, learning_rate=3e-4, gamma=0.99, tau=0.005, num_quantiles=16, kappa=0.9, num_cosines=64,
        embedding_dim=512, num_samples=16, num_flow_steps=10, quantile_agg="mean", clip_flow_actions=True,
        value_hidden_dims=(512,) * 4, value_layer_norm=True, actor_hidden_dims=(512,) * 4, actor_layer_norm=True,
    ),
}  # fmt: skip

# Columns of each table, then its rows; online rows hold the offline-to-online runs.
COLUMNS = {
    "floq": "alpha gamma q_agg batch_size block_depth critic_flow_steps noise_coverage total_timesteps",
    "value_flows": "gamma bcfm_lambda confidence_weight_temp ret_agg q_agg alpha total_timesteps",
    "q_flow": "alpha gamma q_agg time_embed_dim use_time_embed",
    "fql": "alpha gamma q_agg",
    "c51": "gamma num_atoms q_agg",
    "iqn": "gamma kappa",
}
OFFLINE = {
    "floq": """
        antmaze-large-navigate         10    0.99   mean  256  4  8  0.1  2000000
        antmaze-giant-navigate         10    0.995  min   512  4  4  0.1  2000000
        humanoidmaze-medium-navigate   30    0.995  mean  256  4  8  0.1  2000000
        humanoidmaze-large-navigate    20    0.995  mean  512  4  8  0.1  2000000
        antsoccer-arena-navigate       10    0.995  mean  256  4  8  0.1  2000000
        cube-single-play               300   0.99   mean  256  2  8  0.1  2000000
        cube-double-play               300   0.99   mean  256  2  8  0.1  2000000
        scene-play                     300   0.99   mean  256  4  8  0.1  2000000
        puzzle-3x3-play                1000  0.99   mean  256  4  8  0.1  2000000
        puzzle-4x4-play                1000  0.99   mean  256  4  8  0.25  2000000
    """,
    "value_flows": """
        cube-double-play                  0.995  1    3     mean  mean  10  1000000
        cube-triple-play                  0.995  3    0.03  mean  mean  10  1000000
        puzzle-3x3-play                   0.99   0.5  0.3   min   mean  10  1000000
        puzzle-4x4-play                   0.99   3    100   mean  min   10  1000000
        scene-play                        0.99   1    0.3   min   mean  10  1000000
        visual-antmaze-medium-navigate    0.99   0.3  0.03  mean  mean  10  500000
        visual-antmaze-teleport-navigate  0.99   0.3  0.03  mean  mean  10  500000
        visual-cube-double-play           0.995  1    0.3   mean  mean  10  500000
        visual-scene-play                 0.99   1    0.3   min   mean  10  500000
        visual-puzzle-3x3-play            0.99   0.3  0.3   min   mean  10  500000
    """,
    "q_flow": """
        antmaze-large-navigate        0.2  0.99   mean  64  True
        antmaze-giant-navigate        0.2  0.995  min   64  True
        antsoccer-arena-navigate      0.5  0.995  mean  64  True
        humanoidmaze-medium-navigate  1    0.995  mean  64  True
        humanoidmaze-large-navigate   1    0.995  mean  64  True
        cube-single-play              5    0.99   mean  64  True
        cube-double-play              2    0.99   mean  16  True
        scene-play                    5    0.99   mean  64  True
        puzzle-3x3-play               20   0.99   min   64  True
        puzzle-4x4-play               20   0.99   min   64  True
    """,
    "fql": """
        antmaze-large-navigate        10    0.99   min
        antmaze-giant-navigate        10    0.995  min
        humanoidmaze-medium-navigate  30    0.995  mean
        humanoidmaze-large-navigate   30    0.995  mean
        antsoccer-arena-navigate      10    0.995  mean
        cube-single-play              300   0.99   mean
        cube-double-play              300   0.99   mean
        cube-triple-play              300   0.995  mean
        scene-play                    300   0.99   mean
        puzzle-3x3-play               1000  0.99   mean
        puzzle-4x4-play               1000  0.99   mean
    """,
    "c51": """
        cube-double-play  0.995  101  mean
        cube-triple-play  0.995  51   mean
        puzzle-3x3-play   0.995  101  mean
        puzzle-4x4-play   0.99   101  min
        scene-play        0.99   51   mean
    """,
    "iqn": """
        cube-double-play  0.995  0.9
        cube-triple-play  0.995  0.8
        puzzle-3x3-play   0.995  0.8
        puzzle-4x4-play   0.99   0.95
        scene-play        0.99   0.95
    """,
}
ONLINE = {
    "floq": """
        antmaze-large-navigate         10    0.99   mean  256  4  8  0.1  1000000
        antmaze-giant-navigate         10    0.995  min   512  4  4  0.1  1000000
        humanoidmaze-medium-navigate   30    0.995  mean  256  4  8  0.1  1000000
        humanoidmaze-large-navigate    20    0.995  mean  512  4  16  0.1  1000000
        antsoccer-arena-navigate       30    0.995  mean  256  4  8  0.1  1000000
        cube-single-play               300   0.99   mean  256  2  8  0.1  1000000
        cube-double-play               300   0.99   mean  256  2  8  0.1  1000000
        scene-play                     300   0.99   mean  256  4  8  0.1  1000000
        puzzle-3x3-play                1000  0.99   mean  256  4  8  0.1  1000000
        puzzle-4x4-play                1000  0.99   mean  256  4  8  0.25  1000000
    """,
    "value_flows": """
        antmaze-large-navigate        0.99   10  0.01  mean  min   30   1000000
        humanoidmaze-medium-navigate  0.995  3   0.3   min   min   100  1000000
        cube-double-play              0.995  1   3     mean  mean  300  1000000
        cube-triple-play              0.995  3   0.03  mean  mean  300  1000000
        puzzle-4x4-play               0.99   3   0.1   mean  min   300  1000000
        scene-play                    0.99   1   0.3   min   mean  300  1000000
    """,
    "q_flow": """
        antmaze-giant-navigate        0.2  0.995  min   64  True
        humanoidmaze-medium-navigate  1    0.995  mean  64  True
        antsoccer-arena-navigate      0.5  0.995  mean  64  True
        cube-double-play              2    0.99   mean  16  True
        scene-play                    5    0.99   mean  64  True
        puzzle-4x4-play               20   0.99   min   64  True
    """,
    "fql": """
        antmaze-large-navigate        10    0.99   mean
        humanoidmaze-medium-navigate  100   0.995  mean
        antsoccer-arena-navigate      30    0.995  mean
        cube-double-play              300   0.99   mean
        cube-triple-play              300   0.995  mean
        scene-play                    300   0.99   mean
        puzzle-4x4-play               1000  0.99   mean
    """,
    "iqn": """
        antmaze-large-navigate        0.99   0.7
        humanoidmaze-medium-navigate  0.995  0.7
        cube-double-play              0.995  0.9
        cube-triple-play              0.995  0.8
        puzzle-4x4-play               0.99   0.8
        scene-play                    0.99   0.95
    """,
}
TABLES = {
    (name, phase): table
    for phase, tables in (("offline", OFFLINE), ("online", ONLINE))
    for name, table in tables.items()
}
ROWS = [
    (name, phase, *row.split(maxsplit=1))
    for (name, phase), table in TABLES.items()
    for row in table.strip().splitlines()
]


@pytest.mark.parametrize("algorithm, phase, environment, values", ROWS)
def test_settings_of_an_environment(algorithm, phase, environment, values):
    """Those of the table, and the defaults elsewhere."""
    online = ("--online-timesteps", "10") if phase == "online" else ()
    env_id = f"{environment}-singletask-v0"
    envs.check_env_id(env_id)
    args = parse(algorithm, "--env-id", env_id, *online)
    words = {"mean": "mean", "min": "min", "True": True}
    parsed = [words[word] if word in words else float(word) for word in values.split()]
    published = dict(zip(COLUMNS[algorithm].split(), parsed, strict=True))
    for name, value in (DEFAULTS[algorithm] | published).items():
        assert getattr(args, name) == value, name


@pytest.mark.parametrize("algorithm", EVERY)
def test_defaults(algorithm):
    module, expected = EVERY[algorithm], DEFAULTS[algorithm]
    args = parse(algorithm, "--env-id", "pointmaze-medium-navigate-singletask-v0")  # which no table names
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.total_timesteps == (2_000_000 if algorithm == "floq" else 1_000_000)
    assert args.eval_interval == 100_000 and args.eval_episodes == 50 and args.success_timing == "post"
    assert args.torch_deterministic and args.dataset_source == "official"
    own = {field.name for field in fields(module.Args)}
    assert set(expected) <= own
    environments = [{row[2] for row in ROWS if row[:2] == (algorithm, phase)} for phase in ("offline", "online")]
    assert [set(module.TUNED), set(module.TUNED_ONLINE)] == environments
