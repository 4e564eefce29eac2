"""The baselines' parts against closed forms, their losses written out, returns that are known, and their runs.

What they share with the four files (stop-gradients, stacked seeds, parity, settings) is tested with those.
"""

import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import (
    BASELINES,
    ENV_ID,
    ROOT,
    SMALL_FLAGS,
    assert_same_csv,
    gradients,
    make_agent,
    networks,
    only_run,
    random_inputs,
    run,
    run_module,
    small_args,
    start,
    wait_for_row,
)

from benchmarks.baselines import c51, fql, iqn
from benchmarks.studies import return_accuracy
from common import checkpoint

# --- C51's parts ---


def test_projection_shares_each_mass_between_the_two_atoms_beside_it():
    """Against the projection written as C51's paper has it, with floors and ceilings, one mass after another."""
    places = torch.rand(20, 7, dtype=torch.float64) * 6
    places[:, :3] = torch.tensor([0.0, 6.0, 3.0])  # on an atom: all of it stays there
    mass = torch.rand(20, 7, dtype=torch.float64).softmax(dim=-1)
    expected = torch.zeros(20, 7, dtype=torch.float64)
    for row in range(20):
        for b, p in zip(places[row].tolist(), mass[row].tolist()):
            low, high = math.floor(b), math.ceil(b)
            expected[row, low] += p if low == high else p * (high - b)
            expected[row, high] += 0 if low == high else p * (b - low)
    projected = c51.project(places, mass)
    torch.testing.assert_close(projected, expected)
    torch.testing.assert_close(projected.sum(dim=-1), torch.ones(20, dtype=torch.float64))
    means = (projected * torch.arange(7)).sum(dim=-1)
    torch.testing.assert_close(means, (mass * places).sum(dim=-1))  # the mean is kept


@pytest.mark.parametrize("q_agg", ["mean", "min"])
def test_q_is_the_aggregated_mean_of_the_categorical_distributions(q_agg):
    agent = make_agent(small_args("c51", q_agg=q_agg, gamma=0.5))  # returns in [-2, 0]
    torch.testing.assert_close(agent.atoms, torch.linspace(-2, 0, 51))
    with torch.no_grad():
        agent.critic.weights[-1].mul_(20)  # distributions that differ
    observations, actions = torch.randn(3, 5), torch.randn(3, 4, 3)
    q = agent.q_values(observations, actions)
    for n in range(3):
        for c in range(4):
            logits = agent.critic(torch.cat([observations[n], actions[n, c]]).unsqueeze(0))[:, 0]  # (E, n)
            means = [sum(p * z for p, z in zip(row.softmax(0), agent.atoms)) for row in logits]
            expected = sum(means) / 2 if q_agg == "mean" else min(means)
            torch.testing.assert_close(q[n, c], expected, rtol=1e-4, atol=1e-5)


def reference_c51_loss(agent, batch, noise):
    """C51's loss row by row and atom by atom."""
    n, atoms, B = agent.args.num_atoms, agent.atoms, len(batch["rewards"])
    spacing, low, high = (atoms[1] - atoms[0]).item(), atoms[0].item(), atoms[-1].item()
    next_actions = agent.rejection_sampling(batch["next_observations"], noise["next_action_candidates"]).detach()
    pairs = torch.cat([batch["next_observations"], next_actions], dim=-1)
    probs = agent.target_critic(pairs).softmax(dim=-1).mean(dim=0).detach()  # (B, n)
    logits = agent.critic(torch.cat([batch["observations"], batch["actions"]], dim=-1))  # (2, B, n)
    if agent.args.loss == "cross_entropy":
        logits = logits - logits.exp().sum(dim=-1, keepdim=True).log()
    loss = 0.0
    for row in range(B):
        for i in range(n):
            z = (batch["rewards"][row] + agent.args.gamma * batch["masks"][row] * atoms[i]).item()
            b = (min(max(z, low), high) - low) / spacing
            below = min(int(b), n - 2)
            for atom, share in ((below, 1 - (b - below)), (below + 1, b - below)):
                loss = loss - share * probs[row, i] * logits[:, row, atom].sum()
    return loss / (2 * B)


def reference_iqn_loss(agent, batch, noise):
    """IQN's loss as a plain loop over rows, quantiles and targets."""
    args, Q = agent.args, agent.args.num_quantiles
    next_actions = agent.rejection_sampling(
        batch["next_observations"], noise["next_action_candidates"], noise["next_q"]
    ).detach()
    condition = torch.cat([batch["observations"], batch["actions"]], dim=-1)
    next_condition = torch.cat([batch["next_observations"], next_actions], dim=-1)
    later = agent.target_critic(next_condition, noise["next_level"]).detach()  # (2, B, Q)
    later = later.mean(dim=0) if args.quantile_agg == "mean" else later.min(dim=0).values
    quantiles = agent.critic(condition, noise["level"])  # (2, B, Q)
    loss = 0.0
    for row in range(len(batch["rewards"])):
        for e in range(2):
            for i in range(Q):
                for j in range(Q):
                    target = batch["rewards"][row] + args.gamma * batch["masks"][row] * later[row, j]
                    error = target - quantiles[e, row, i]
                    weight = noise["level"][row, i] if error >= 0 else 1 - noise["level"][row, i]
                    square = error.abs() <= args.kappa
                    huber = error**2 / 2 if square else args.kappa * (error.abs() - args.kappa / 2)
                    loss = loss + weight * huber / args.kappa
    return loss / (2 * len(batch["rewards"]) * Q)


def reference_fql_loss(agent, batch, noise):
    """FQL's critic loss row by row."""
    args, loss = agent.args, 0.0
    for row in range(len(batch["rewards"])):
        s = batch["next_observations"][row : row + 1]
        policy_inputs = torch.cat([s, noise["next_action"][row : row + 1]], dim=-1)
        a = agent.actor_onestep_flow(policy_inputs).clamp(-1, 1)
        later = agent.target_critic(torch.cat([s, a], dim=-1)).flatten().detach()  # (2,)
        later = later.mean() if args.q_agg == "mean" else later.min()
        target = batch["rewards"][row] + args.gamma * batch["masks"][row] * later
        q = agent.critic(torch.cat([batch["observations"][row], batch["actions"][row]]).unsqueeze(0)).flatten()
        loss = loss + (q - target).square().sum()
    return loss / (2 * len(batch["rewards"]))


@pytest.mark.parametrize(
    "algorithm, changes, reference",
    [
        ("fql", dict(q_agg="mean"), reference_fql_loss),
        ("fql", dict(q_agg="min"), reference_fql_loss),
        ("c51", dict(loss="released"), reference_c51_loss),
        ("c51", dict(loss="cross_entropy", num_atoms=11), reference_c51_loss),
        ("iqn", dict(kappa=0.9, num_quantiles=3), reference_iqn_loss),
        ("iqn", dict(kappa=0.1, num_quantiles=3, quantile_agg="min"), reference_iqn_loss),
    ],
)
def test_critic_loss_equals_the_equations_written_out_and_its_labels_are_constants(algorithm, changes, reference):
    results = []
    for compute in (lambda agent, *inputs: agent.critic_loss(*inputs)[0], reference):
        agent = make_agent(small_args(algorithm, **changes))
        batch, noise = random_inputs(agent)
        assert 0 < batch["masks"].mean() < 1
        # Were a label not a constant, the networks that enter it would get gradients.
        agent.target_critic.requires_grad_(True)
        loss = compute(agent, batch, noise)
        loss.backward()
        assert networks(gradients(agent)) == {"critic"}
        results.append((loss.detach(), gradients(agent)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    for name, gradient in results[1][1].items():
        torch.testing.assert_close(results[0][1][name], gradient, rtol=1e-3, atol=1e-4)


def test_the_released_loss_pushes_logits_up_by_the_masses_and_the_cross_entropy_towards_them():
    """d/d logits is -m of the released loss, whatever the logits are, and p - m of the cross-entropy."""
    agent = make_agent(small_args("c51", batch_size=1, num_atoms=5, gamma=0.5))
    batch, noise = random_inputs(agent)
    batch["rewards"], batch["masks"] = torch.tensor([-1.0]), torch.tensor([0.0])  # all mass on the middle of [-2, 0]
    gradient = {}
    for loss in ("released", "cross_entropy"):
        agent.args.loss = loss
        agent.zero_grad()
        agent.critic_loss(batch, noise)[0].backward()
        gradient[loss] = agent.critic.biases[-1].grad.mean(dim=0).flatten() * 2  # each critic has half of the loss
    mass = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])
    logits = agent.critic(torch.cat([batch["observations"], batch["actions"]], dim=-1))[:, 0]
    torch.testing.assert_close(gradient["released"], -mass)
    torch.testing.assert_close(gradient["cross_entropy"], logits.softmax(dim=-1).mean(dim=0) - mass)


def test_equal_rewards_leave_c51_one_return():
    """Data without a success: every atom is -100, and so is every target; nothing is divided by zero."""
    agent = make_agent(small_args("c51"), min_reward=-1.0, max_reward=-1.0)
    batch, noise = random_inputs(agent)
    loss, metrics = agent.critic_loss(batch, noise)
    assert torch.isfinite(loss) and metrics["critic/target_mean"].item() == pytest.approx(-100.0)
    assert metrics["critic/q_mean"].item() == pytest.approx(-100.0)


# --- IQN's parts ---


def test_quantile_huber_equals_a_plain_loop():
    errors = torch.cat([torch.tensor([0.0, 0.7, -0.7, 0.70001, 3.0, -3.0]), torch.randn(50)])
    levels, kappa = torch.rand(56), 0.7
    for u, level, value in zip(errors.tolist(), levels.tolist(), iqn.quantile_huber(errors, levels, kappa).tolist()):
        huber = 0.5 * u * u if abs(u) <= kappa else kappa * (abs(u) - 0.5 * kappa)
        assert value == pytest.approx(abs(level - (1 if u < 0 else 0)) * huber / kappa, rel=1e-5)


def test_quantile_regression_finds_the_quantile():
    """With a small kappa the loss' minimum over constants is the sample's quantile."""
    sample, grid = torch.randn(501).double(), torch.linspace(-2, 2, 2_001).double()
    for level in (0.1, 0.5, 0.8):
        losses = iqn.quantile_huber(sample - grid.unsqueeze(-1), torch.tensor(level), 1e-4).mean(dim=-1)
        assert grid[losses.argmin()].item() == pytest.approx(sample.quantile(level).item(), abs=0.01)


def test_quantiles_are_the_network_on_the_product_of_the_embeddings():
    agent = make_agent(small_args("iqn"))
    critic, condition, levels = agent.critic, torch.randn(4, 8), torch.rand(4, 6)
    quantiles = critic(condition, levels)
    assert quantiles.shape == (2, 4, 6)
    for n in range(4):
        for i in range(6):
            cosines = torch.cos(math.pi * torch.arange(1, 65) * levels[n, i])
            product = critic.condition_embedding(condition[n : n + 1]) * critic.level_embedding(cosines.unsqueeze(0))
            torch.testing.assert_close(quantiles[:, n, i], critic.mlp(product)[:, 0, 0], rtol=1e-4, atol=1e-5)
    # Levels that all rows share, as those of the candidates: the same as each row's own copies.
    rows, shared = torch.randn(3, 4, 8), torch.rand(4, 6)
    own = shared.expand(3, -1, -1)
    torch.testing.assert_close(critic(rows, shared), critic(rows, own), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantile_agg", ["mean", "min"])
def test_iqn_acts_with_the_candidate_of_the_largest_mean_quantile(quantile_agg):
    agent = make_agent(small_args("iqn", quantile_agg=quantile_agg))
    observations = torch.randn(14, 5)
    noise = agent.draw_act_noise(torch.Generator().manual_seed(0), 14)  # (N, C, A + Q)
    levels = torch.distributions.Normal(0, 1).cdf(noise[..., 3:])
    actions, chosen = agent.flow_actions(observations, noise[..., :3]), agent.act(observations, noise)
    best = []
    for n in range(14):
        z = agent.critic(torch.cat([observations[n].expand(4, -1), actions[n]], dim=-1), levels[n])  # (2, C, Q)
        q = (z.mean(dim=0) if quantile_agg == "mean" else z.amin(dim=0)).mean(dim=-1)
        best.append(q.argmax().item())
        torch.testing.assert_close(chosen[n], actions[n, best[-1]])
    assert len(set(best)) > 1


@pytest.mark.parametrize("module", [c51, iqn], ids=["c51", "iqn"])
def test_flow_actions_are_euler_steps_clipped_each_time(module):
    agent = make_agent(small_args(module.__name__.split(".")[-1]))
    with torch.no_grad():
        agent.actor_flow.biases[-1] += 2.0
    observations, noise = torch.randn(3, 5), torch.randn(3, 4, 3)
    for clip in (True, False):
        agent.args.clip_flow_actions = clip
        x = noise
        for k in range(5):
            s = observations.unsqueeze(1).expand(-1, 4, -1)
            x = x + agent.actor_flow(torch.cat([s, x, torch.full_like(x[..., :1], k / 5)], dim=-1)) / 5
            x = x.clamp(-1, 1) if clip else x
        torch.testing.assert_close(agent.flow_actions(observations, noise), x.clamp(-1, 1), rtol=1e-4, atol=1e-5)


def test_c51_acts_with_the_best_candidate_and_one_candidate_is_cloning():
    agent = make_agent(small_args("c51"))
    observations, noise = torch.randn(14, 5), torch.randn(14, 4, 3)
    actions, chosen = agent.flow_actions(observations, noise), agent.act(observations, noise)
    best = agent.q_values(observations, actions).argmax(dim=1)
    assert len(best.unique()) > 1
    torch.testing.assert_close(chosen, actions[torch.arange(14), best])
    torch.testing.assert_close(agent.act(observations, noise[:, 1:2]), actions[:, 1])


# --- Returns that are known ---


def trained(module, mdp, updates, **settings):
    """One agent trained on an MDP, acting in its one way."""
    one = {"num_samples": 1, "num_flow_steps": 1} if "num_samples" in vars(module.Args()) else {}
    small = dict(batch_size=128, learning_rate=3e-3, tau=0.05, value_hidden_dims=(64, 64), actor_hidden_dims=(8,))
    args = module.Args(cuda=False, **one | small | settings)
    agents, diverged = return_accuracy.train(module, args, mdp, updates, seeds=[0])
    assert diverged is None
    return agents


def states_with_an_action(mdp):
    """Every state of an MDP with action 0: (states, states + 1)."""
    size = mdp["observations"].shape[1]
    return torch.cat([torch.eye(size), torch.zeros(size, 1)], dim=-1)


def test_fql_learns_the_values_of_a_chain():
    mdp = return_accuracy.make_mdp("chain")
    agents = trained(fql, mdp, 400, gamma=0.9, actor_flow_steps=1)
    pairs = states_with_an_action(mdp)
    values = agents.function(lambda agent, s, a: agent.q_values(agent.critic, s, a))(
        pairs[None, :, :-1], pairs[None, :, -1:]
    )
    expected = -torch.tensor([(1 - 0.9 ** (4 - state)) / 0.1 for state in range(4)])
    torch.testing.assert_close(values[0], expected.expand(2, -1), rtol=0, atol=0.1)


def test_fql_improves_within_the_data_as_far_as_alpha_lets_it():
    """A bandit with reward -(a - 0.5)^2 and uniform data: the policy finds the best action, or stays with the data."""
    actions = torch.rand(512, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1
    data = dict(observations=torch.ones(512, 1), next_observations=torch.ones(512, 1), actions=actions)
    data |= dict(rewards=-(actions[:, 0] - 0.5).square(), masks=torch.zeros(512))
    spread = {}
    for alpha in (0.01, 1e4):
        agents = trained(fql, data, 400, alpha=alpha, actor_flow_steps=5, actor_hidden_dims=(32, 32))
        act = agents.function("act")(torch.ones(1, 400, 1), torch.randn(1, 400, 1))
        spread[alpha] = (act - 0.5).square().mean().sqrt().item()
    assert spread[0.01] < 0.15 and spread[1e4] > 0.5, spread  # uniform actions: sqrt(1/3 + 1/4) = 0.76


@pytest.mark.parametrize("loss", ["cross_entropy", "released"])
def test_c51_learns_the_return_distribution_of_the_coin_chain_by_the_cross_entropy_only(loss):
    """+-0.5^k with equal probability, k steps before the end. The released loss piles the mass up on one atom."""
    mdp, size = return_accuracy.make_mdp("coin"), torch.tensor([0.25, 0.5, 1.0]).unsqueeze(-1)
    agents = trained(c51, mdp, 300, gamma=0.5, num_atoms=101, loss=loss)
    pairs = states_with_an_action(mdp).unsqueeze(0)
    logits = agents.function(lambda agent, s, a: agent.logits(agent.critic, s, a))(pairs[..., :-1], pairs[..., -1:])
    probs, atoms = logits[0].softmax(dim=-1), torch.linspace(-2, 2, 101)  # (2, states, 101)
    truth = 0.5 * (atoms >= -size).float() + 0.5 * (atoms >= size).float()
    wasserstein = 0.04 * (probs.cumsum(dim=-1) - truth).abs().sum(dim=-1)
    if loss == "cross_entropy":
        assert (wasserstein < 0.15).all(), wasserstein
        assert (probs.amax(dim=-1) < 0.7).all()
    else:
        assert (wasserstein > 0.2).all(), wasserstein  # one of both values alone: 0.25, 0.5 and 1
        assert (probs.amax(dim=-1) > 0.7).all()


def test_iqn_learns_the_return_distribution_of_the_coin_chain():
    """Below the level 1/2 the quantile is -0.9^k, above it +0.9^k. A small kappa: a large one learns expectiles."""
    mdp = return_accuracy.make_mdp("coin")
    agents = trained(iqn, mdp, 400, gamma=0.9, kappa=0.05, embedding_dim=32, num_quantiles=8)
    pairs, levels = (
        states_with_an_action(mdp),
        torch.cat([torch.linspace(0.05, 0.35, 20), torch.linspace(0.65, 0.95, 20)]),
    )
    read = lambda agent, s, a, levels: agent.quantiles(agent.critic, s, a, levels)
    quantiles = agents.function(read)(pairs[None, :, :-1], pairs[None, :, -1:], levels.expand(1, 3, -1))
    for state, size in enumerate((0.81, 0.9, 1.0)):
        for z in quantiles[0, :, state]:  # of each critic
            assert (z[:20] + size).abs().mean() < 0.15 and (z[20:] - size).abs().mean() < 0.15, (state, z)


# --- Runs ---

LENGTHS = "--total-timesteps 60 --online-timesteps 30 --eval-interval 90 --log-interval 10 --save-interval 20".split()


def test_c51_has_the_main_program_of_iqn():
    """So the runs below, of the other two, speak for it."""
    main = lambda name: (
        (ROOT / f"benchmarks/baselines/{name}.py").read_text().partition('if __name__ == "__main__":')[2]
    )
    assert main("c51") == main("iqn") != ""


@pytest.mark.parametrize("algorithm", ["fql", "iqn"])
def test_killed_and_resumed_equals_uninterrupted(algorithm, maze_data, tmp_path):
    """Offline, then online, with two seeds; FQL's uninterrupted run is started as a module, the others as files."""
    file = f"benchmarks/baselines/{algorithm}"
    flags = ["--env-id", ENV_ID, "--dataset-path", maze_data, "--num-seeds", 2, *SMALL_FLAGS[algorithm], *LENGTHS]
    if algorithm == "fql":
        done = run_module("benchmarks.baselines.fql", *flags, "--runs-dir", tmp_path / "whole")
        assert done.returncode == 0, done.stderr[-2000:]
    else:
        run(file, *flags, "--runs-dir", tmp_path / "whole")
    process = start(file, flags, tmp_path / "killed")
    run_dir = wait_for_row(process, tmp_path / "killed", "train.csv", "50,0")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    run(file, "--resume", run_dir)
    whole = only_run(tmp_path / "whole")
    assert_same_csv(run_dir, whole)
    mine, other = checkpoint.load(run_dir), checkpoint.load(whole)
    assert mine["step"] == other["step"] == 90 and mine["algorithm"] == other["algorithm"] == algorithm
    assert all(torch.equal(mine["agent"][name], value) for name, value in other["agent"].items())
    assert whole.name.split("__")[1] == algorithm

    policy, again = BASELINES[algorithm].load(whole / "policy", 1), BASELINES[algorithm].load(run_dir, 1)
    observation = np.zeros(2, np.float32)
    assert np.array_equal(policy.act(observation), again.act(observation)) and policy.act(observation).shape == (2,)


def test_a_baseline_is_launched_evaluated_and_exported(maze_data, tmp_path):
    own = [
        "--methods",
        "benchmarks/baselines/fql.py",
        "--env-ids",
        ENV_ID,
        "--seeds",
        1,
        "--runs-dir",
        tmp_path / "runs",
    ]
    flags = ["--dataset-path", maze_data, *SMALL_FLAGS["fql"], "--total-timesteps", 20, "--log-interval", 10]
    words = [str(word) for word in (sys.executable, "-m", "benchmarks.launch", *own, "--", *flags)]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (run_dir,) = [path for path in (tmp_path / "runs").iterdir() if path.name != "launch"]
    assert json.loads((run_dir / "args.json").read_text())["algorithm"] == "fql"
    words = ["--evaluate", run_dir, "--eval-episodes", 1, "--export", tmp_path / "policy"]
    run("benchmarks/baselines/fql", *words)
    assert fql.load(tmp_path / "policy").act(np.zeros((3, 2), np.float32)).shape == (3, 2)
    assert json.loads((tmp_path / "policy" / "config.json").read_text())["module"] == "benchmarks.baselines.fql"
    card = (tmp_path / "policy" / "README.md").read_text()
    assert "from benchmarks.baselines import fql" in card and "python -m benchmarks.baselines.fql --evaluate" in card


# --- Arguments ---


@pytest.mark.parametrize(
    "algorithm, words, message",
    [
        ("fql", ["--num-ensembles", "0"], "--num-ensembles 0: must be above zero"),
        ("fql", ["--alpha", "-1"], "--alpha -1.0: must be at least zero"),
        ("fql", ["--q-agg", "max"], "--q-agg"),
        ("fql", ["--env-id", "visual-scene-play-singletask-v0"], "fql.py works on state observations"),
        ("fql", ["--resume", "/nowhere"], "/nowhere is not a directory"),
        ("c51", ["--num-atoms", "1"], "--num-atoms 1: a histogram needs at least 2 atoms"),
        ("c51", ["--num-samples", "0"], "--num-samples 0: must be above zero"),
        ("c51", ["--loss", "mse"], "--loss"),
        ("c51", ["--env-id", "visual-scene-play-singletask-v0"], "c51.py works on state observations"),
        ("iqn", ["--kappa", "0"], "--kappa 0.0: must be above zero"),
        ("iqn", ["--num-quantiles", "-1"], "--num-quantiles -1: must be above zero"),
        ("iqn", ["--env-id", "visual-scene-play-singletask-v0"], "iqn.py works on state observations"),
    ],
)
def test_bad_arguments(algorithm, words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        BASELINES[algorithm].parse_args(words)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_bad_arguments_of_a_file_end_with_2():
    failed = run("benchmarks/baselines/c51", "--num-atoms", 1, check=False)
    assert failed.returncode == 2 and "a histogram needs at least 2 atoms" in failed.stderr
    assert "Traceback" not in failed.stderr
