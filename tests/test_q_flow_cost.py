"""What an update of Q-Flow costs beside other ways: operations by hand and in order, and the table of the command."""

import csv
import functools
import itertools

import pytest
from conftest import run_module

import q_flow
from benchmarks.studies import q_flow_cost


def test_costs_are_measured_of_all_four():
    rows = q_flow_cost.measure(q_flow_cost.CostArgs(repeats=2, quick=True, cuda=False))
    gflop = {row["method"]: row["gflop"] for row in rows}
    # One network is regressed in an actor-critic; a one-step policy adds the flow; the others solve it, once or twice.
    assert gflop["actor_critic"] < gflop["one_step"] < gflop["q_flow"] and gflop["actor_critic"] < gflop["backprop"]
    assert all(row["low"] <= row["seconds"] <= row["high"] for row in rows)
    assert [row["q_flow_is"] for row in rows if row["method"] == "q_flow"] == [1]


def test_times_and_ratios_by_a_clock_of_our_own(monkeypatch):
    """An update of the four methods, in turn, takes 8, 2, 4 and 16 ms."""
    spans, now = itertools.cycle((0.008, 0.002, 0.004, 0.016)), [0.0]
    looks = itertools.count()

    def clock():
        now[0] += next(spans) if next(looks) % 2 else 1.0
        return now[0]

    monkeypatch.setattr(q_flow_cost.time, "perf_counter", clock)
    rows = q_flow_cost.measure(q_flow_cost.CostArgs(repeats=3, quick=True, cuda=False))
    assert {row["method"]: row["q_flow_is"] for row in rows} == dict(q_flow=1, actor_critic=4, one_step=2, backprop=0.5)
    assert [row["seconds"] for row in rows] == pytest.approx([0.008, 0.002, 0.004, 0.016], abs=1e-6)


def test_operations_of_an_actor_critic_by_hand(monkeypatch):
    """Two operations per weight and row. Backward: every product twice, but for the inputs that need no gradient."""
    H, B, D, A = 256, 256, q_flow_cost.OBS_DIM, q_flow_cost.ACTION_DIM
    small = dict(value_hidden_dims=(H, H), actor_hidden_dims=(H, H), batch_size=B)
    monkeypatch.setattr(q_flow, "QUICK", q_flow.QUICK | small)
    rows = q_flow_cost.measure(q_flow_cost.CostArgs(repeats=2, quick=True, cuda=False))
    (measured,) = [row["gflop"] for row in rows if row["method"] == "actor_critic"]
    first_critic, first_policy = (D + A) * H, (D + A) * H
    critic, policy = 2 * (first_critic + H * H + H), first_policy + H * H + H * A
    next_value = policy + critic
    regression = 3 * critic - 2 * first_critic
    improvement = 3 * policy - first_policy + 2 * critic
    assert measured == pytest.approx(2 * B * (next_value + regression + improvement) / 1e9, abs=0.006)


command = functools.partial(run_module, "benchmarks.studies.q_flow_cost")


def test_the_command_prints_and_writes_a_row_per_method(tmp_path):
    done = command("--quick", "--repeats", 2, "--no-cuda", "--output", tmp_path / "new" / "cost.csv")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("GFLOP") == 4 and "q_flow takes 1.00 times as long" in done.stdout
    with open(tmp_path / "new" / "cost.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["q_flow", "actor_critic", "one_step", "backprop"]
    assert set(rows[0]) == {"method", "gflop", "seconds", "low", "high", "q_flow_is"}


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    for output, message in ((tmp_path / "file" / "a.csv", "file is not writable"), (tmp_path, "is a directory")):
        failed = command("--quick", "--repeats", 2, "--no-cuda", "--output", output)
        assert failed.returncode == 2 and message in failed.stderr


def test_one_repeat_is_refused():
    failed = command("--repeats", 1)
    assert failed.returncode == 2 and "--repeats must be at least 2" in failed.stderr
