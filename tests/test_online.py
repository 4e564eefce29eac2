"""The online phase: replay, the exploring environments, and runs with both phases, interrupted and not."""

import os
import signal

import numpy as np
import pytest
import torch
from conftest import (
    ALGORITHMS,
    ENV_ID,
    assert_refused,
    assert_same_csv,
    children,
    make_expert,
    only_run,
    parse,
    run,
    start,
    wait_for_row,
)

from common import checkpoint, rollout
from common import replay as replays

# --- Replay ---


def make_dataset(n):
    """Offline transitions whose every number is their own index."""
    index = torch.arange(n, dtype=torch.float32)
    wide = index.unsqueeze(-1).expand(-1, 2)
    return {"observations": wide, "next_observations": wide, "actions": wide[:, :1], "rewards": index, "masks": index}


def transitions(number, num_seeds):
    """Online transition `number` of each seed: 1000 * (seed + 1) + number in every place."""
    value = 1000.0 * (torch.arange(num_seeds) + 1) + number
    wide = value.unsqueeze(-1).expand(-1, 2)
    return {"observations": wide, "next_observations": wide, "actions": wide[:, :1], "rewards": value, "masks": value}


@pytest.mark.parametrize(
    "n, online_timesteps, capacity",
    [(10, 8, 100), (10, 8, 15), (10, 40, 15), (10, 8, 5), (10, 1, 100)],
    ids=["grows", "fills", "wraps", "dataset-above-capacity", "one"],
)
def test_batches_are_uniform_over_a_buffer_filled_by_hand(n, online_timesteps, capacity, monkeypatch):
    assert replays.CAPACITY == 2_000_000  # as docs/usage.md says
    monkeypatch.setattr(replays, "CAPACITY", capacity)
    size = max(capacity, n + 1)
    replay = replays.Replay(make_dataset(n), 2, online_timesteps)
    assert replay.rows["observations"].shape == (2, min(online_timesteps, size), 2)
    by_hand = [[float(i) for i in range(n)] for _ in range(2)]  # a ring of at most `size` slots for each seed
    for number in range(online_timesteps):
        count = replay.append(transitions(number, 2))
        assert count == number + 1
        for seed in range(2):
            value = 1000.0 * (seed + 1) + number
            if len(by_hand[seed]) < size:
                by_hand[seed].append(value)
            else:
                by_hand[seed][(n + number) % size] = value
        filled = len(by_hand[0])
        every_slot = torch.arange(filled).repeat(2, 3)  # each slot three times
        batch = replay.batch({"indices": every_slot, "count": count})
        for seed in range(2):
            assert batch["rewards"][seed].tolist() == by_hand[seed] * 3
            for key, value in batch.items():
                assert value.shape[:2] == every_slot.shape
                assert (value[seed].reshape(len(value[seed]), -1) == batch["rewards"][seed].unsqueeze(-1)).all(), key


def test_large_draws_are_uniform_over_the_buffer():
    replay = replays.Replay(make_dataset(10), 1, 6)
    for number in range(3):
        count = replay.append(transitions(number, 1))
    draws = torch.randint(2**62, (1, 130_000), generator=torch.Generator().manual_seed(0))
    batch = replay.batch({"indices": draws, "count": count})
    values, counts = batch["rewards"].unique(return_counts=True)
    assert values.tolist() == [*range(10), 1000, 1001, 1002]
    assert (counts - 10_000).abs().max() < 5 * 10_000**0.5


def test_offline_indices_are_transitions():
    replay = replays.Replay(make_dataset(10), 2, 0)
    indices = torch.tensor([[3, 9, 0], [1, 1, 2]])
    assert torch.equal(replay.batch({"indices": indices})["rewards"], indices.float())


def test_a_saved_replay_is_restored_into_a_longer_one():
    old, new = (replays.Replay(make_dataset(10), 2, length) for length in (5, 9))
    for number in range(4):
        old.append(transitions(number, 2))
    assert all(rows.shape[1] == 4 for rows in old.state().values())
    new.restore(old.state(), old.count)
    assert new.append(transitions(9, 2)) == 5
    for key, rows in new.rows.items():
        assert torch.equal(rows[:, 4], transitions(9, 2)[key])
        rows[:, 4] = 0
        assert torch.equal(rows[:, :4], old.rows[key][:, :4]) and (rows[:, 4:] == 0).all() and rows.shape[1] == 9


# --- Exploration ---


def explore(steps, policy, seeds=(10, 11), first_step=0):
    """Transitions [{key: (S, ...)}] of an exploration, and the explorer."""
    explorer = rollout.Explorer(parse("q_flow", "--env-id", ENV_ID), list(seeds), torch.device("cpu"))
    noise = torch.full((len(seeds), 2), 0.1)
    return [explorer(policy, noise, first_step + step) for step in range(steps)], explorer


def test_transitions_connect_and_a_success_ends_the_episode():
    rows, explorer = explore(400, make_expert())
    masks = torch.stack([row["masks"] for row in rows])  # (T, S)
    assert set(masks.unique().tolist()) == {0.0, 1.0} and (masks == 0).sum(dim=0).min() >= 1
    for row, following in zip(rows, rows[1:]):
        for s in range(2):
            goes_on = torch.equal(row["next_observations"][s], following["observations"][s])
            assert goes_on == bool(row["masks"][s])  # after a success the next episode begins somewhere else
            assert row["rewards"][s] == (0.0 if row["masks"][s] == 0 else -1.0)
    for key, shape in (("observations", (2, 2)), ("actions", (2, 2)), ("rewards", (2,)), ("masks", (2,))):
        assert rows[0][key].shape == shape and rows[0][key].dtype == torch.float32
    assert torch.equal(torch.as_tensor(explorer.observations[1]), rows[-1]["next_observations"][1]) or masks[-1, 1] == 0


def test_a_time_limit_still_bootstraps():
    rows, explorer = explore(1000, lambda observations, noise: torch.zeros_like(observations))
    assert all((row["masks"] == 1).all() for row in rows)
    # 1000 steps are the time limit: a new episode has begun, the last transition leads to the old one's end.
    assert not np.array_equal(explorer.observations, rows[-1]["next_observations"].numpy())


def test_exploration_is_a_function_of_seed_and_step():
    expert = make_expert()
    first, _ = explore(30, expert)
    again, _ = explore(30, expert)
    alone, _ = explore(30, expert, seeds=(11,))
    later, _ = explore(30, expert, first_step=7)
    for a, b, c in zip(first, again, alone):
        assert all(torch.equal(a[key], b[key]) and torch.equal(a[key][1:], c[key]) for key in a)
    assert not torch.equal(first[0]["observations"], later[0]["observations"])


# --- Runs ---


def rows_of(path):
    header, *rows = path.read_text().splitlines()
    return [dict(zip(header.split(","), row.split(","))) for row in rows]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_has_both_phases(online_runs, algorithm):
    evaluations = [row for row in rows_of(online_runs[algorithm] / "eval.csv") if row["seed"] == "1"]
    phases = [("1", "offline"), ("70", "offline"), ("120", "online"), ("230", "online")]
    assert [(row["step"], row["phase"]) for row in evaluations] == phases
    train = rows_of(online_runs[algorithm] / "train.csv")
    assert [row["step"] for row in train if row["seed"] == "0"] == [str(step) for step in range(10, 231, 10)]
    payload = checkpoint.load(online_runs[algorithm])
    replay = payload["replay"]
    assert payload["step"] == 230 and replay["observations"].shape == (2, 160, 2)
    assert (replay["rewards"] == -1).all() or (replay["masks"] == 0).any()
    assert not torch.equal(replay["observations"][0], replay["observations"][1])
    # Within an episode a transition begins where the one before it ended.
    connected = (replay["observations"][:, 1:] == replay["next_observations"][:, :-1]).all(dim=-1)
    assert connected.float().mean() > 0.9
    assert (replay["actions"].abs() <= 1).all() and replay["actions"].std() > 0.05


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_same_seeds_give_the_same_files_and_online_follows_an_unchanged_offline_phase(
    online_flags, online_runs, algorithm, tmp_path
):
    """An offline run, then continued online: the same numbers again. Nothing is interrupted within the online phase."""
    run(algorithm, *online_flags[algorithm], "--online-timesteps", 0, "--runs-dir", tmp_path / "offline")
    offline = only_run(tmp_path / "offline")
    assert {row["phase"] for row in rows_of(offline / "eval.csv")} == {"offline"}
    run(algorithm, "--resume", offline, "--online-timesteps", 160)
    assert_same_csv(offline, online_runs[algorithm])


@pytest.mark.parametrize("algorithm, online_policy", [("value_flows", "act_online"), ("q_flow", "act")])
def test_each_phase_acts_with_its_own_policy(online_flags, tmp_path, monkeypatch, algorithm, online_policy):
    evaluate, explore, acted = rollout.Evaluator.__call__, rollout.Explorer.__call__, []

    def spy_evaluate(evaluator, policy, draw_noise, step, stop):
        acted.append(("evaluate", step, policy.method))
        return evaluate(evaluator, policy, draw_noise, step, stop)

    def spy_explore(explorer, policy, noise, step, on_failure):
        acted.append(("explore", step, policy.method))
        return explore(explorer, policy, noise, step, on_failure)

    monkeypatch.setattr(rollout.Evaluator, "__call__", spy_evaluate)
    monkeypatch.setattr(rollout.Explorer, "__call__", spy_explore)
    short = ["--total-timesteps", 2, "--online-timesteps", 2, "--runs-dir", tmp_path]
    run(algorithm, *online_flags[algorithm], *short)
    offline, online = [("evaluate", 1, "act"), ("evaluate", 2, "act")], ("evaluate", 4, online_policy)
    assert acted == [*offline, ("explore", 2, online_policy), ("explore", 3, online_policy), online]


def test_a_run_killed_online_goes_on_with_its_replay(online_flags, online_runs, tmp_path):
    process = start("value_flows", online_flags["value_flows"], tmp_path)
    run_dir = wait_for_row(process, tmp_path, "train.csv", "150,1")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    stopped, done = checkpoint.load(run_dir), online_runs["value_flows"]
    assert 70 < stopped["step"] < 230
    assert stopped["replay"]["rewards"].shape == (2, stopped["step"] - 70)
    for key, rows in checkpoint.load(done)["replay"].items():  # what had happened before is what happens undisturbed
        assert torch.equal(rows[:, : stopped["step"] - 70], stopped["replay"][key]), key

    run("value_flows", "--resume", run_dir)
    resumed = checkpoint.load(run_dir)
    for key, rows in stopped["replay"].items():
        assert torch.equal(resumed["replay"][key][:, : rows.shape[1]], rows), key
    assert resumed["replay"]["rewards"].shape == (2, 160) and resumed["step"] == 230
    for name in ("train.csv", "eval.csv"):  # no row is lost or doubled, and those from before the stop are unchanged
        mine, other = rows_of(run_dir / name), rows_of(done / name)
        assert [(row["step"], row["seed"]) for row in mine] == [(row["step"], row["seed"]) for row in other]
        before = [row for row in other if int(row["step"]) <= stopped["step"]]
        assert mine[: len(before)] == before
    # The environment starts a new episode, so what follows is another run of the dice.
    assert not torch.equal(resumed["replay"]["observations"], checkpoint.load(done)["replay"]["observations"])


def test_a_dead_environment_ends_the_run_with_its_updates_saved(online_flags, tmp_path):
    endless = "--online-timesteps 100000 --eval-interval 1000000 --save-interval 1000000 --eval-workers 1".split()
    process = start("floq", [*online_flags["floq"], *endless], tmp_path)
    run_dir = wait_for_row(process, tmp_path, "train.csv", "100,1")
    os.kill(children(process)[-1], signal.SIGKILL)  # the last one started: the explorers' worker
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "died with exit code -9" in err
    saved = checkpoint.load(run_dir)
    assert saved["step"] >= 100 and saved["replay"]["rewards"].shape[1] == saved["step"] - 70


# --- Arguments ---


@pytest.mark.parametrize(
    "words, message",
    [
        ("--online-timesteps -5", "--online-timesteps -5: must be at least zero"),
        ("--online-timesteps 5 --env-id visual-scene-play-singletask-v0", "works on state observations"),
    ],
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bad_arguments(algorithm, words, message):
    assert_refused(algorithm, words, message)


def test_resume_refuses_to_move_the_phases_border_or_to_go_back(online_runs):
    resume = ["--resume", online_runs["floq"]]
    assert_refused("floq", [*resume, "--total-timesteps", 99], "is in its online phase already")
    assert_refused("floq", [*resume, "--online-timesteps", 99], "is at step 230 already")


def test_offline_to_online_settings_apply_where_there_are_some(capsys):
    words = ("--env-id", "puzzle-4x4-play-singletask-v0")
    assert parse("value_flows", *words).confidence_weight_temp == 100.0
    args = parse("value_flows", *words, "--online-timesteps", "10")
    assert (args.confidence_weight_temp, args.alpha, args.q_agg, args.bcfm_lambda) == (0.1, 300.0, "min", 3.0)
    assert parse("value_flows", *words, "--online-timesteps", "10", "--alpha", "5").alpha == 5.0
    args = parse("value_flows", "--env-id", "humanoidmaze-medium-navigate-singletask-v0", "--online-timesteps", "10")
    assert (args.gamma, args.bcfm_lambda, args.confidence_weight_temp, args.alpha) == (0.995, 3.0, 0.3, 100.0)
    words = ("--env-id", "antsoccer-arena-navigate-singletask-v0")
    assert parse("floq", *words).alpha == 10.0 and parse("floq", *words, "--online-timesteps", "9").alpha == 30.0
    assert "note" not in capsys.readouterr().out
    args = parse("value_flows", "--env-id", "puzzle-3x3-play-singletask-v0", "--online-timesteps", "10")
    assert (args.bcfm_lambda, args.ret_agg) == (0.5, "min")
    assert "no offline-to-online settings for puzzle-3x3-play: using the offline ones" in capsys.readouterr().out
