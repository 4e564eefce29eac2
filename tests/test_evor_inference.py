"""EVOR's improvement at inference: means and intervals, action noise, and the sweeps of a run."""

import csv
import shutil
from dataclasses import replace

import torch
from conftest import SMALL_ARGS, run_module

import evor
from benchmarks.studies import evor_inference
from common import rollout
from common.stacked import Stacked


def scale(*words):
    return run_module("benchmarks.studies.evor_inference", *words)


def test_one_seed_has_a_mean_and_no_interval(tmp_path):
    rows = [{"success": 0.25}, {"success": 0.75}]
    assert evor_inference.success_text(rows[:1]) == "25.0%"
    assert evor_inference.success_text(rows).startswith("50.0% +- ")
    base = dict(num_actions=16, tau_q=1.0, tau_r=10.0, num_returns=8, action_noise=0.0)
    rows = [{"sweep": name, "seed": 0, "success": 0.5} | base for name in base]
    evor_inference.draw(tmp_path / "scaling.png", rows, base)
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_action_noise_is_added_to_the_chosen_action_and_clipped():
    args = replace(evor.Args(), value_hidden_dims=(16,), actor_hidden_dims=(16,), **SMALL_ARGS["evor"])
    agents = Stacked(lambda: evor.Agent(args, 3, 2, -1.0, 0.0), [0, 1], torch.device("cpu"), 1e-3)
    observations = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(1))
    generator = lambda: torch.Generator().manual_seed(2)
    own = agents.agent.draw_act_noise(generator(), 100).view(2, 50, -1)
    chosen = agents.function("act")(observations, own)  # (S, N, A)
    for deviation in (0.0, 0.3):
        policy, draw_noise = evor_inference.disturbed(agents, deviation)
        noise = draw_noise(generator(), 100).view(2, 50, -1)
        assert torch.equal(noise[..., :-2], own) and abs(noise[..., -2:].std() - 1) < 0.15
        assert torch.equal(policy(observations, noise), (chosen + deviation * noise[..., -2:]).clamp(-1, 1))


def test_inference_scaling_of_a_run(online_runs, tmp_path, monkeypatch):
    run_dir = online_runs["evor"]  # made by now
    sizes, taus = [], set()  # of the noise of an action; of the choices and ratings that are made
    original, choice, soft = rollout.Evaluator.__call__, evor.softmax_choice, evor.soft_maximum
    watched = lambda draw_noise: sizes.append(draw_noise(torch.Generator(), 1).shape[-1]) or draw_noise
    play = lambda evaluator, policy, draw_noise, *step: original(evaluator, policy, watched(draw_noise), *step)
    monkeypatch.setattr(rollout.Evaluator, "__call__", play)
    monkeypatch.setattr(evor, "softmax_choice", lambda q, tau, noise: taus.add(("q", tau)) or choice(q, tau, noise))
    monkeypatch.setattr(evor, "soft_maximum", lambda returns, tau: taus.add(("r", tau)) or soft(returns, tau))
    words = ("--run", run_dir, "--episodes", 1, "--output", tmp_path / "scaling", "--no-cuda")
    sweeps = ("--num-actions", 1, 3, "--tau-q", 0.1, "--tau-r", 10, 5, "--num-returns", 2)
    done = scale(*words, *sweeps, "--action-noise")
    assert done.returncode == 0, done.stderr[-2000:]
    before = (tmp_path / "scaling.csv").read_bytes()
    done = scale(*words, *sweeps, "--action-noise", 0, 0.5)  # what is there is kept
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(": success ") == 4
    # C candidates of 2 actions and a choice each, R returns, 2 of action noise; C 3 and R 4 but where they are swept
    C, R = (1, 3, 3, 3, 3, 3, 1), (4, 4, 4, 4, 2, 4, 4)
    assert sizes == [3 * c + r + 2 for c, r in zip(C, R)]
    assert taus == {("q", 1.0), ("q", 0.1), ("r", 10.0), ("r", 5.0)}
    assert (tmp_path / "scaling.csv").read_bytes().startswith(before)
    rows = list(csv.DictReader(open(tmp_path / "scaling.csv")))
    columns = ("sweep", "num_actions", "tau_q", "tau_r", "num_returns", "action_noise")
    settings = [tuple(row[column] for column in columns) for row in rows]
    assert settings[::2] == settings[1::2] and [row["seed"] for row in rows] == 10 * ["0", "1"]
    assert settings[::2] == [
        ("num_actions", "1", "1.0", "10.0", "4", "0.0"),
        ("num_actions", "3", "1.0", "10.0", "4", "0.0"),
        ("tau_q", "3", "0.1", "10.0", "4", "0.0"),
        ("tau_r", "3", "1.0", "10.0", "4", "0.0"),
        ("tau_r", "3", "1.0", "5.0", "4", "0.0"),
        ("num_returns", "3", "1.0", "10.0", "2", "0.0"),
        ("action_noise", "3", "1.0", "10.0", "4", "0.0"),
        ("action_noise", "3", "1.0", "10.0", "4", "0.5"),
        ("action_noise", "1", "1.0", "10.0", "4", "0.0"),
        ("action_noise", "1", "1.0", "10.0", "4", "0.5"),
    ]
    unnamed = [[value for name, value in row.items() if name != "sweep"] for row in rows]
    assert unnamed[12:14] == unnamed[2:4] and unnamed[16:18] == unnamed[:2]  # without noise: rows of the first call
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")

    failed = scale("--run", online_runs["floq"])
    assert failed.returncode == 2 and "is a run of floq.py, not of evor.py" in failed.stderr
    failed = scale(*words, "--tau-q", 0)
    assert failed.returncode == 2 and "--tau-q 0.0: must be above zero" in failed.stderr
    failed = scale(*words, "--action-noise", -1)
    assert failed.returncode == 2 and "--action-noise -1.0: must be at least zero" in failed.stderr
    other_run = shutil.copytree(online_runs["evor"], tmp_path / "other")  # another run with as many updates
    failed = scale("--run", other_run, *words[2:])
    assert failed.returncode == 2 and "scaling.csv has rows of another checkpoint" in failed.stderr
    failed = scale(*words[:3], 2, *words[4:])
    assert failed.returncode == 2 and "scaling.csv has rows of another checkpoint" in failed.stderr
    failed = scale("--run", tmp_path)
    assert failed.returncode == 2 and "--run" in failed.stderr and "no usable checkpoint" in failed.stderr
