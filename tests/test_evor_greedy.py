"""The study of EVOR's greedy end: who rates whose candidates, what is chosen, how ratings are compared."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_agents, run_module, small_args

import evor
from benchmarks import tables
from benchmarks.studies import evor_greedy
from common import checkpoint, policies, rollout


@pytest.fixture
def agents():
    return make_agents(small_args("evor", num_actions=3, num_returns=2, clip_flow_returns=False), (0, 1, 2))


def inputs(agents, N=6):
    generator = torch.Generator().manual_seed(0)
    observations = torch.randn(3, N, 5, generator=generator)
    return observations, torch.stack([agents.agent.draw_act_noise(generator, N) for _ in range(3)])


def test_every_seeds_candidates_are_rated_by_every_seeds_fields(agents):
    generator = torch.Generator().manual_seed(1)
    observations, actions = torch.randn(3, 4, 5, generator=generator), torch.randn(3, 4, 3, 3, generator=generator)
    noise = torch.randn(3, 4, 2, generator=generator)
    rated = evor_greedy.by_all_seeds(evor_greedy.make_ratings(agents))(observations, actions, noise)  # (3, 3, 4, 3)
    for k in range(3):
        for s in range(3):
            rater = agents.only((s + k) % 3).function("ratings")
            expected = rater(observations[s : s + 1], actions[s : s + 1], noise[s : s + 1])[0]
            torch.testing.assert_close(rated[k, s], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(rated[0], rated[1])


def test_the_best_candidate_of_the_named_ratings_is_chosen(agents):
    observations, noise = inputs(agents)
    untrained = make_agents(agents.agent.args, (7, 8, 9))
    candidates = agents.function("flow_actions")(observations, noise[..., :9].unflatten(-1, (3, 3)))  # (3, 6, 3, 3)
    ratings = {
        "own": agents.function("ratings")(observations, candidates, noise[..., 12:]),
        "untrained": untrained.function("ratings")(observations, candidates, noise[..., 12:]),
    }
    each = [agents.only(k).function("ratings") for k in range(3)]  # all seeds' fields on a seed's candidates, averaged
    of = lambda s: (x[s : s + 1] for x in (observations, candidates, noise[..., 12:]))
    ratings["seeds_mean"] = torch.cat([sum(rate(*of(s)) for rate in each) for s in range(3)])
    chosen = {name: evor_greedy.make_policy(name, agents, untrained)(observations, noise) for name in ratings}
    for name, q in ratings.items():
        for s in range(3):
            for n in range(6):
                assert torch.equal(chosen[name][s, n], candidates[s, n, q[s, n].argmax()])
    cloning = evor_greedy.make_policy("cloning", agents, untrained)(observations, noise)
    assert torch.equal(cloning, candidates[:, :, 0])
    tempered = evor_greedy.make_policy("tempered", agents, untrained)(observations, noise)
    assert torch.equal(tempered, agents.function("act")(observations, noise))


def test_equal_seeds_agree_and_one_preferred_direction_is_seen(agents):
    observations, _ = inputs(agents, N=64)
    draws = lambda: torch.Generator().manual_seed(3)
    rows = evor_greedy.compare_ratings(agents, observations, draws())
    generator = draws()
    noise = torch.stack([agents.agent.draw_act_noise(generator, 64) for _ in range(3)])
    actions = agents.function("flow_actions")(observations, noise[..., :9].unflatten(-1, (3, 3)))
    q = evor_greedy.by_all_seeds(evor_greedy.make_ratings(agents))(observations, actions, noise[..., 12:])
    distance = (actions - actions.mean(dim=2, keepdim=True)).norm(dim=-1)  # (S, N, C)
    correlation = lambda a, b: np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(a.numpy(), b.numpy())])
    for s, row in rows.items():
        by_hand = np.mean([correlation(q[0, s], q[k, s]) for k in (1, 2)])
        assert row["correlation"] == pytest.approx(by_hand, abs=1e-3) and abs(by_hand) < 0.99
        assert row["with_distance"] == pytest.approx(correlation(q[0, s], distance[s]), abs=1e-3)

    with torch.no_grad():
        for name, p in agents.parameters.items():
            if name.startswith("target_critic_flow"):
                p.copy_(p[:1].expand_as(p))
    generator = torch.Generator().manual_seed(2)
    for row in evor_greedy.compare_ratings(agents, observations, generator).values():
        assert row["correlation"] == pytest.approx(1, abs=1e-3) and row["spread"] > 0

    # Ratings that are the first action, whatever the state is: the best candidate lies in one half of the directions.
    first = lambda agent, observations, actions, noise: actions[..., 0]
    own, agents.function = agents.function, lambda name: own(first if name == "ratings" else name)
    rows = evor_greedy.compare_ratings(agents, observations, generator).values()
    assert all(row["same_direction"] > 0.5 for row in rows)


def test_states_are_kept_as_they_were_visited(online_runs, tmp_path):
    saved = checkpoint.load(online_runs["evor"], "--run")
    args, cpu = replace(evor.Args(**saved["args"]), eval_episodes=2), torch.device("cpu")
    agents, visited = policies.rebuild(evor.Agent, args, saved, cpu, tmp_path), [[], []]
    policy = evor_greedy.recording(evor_greedy.make_policy("cloning", agents, agents), visited)
    (row, _) = rollout.Evaluator(args, [0, 1], cpu, tmp_path)(policy, agents.agent.draw_act_noise, step=1)
    for of_seed in visited:
        states = torch.cat(of_seed)
        assert len(of_seed) >= row["episode_length"] // evor_greedy.KEEP_EVERY > 1
        assert len(states.unique(dim=0)) == len(states)


def test_states_of_slots_without_an_episode_are_left_out(monkeypatch):
    monkeypatch.setattr(evor_greedy, "KEEP_EVERY", 2)
    visited, noise = [[], []], torch.ones(2, 3, 4)
    policy = evor_greedy.recording(lambda observations, noise: "actions", visited)
    observations = torch.zeros(2, 3, 5)  # one buffer, as the evaluator's
    for step in range(4):
        observations[:] = step
        noise[1, 2] = 0 if step >= 1 else 1
        assert policy(observations, noise) == "actions"
    assert [torch.cat(of_seed)[:, 0].tolist() for of_seed in visited] == [[0, 0, 0, 2, 2, 2], [0, 0, 0, 2, 2]]


def greedy(*words):
    return run_module("benchmarks.studies.evor_greedy", *words)


def test_a_second_call_keeps_the_rows_of_the_first(online_runs, tmp_path):
    words = ("--run", online_runs["evor"], "--episodes", 1, "--no-cuda", "--output", tmp_path / "greedy", "--policies")
    done = greedy(*words, "own", "cloning", "--num-actions", 2)
    assert done.returncode == 0, done.stderr[-2000:]
    path = tmp_path / "greedy.csv"
    before = path.read_text()
    assert (tmp_path / "greedy_ratings.csv").read_text().count("\n") == 3  # two seeds
    done = greedy(*words, "cloning", "own", "--num-actions", 2, 3)
    assert done.returncode == 0, done.stderr[-2000:]
    whole = path.read_text()
    assert whole.startswith(before) and done.stdout.count("candidates: success") == 2
    columns = [tuple(row[name] for name in ("policy", "num_actions", "seed")) for row in tables.read_rows(path)]
    pairs = [("own", "2"), ("cloning", "2"), ("cloning", "3"), ("own", "3")]
    assert columns == [(*pair, seed) for pair in pairs for seed in "01"]

    other_run = shutil.copytree(online_runs["evor"], tmp_path / "other")  # another run with as many updates
    for others in (("--run", other_run, *words[2:], "own"), (*words, "own", "--episodes", 2)):
        failed = greedy(*others)
        assert failed.returncode == 2 and "greedy.csv has rows of another checkpoint or number" in failed.stderr
    assert path.read_text() == whole


def test_mistakes_are_refused(online_runs):
    for words, message in (
        (["floq"], "is a run of floq.py, not of evor.py"),
        (["evor", "--policies", "none"], "known are cloning, untrained"),
        (["evor", "--num-actions", "0"], "must be above zero"),
    ):
        failed = greedy("--run", online_runs[words[0]], *words[1:])
        assert failed.returncode == 2 and message in failed.stderr and "Traceback" not in failed.stderr
