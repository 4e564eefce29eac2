"""Evaluation: hand counts, seeded resets, success timing, videos, dying workers."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from conftest import ENV_ID, make_expert, parse, small_args

from common import envs, rollout, workers
from common.stacked import Stacked


def start(num_episodes=3, num_workers=2, num_seeds=2, run_dir=Path(), **changes):
    """An evaluator of two seeds; its workers end when nothing uses it any more."""
    sizes = dict(num_seeds=num_seeds, eval_episodes=num_episodes, eval_workers=num_workers)
    args = replace(parse("floq", "--env-id", ENV_ID), **sizes, **changes)
    return rollout.Evaluator(args, list(range(10, 10 + num_seeds)), "cpu", run_dir)


def draw_noise(generator, num_steps):
    return torch.randn(num_steps, 2, generator=generator)


def evaluate(evaluator, policy, step=5, **kwargs):
    return evaluator(policy, draw_noise, step, **kwargs)


def count_by_hand(policy, seed, num_episodes, step, success_timing="post"):
    """Plays the same episodes one after the other in this process: (success, return, length) of each."""
    env, episodes = envs.make_env(ENV_ID, success_timing), []
    for number in range(num_episodes):
        words = np.random.SeedSequence([seed, step, number]).generate_state(2, np.uint32)
        noise = draw_noise(torch.Generator().manual_seed(int(words[0])), env.spec.max_episode_steps)
        ob, _ = envs.reset_env(env, int(words[1] >> 1))
        total, length, done = 0.0, 0, False
        while not done:
            observation = torch.as_tensor(ob, dtype=torch.float32).view(1, 1, 2)
            ob, reward, terminated, truncated, info = env.step(
                policy(observation, noise[length].view(1, 1, 2)).numpy()[0, 0]
            )
            total, length, done = total + reward, length + 1, terminated or truncated
        episodes.append((info["success"], total, length))
    return np.array(episodes)


def test_expert_succeeds_and_equals_a_hand_count():
    expert = make_expert()
    rows = evaluate(start(), expert)
    for row, seed in zip(rows, (10, 11)):
        success, returns, lengths = count_by_hand(expert, seed, 3, 5).mean(axis=0)
        assert success == row["success"] == 1.0
        assert (row["episode_return"], row["episode_length"]) == (returns, lengths)
        assert (row["seed"], row["step"], row["episodes"]) == (seed, 5, 3)


def test_a_policy_that_stands_still_never_succeeds():
    for row in evaluate(start(num_episodes=1), lambda observations, noise: torch.zeros_like(observations)):
        assert (row["success"], row["episode_return"], row["episode_length"]) == (0.0, -1000.0, 1000.0)


def test_a_policy_gets_its_inputs_on_its_device():
    """By torch's device without values, in place of a GPU."""
    seen = []

    def policy(observations, noise):
        seen.append((observations.device.type, noise.device.type))
        return torch.zeros(observations.shape)

    evaluator = start(num_episodes=1)
    evaluator.device = torch.device("meta")
    evaluate(evaluator, policy)
    assert set(seen) == {("meta", "meta")}


@pytest.mark.parametrize("wanted, number", [(0, 3), (1, 1), (4, 4)])
def test_evaluations_take_a_process_per_core_unless_told_otherwise(wanted, number, monkeypatch):
    monkeypatch.setattr(workers, "num_cores", lambda: 3)
    args = replace(parse("floq", "--env-id", ENV_ID), eval_workers=wanted)
    assert len(workers.Workers(args, num_seeds=2, num_episodes=50).processes) == number


def test_a_policy_that_sometimes_succeeds_is_counted_right():
    expert = make_expert()
    # The start is (16, 20) +- 1 and the way leads to the right: episodes that start in the cell's left half stay there.
    stuck = lambda ob: (15 <= ob[..., :1]) & (ob[..., :1] < 16) & (ob[..., 1:] > 18.5)
    sometimes = lambda observations, noise: expert(observations, noise) * ~stuck(observations)
    rows = evaluate(start(num_episodes=6), sometimes)
    by_hand = [count_by_hand(sometimes, seed, 6, 5) for seed in (10, 11)]
    assert 0 < np.concatenate(by_hand)[:, 0].mean() < 1
    for row, episodes in zip(rows, by_hand):
        expected = episodes.mean(axis=0)
        assert (row["success"], row["episode_return"], row["episode_length"]) == tuple(expected)


def test_rows_do_not_depend_on_workers_or_on_other_seeds():
    expert = make_expert()
    rows = evaluate(start(num_workers=2), expert)
    assert evaluate(start(num_workers=1), expert) == rows
    assert evaluate(start(num_seeds=1), expert) == rows[:1]
    later = [row | {"step": rows[0]["step"]} for row in evaluate(start(), expert, step=6)]
    assert later != rows


def test_an_environment_that_draws_from_numpys_generator_does_not_see_the_others(monkeypatch):
    """As teleport mazes do in a step. Slots of one process are answered in turn."""

    class Env:
        def step(self, action):
            return np.random.random(), 0.0, False, False, {"success": 0.0}

    monkeypatch.setattr(envs, "reset_env", lambda env, seed: (np.random.seed(seed), {}))
    before = np.random.get_bit_generator()
    places = [(Env(), np.random.MT19937()) for _ in range(3)]
    reset = lambda slot: workers._answer(places[slot], "reset", 10 + slot)
    step = lambda slot: workers._answer(places[slot], "step", None)[0]
    alone = []
    for slot in range(3):
        reset(slot)
        alone.append([step(slot) for _ in range(4)])
    for slot in range(3):
        reset(slot)
    together = [[step(slot) for slot in range(3)] for _ in range(4)]
    np.random.set_bit_generator(before)
    assert [list(steps) for steps in zip(*together)] == alone and len(set(map(tuple, alone))) == 3
    assert alone[0] == np.random.RandomState(10).random(4).tolist()


def test_a_module_in_the_current_folder_does_not_hide_the_projects(tmp_path, monkeypatch):
    (tmp_path / "common.py").write_text("raise ImportError('another project')")
    monkeypatch.chdir(tmp_path)
    assert start(num_episodes=1, num_seeds=1)(lambda *x: torch.zeros(1, 1, 2), draw_noise, 1)


def test_a_network_acts_the_same_on_any_number_of_workers():
    import floq

    args = small_args("floq", actor_hidden_dims=(256, 256), block_width=16)
    make_agent = lambda: floq.Agent(args, 2, 2, -1.0, 0.0)
    act = {n: Stacked(make_agent, range(10, 10 + n), "cpu", 1e-3).function("act") for n in (1, 2)}

    def play(num_workers, num_seeds):
        """The rows, and all actions (T, S, P, A)."""
        actions = []
        policy = lambda *inputs: actions.append(act[num_seeds](*inputs)) or actions[-1]
        rows = evaluate(start(num_episodes=5, num_workers=num_workers, num_seeds=num_seeds), policy)
        return rows, torch.stack(actions)

    (rows, actions), (alone, own_actions) = play(3, 2), play(2, 1)
    other_rows, other_actions = play(1, 2)
    assert other_rows == rows and torch.equal(other_actions, actions)
    assert alone == rows[:1]
    torch.testing.assert_close(own_actions, actions[:, :1], rtol=0, atol=1e-4)  # one seed, not two side by side
    assert len(actions) > 500 and actions.std() > 0.1


def test_success_timing_pre_judges_one_step_later():
    expert = make_expert()
    post, pre = (evaluate(start(success_timing=timing), expert) for timing in ("post", "pre"))
    for a, b in zip(post, pre):
        assert a["success"] == b["success"] == 1.0
        assert b["episode_length"] == a["episode_length"] + 1  # the step from the goal is still taken
        assert b["episode_return"] == a["episode_return"] - 1


@pytest.mark.parametrize(
    "env_id",
    [
        "cube-single-play-singletask-v0",
        "pointmaze-medium-navigate-singletask-v0",
        "antmaze-large-navigate-singletask-v0",
    ],
)
def test_reset_is_a_function_of_its_seed(env_id):
    def start_and_steps(seed):
        env = envs.make_env(env_id)
        ob = [envs.reset_env(env, seed)[0]]
        action = np.full(env.action_space.shape, 0.3, np.float32)
        return np.array(ob + [env.step(action)[0] for _ in range(5)])

    np.random.rand()  # whatever the global generator's state is
    assert np.array_equal(start_and_steps(3), start_and_steps(3))
    assert not np.array_equal(start_and_steps(3)[0], start_and_steps(4)[0])


def test_workers_end_when_their_evaluator_is_dropped():
    evaluator = start(num_episodes=1)
    evaluate(evaluator, make_expert())
    processes = evaluator.workers.processes
    assert all(process.poll() is None for process in processes)
    del evaluator
    assert [process.poll() for process in processes] == [0, 0]


def test_workers_outlive_the_signals_that_stop_a_run():
    """Which go to the whole group of processes: the main process still evaluates or saves."""
    evaluator, expert = start(num_episodes=1), make_expert()
    rows = evaluate(evaluator, expert)
    for process in evaluator.workers.processes:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
    assert evaluate(evaluator, expert) == rows


def test_an_evaluation_has_one_thread_and_gives_the_others_back():
    threads, before = [], torch.get_num_threads()

    def policy(observations, noise):
        threads.append(torch.get_num_threads())
        raise ValueError("a mistake in the policy")

    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="a mistake in the policy"):
            evaluate(start(num_episodes=1, num_workers=1), policy)
        threads.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
    assert threads == [1, 2]


def test_a_killed_worker_is_an_error_and_not_a_hang():
    evaluator = start()

    def policy(observations, noise):
        os.kill(evaluator.workers.processes[0].pid, signal.SIGKILL)
        return torch.zeros_like(observations)

    with pytest.raises(RuntimeError, match="worker 0 died with exit code -9"):
        evaluate(evaluator, policy)


def test_a_failing_worker_is_an_error_with_its_traceback():
    with pytest.raises(RuntimeError, match="(?s)worker . failed.*Traceback.*Error"):
        evaluate(start(), lambda observations, noise: torch.zeros(*observations.shape[:2], 7))


@pytest.mark.parametrize("closed", ["recv", "send"])
def test_a_worker_leaves_quietly_when_nobody_listens(closed):
    class Connection:
        def recv(self):
            if closed == "recv":
                raise ConnectionResetError
            return "unknown", {}

        def send(self, reply):
            assert reply == (True, {})
            raise BrokenPipeError

    workers.serve(Connection())


def test_an_evaluation_can_be_given_up():
    class Stop:
        calls = 0

        def __bool__(self):
            self.calls += 1
            return self.calls > 4

    assert evaluate(start(), make_expert(), stop=Stop()) is None


def test_frames_are_stacked_on_the_channel_axis():
    class Env(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(0, 255, (4, 4, 3), np.uint8)

        def reset(self, **kwargs):
            self.count = 0
            return np.full((4, 4, 3), 0, np.uint8), {}

        def step(self, action):
            self.count += 1
            return np.full((4, 4, 3), self.count, np.uint8), 0.0, False, False, {}

    env = envs.stack_frames(Env(), 3)
    assert env.reset()[0].shape == env.observation_space.shape == (4, 4, 9) and env.reset()[0].max() == 0
    env.step(None)
    assert env.step(None)[0][0, 0, ::3].tolist() == [0, 1, 2]
    assert env.step(None)[0][0, 0, ::3].tolist() == [1, 2, 3]


@pytest.mark.parametrize("env_id, number", [("visual-cube-single-play-singletask-v0", 3), (ENV_ID, 1)])
def test_policies_of_images_are_evaluated_on_stacks_of_three_frames(monkeypatch, env_id, number):
    asked = {}

    def make_workers(args, num_seeds, num_episodes, frame_stack, render):
        asked.update(env_id=args.env_id, frame_stack=frame_stack)
        raise InterruptedError

    monkeypatch.setattr(rollout, "Workers", make_workers)
    with pytest.raises(InterruptedError):
        evaluate(start(env_id=env_id), None)
    assert asked == {"env_id": env_id, "frame_stack": number}


def test_video_of_each_seeds_first_episode(opengl, tmp_path):
    from PIL import Image

    evaluator = start(num_episodes=2, num_seeds=1, capture_video=True, run_dir=tmp_path)
    assert evaluator.video_names == [f"seed{seed}" for seed in evaluator.seeds]
    evaluator.video_names = ["again"]
    rows = evaluate(evaluator, make_expert())
    (first,) = evaluate(start(num_episodes=1, num_seeds=1), make_expert())
    for row in rows:
        assert row["success"] == 1.0 and row["episode_length"] != first["episode_length"]
        with Image.open(tmp_path / "videos" / "step5-again.gif") as image:
            frames = range(image.n_frames)  # equal neighbours are one, shown for longer
            durations = [image.seek(frame) or image.info["duration"] for frame in frames]
            assert sum(durations) == 50 * first["episode_length"] and image.size == (200, 200)
    assert evaluate(start(num_episodes=2, num_seeds=1), make_expert()) == rows  # rendering changes no number


def test_gif_has_every_frame(tmp_path):
    from PIL import Image

    rollout.save_gif(tmp_path / "videos" / "a.gif", [np.full((20, 30, 3), 40 * i, np.uint8) for i in range(5)])
    with Image.open(tmp_path / "videos" / "a.gif") as image:
        assert image.n_frames == 5 and image.size == (30, 20)
