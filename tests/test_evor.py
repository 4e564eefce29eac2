"""EVOR's parts against closed forms: soft maximum, softmax choice, flow-TD targets, a known return distribution."""

import csv
import functools
import itertools
import math

import pytest
import torch

from conftest import assert_refused, make_agent, random_inputs, run
from conftest import small_args as small_args_of
from evor import softmax_choice, soft_maximum

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
    extreme = torch.tensor([[-12.0, 0.0, 12.0]])  # noise at the edges of what float32 can draw
    assert softmax_choice(torch.zeros(1, 3), 1.0, extreme).item() == 2


def test_act_takes_the_best_rated_candidate():
    agent = make_agent(small_args(tau_q=1e-6, tau_r=2.0), seeds=(0, 1), min_reward=-100.0)
    observations, noise = torch.randn(2, 6, 5), torch.randn(2, 6, 4 * 3 + 4 + 4)
    acted = agent.act(observations, noise)
    assert acted.shape == (2, 6, 3) and agent.draw_act_noise(torch.Generator(), 7).shape == (7, 20)
    candidates = agent.flow_actions(observations, noise[..., :12].unflatten(-1, (4, 3)))
    for s, n in itertools.product(range(2), range(6)):
        ratings = []
        for c in range(4):
            pair = torch.cat([observations[s, n], candidates[s, n, c]])
            returns = []
            for start in noise[s, n, 16:]:  # the same start noises for every candidate
                ends = []
                for e in range(2):
                    z = start
                    for k in range(5):
                        inputs = torch.cat([pair, z.view(1), torch.tensor([k / 5])])
                        stacked = inputs.expand(2, 2, 1, -1)
                        z = z + agent.target_critic_flow(stacked)[s, e, 0, 0] / 5
                    ends.append(z.clamp(-100 / 0.01, 0))  # clipped at the end only
                returns.append(torch.stack(ends).mean())
            returns = torch.stack(returns)
            ratings.append(2.0 * (torch.logsumexp(returns / 2.0, dim=0) - math.log(4)))
        torch.testing.assert_close(acted[s, n], candidates[s, n, torch.stack(ratings).argmax()])


def test_one_candidate_is_the_base_policy():
    agent = make_agent(small_args(num_actions=1))
    observations, noise = torch.randn(1, 6, 5), torch.randn(1, 6, 3 + 1 + 4)
    expected = agent.flow_actions(observations, noise[..., None, :3]).squeeze(2)
    torch.testing.assert_close(agent.act(observations, noise), expected)


def test_choices_among_rated_candidates_follow_the_temperature():
    """The same candidates and ratings as above (that test takes them apart), chosen at a warm temperature."""
    for tau_q in (0.5, 50.0):
        agent = make_agent(small_args(tau_q=tau_q, tau_r=2.0), min_reward=-100.0)
        with torch.no_grad():
            agent.target_critic_flow.weights[-1].mul_(30)  # ratings that differ by more than the temperature
        observations, noise = torch.randn(1, 200, 5), torch.randn(1, 200, 4 * 3 + 4 + 4)
        candidates = agent.flow_actions(observations, noise[..., :12].unflatten(-1, (4, 3)))
        rated = candidates.flatten(1, 2)
        starts = noise[..., 16:].repeat_interleave(4, dim=1)
        q = soft_maximum(agent.returns(observations.repeat_interleave(4, dim=1), rated, starts), 2.0).view(1, 200, 4)
        best = softmax_choice(q, tau_q, noise[..., 12:16])
        assert (best != q.argmax(dim=-1)).any()
        expected = candidates.gather(2, best[..., None, None].expand(-1, -1, -1, 3)).squeeze(2)
        torch.testing.assert_close(agent.act(observations, noise), expected)


# --- Base policy ---


def test_base_policy_is_euler_integration_clipped_at_the_end():
    agent = make_agent(small_args(), seeds=(0, 1))
    with torch.no_grad():
        agent.actor_flow.biases[-1].copy_(torch.tensor([3.0, -0.2, 0.1]).expand_as(agent.actor_flow.biases[-1]))
    observations, noise = torch.randn(2, 6, 5), torch.randn(2, 6, 4, 3)
    actions = agent.flow_actions(observations, noise)
    for c in range(4):
        x = noise[:, :, c]
        for k in range(5):
            x = x + agent.actor_flow(torch.cat([observations, x, torch.full((2, 6, 1), k / 5)], dim=-1)) / 5
        torch.testing.assert_close(actions[:, :, c], x.clamp(-1, 1), rtol=1e-4, atol=1e-5)
    assert (actions == 1).any() and actions.min() >= -1


def test_cloning_loss_is_flow_matching_towards_the_data():
    agent = make_agent(small_args(), seeds=(0, 1))
    batch, noise = random_inputs(agent, seeds=(0, 1))
    x_0, t, a = noise["policy_action"], noise["policy_time"], batch["actions"]
    u = agent.actor_flow(torch.cat([batch["observations"], t * a + (1 - t) * x_0, t], dim=-1))
    expected = (u - (a - x_0)).square().mean(dim=(1, 2))
    torch.testing.assert_close(agent.actor_loss(batch, noise)[0], expected, rtol=1e-4, atol=1e-5)


# --- Flow TD ---


VARIANTS = [("exact", "own"), ("published", "own"), ("published", "next"), ("published", "transported")]


def constant_target_field(agent, velocity):
    """Makes the target fields the same number everywhere, so that Phi(z_0; T) = z_0 + T velocity."""
    with torch.no_grad():
        agent.target_critic_flow.weights[-1].zero_()
        agent.target_critic_flow.biases[-1].fill_(velocity)


@pytest.mark.parametrize("td_target, latents", VARIANTS)
def test_points_and_labels_for_a_constant_field(td_target, latents):
    agent = make_agent(small_args(td_target=td_target, latents=latents, clip_flow_returns=False))
    constant_target_field(agent, -2.0)
    batch, noise = random_inputs(agent)
    r, mask = batch["rewards"].unsqueeze(-1), batch["masks"].unsqueeze(-1)
    z_0, t = noise["return"], noise["time"]
    z_t, label, target = agent.flow_td(batch, noise)
    torch.testing.assert_close(target, r + 0.99 * mask * (z_0 - 2))
    ends = {"own": target, "next": z_0 - 2, "transported": z_0 - 2}
    torch.testing.assert_close(z_t, (1 - t) * z_0 + t * ends[latents])
    torch.testing.assert_close(label, target - z_0 if td_target == "exact" else r + 0.99 * mask * -2)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("td_target, latents", VARIANTS)
def test_flow_td_and_its_loss_equal_the_formulas_written_out(td_target, latents, clip):
    """With target fields that differ from each other and depend on z, t, s' and a'."""
    agent = make_agent(small_args(td_target=td_target, latents=latents, clip_flow_returns=clip), min_reward=-0.5)
    agent.z_min, agent.z_max = -0.4, 0.3  # a range that cuts some end points off
    batch, noise = random_inputs(agent)
    s, s_next, r, mask = (batch[name] for name in ("observations", "next_observations", "rewards", "masks"))
    r, mask, z_0, t = r.unsqueeze(-1), mask.unsqueeze(-1), noise["return"], noise["time"]

    def field(net, s, a, z, t):  # every member at its own z: (1, E, B, 1)
        rows = torch.cat([torch.cat([s, a], dim=-1).unsqueeze(1).expand(-1, 2, -1, -1), z, t], dim=-1)
        return net(rows)

    both = lambda x: x.unsqueeze(1).expand(-1, 2, -1, -1)

    def next_field(a):  # the target fields of s' and the base policy's action from the noise a
        for k in range(5):
            a = a + agent.actor_flow(torch.cat([s_next, a, torch.full_like(t, k / 5)], dim=-1)) / 5
        return functools.partial(field, agent.target_critic_flow, s_next, a.clamp(-1, 1))

    with torch.no_grad():
        target_field = next_field(noise["next_action"])
        z, carried = both(z_0), both(z_0)
        for k in range(5):
            z = z + target_field(z, torch.full_like(z, k / 5)) / 5
            carried = carried + both(t) / 5 * target_field(carried, both(t) * k / 5)
        end = (z.clamp(-0.4, 0.3) if clip else z).mean(dim=1)
        assert not torch.equal(z, z.clamp(-0.4, 0.3))
        target = r + 0.99 * mask * end
        z_t = {"own": t * target + (1 - t) * z_0, "next": t * end + (1 - t) * z_0, "transported": carried.mean(dim=1)}[
            latents
        ]
        if td_target == "exact":
            label = target - z_0
        else:  # another a' than the one that made z_t
            label = r + 0.99 * mask * next_field(noise["label_action"])(both(z_t), both(t)).mean(dim=1)
        v = field(agent.critic_flow, s, batch["actions"], both(z_t), both(t))
        loss = (v - both(label)).square().mean(dim=(1, 2, 3))
    for mine, expected in zip(agent.flow_td(batch, noise), (z_t, label, target)):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(agent.critic_loss(batch, noise)[0], loss, rtol=1e-4, atol=1e-5)


def test_the_range_of_returns_has_zero_in_it():
    for rewards, expected in (
        ((-1.0, -1.0), (-100.0, 0.0)),
        ((-1.0, 2.0), (-100.0, 200.0)),
        ((0.5, 1.0), (0.0, 100.0)),
    ):
        agent = make_agent(small_args(), min_reward=rewards[0], max_reward=rewards[1])
        assert (agent.z_min, agent.z_max) == pytest.approx(expected)


@pytest.mark.parametrize("latents", ["own", "next", "transported"])
def test_published_and_exact_labels_differ_by_noise_of_zero_mean_only(latents):
    """Where the next field carries z_0 straight to z', exact - published = -(1 - gamma mask) z_0, whatever z_t is."""
    args = dict(clip_flow_returns=False, batch_size=4_000)
    exact, published = (
        make_agent(small_args(**args)),
        make_agent(small_args(td_target="published", latents=latents, **args)),
    )
    batch, noise = random_inputs(published)
    for agent in (exact, published):
        constant_target_field(agent, -2.0)
    difference = exact.flow_td(batch, noise)[1] - published.flow_td(batch, noise)[1]
    expected = -(1 - 0.99 * batch["masks"].unsqueeze(-1)) * noise["return"]
    torch.testing.assert_close(difference, expected, rtol=1e-4, atol=1e-5)
    assert difference.mean().abs() < 5 * difference.std() / 4_000**0.5


@pytest.mark.parametrize("td_target, latents", VARIANTS)
def test_terminal_labels_hold_the_reward_alone(td_target, latents):
    agent = make_agent(small_args(td_target=td_target, latents=latents), min_reward=-100.0)
    batch, noise = random_inputs(agent)
    batch["masks"] = torch.zeros_like(batch["masks"])
    _, label, target = agent.flow_td(batch, noise)
    torch.testing.assert_close(target.squeeze(-1), batch["rewards"])
    own_noise = noise["return"].squeeze(-1) if td_target == "exact" else 0
    torch.testing.assert_close(label.squeeze(-1), batch["rewards"] - own_noise)


@pytest.mark.parametrize("td_target, latents", VARIANTS)
def test_targets_are_constants_of_the_target_fields_and_the_policy(td_target, latents):
    agent = make_agent(small_args(td_target=td_target, latents=latents), min_reward=-100.0)
    batch, noise = random_inputs(agent)
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


def test_returns_are_clipped_to_their_range():
    for clip, expected in ((True, -100.0), (False, None)):
        agent = make_agent(small_args(clip_flow_returns=clip), min_reward=-1.0)
        constant_target_field(agent, -5_000.0)
        returns = agent.returns(torch.randn(1, 3, 5), torch.randn(1, 3, 3), torch.randn(1, 3, 4))
        assert (returns == expected).all() if clip else (returns < -4_000).all()


# --- A return distribution that is known ---


def test_evor_learns_a_two_mode_return_distribution():
    """The coin chain: +-0.9^k with equal probability, k steps before the end (benchmarks/return_accuracy.py).

    An untrained flow is at a distance of 0.5 or more; see docs/evor.md for the spread over seeds and variants.
    """
    import evor
    from benchmarks import return_accuracy

    mdp = return_accuracy.make_mdp("coin")
    args = return_accuracy.small_args(evor, batch_size=256)
    agent, diverged = return_accuracy.train(evor, args, mdp, updates=2_000, seeds=[0])
    assert diverged is None
    for row in return_accuracy.accuracy(agent, mdp, 0.9):
        assert row["wasserstein"] < 0.2 and abs(row["mean_error"]) < 0.1, row
        assert row["low_mode"] > 0.4 and row["high_mode"] > 0.4, row


# --- Evaluation only ---


def test_evaluate_changes_the_choice_alone_and_repeats(online_runs):
    run_dir = online_runs["evor"]
    before = {name: (run_dir / name).read_bytes() for name in ("eval.csv", "train.csv", "checkpoint.pt")}
    words = ("--evaluate", run_dir, "--num-actions", 2, "--tau-q", 0.1, "--eval-episodes", 3)
    done = [run("evor", *words) for _ in range(2)]
    assert "'num_actions': 2" in done[0].stdout
    rows = list(csv.DictReader(open(run_dir / "inference.csv")))
    assert len(rows) == 4 and rows[:2] == rows[2:]
    assert [(row["num_actions"], row["tau_q"], row["seed"], row["episodes"]) for row in rows[:2]] == [
        ("2", "0.1", "0", "3"), ("2", "0.1", "1", "3"),
    ]  # fmt: skip
    assert {name: (run_dir / name).read_bytes() for name in before} == before
    (run_dir / "inference.csv").unlink()


def test_evaluate_refuses_what_is_not_an_evor_run_or_would_need_training(online_runs, tmp_path):
    assert_refused("evor", ["--evaluate", online_runs["floq"]], "--evaluate", "is a run of floq.py")
    refused = ["--evaluate", online_runs["evor"], "--gamma", "0.9"]
    assert_refused("evor", refused, "cannot go on with other arguments: --gamma 0.9 (the run has 0.99)")
    refused = ["--evaluate", online_runs["evor"], "--total-timesteps", "9"]
    assert_refused("evor", refused, "cannot go on with other arguments: --total-timesteps 9")
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
        ("--latents next", "--latents next needs --td-target published"),
        ("--env-id visual-scene-play-singletask-v0", "state observations"),
    ],
)
def test_bad_arguments(words, message):
    assert_refused("evor", words, message)
