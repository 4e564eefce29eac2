"""The bet where a risk-averse choice differs from the mean's: its table, the truth, and what trained agents choose."""

import pytest
from conftest import run_module

from benchmarks.studies import risk_averse
from common.returns import cvar

STUDY = "benchmarks.studies.risk_averse"


def test_the_bet_holds_each_stake_with_seven_wins_in_ten():
    bet = risk_averse.make_bet(num_actions=5)
    stake = (1 + bet["actions"].flatten()) / 2
    betting = bet["observations"][:, 0] == 1
    assert betting.sum() == 50 and len(stake) == 55 and (bet["next_observations"][:, 1] == 1).all()
    for b in stake.unique():
        rewards = bet["rewards"][betting & (stake == b)]
        assert rewards.tolist() == pytest.approx([2 * b.item()] * 7 + [-2 * b.item()] * 3)
        for level in (0.1, 0.3, 0.45, 0.9, 1.0):
            assert cvar(rewards, level).item() == pytest.approx(risk_averse.true_cvar(b.item(), level), abs=1e-6)
    assert (bet["rewards"][~betting] == 0).all() and bet["masks"].tolist() == [1.0] * 50 + [0.0] * 5


def test_the_best_stake_turns_where_the_study_says():
    below, above = risk_averse.TURN - 0.01, risk_averse.TURN + 0.01
    assert risk_averse.true_cvar(1, below) < 0 == risk_averse.true_cvar(0, below)
    assert risk_averse.true_cvar(1, above) > 0 == risk_averse.true_cvar(0, above)


def test_trained_agents_take_a_high_stake_by_the_mean_and_a_low_one_by_the_lower_tail():
    """An agent that knows nothing takes a place of 0.5 in the mean."""
    agents = risk_averse.train(updates=300, seeds=[0], compiled=False, num_flow_steps=5)
    place = {}
    for level in (1.0, 0.2):
        chosen, lowest, highest = risk_averse.stakes(agents, level, candidates=16, states=50)
        assert chosen.shape == (1, 50) and (lowest <= chosen).all() and (chosen <= highest).all()
        place[level] = (chosen.mean() - lowest.mean()) / (highest.mean() - lowest.mean())
    assert place[1.0] > 0.8 and place[0.2] < 0.2


def test_the_script_writes_a_table_and_a_picture(tmp_path):
    words = "--levels 0.2 1 --states 5 --seeds 2 --updates 2 --no-compile --output".split()
    done = run_module(STUDY, *words, tmp_path / "new" / "a")
    assert done.returncode == 0, done.stderr[-2000:]
    header, *rows = (tmp_path / "new" / "a.csv").read_text().splitlines()
    assert header == "level,seed,stake,lowest,highest,place" and len(rows) == 4
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    words = "--updates 2 --no-compile --output".split()  # refused before it trains
    refused = run_module(STUDY, *words, tmp_path / "new" / "a.csv" / "b")
    assert refused.returncode == 2 and "a.csv is not writable" in refused.stderr
    refused = run_module(STUDY, "--levels", 0)
    assert refused.returncode == 2 and "must lie above 0" in refused.stderr and "Traceback" not in refused.stderr
