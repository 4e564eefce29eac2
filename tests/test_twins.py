"""benchmarks/studies/twins.py: its tests and tables on made-up results, its data, its messages; no JAX is needed."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_module
from test_parity import PARITY_DIR, in_our_order, make_recorded_agent, parameter_of

from benchmarks import tables
from benchmarks.studies import twins


def test_equivalent_where_the_interval_lies_within_the_margin():
    row = twins.compare_means([50.0, 51, 49, 50], [50.0, 50, 51, 49], margin=10)
    assert row["verdict"] == "equivalent" and row["seeds_needed"] is None
    # Welch's interval by hand: variances 2/3 and 2/3, 6 degrees of freedom, t at 95% 1.943
    half = 1.943 * math.sqrt((2 / 3) / 4 + (2 / 3) / 4)
    assert row["difference"] == 0 and row["high"] == pytest.approx(half, rel=1e-3) == -row["low"]


def test_different_only_where_the_whole_interval_lies_outside():
    assert twins.compare_means([80.0, 81, 79, 80], [50.0, 50, 51, 49], margin=10)["verdict"] == "different"
    row = twins.compare_means([61.0, 59, 60, 62], [50.0, 50, 51, 49], margin=10)  # 10.5 apart
    assert row["verdict"] == "not resolved"


def test_wide_intervals_are_not_resolved_and_say_how_many_seeds_would_do():
    row = twins.compare_means([20.0, 80, 50, 50], [30.0, 70, 40, 60], margin=10)
    variance = (np.var([20, 80, 50, 50], ddof=1) + np.var([30, 70, 40, 60], ddof=1)) / 2
    assert row["verdict"] == "not resolved"
    assert row["seeds_needed"] == math.ceil(2 * (2.927 / 10) ** 2 * variance)


def test_that_many_seeds_find_equivalence_four_times_in_five():
    rng = np.random.default_rng(0)
    needed, found = math.ceil(2 * (2.927 / 10) ** 2 * 20**2), 0  # deviation 20 points, margin 10: 69 seeds
    for _ in range(400):
        a, b = rng.normal(50, 20, needed), rng.normal(50, 20, needed)
        found += twins.compare_means(a.tolist(), b.tolist(), margin=10)["verdict"] == "equivalent"
    assert 0.72 < found / 400 < 0.88


def test_one_seed_resolves_nothing():
    assert twins.compare_means([50.0], [50.0, 50.0], margin=10)["verdict"] == "not resolved"
    assert twins.compare_means([50.0, 50.0], [50.0, 50.0], margin=10)["verdict"] == "equivalent"  # no spread at all


def test_log_ratios_need_equal_signs():
    ours, authors = twins.log_ratios([-1.0, -math.e], [-1.0, -1.0])
    assert ours == [0.0, 1.0] and authors == [0.0, 0.0]
    assert twins.log_ratios([1.0, -1.0], [1.0, 1.0]) is None
    assert twins.log_ratios([0.0], [1.0]) is None


@pytest.fixture
def options(tmp_path):
    directories = {"state_dir": str(tmp_path / "state"), "results_dir": str(tmp_path / "results")}
    return twins.TwinsArgs("compare", "q_flow", **directories)


def write_side(options, side, success, loss, seeds=4):
    """Made-up results of Q-Flow: `success` and the outer loss around `loss`, all four quarters."""
    rng = np.random.default_rng(len(side))
    for seed in range(seeds):
        rows = twins.Rows(options, side, seed)
        for quarter in range(1, 5):
            step = quarter * 3_000
            values = {name: -2.0 for name in (*twins.LOSSES["q_flow"], *twins.VALUES["q_flow"])}
            values |= {"critic/outer_loss": loss * (1 + 0.001 * rng.standard_normal())}
            early = 0.3 * (quarter < 3) - 0.1 * (quarter == 3)  # the last two quarters count, in their mean
            rows.add(step, values | {"success": success + 0.01 * (seed % 2) + early, "episode_length": 100.0})
            assert rows.done(quarter)
        rows.save(publish=True)


def test_compare_reads_both_sides(options, capsys):
    write_side(options, "ours", success=0.50, loss=1.0)
    write_side(options, "authors", success=0.52, loss=1.2)
    twins.compare(options)
    table = capsys.readouterr().out
    rows = {(row["quantity"], row["step"]): row for row in twins.compare_method(options.results_dir, "q_flow")}
    assert rows["success", 12_000]["verdict"] == "equivalent"
    assert rows["success", 12_000]["difference"] == pytest.approx(-2)
    for step in (3_000, 6_000, 12_000):  # 9,000 is not tested
        assert rows["critic/outer_loss", step]["verdict"] == "different"
        assert rows["critic/outer_loss", step]["difference"] == pytest.approx(-math.log(1.2), abs=0.01)
        assert rows["values/q", step]["verdict"] == "equivalent"
    assert len(rows) == 1 + 3 * (len(twins.LOSSES["q_flow"]) + 1)
    assert "| q_flow | success | 12000 | 4 / 4 | -2.0 |" in table and "-16." in table  # 1 / 1.2 - 1
    assert (twins.Path(options.results_dir) / "q_flow.png").exists()
    assert (twins.Path(options.results_dir) / "comparison.csv").read_text().count("\n") == 1 + len(rows)


@pytest.mark.parametrize("method", twins.METHODS)
def test_the_committed_tests_are_those_of_the_committed_rows_by_the_rule(method):
    stored = [row for row in tables.read_rows(twins.RESULTS / "comparison.csv") if row["method"] == method]
    rows = twins.compare_method(twins.RESULTS, method)
    assert [(row["quantity"], row["step"]) for row in rows] == [(r["quantity"], int(r["step"])) for r in stored]
    for row, expected in zip(rows, stored, strict=True):
        assert (row["verdict"], str(row["seeds_needed"] or "")) == (expected["verdict"], expected["seeds_needed"])
        for name in ("difference", "low", "high"):
            assert row[name] == pytest.approx(float(expected[name]), rel=1e-3)
    assert twins.MARGIN == {"success": 10.0, "ratio": math.log(1.05)} and twins.CONFIDENCE == 0.9


def test_a_diverged_seed_resolves_nothing():
    for figures in ([1.0, math.nan], [1.0, math.inf]):
        row = twins.compare_means(figures, [1.0, 1.1], 0.1)
        assert row["verdict"] == "not resolved" and row["seeds_needed"] is None


def test_compare_without_results_says_what_to_do(options, capsys):
    with pytest.raises(SystemExit) as end:
        twins.compare(options)
    assert end.value.code == 2 and "run the tasks authors and ours" in capsys.readouterr().err


def test_rows_after_the_agents_step_are_written_again(options):
    rows = twins.Rows(options, "ours", 0)
    rows.add(500, {"critic/outer_loss": 1.0})
    rows.add(1000, {"critic/outer_loss": 0.5})
    rows.save()
    again = twins.Rows(options, "ours", 0)
    again.cut(500)
    assert again.rows == [(500, "critic/outer_loss", 1.0)]
    assert not rows.published.exists()


def test_an_evaluation_that_was_published_in_part_is_not_there_twice(options):
    """A kill between two seeds: the first one's rows are there when the quarter is evaluated again."""
    every_rows = [(seed, twins.Rows(options, "ours", seed)) for seed in (0, 1)]
    for _, rows in every_rows:
        rows.add(3000, {"critic/outer_loss": 1.0})
        rows.save()
    twins.publish(every_rows[:1], [{"success": 0.25, "episode_length": 9.0}], 3000)
    every_rows = [(seed, twins.Rows(options, "ours", seed)) for seed in (0, 1)]
    twins.publish(every_rows, 2 * [{"success": 0.5, "episode_length": 8.0}], 3000)
    expected = [(3000, "critic/outer_loss", 1.0), (3000, "success", 0.5), (3000, "episode_length", 8.0)]
    for _, rows in every_rows:
        assert rows.rows == twins.read_rows(rows.published) == expected


def make_dataset():
    """600 made-up transitions."""
    torch.manual_seed(0)
    dataset = {
        "observations": torch.randn(600, 28),
        "next_observations": torch.randn(600, 28),
        "actions": torch.rand(600, 5) * 2 - 1,
        "rewards": -torch.ones(600),
        "masks": torch.ones(600),
    }
    dataset["rewards"][0] = 0
    return dataset


SMALL = {"compile": False, "batch_size": 8, "value_hidden_dims": (8,), "actor_hidden_dims": (8,)}


class FakeAuthors:
    """Stands in for the authors' process: its state is the number of updates."""

    policy = None

    def __init__(self, twins, args, data):
        self.step = 0

    def ask(self, kind, **words):
        if kind == "begin":
            self.step = int(Path(words["state"]).read_text()) if words["state"] else 0
        elif kind == "save":
            Path(words["state"]).write_text(str(self.step))
        elif kind == "train":
            self.step += words["updates"]
            return {"actor/total_loss": 1.0}
        return self.step

    def close(self):
        pass


@pytest.fixture
def small_sides(monkeypatch):
    """train(side, options, sha256="a", **changes of the settings) to `options.until`: quarters of two updates."""
    base = replace(twins.settings_of("q_flow"), total_timesteps=8, **SMALL)
    monkeypatch.setattr(twins, "settings_of", lambda method, size="quick": base)
    monkeypatch.setattr(twins, "WINDOW", 1)
    monkeypatch.setattr(twins, "Authors", FakeAuthors)
    monkeypatch.setattr(twins, "commit_of", lambda directory: "first")
    results = lambda seeds: [{"success": 0.5, "episode_length": 9.0} for _ in seeds]
    monkeypatch.setattr(twins, "play", lambda args, seeds, *others: results(seeds))

    def train(side, options, sha256="a", **changes):
        args, identity = replace(base, **changes), {"file": "data.npz", "sha256": sha256}
        if side == "ours":
            twins.train_ours(options, args, identity, make_dataset())
        else:
            twins.train_authors(options, args, identity, Path("data.npz"))

    return train


@pytest.mark.parametrize("side", ["ours", "authors"])
def test_a_side_continues_with_the_settings_and_data_that_it_began_with(
    side, options, small_sides, monkeypatch, capsys
):
    options = replace(options, num_seeds=2, until=1)
    small_sides(side, options)
    about = Path(options.results_dir) / f"q_flow_{side}.json"
    first = about.read_text()
    for changes, message in (
        ({"alpha": 7.0}, "began with alpha 5.0 (now 7.0), see"),
        ({"sha256": "b"}, "began with the dataset's sha256 a (now b), see"),
    ):
        with pytest.raises(SystemExit) as stop:
            small_sides(side, replace(options, until=2), **changes)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error and "--results-dir begin anew" in error
        assert error.count("\n") == 1

    monkeypatch.setattr(twins, "commit_of", lambda directory: "second")
    small_sides(side, options)  # nothing is left to train
    assert about.read_text() == first
    small_sides(side, replace(options, until=2))
    assert json.loads(about.read_text()) == json.loads(first) | {"commit": "second"}
    assert twins.Rows(options, side, 1).done(2)

    more = replace(options, first_seed=2, num_seeds=1)
    with pytest.raises(SystemExit):
        small_sides(side, more, alpha=7.0)
    assert "began with alpha 5.0 (now 7.0)" in capsys.readouterr().err
    small_sides(side, more)
    before = {path.name: path.read_text() for path in Path(options.results_dir).glob("*_seed[01].csv")}
    assert twins.Rows(options, side, 2).done(1) and not twins.Rows(options, side, 2).done(2)
    small_sides(side, replace(more, until=2))
    assert twins.Rows(options, side, 2).done(2) and len(before) == 2
    assert all((Path(options.results_dir) / name).read_text() == text for name, text in before.items())

    if side == "ours":  # seeds that are trained side by side are one state
        with pytest.raises(SystemExit):
            small_sides(side, replace(options, first_seed=1, num_seeds=2))
        assert "seed 1 is there already" in capsys.readouterr().err

    fresh = {"state_dir": f"{options.state_dir}_b", "results_dir": f"{options.results_dir}_b"}
    small_sides(side, replace(options, **fresh), sha256="b", alpha=7.0)


@pytest.mark.parametrize("side", ["ours", "authors"])
def test_states_from_before_settings_were_kept_continue(side, options, small_sides, capsys):
    """The json in the results has what they began with, and may lack settings."""
    options = replace(options, num_seeds=1, until=1)
    small_sides(side, options)
    kept, about = (Path(path) / f"q_flow_{side}.json" for path in (options.state_dir, options.results_dir))
    older = json.loads(about.read_text())
    del older["settings"]["alpha"]
    about.write_text(json.dumps(older))
    kept.unlink()
    with pytest.raises(SystemExit):
        small_sides(side, options, tau=0.5)
    assert "began with tau 0.01 (now 0.5), see" in capsys.readouterr().err
    small_sides(side, replace(options, until=2), alpha=7.0)

    kept.unlink()
    about.unlink()
    small_sides(side, replace(options, until=3), alpha=7.0)
    assert json.loads(kept.read_text())["settings"]["alpha"] == 7


@pytest.mark.parametrize("method", twins.METHODS)
def test_every_loss_of_the_rule_is_logged(method, tmp_path):
    """Our side logs what the rule names, trains, and continues after a save to the same numbers."""
    dataset = make_dataset()
    args = replace(twins.settings_of(method), **SMALL)
    options = twins.TwinsArgs("ours", method)
    side = twins.Ours(options, args, dataset, [0, 1])
    first = side.train(3)
    assert all({*twins.LOSSES[method], *twins.VALUES[method]} <= losses.keys() for losses in first)
    assert first[0] != first[1]  # seeds differ
    side.save(tmp_path / "state.pt")
    after = side.train(2)
    other = twins.Ours(options, args, dataset, [0, 1])
    other.restore(tmp_path / "state.pt")
    assert other.step == 3 and other.train(2) == after

    alone = twins.Ours(options, args, dataset, [1])  # a seed's numbers do not depend on the seeds beside it
    assert alone.train(3)[0] == pytest.approx(first[1], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("case", ["floq_a", "value_flows_a", "q_flow_a"])
def test_the_authors_weights_find_their_places(case):
    """As tests/test_parity.py places them, which checks recorded updates of the authors' agents."""
    with np.load(PARITY_DIR / f"{case}.npz") as file:
        data = {key: file[key] for key in file.files}
    meta = json.loads(str(data["meta"]))
    agents, expected = (make_recorded_agent(meta, [seed]) for seed in (0, 1))
    weights = {key: value for key, value in data.items() if key.startswith("params_before/")}
    twins.copy_weights(agents, meta["method"], {f"modules_{k.partition('/')[2]}": v for k, v in weights.items()})
    for key, array in weights.items():
        parameter = parameter_of(expected, key)
        parameter.copy_(torch.as_tensor(in_our_order(key, array)).reshape(parameter.shape))
    for name, parameter in agents.parameters.items():
        assert torch.equal(parameter, expected.parameters[name]), name

    weights.popitem()
    fewer = {f"modules_{k.partition('/')[2]}": v for k, v in weights.items() if "/critic" not in k}
    with pytest.raises(KeyError, match="lack"):
        twins.copy_weights(agents, meta["method"], fewer)


def test_settings_under_the_authors_names():
    config = twins.config_of("floq", twins.settings_of("floq"))
    assert config["discount"] == 0.99 and config["lr"] == 3e-4 and config["tau"] == 0.01 and config["alpha"] == 100
    assert config["block_depth"] == 2 and config["noise_samples"] == 2
    assert config["value_hidden_dims"] == (256, 256, 256)
    assert twins.settings_of("value_flows", "published").gamma == 0.99
    assert twins.settings_of("q_flow").use_time_embed and twins.settings_of("q_flow").time_embed_dim == 64


def run(*words):
    return run_module("benchmarks.studies.twins", *words)


def test_bad_input(tmp_path, monkeypatch, capsys):
    no_agent = run("authors", "--method", "floq", "--authors", tmp_path)
    assert no_agent.returncode == 2 and "has no agents/floq.py" in no_agent.stderr

    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "floq.py").touch()
    no_python = run("authors", "--method", "floq", "--authors", tmp_path, "--python", tmp_path / "python")
    assert no_python.returncode == 2 and "cannot be started" in no_python.stderr
    monkeypatch.setattr(twins, "NEEDED", ("jax_that_nobody_has",))
    with pytest.raises(SystemExit) as end:
        twins.check_authors(twins.TwinsArgs("authors", "floq", authors=str(tmp_path)))
    no_jax = capsys.readouterr().err
    assert end.value.code == 2 and "pip install jax_that_nobody_has there" in no_jax and no_jax.count("\n") == 1

    no_data = run("ours", "--dataset-path", tmp_path / "none.npz")
    assert no_data.returncode == 2 and "none.npz is not a file" in no_data.stderr
    for answer in (no_agent, no_python, no_data):
        assert answer.stderr.count("\n") == 1 and "Traceback" not in answer.stderr


def test_times_replace_those_of_the_same_setting(tmp_path):
    for threads, ratio in ((2, 1.5), (1, 1.1), (2, 1.6)):
        twins.store_times(
            tmp_path / "times.csv", {"method": "floq", "size": "quick", "threads": threads, "times_as_fast": ratio}
        )
    assert (tmp_path / "times.csv").read_text().split() == [
        "method,size,threads,times_as_fast",
        "floq,quick,1,1.1",
        "floq,quick,2,1.6",
    ]
