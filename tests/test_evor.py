"""EVOR's parts against closed forms: soft maximum, softmax choice, flow-TD targets, a known return distribution."""

import csv
import functools
import math
import runpy
import shutil
import sys

import pytest
import torch
from conftest import (
    ENV_ID,
    ROOT,
    SMALL_FLAGS,
    assert_refused,
    make_agent,
    make_agents,
    only_run,
    random_inputs,
    run,
    stacked_inputs,
    update,
)
from conftest import small_args as small_args_of

from common import returns
from evor import soft_maximum, softmax_choice

small_args = functools.partial(small_args_of, "evor")


# --- Soft maximum over return samples ---


def test_soft_maximum_is_the_scaled_log_mean_exp():
    returns = 3 * torch.randn(2, 5, 7, dtype=torch.float64)
    for tau_r in (0.5, 2.0, 30.0):
        expected = tau_r * (torch.logsumexp(returns / tau_r, dim=-1) - math.log(7))
        torch.testing.assert_close(soft_maximum(returns, tau_r), expected)


def test_soft_maximum_goes_from_the_maximum_to_the_mean():
    returns = -100 * torch.rand(4, 16)
    for large in (1e6, 1e9):  # without log1p and expm1, float32 would be off by 0.06 at 1e6 and by 60 at 1e9
        torch.testing.assert_close(soft_maximum(returns, large), returns.mean(dim=-1), rtol=1e-4, atol=1e-2)
    for small in (1e-3, 1e-30):
        torch.testing.assert_close(soft_maximum(returns, small), returns.amax(dim=-1), rtol=0, atol=0.01)
    values = torch.stack([soft_maximum(returns, tau_r) for tau_r in (0.01, 0.1, 1.0, 10.0, 100.0)])
    assert (values[1:] < values[:-1]).all()


def test_soft_maximum_moves_with_a_shift_and_stays_finite():
    returns = 50 * torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(soft_maximum(returns + 7, 2.0), soft_maximum(returns, 2.0) + 7)
    huge = torch.tensor([[1e30, -1e30, 0.0], [-3e38, -3e38, -3e38], [1e38, 1e38, 1e38]])
    for tau_r in (1e-20, 1.0, 1e20):
        assert torch.isfinite(soft_maximum(huge, tau_r)).all()
    torch.testing.assert_close(soft_maximum(huge, 1.0)[1:], huge[1:, 0])


# --- Choice among candidates ---


@pytest.mark.parametrize("tau_q", [0.5, 2.0])
def test_choices_have_the_softmax_frequencies(tau_q):
    q = torch.tensor([-3.0, -1.0, -1.5, -8.0])
    n = 200_000
    chosen = softmax_choice(q.expand(n, 4), tau_q, torch.randn(n, 4))
    frequencies = torch.bincount(chosen, minlength=4) / n
    torch.testing.assert_close(frequencies, torch.softmax(q / tau_q, dim=0), rtol=0, atol=5 * 0.5 / n**0.5)


def test_choice_is_uniform_when_hot_and_greedy_when_cold():
    q, noise = -200 * torch.rand(3, 20_000, 5), torch.randn(3, 20_000, 5)
    for cold in (1e-4, 1e-30):
        assert (softmax_choice(q, cold, noise) == q.argmax(dim=-1)).float().mean() > 0.999
    counts = torch.bincount(softmax_choice(q, 1e9, noise).flatten(), minlength=5)
    assert (counts - 12_000).abs().max() < 5 * 12_000**0.5
    extreme = torch.tensor([[-12.0, 0.0, 12.0], [-12.0, -11.0, 3.0], [-12.0, 6.0, 5.9]])  # beyond what float32 draws
    assert softmax_choice(torch.zeros(3, 3), 1.0, extreme).tolist() == [2, 2, 1]


def test_act_takes_the_best_rated_candidate():
    agent = make_agent(small_args(tau_q=1e-6, tau_r=2.0), min_reward=-100.0)
    observations, noise = torch.randn(12, 5), torch.randn(12, 4 * 3 + 4 + 4)
    acted = agent.act(observations, noise)
    assert acted.shape == (12, 3) and agent.draw_act_noise(torch.Generator(), 7).shape == (7, 20)
    candidates = agent.flow_actions(observations, noise[:, :12].unflatten(-1, (4, 3)))
    for n in range(12):
        ratings = []
        for c in range(4):
            pair = torch.cat([observations[n], candidates[n, c]])
            returns = []
            for start in noise[n, 16:]:  # the same start noises for every candidate
                ends = []
                for e in range(2):
                    z = start
                    for k in range(5):
                        inputs = torch.cat([pair, z.view(1), torch.tensor([k / 5])])
                        z = z + agent.target_critic_flow(inputs.unsqueeze(0))[e, 0, 0] / 5
                    ends.append(z.clamp(-100 / 0.01, 0))  # clipped at the end only
                returns.append(torch.stack(ends).mean())
            returns = torch.stack(returns)
            ratings.append(2.0 * (torch.logsumexp(returns / 2.0, dim=0) - math.log(4)))
        torch.testing.assert_close(acted[n], candidates[n, torch.stack(ratings).argmax()])


def test_one_candidate_is_the_base_policy():
    agent = make_agent(small_args(num_actions=1))
    observations, noise = torch.randn(6, 5), torch.randn(6, 3 + 1 + 4)
    expected = agent.flow_actions(observations, noise[:, None, :3]).squeeze(1)
    torch.testing.assert_close(agent.act(observations, noise), expected)


def test_choices_among_rated_candidates_follow_the_temperature():
    """The same candidates and ratings as above (that test takes them apart), chosen at a warm temperature."""
    for tau_q in (0.5, 50.0):
        agent = make_agent(small_args(tau_q=tau_q, tau_r=2.0), min_reward=-100.0)
        with torch.no_grad():
            agent.target_critic_flow.weights[-1].mul_(30)  # ratings that differ by more than the temperature
        observations, noise = torch.randn(200, 5), torch.randn(200, 4 * 3 + 4 + 4)
        candidates = agent.flow_actions(observations, noise[:, :12].unflatten(-1, (4, 3)))
        q = agent.ratings(observations, candidates, noise[:, 16:])
        best = softmax_choice(q, tau_q, noise[:, 12:16])
        assert (best != q.argmax(dim=-1)).any()
        torch.testing.assert_close(agent.act(observations, noise), candidates[torch.arange(200), best])


# --- Base policy ---


def test_base_policy_is_euler_integration_clipped_at_the_end():
    agent = make_agent(small_args())
    with torch.no_grad():
        agent.actor_flow.biases[-1].copy_(torch.tensor([[3.0, -0.2, 0.1]]))
    observations, noise = torch.randn(6, 5), torch.randn(6, 4, 3)
    actions = agent.flow_actions(observations, noise)
    for c in range(4):
        x = noise[:, c]
        for k in range(5):
            x = x + agent.actor_flow(torch.cat([observations, x, torch.full((6, 1), k / 5)], dim=-1)) / 5
        torch.testing.assert_close(actions[:, c], x.clamp(-1, 1), rtol=1e-4, atol=1e-5)
    assert (actions == 1).any() and actions.min() >= -1


def test_cloning_loss_is_flow_matching_towards_the_data():
    agent = make_agent(small_args())
    batch, noise = random_inputs(agent)
    x_0, t, a = noise["bc_action"], noise["bc_time"], batch["actions"]
    u = agent.actor_flow(torch.cat([batch["observations"], t * a + (1 - t) * x_0, t], dim=-1))
    expected = (u - (a - x_0)).square().mean()
    torch.testing.assert_close(agent.actor_loss(batch, noise)[0], expected, rtol=1e-4, atol=1e-5)


# --- Flow TD ---


VARIANTS = [("exact", "data"), ("published", "data"), ("published", "target")]


def evor_inputs(agent):
    """A random batch with rewards-to-go of the data, and its noise."""
    batch, noise = random_inputs(agent)
    batch["returns"] = -3 * torch.rand(batch["rewards"].shape)
    return batch, noise


def constant_target_field(agent, velocity):
    """Makes the target fields the same number everywhere, so that Phi(z_0; T) = z_0 + T velocity."""
    with torch.no_grad():
        agent.target_critic_flow.weights[-1].zero_()
        agent.target_critic_flow.biases[-1].fill_(velocity)


@pytest.mark.parametrize("td_target, latents", VARIANTS)
def test_points_and_labels_for_a_constant_field(td_target, latents):
    agent = make_agent(small_args(td_target=td_target, latents=latents, clip_flow_returns=False))
    constant_target_field(agent, -2.0)
    batch, noise = evor_inputs(agent)
    r, mask = batch["rewards"].unsqueeze(-1), batch["masks"].unsqueeze(-1)
    z_0, t = noise["return"], noise["time"]
    z_t, label = agent.flow_td(batch, noise)
    if td_target == "exact":
        z_1 = r + 0.99 * mask * (z_0 - 2)
    else:
        z_1 = batch["returns"].unsqueeze(-1) if latents == "data" else noise["latent"] - 2
    torch.testing.assert_close(z_t, (1 - t) * z_0 + t * z_1)
    torch.testing.assert_close(label, z_1 - z_0 if td_target == "exact" else r + 0.99 * mask * -2)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("td_target, latents", VARIANTS)
def test_flow_td_and_its_loss_equal_the_formulas_written_out(td_target, latents, clip):
    """With target fields that differ from each other and depend on z, t and the pair."""
    agent = make_agent(small_args(td_target=td_target, latents=latents, clip_flow_returns=clip), min_reward=-0.5)
    agent.z_min, agent.z_max = -0.4, 0.3  # a range that cuts some end points off
    batch, noise = evor_inputs(agent)
    s, a, s_next, r, mask = (batch[k] for k in ("observations", "actions", "next_observations", "rewards", "masks"))
    r, mask, z_0, t = r.unsqueeze(-1), mask.unsqueeze(-1), noise["return"], noise["time"]
    both = lambda x: x.expand(2, -1, -1)

    def field(net, s, a, z, t):  # every member at its own z: (E, B, 1)
        return net(torch.cat([both(torch.cat([s, a], dim=-1)), z, t], dim=-1))

    def end_point(s, a, z):  # (B, 1), the mean of the target fields' end points from the same start
        z = both(z)
        for k in range(5):
            z = z + field(agent.target_critic_flow, s, a, z, torch.full_like(z, k / 5)) / 5
        assert not torch.equal(z, z.clamp(-0.4, 0.3))
        return (z.clamp(-0.4, 0.3) if clip else z).mean(dim=0)

    with torch.no_grad():
        a_next = noise["next_action"]
        for k in range(5):
            a_next = a_next + agent.actor_flow(torch.cat([s_next, a_next, torch.full_like(t, k / 5)], dim=-1)) / 5
        a_next = a_next.clamp(-1, 1)
        if td_target == "exact":
            z_1 = r + 0.99 * mask * end_point(s_next, a_next, z_0)
            z_t, label = t * z_1 + (1 - t) * z_0, z_1 - z_0
        else:
            z_1 = batch["returns"].unsqueeze(-1) if latents == "data" else end_point(s, a, noise["latent"])
            z_t = t * z_1 + (1 - t) * z_0
            label = r + 0.99 * mask * field(agent.target_critic_flow, s_next, a_next, both(z_t), both(t)).mean(dim=0)
        v = field(agent.critic_flow, s, a, both(z_t), both(t))
        loss = (v - label).square().mean()
    for mine, expected in zip(agent.flow_td(batch, noise), (z_t, label)):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    mine, metrics = agent.critic_loss(batch, noise)
    torch.testing.assert_close(mine, loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["critic/target_mean"], label.mean(), rtol=1e-4, atol=1e-5)


def test_latents_of_the_target_fields_are_independent_of_the_start_noise():
    agent = make_agent(small_args(td_target="published", latents="target", batch_size=4_000))
    _, noise = evor_inputs(agent)
    correlation = torch.corrcoef(torch.cat([noise["return"], noise["latent"]], dim=-1).T)[0, 1]
    assert correlation.abs() < 5 / 4_000**0.5
    for latents, td_target in (("data", "published"), ("target", "exact"), ("data", "exact")):
        agent = make_agent(small_args(td_target=td_target, latents=latents))
        assert "latent" not in evor_inputs(agent)[1]


@pytest.mark.parametrize("latents", ["data", "target"])
def test_the_published_label_of_a_known_return_makes_its_velocity(latents):
    """The fixed point with deterministic returns: fields that are the return G of their pair give the label r + gamma
    mask G', whatever z_t is, so that the learned end point is G + z_0 (papers' equation; docs/evor.md)."""
    agent = make_agent(small_args(td_target="published", latents=latents, clip_flow_returns=False))
    constant_target_field(agent, -7.0)
    batch, noise = evor_inputs(agent)
    label = agent.flow_td(batch, noise)[1]
    torch.testing.assert_close(label.squeeze(-1), batch["rewards"] + 0.99 * batch["masks"] * -7.0)
    returns = agent.return_samples(torch.randn(2, 8), torch.tensor([[0.5], [-1.5]]))
    torch.testing.assert_close(returns, torch.tensor([[-6.5], [-8.5]]))


def test_the_range_of_returns_has_zero_in_it():
    for rewards, expected in (
        ((-1.0, -1.0), (-100.0, 0.0)),
        ((-1.0, 2.0), (-100.0, 200.0)),
        ((0.5, 1.0), (0.0, 100.0)),
    ):
        agent = make_agent(small_args(), min_reward=rewards[0], max_reward=rewards[1])
        assert (agent.z_min, agent.z_max) == pytest.approx(expected)


@pytest.mark.parametrize("td_target, latents", VARIANTS)
def test_terminal_labels_hold_the_reward_alone(td_target, latents):
    agent = make_agent(small_args(td_target=td_target, latents=latents), min_reward=-100.0)
    batch, noise = evor_inputs(agent)
    batch["masks"] = torch.zeros_like(batch["masks"])
    _, label = agent.flow_td(batch, noise)
    own_noise = noise["return"].squeeze(-1) if td_target == "exact" else 0
    torch.testing.assert_close(label.squeeze(-1), batch["rewards"] - own_noise)


@pytest.mark.parametrize("td_target, latents", VARIANTS)
def test_targets_are_constants_of_the_target_fields_and_the_policy(td_target, latents):
    agent = make_agent(small_args(td_target=td_target, latents=latents), min_reward=-100.0)
    batch, noise = evor_inputs(agent)
    before = agent.flow_td(batch, noise)
    assert not any(tensor.requires_grad for tensor in before)
    with torch.no_grad():
        for parameter in agent.critic_flow.parameters():
            parameter.normal_()
    for a, b in zip(before, agent.flow_td(batch, noise)):
        assert torch.equal(a, b)
    with torch.no_grad():
        for parameter in agent.actor_flow.parameters():
            parameter.normal_()
    assert not torch.equal(before[1], agent.flow_td(batch, noise)[1])  # a' ~ the base policy


# --- Training phases ---


@pytest.mark.parametrize("frozen, trained", [("actor_loss", "critic_loss"), ("critic_loss", "actor_loss")])
def test_a_phase_leaves_the_other_networks_bit_equal(frozen, trained):
    """Also after Adam has moments for them."""
    agents, seeds = make_agents(small_args(), (0, 1)), (0, 1)
    update(agents, *stacked_inputs(agents, seeds))
    agents.ema("target_critic_flow", "critic_flow", 1.0)
    networks = {"actor_loss": ("actor_flow",), "critic_loss": ("critic_flow", "target_critic_flow")}
    before = {name: p.detach().clone() for name, p in agents.parameters.items()}
    steps = lambda: {
        n: agents.optimizer.state[p]["step"].item() for n, p in agents.parameters.items() if p.requires_grad
    }
    steps_before = steps()
    for number in range(1, 4):
        metrics = update(agents, *stacked_inputs(agents, seeds, number), losses=(trained,))
        assert all(name.startswith("actor/" if trained == "actor_loss" else "critic/") for name in metrics)
    for name, parameter in agents.parameters.items():
        still = name.split(".")[0] in networks[frozen]
        assert torch.equal(parameter, before[name]) == still, name
    for name, step in steps().items():
        assert step - steps_before[name] == (0 if name.split(".")[0] in networks[frozen] else 3)


def test_phases_in_one_update_each_equal_an_update_of_both():
    """Neither loss reads what the other trains within an update, so an update of both is the two phases' updates."""
    agents = [make_agents(small_args()) for _ in range(3)]
    batch, noise = stacked_inputs(agents[0])
    update(agents[0], batch, noise)
    update(agents[1], batch, noise, losses=("actor_loss",))
    update(agents[2], batch, noise, losses=("critic_loss",))
    for name, value in agents[0].parameters.items():
        other = agents[1 if name.startswith("actor_flow") else 2].parameters[name]
        assert torch.equal(value, other), name


def test_the_published_latents_are_the_runs_discounted_returns(maze_data, tmp_path, monkeypatch):
    asked = []

    def reward_to_go(data, gamma):
        asked.append((len(data["rewards"]), gamma))
        raise InterruptedError

    monkeypatch.setattr(returns, "reward_to_go", reward_to_go)
    words = ["--env-id", ENV_ID, "--dataset-path", maze_data, "--td-target", "published", "--gamma", 0.9]
    monkeypatch.setattr(sys, "argv", ["evor.py", *map(str, words), *SMALL_FLAGS["evor"], "--runs-dir", str(tmp_path)])
    with pytest.raises(InterruptedError):
        runpy.run_path(str(ROOT / "evor.py"), run_name="__main__")
    assert asked == [(10_000, 0.9)]


def test_a_run_with_phases_resumes_and_freezes_the_policy(maze_data, tmp_path):
    lengths = "--total-timesteps 60 --bc-timesteps 25 --eval-interval 60 --log-interval 10 --save-interval 20".split()
    flags = [
        *SMALL_FLAGS["evor"],
        "--env-id",
        ENV_ID,
        "--dataset-path",
        maze_data,
        "--td-target",
        "published",
        *lengths,
    ]
    run("evor", *flags, "--runs-dir", tmp_path / "whole")
    whole = only_run(tmp_path / "whole")
    rows = list(csv.DictReader(open(whole / "train.csv")))
    assert [bool(row["actor/bc_flow_loss"]) for row in rows] == [True, True, False, False, False, False]
    assert [bool(row["critic/critic_loss"]) for row in rows] == [False, False, True, True, True, True]
    first, last = (torch.load(whole / name, weights_only=True) for name in ("checkpoint_previous.pt", "checkpoint.pt"))
    assert (first["step"], last["step"]) == (40, 60)
    for name, value in last["agent"].items():
        assert torch.equal(value, first["agent"][name]) == name.startswith("actor_flow"), name

    run("evor", *flags, "--runs-dir", tmp_path / "stopped", "--total-timesteps", 40)  # within the second phase
    resumed = only_run(tmp_path / "stopped")
    run("evor", "--resume", resumed, "--total-timesteps", 60)
    assert (resumed / "train.csv").read_bytes() == (whole / "train.csv").read_bytes()
    final = torch.load(resumed / "checkpoint.pt", weights_only=True)
    for name, value in final["agent"].items():
        assert torch.equal(value, last["agent"][name]), name


def test_returns_are_clipped_to_their_range():
    for clip, expected in ((True, -100.0), (False, None)):
        agent = make_agent(small_args(clip_flow_returns=clip), min_reward=-1.0)
        constant_target_field(agent, -5_000.0)
        returns = agent.return_samples(torch.randn(12, 8), torch.randn(12, 1))
        assert (returns == expected).all() if clip else (returns < -4_000).all()


# --- A return distribution that is known ---


def test_evor_learns_a_two_mode_return_distribution():
    """The coin chain: +-0.9^k with equal probability, k steps before the end (benchmarks/studies/return_accuracy.py).

    An untrained flow is at a distance of 0.5 or more; see docs/evor.md for the spread over seeds and variants.
    """
    import evor
    from benchmarks.studies import return_accuracy

    mdp = return_accuracy.make_mdp("coin")
    args = return_accuracy.small_args(evor, batch_size=256, learning_rate=2e-3)
    agent, diverged = return_accuracy.train(evor, args, mdp, updates=1_000, seeds=[0])
    assert diverged is None
    for row in return_accuracy.accuracy(agent, mdp, 0.9):
        assert row["wasserstein"] < 0.2 and abs(row["mean_error"]) < 0.1, row
        assert row["low_mode"] > 0.4 and row["high_mode"] > 0.4, row


# --- Evaluation only ---


def test_evaluate_changes_the_choice_alone_and_repeats(online_runs, tmp_path):
    run_dir = shutil.copytree(online_runs["evor"], tmp_path / "run")  # others evaluate theirs at the same time
    before = {name: (run_dir / name).read_bytes() for name in ("eval.csv", "train.csv", "checkpoint.pt")}
    words = ("--evaluate", run_dir, "--num-actions", 2, "--tau-q", 0.1, "--eval-episodes", 2)
    done = [run("evor", *words) for _ in range(2)]
    assert "'num_actions': 2" in done[0].stdout
    rows = list(csv.DictReader(open(run_dir / "inference.csv")))
    assert len(rows) == 4 and rows[:2] == rows[2:]
    assert [(row["num_actions"], row["tau_q"], row["seed"], row["episodes"]) for row in rows[:2]] == [
        ("2", "0.1", "0", "2"), ("2", "0.1", "1", "2"),
    ]  # fmt: skip
    assert {name: (run_dir / name).read_bytes() for name in before} == before


def test_evaluate_refuses_what_is_not_an_evor_run_or_would_need_training(online_runs, tmp_path):
    assert_refused("evor", ["--evaluate", online_runs["floq"]], "--evaluate", "is a run of floq.py")
    refused = ["--evaluate", online_runs["evor"], "--gamma", "0.9"]
    assert_refused("evor", refused, "cannot continue with other arguments: --gamma 0.9 (the run has 0.99)")
    refused = ["--evaluate", online_runs["evor"], "--total-timesteps", "9"]
    assert_refused("evor", refused, "cannot continue with other arguments: --total-timesteps 9")
    assert_refused("evor", ["--evaluate", tmp_path], "--evaluate", "has no usable checkpoint")
    both = ["--evaluate", online_runs["evor"], "--resume", online_runs["evor"]]
    assert_refused("evor", both, "--resume and --evaluate exclude each other")
    assert_refused("evor", ["--resume", online_runs["evor"], "--num-actions", "9"], "--num-actions 9 (the run has 3)")


@pytest.mark.parametrize(
    "words, message",
    [
        ("--num-actions 0", "--num-actions 0: must be above zero"),
        ("--num-returns -1", "--num-returns -1: must be above zero"),
        ("--tau-q 0", "--tau-q 0.0: must be above zero"),
        ("--tau-r -3", "--tau-r -3.0: must be above zero"),
        ("--td-target published --latents data --online-timesteps 5", "use --latents target"),
        ("--bc-timesteps -1", "--bc-timesteps -1: must be at least zero"),
        ("--bc-timesteps 11 --total-timesteps 10", "--bc-timesteps 11 is above --total-timesteps 10"),
        ("--env-id visual-scene-play-singletask-v0", "state observations"),
    ],
)
def test_bad_arguments(words, message):
    assert_refused("evor", words, message)
