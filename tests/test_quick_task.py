"""The study of variants on the quick task: commands, restarts, runs that end at a non-finite loss, the rule."""

import fcntl
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, wait_for

from benchmarks import tables
from benchmarks.studies import quick_task as study
from benchmarks.studies.return_accuracy import parse_variant
from common import arguments

SUCCESS = {"value_flows": (0.5, 0.7), "bcfm_lambda=0": (0.1, 0.2), "num_samples=1": (0.52, 0.71), "c51": (0.4, 0.9)}


@pytest.fixture
def program(monkeypatch):
    """Stands in for the main programs: each call's words, and what the next ones do ("die", "diverge", "at once")."""
    calls, moods = [], []
    ended = lambda code: SimpleNamespace(wait=lambda: code)

    def start(command, cwd, env, stdout, stderr, pass_fds):
        words = command[3:]
        calls.append((command[2], words))
        mood = moods.pop(0) if moods else ""
        resumed = words[0] == "--resume"
        run_dir = Path(words[1]) if resumed else Path(words[words.index("--runs-dir") + 1]) / "run"
        run_dir.mkdir(exist_ok=True)
        (run_dir / "args.json").touch()
        (run_dir / "checkpoint.pt").touch()
        variant = next(name for name in reversed(SUCCESS) if name in run_dir.parent.name)
        steps = (1, 4000, 8000) if mood == "" else (1, 4000)
        rows = [
            {"step": step, "seed": seed, "phase": "offline", "success": (step > 1) * SUCCESS[variant][seed]}
            | ({"success": 0.02 + SUCCESS[variant][seed]} if step > 4000 else {})
            for step in steps
            for seed in (0, 1)
        ]
        if mood == "at once":
            stdout.write("error: critic/critic_loss is nan at step 1 (seed 0); training stops; a checkpoint in x\n")
            return ended(1)
        tables.write(run_dir / "eval.csv", rows)
        tables.write(run_dir / "timing.csv", [{"updates_per_second": speed} for speed in ("0", "10", "20", "40")])
        if mood == "die":
            stdout.write("error: the disk is full\n")
            return ended(1)
        if mood == "diverge":
            stdout.write("error: critic/critic_loss is nan at step 5000 (seed 1); training stops; a checkpoint in x\n")
            return ended(1)
        (run_dir / "policy").mkdir()
        return ended(0)

    monkeypatch.setattr(study, "subprocess", SimpleNamespace(Popen=start))
    return calls, moods


def main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["quick_task", *map(str, words)])
    study.main()


def test_variants_run_by_their_main_programs_and_are_compared_with_the_first_by_seed(
    program, tmp_path, monkeypatch, capsys
):
    calls, _ = program
    variants = ("value_flows", "value_flows:bcfm_lambda=0", "value_flows:num_samples=1,clip_flow_returns=False", "c51")
    words = ("--seeds", 2, "--updates", 8000, "--runs-dir", tmp_path / "runs", "--output", tmp_path / "a")
    main(monkeypatch, "--variants", *variants, *words)
    names, given = zip(*calls)
    assert names == ("value_flows",) * 3 + ("benchmarks.baselines.c51",)
    assert given[2][:5] == ["--quick", "--num-seeds", "2", "--eval-episodes", "50"]
    assert given[2][-5:] == ["--total-timesteps", "8000", "--num-samples", "1", "--no-clip-flow-returns"]
    rows = tables.read_rows(tmp_path / "a.csv")
    assert [row["success"] for row in rows[:4]] == ["51", "71", "11", "21"]  # the mean of 50 and 52, ...
    assert {row["milliseconds"] for row in rows} == {"50"} and {row["updates"] for row in rows} == {"8000"}
    lines = capsys.readouterr().out.splitlines()
    # Differences -40 and -50, of two seeds: t of one degree of freedom is 12.7, so half is 12.7 * 5.
    assert lines[2] == "| `value_flows` | 61.0% +- 127.1 |  |  | 50 |"
    assert lines[3].endswith("| -45.0 +- 63.5 | not resolved | 50 |")
    assert lines[4].endswith("| +1.5 +- 6.4 | alike | 50 |")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

    main(monkeypatch, "--variants", *variants, *words)  # all are whole
    assert len(calls) == 4 and tables.read_rows(tmp_path / "a.csv") == rows


def test_a_run_that_failed_is_continued_and_one_that_diverged_is_not(program, tmp_path, monkeypatch, capsys):
    calls, moods = program
    moods += ["die", "", "diverge"]
    words = ("--variants", "value_flows", "value_flows:bcfm_lambda=0", "--seeds", 2, "--runs-dir", tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, *words)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "(error: the disk is full)" in message and "continues" in message
    for _ in range(2):
        main(monkeypatch, *words)
        line = capsys.readouterr().out.splitlines()[3]
        assert "| 15.0% +- 63.5, non-finite at 5000 |" in line
    (_, first), (_, again), (_, diverged) = calls
    assert first[0] == "--quick" and again[0] == "--resume" and "--bcfm-lambda" in diverged


PROGRAM = """#!{python}
import pathlib, signal, sys, time
def save(number, frame):
    time.sleep(1)  # a checkpoint takes longer than the 0.25 s that subprocess.run waits after Ctrl-C
    pathlib.Path({saved!r}).touch()
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, save)
pathlib.Path({started!r}).touch()
time.sleep(100)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_study_that_is_stopped_lets_the_training_save(tmp_path, number):
    saved, started, program = (tmp_path / name for name in ("saved", "started", "program"))
    program.write_text(PROGRAM.format(python=sys.executable, saved=str(saved), started=str(started)))
    program.chmod(0o755)
    words = ["quick_task", "--variants", "floq", "--runs-dir", str(tmp_path / "runs")]
    code = f"import runpy, sys; sys.executable, sys.argv = {str(program)!r}, {words!r}; "
    code += "runpy.run_module('benchmarks.studies.quick_task', run_name='__main__')"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(process, started.exists)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number and saved.exists() and "Traceback" not in error


def test_a_run_without_any_evaluation_is_left_out(program, tmp_path, monkeypatch, capsys):
    _, moods = program
    moods += ["", "at once"]
    main(monkeypatch, "--variants", "value_flows", "value_flows:bcfm_lambda=0", "--seeds", 2, "--runs-dir", tmp_path)
    out, err = capsys.readouterr()
    assert "value_flows:bcfm_lambda=0 is left out: a loss is non-finite at step 1" in err
    assert "`value_flows`" in out and "bcfm" not in out
    moods += ["at once"]
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, "--variants", "c51", "--seeds", 2, "--runs-dir", tmp_path)
    assert stop.value.code == 2 and "no variant has an evaluation" in capsys.readouterr().err


def test_nothing_is_compared_with_another_variant_than_the_first(program, tmp_path, monkeypatch, capsys):
    _, moods = program
    moods += ["at once"]
    variants = ("value_flows", "value_flows:bcfm_lambda=0", "value_flows:num_samples=1")
    main(monkeypatch, "--variants", *variants, "--seeds", 2, "--runs-dir", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| variant | success, 2 seeds | ")
    assert lines[2] == "| `value_flows:bcfm_lambda=0` | 16.0% +- 63.5 |  |  | 50 |"
    assert lines[3] == "| `value_flows:num_samples=1` | 62.5% +- 120.7 |  |  | 50 |"
    assert lines[5] == "No differences: the first variant, `value_flows`, is left out."


def test_a_variant_that_another_process_trains_is_refused(program, tmp_path, monkeypatch, capsys):
    calls, _ = program
    words = ("--variants", "value_flows", "--seeds", 2, "--runs-dir", tmp_path)
    main(monkeypatch, *words)
    (folder,) = tmp_path.iterdir()
    with open(folder / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit) as stop:
            main(monkeypatch, *words)
    assert stop.value.code == 2 and "another process trains this variant" in capsys.readouterr().err
    main(monkeypatch, *words)
    assert len(calls) == 1


def test_one_seed_has_no_interval():
    shared = {"stopped": "", "milliseconds": "5"}
    rows = [{"variant": name, "success": success} | shared for name, success in (("a", "40"), ("b", "60"))]
    lines = study.summary(rows, "a").splitlines()
    assert lines[2:] == ["| `a` | 40.0% |  |  | 5 |", "| `b` | 60.0% | +20.0 | not resolved | 5 |"]


@pytest.mark.parametrize(
    "difference, half, expected",
    [
        (5.0, 4.0, "higher"),
        (-5.0, 4.0, "lower"),
        (5.0, 4.99, "higher"),
        (3.0, 6.9, "alike"),
        (3.0, 7.1, "not resolved"),
        (0.0, float("nan"), "not resolved"),
    ],
)
def test_the_rule(difference, half, expected):
    assert study.verdict(difference, half) == expected


@pytest.mark.parametrize("grid", study.GRIDS)
def test_the_grids_are_arguments_of_their_files(grid):
    variants = study.GRIDS[grid]
    assert len(set(variants)) == len(variants) > 1
    for variant in variants:
        module, changes = parse_variant(variant, study.FILES)
        args, _ = module.parse_args(["--quick", *arguments.as_flags(changes)])
        assert {name: getattr(args, name) for name in changes} == changes


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "name --grid or --variants"),
        ("--grid floq --variants floq", "name --grid or --variants"),
        ("--variants sarsa", "sarsa is unknown; known: floq, value_flows"),
        ("--variants floq floq:bcfm_lambda=0", "floq.py has no argument bcfm_lambda"),
        ("--grid floq --seeds 0", "must be above zero"),
        ("--variants floq --updates 0", "must be above zero"),
        ("--variants floq --runs-dir {}/file", "file is not writable"),
        ("--variants floq --output {}/file/a", "--output {}/file is not writable"),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, capsys, words, message):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, *words.format(tmp_path).split())
    assert stop.value.code == 2 and message.format(tmp_path) in capsys.readouterr().err
