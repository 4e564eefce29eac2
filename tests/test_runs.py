"""Runs as a user starts them: equal csv files, resume after SIGKILL and SIGTERM, bad input, faults while training."""

import contextlib
import dataclasses
import difflib
import importlib.util
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ALGORITHMS,
    ENV_ID,
    ROOT,
    SMALL_FLAGS,
    assert_refused,
    assert_same_csv,
    children,
    only_run,
    parse,
    run,
    run_module,
    start,
    wait_for,
    wait_for_row,
)

from common import checkpoint, datasets, export, files, log, python_environment, runs
from common.arguments import MAY_CHANGE, algorithm
from common.signals import StopRequest
from common.stacked import Stacked

LENGTHS = "--total-timesteps 420 --eval-interval 210 --log-interval 20 --save-interval 90".split()
LENGTHS += ["--num-seeds", "2", "--eval-episodes", "1"]


@pytest.fixture(scope="module")
def flags(maze_data):
    return ["--env-id", ENV_ID, "--dataset-path", maze_data, *SMALL_FLAGS["floq"], *LENGTHS]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    """The run directory of the run that nothing interrupted."""
    directory = tmp_path_factory.mktemp("finished")
    run("floq", *flags, "--runs-dir", directory)
    return only_run(directory)


def assert_same_results(run_dir, finished):
    assert_same_csv(run_dir, finished)
    mine, other = checkpoint.load(run_dir), checkpoint.load(finished)
    assert mine["step"] == other["step"] == 420
    for name, value in other["agent"].items():
        assert torch.equal(mine["agent"][name], value), name
    for index, state in other["optimizer"]["state"].items():
        assert all(torch.equal(mine["optimizer"]["state"][index][key], value) for key, value in state.items())


def test_a_run_leaves_what_is_promised(finished):
    info = json.loads((finished / "args.json").read_text())
    assert info["algorithm"] == "floq" and info["args"]["batch_size"] == 16 and info["args"]["gamma"] == 0.99
    assert set(info["versions"]) == {"python", "torch", "ogbench", "mujoco", "gymnasium", "numpy"}
    assert info["dataset"]["source"] == "generated" and len(info["dataset"]["sha256"]) == 64
    assert info["dataset"]["transitions"] == 10_000 and "git_commit" in info and info["device"].startswith("cpu")
    train = (finished / "train.csv").read_text().splitlines()
    assert train[0].startswith("step,seed,critic/critic_loss,") and "actor/bc_flow_loss" in train[0]
    assert [line.split(",")[:2] for line in train[1:5]] == [["20", "0"], ["20", "1"], ["40", "0"], ["40", "1"]]
    evaluations = (finished / "eval.csv").read_text().splitlines()
    assert evaluations[0] == "step,seed,phase,success,episode_return,episode_length,episodes"
    assert [line.split(",")[:3] for line in evaluations[1::2]] == [[s, "0", "offline"] for s in ("1", "210", "420")]
    timing = (finished / "timing.csv").read_text().splitlines()
    assert timing[0] == "step,updates_per_second,seconds_training,seconds_evaluating" and len(timing) == 22
    assert (finished / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not list(finished.glob("*.part"))


def test_the_same_command_gives_the_same_files(flags, finished, tmp_path):
    run("floq", *flags, "--runs-dir", tmp_path)
    assert_same_results(only_run(tmp_path), finished)


@pytest.mark.parametrize("name, row", [("eval.csv", "210,0"), ("train.csv", "320,0")])
def test_killed_and_resumed_equals_uninterrupted(flags, finished, tmp_path, name, row):
    process = start("floq", flags, tmp_path)
    run_dir = wait_for_row(process, tmp_path, name, row)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if not (
        run_dir / "checkpoint.pt"
    ).exists():  # killed before the first checkpoint: nothing to resume, and it says so
        assert_refused("floq", ["--resume", run_dir], "no usable checkpoint")
        return
    run("floq", "--resume", run_dir)
    assert_same_results(run_dir, finished)


def test_sigterm_saves_and_the_run_can_go_on(flags, finished, tmp_path):
    process = start("floq", flags, tmp_path)
    run_dir = wait_for_row(process, tmp_path, "train.csv", "80,0")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err[-2000:]
    assert "SIGTERM" in out and f"--resume {run_dir}" in out
    step = checkpoint.load(run_dir)["step"]
    assert 60 < step < 420
    # A damaged latest checkpoint: the previous one serves, if there is one; otherwise this one stays as it is.
    if (run_dir / "checkpoint_previous.pt").exists():
        content = bytearray((run_dir / "checkpoint.pt").read_bytes())
        content[len(content) // 2] ^= 0xFF
        (run_dir / "checkpoint.pt").write_bytes(content)
    resumed = run("floq", "--resume", run_dir)
    assert_same_results(run_dir, finished)
    if "damaged" in resumed.stderr:
        assert "continuing from checkpoint_previous.pt" in resumed.stderr
        assert (run_dir / "checkpoint_damaged.pt").read_bytes() == content


def test_resuming_a_finished_run_changes_nothing(finished):
    files = lambda: {path.name: path.read_bytes() for path in [*finished.glob("*.csv"), *finished.glob("*.pt")]}
    before = files()
    run("floq", "--resume", finished)
    assert files() == before


def test_a_resumed_run_keeps_what_made_it_before(finished, tmp_path):
    run_dir = Path(shutil.copytree(finished, tmp_path / "run"))
    info = json.loads((run_dir / "args.json").read_text())
    older = info["versions"] | {"torch": "1.0"}
    (run_dir / "args.json").write_text(json.dumps(info | {"versions": older}))
    resumed = run("floq", "--resume", run_dir)
    after = json.loads((run_dir / "args.json").read_text())
    assert after["versions"] == info["versions"]
    assert [(part["until"], part["versions"]) for part in after["earlier"]] == [(420, older)]
    assert "the run had torch 1.0, it continues with" in resumed.stderr


def test_one_checkpoint_a_step(flags, finished, tmp_path):
    """Also at a step that is evaluated and saved; the evaluation that follows a step's checkpoint is not made again."""
    steps = [checkpoint.load(finished)["step"]]
    (tmp_path / "previous").mkdir()
    shutil.copy(finished / "checkpoint_previous.pt", tmp_path / "previous" / "checkpoint.pt")
    steps.append(checkpoint.load(tmp_path / "previous")["step"])
    assert steps == [420, 360]
    assert checkpoint.load(finished)["evaluated"] == 210  # of before step 420's evaluation, whose rows are there

    cut = Path(shutil.copytree(finished, tmp_path / "cut"))
    content = (cut / "eval.csv").read_bytes()
    for rows_there, kept in ((2, content), (1, content.rsplit(b"\n", 2)[0] + b"\n")):
        (cut / "eval.csv").write_bytes(kept)
        resumed = run("floq", "--resume", cut)
        assert (cut / "eval.csv").read_bytes() == content
        assert ("step      420: success" in resumed.stderr + resumed.stdout) == (rows_there == 1)


def test_a_later_evaluation_is_cut_off_with_its_updates(tmp_path):
    """Where the latest checkpoint is damaged, the previous one may be older than several evaluations."""
    header, rows = (
        b"step,seed,phase\n",
        b"10,0,offline\n10,1,offline\n",
    )
    path = tmp_path / "eval.csv"
    path.write_bytes(header + rows + b"20,0,offline\n20,1,offline\n")
    assert runs.evaluation_after(path, 0, 10, 2) == len(header + rows)
    assert runs.evaluation_after(path, len(header), 10, 2) == len(rows)
    assert runs.evaluation_after(path, len(header + rows), 10, 2) == 0
    assert runs.evaluation_after(path, len(header), 20, 2) == 0
    path.write_bytes(header + rows[:-4])
    assert runs.evaluation_after(path, len(header), 10, 2) == 0


# --- Copies ---


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_a_copy_is_an_algorithm_of_its_own(name, tmp_path, monkeypatch):
    shutil.copy(ROOT / f"{name}.py", tmp_path / f"copied_{name}.py")
    monkeypatch.syspath_prepend(tmp_path)
    copy = importlib.import_module(f"copied_{name}")
    args, _ = copy.parse_args(SMALL_FLAGS[name])
    assert algorithm(args) == f"copied_{name}" and export.module_path(copy.Agent) == f"copied_{name}"
    agents = Stacked(lambda: copy.Agent(args, 5, 3, -1.0, 0.0), [0], "cpu", 1e-3)
    assert type(agents.agent).__module__ == type(args).__module__ == f"copied_{name}"
    own_name = re.findall(rf"^(?:import|from) {name}\b", (ROOT / f"{name}.py").read_text(), re.MULTILINE)
    assert not own_name  # a copy that imports the original would train that


OWN_LINES = {  # of the main programs, that floq's has not
    "q_flow": "",
    "value_flows": """
        raise SystemExit(policies.evaluate(Agent, args, resumed, INFERENCE, device, acting))
        acts = {name: graphs.FastPolicy(agents, name, args.cudagraphs) for name in ("act", "act_online")}
        act, draw_act_noise = acts["act_online"], agents.agent.draw_act_noise
        rows = evaluator(acts[acting(args, step)], draw_act_noise, step, stop)
    """,
    "evor": """
        if args.td_target == "published" and args.latents == "data":
        dataset["returns"] = torch.as_tensor(reward_to_go(dataset, args.gamma), dtype=torch.float32, device=device)
        log = Log(args, resumed, device, identity, Agent.METRICS)
        one_update = lambda draws, losses: update(agents, *replay.inputs(draws), losses)  # the batch, and noise
        losses = ("critic_loss", "actor_loss")
        if args.bc_timesteps:  # the base policy first, then its returns
        losses = ("actor_loss",) if step < args.bc_timesteps else ("critic_loss",)
        metrics = fast_update(draws, losses)
    """,
}


@pytest.mark.parametrize("name", OWN_LINES)
def test_the_main_programs_differ_in_a_few_lines(name):
    """What a test of one finds, of resuming or evaluating, then holds for the four."""
    texts = [(ROOT / f"{which}.py").read_text() for which in ("floq", name)]
    both = [text.split('\nif __name__ == "__main__":\n')[1].splitlines() for text in texts]
    different = [line for line in difflib.ndiff(*both) if line[0] in "+-"]
    own = [line[2:].strip() for line in different if line[0] == "+"]
    assert own == [line.strip() for line in OWN_LINES[name].strip().splitlines()]
    assert len(different) - len(own) == (0 if name == "q_flow" else 3), different


def test_a_copied_file_trains_resumes_evaluates_and_launches(maze_data, tmp_path):
    """`cp floq.py my_floq.py` and start: killed and resumed, its run equals the uninterrupted and the original's.

    One of the four: their main programs differ in a few lines, none of which names the file.
    """
    name = "floq"
    copy = ROOT / f"my_{name}_{os.getpid()}.py"
    lengths = "--total-timesteps 60 --eval-interval 60 --log-interval 10 --save-interval 20".split()
    flags = ["--env-id", ENV_ID, "--dataset-path", maze_data, *SMALL_FLAGS[name], *lengths]
    shutil.copy(ROOT / f"{name}.py", copy)
    try:
        run(name, *flags, "--runs-dir", tmp_path / "original")
        process = start(copy.stem, flags, tmp_path / "copy")
        run_dir = wait_for_row(process, tmp_path / "copy", "train.csv", "40,0")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert run_dir.name.split("__")[1] == copy.stem
        run(copy.stem, "--resume", run_dir)
        assert_same_csv(run_dir, only_run(tmp_path / "original"))
        mine, original = checkpoint.load(run_dir), checkpoint.load(only_run(tmp_path / "original"))
        assert (mine["algorithm"], original["algorithm"]) == (copy.stem, name)
        assert json.loads((run_dir / "args.json").read_text())["algorithm"] == copy.stem
        assert all(torch.equal(mine["agent"][key], value) for key, value in original["agent"].items())
        assert_refused(name, ["--resume", run_dir], f"is a run of {copy.stem}.py")
        run(copy.stem, "--evaluate", run_dir, "--eval-episodes", 1)
        options = ["--methods", copy.stem, "--env-ids", ENV_ID, "--seeds", 1, "--runs-dir", tmp_path / "launched"]
        for _ in range(2):  # the second finds it finished
            done = run_module("benchmarks.launch", *options, "--", *flags[2:])
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        launched = [path for path in (tmp_path / "launched").iterdir() if path.name != "launch"]
        assert len(launched) == 1
        assert_same_csv(launched[0], run_dir)
    finally:
        copy.unlink()


def test_a_copys_new_number_may_be_anything(tmp_path, monkeypatch):
    field = "    entropy_coef: float = -1.0  # weight of an entropy\n\n    # Speed\n"
    (tmp_path / "my_q_flow.py").write_text((ROOT / "q_flow.py").read_text().replace("\n    # Speed\n", field))
    monkeypatch.syspath_prepend(tmp_path)
    copy = importlib.import_module("my_q_flow")
    for words, value in (([], -1.0), (["--entropy-coef", "0"], 0.0), (["--entropy-coef", "-2.5"], -2.5)):
        assert copy.parse_args(words)[0].entropy_coef == value


def test_a_copys_name_must_be_an_identifier(tmp_path):
    for name in ("my-q_flow.py", "2q_flow.py"):
        shutil.copy(ROOT / "q_flow.py", tmp_path / name)
        done = subprocess.run(
            [sys.executable, tmp_path / name, "--help"], env=python_environment(), capture_output=True, text=True
        )
        assert done.returncode == 2 and "must be letters, digits and underscores" in done.stderr
        assert name in done.stderr and "Traceback" not in done.stderr


def test_a_checkpoint_of_another_device_goes_on_with_this_devices_adam(finished, tmp_path):
    """`capturable` is a GPU's: without it a CUDA graph refuses Adam."""
    run_dir = Path(shutil.copytree(finished, tmp_path / "copy"))
    saved = checkpoint.load(run_dir)
    saved["optimizer"]["param_groups"][0]["capturable"] = True
    checkpoint.save(run_dir, saved)
    run("floq", "--resume", run_dir, "--total-timesteps", 425)
    assert checkpoint.load(run_dir)["step"] == 425
    assert checkpoint.load(run_dir)["optimizer"]["param_groups"][0]["capturable"] is False
    for name in ALGORITHMS:  # the others restore it by the same method
        assert "    agents.load_state_dict(resumed)\n" in (ROOT / f"{name}.py").read_text()


# --- Checkpoints ---


def payload(step, size=1000):
    return {"algorithm": "floq", "args": {}, "step": step, "agent": {"w": torch.full((size,), float(step))}}


def test_damaged_checkpoint_falls_back_to_the_previous_one(tmp_path, capsys):
    for step in (1, 2):
        checkpoint.save(tmp_path, payload(step))
    assert checkpoint.load(tmp_path)["step"] == 2
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    for damage in (whole[: len(whole) // 2], b"", whole[:900] + bytes([whole[900] ^ 1]) + whole[901:], b"junk"):
        (tmp_path / "checkpoint.pt").write_bytes(damage)
        assert checkpoint.load(tmp_path)["step"] == 1
        message = capsys.readouterr().err
        assert "checkpoint.pt is damaged" in message and "continuing from checkpoint_previous.pt at step 1" in message
    (tmp_path / "checkpoint.pt").unlink()  # the moment between the two renames of a save
    assert checkpoint.load(tmp_path)["step"] == 1
    (tmp_path / "checkpoint_previous.pt").write_bytes(b"junk")
    with pytest.raises(SystemExit) as stop:
        checkpoint.load(tmp_path)
    assert stop.value.code == 2 and "no usable checkpoint" in capsys.readouterr().err


def test_a_damaged_checkpoint_does_not_replace_the_previous_one(tmp_path):
    """Else a save that follows would leave one whole checkpoint, and for a moment none."""
    for step in (1, 2):
        checkpoint.save(tmp_path, payload(step))
    checkpoint.make_latest(tmp_path, "checkpoint.pt")
    assert checkpoint.load(tmp_path)["step"] == 2
    (tmp_path / "checkpoint.pt").write_bytes(b"junk")
    checkpoint.make_latest(tmp_path, checkpoint.load(tmp_path)["file"][0])
    assert (tmp_path / "checkpoint_damaged.pt").read_bytes() == b"junk"
    assert checkpoint.load(tmp_path)["file"][0] == "checkpoint.pt" and checkpoint.load(tmp_path)["step"] == 1
    checkpoint.save(tmp_path, payload(3))
    both = (checkpoint.PREVIOUS, checkpoint.LATEST)
    steps = [torch.load(tmp_path / name, weights_only=True)["step"] for name in both]
    assert steps == [1, 3]
    (tmp_path / "checkpoint.pt").unlink()  # the moment between the two renames of a save
    checkpoint.make_latest(tmp_path, checkpoint.load(tmp_path)["file"][0])
    assert checkpoint.load(tmp_path)["step"] == 1 and (tmp_path / "checkpoint_damaged.pt").read_bytes() == b"junk"


@pytest.mark.parametrize("content", [torch.zeros(3), [1], {"args": {}, "step": 5}, {"algorithm": "floq"}])
def test_another_programs_checkpoint_is_refused(content, tmp_path, capsys):
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit) as stop:
        checkpoint.load(tmp_path)
    assert stop.value.code == 2 and "checkpoint.pt is damaged (it lacks a" in capsys.readouterr().err


def test_a_checkpoint_runs_no_code(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (os.system, ("touch " + str(tmp_path / "ran"),))

    torch.save(payload(1) | {"evil": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_non_finite_weights_are_not_saved(tmp_path):
    checkpoint.save(tmp_path, payload(1))
    with pytest.raises(SystemExit, match="non-finite"):
        checkpoint.save(tmp_path, payload(2) | {"agent": {"w": torch.tensor([1.0, float("nan")])}})
    assert checkpoint.load(tmp_path)["step"] == 1


@contextlib.contextmanager
def full_disk(size):
    """No file of this process can be longer than `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def save_and_fail(file):
    file.write(b"part")
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("reported_by", ["torch", "Python"])
def test_full_disk_keeps_both_checkpoints(tmp_path, monkeypatch, reported_by):
    """torch reports a failed write as a RuntimeError, Python as an OSError."""
    for step in (1, 2):
        checkpoint.save(tmp_path, payload(step, size=20_000))
    content = lambda: {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    before = content()
    assert set(before) == {"checkpoint.pt", "checkpoint_previous.pt"} and len(before["checkpoint.pt"]) > 80_000
    if reported_by == "Python":
        monkeypatch.setattr(torch, "save", lambda payload, file: save_and_fail(file))
    with full_disk(size=20_000), pytest.raises(SystemExit) as stop:
        checkpoint.save(tmp_path, payload(3, size=20_000))
    assert str(stop.value.code).startswith(f"error: could not save a checkpoint in {tmp_path} (")
    assert str(stop.value.code).endswith(f"; the last checkpoint is kept: {tmp_path}/checkpoint.pt")
    assert content() == before


# --- Faults while training ---


def test_non_finite_loss_names_step_loss_and_seed(tmp_path):
    args = parse("floq", *f"--no-cuda --seed 7 --num-seeds 2 --log-interval 15 --runs-dir {tmp_path}".split())
    identity = {"file": "x.npz", "source": "generated", "transitions": 1}
    written = log.Log(args, None, torch.device("cpu"), identity)
    for step in range(1, 30):
        b = torch.tensor([0.0, torch.nan if step in (24, 26) else 1.0])
        written.training(step, {"a": torch.zeros(2), "b": b, "c": torch.zeros(2)})
    with pytest.raises(SystemExit, match=r"^error: b is nan at step 24 \(seed 8\); training stops; a checkpoint in"):
        written.training(30, {"a": torch.full((2,), torch.inf), "b": torch.zeros(2), "c": torch.zeros(2)})
    written.bar.close()
    assert {row.split(",")[0] for row in (written.run_dir / "train.csv").read_text().splitlines()} == {"step", "15"}


def test_diverging_training_stops_and_keeps_the_last_checkpoint(flags, tmp_path):
    diverging = [*flags, "--learning-rate", 1e30, "--save-interval", 1, "--runs-dir", tmp_path]
    failed = run("floq", *diverging, check=False)
    assert failed.returncode == 1 and "at step" in failed.stderr and "is from an earlier step" in failed.stderr, (
        failed.stderr[-2000:]
    )
    agent = checkpoint.load(only_run(tmp_path))["agent"]
    assert all(torch.isfinite(value).all() for value in agent.values())


def test_a_dead_evaluation_worker_ends_the_run_with_its_updates_saved(flags, tmp_path):
    process = start("floq", [*flags, "--eval-episodes", 200], tmp_path)
    first, *_ = wait_for(process, lambda: list(tmp_path.glob("*/checkpoint.pt")) and children(process))
    time.sleep(2)
    os.kill(first, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "died with exit code -9" in err
    assert checkpoint.load(only_run(tmp_path))["step"] == 1


def test_sigterm_while_evaluating_ends_the_run_without_rows(flags, tmp_path):
    process = start("floq", [*flags, "--eval-episodes", 200], tmp_path)
    wait_for(process, lambda: list(tmp_path.glob("*/checkpoint.pt")) and children(process))
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "stopped by SIGTERM at step 1" in out, err[-2000:]
    saved = checkpoint.load(only_run(tmp_path))
    assert (saved["step"], saved["evaluated"]) == (1, 0) and not (only_run(tmp_path) / "eval.csv").exists()


def test_a_second_ctrl_c_interrupts_at_once(tmp_path, capsys):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        stop = StopRequest()
        assert not stop
        signal.raise_signal(signal.SIGINT)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    with pytest.raises(SystemExit) as left:
        stop.leave(tmp_path, step=3)
    assert left.value.code == 130 and "stopped by SIGINT at step 3" in capsys.readouterr().out


# --- Bad input ---


@pytest.mark.parametrize(
    "words, message",
    [
        ("--env-id cube-singel-play-singletask-v0", "cube-single-play-singletask-v0"),
        ("--env-id cube-single-play-v0", "goal-conditioned"),
        ("--batch-size 0", "--batch-size 0: must be above zero"),
        ("--critic-flow-steps -1", "--critic-flow-steps -1: must be above zero"),
        ("--value-hidden-dims 64 0", "--value-hidden-dims 64 0: must be above zero"),
        ("--num-seeds 0", "--num-seeds 0"),
        ("--gamma 1", "--gamma 1.0 must lie between 0 and 1"),
        ("--seed -1", "--seed -1: must be at least zero"),
        ("--q-agg max", "--q-agg"),
        ("--no-such-flag", "no-such-flag"),
        ("--env-id visual-cube-single-play-singletask-v0", "state observations"),
        ("--dataset-path /nowhere.npz", "/nowhere.npz is not a file"),
        ("--dataset-source generated --env-id antmaze-large-navigate-singletask-v0", "cannot be generated"),
        ("--resume /nowhere", "/nowhere is not a directory"),
    ],
)
def test_bad_arguments_exit_with_2_and_say_what_to_do(words, message):
    assert_refused("floq", words, message)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_bad_argument_ends_the_process_with_2(algorithm):
    failed = run(algorithm, "--gamma", 1, check=False)
    assert failed.returncode == 2 and failed.stderr.startswith("error: --gamma 1.0 must lie between 0 and 1")
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_number_of_an_algorithm_may_be_negative(algorithm, capsys):
    """The numbers that all share are checked in common/arguments.py, an algorithm's own where its file says so."""
    for field in dataclasses.fields(ALGORITHMS[algorithm].Args):
        first = field.default[0] if isinstance(field.default, tuple) else field.default
        if (isinstance(first, (int, float)) and not isinstance(first, bool)) or field.name == "generated_episodes":
            flag = f"--{field.name.replace('_', '-')}"
            with pytest.raises(SystemExit) as stopped:
                ALGORITHMS[algorithm].parse_args([flag, "-1"])
            assert stopped.value.code == 2 and flag in capsys.readouterr().err, flag


def test_unwritable_run_directory(flags, tmp_path):
    path = tmp_path / "file"
    path.touch(0o755)  # the permissions of a directory
    nowhere = [*flags, "--dataset-path", "/no/file", "--runs-dir", path / "runs"]
    assert_refused("floq", nowhere, f"--runs-dir {path}/runs is not writable: {path} is not a directory")


def test_a_name_is_no_path():
    assert_refused("floq", ["--env-id", ENV_ID, "--exp-name", "a/b"], "--exp-name a/b: it is a part of the run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look everywhere")
def test_a_place_that_cannot_be_looked_at(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o000)
    there = tmp_path / "closed/x"
    for flag in ("--resume", "--evaluate"):
        assert_refused("floq", [flag, there], f"{flag} {there} is not a directory")
    assert_refused("floq", ["--env-id", ENV_ID, "--dataset-path", there], f"--dataset-path {there} is not a file")
    assert_refused("floq", ["--env-id", ENV_ID, "--dataset-dir", there], f"--dataset-dir {there} is not writable")


def test_a_directory_is_looked_at_before_it_is_needed(tmp_path, monkeypatch, capsys):
    files.check_writable(tmp_path / "new" / "directory", "--x")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(SystemExit) as stop:
        files.check_writable(tmp_path / "new", "--x")
    message = f"--x {tmp_path}/new is not writable: {tmp_path} forbids it"
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_two_processes_do_not_train_one_run(tmp_path, capsys):
    code = f"from common import runs; lock = runs.hold({str(tmp_path)!r}); print(1, flush=True); input()"
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "1\n"
    with pytest.raises(SystemExit) as stop:
        runs.hold(tmp_path)
    assert stop.value.code == 2 and "another process is training this run" in capsys.readouterr().err
    process.communicate("\n")
    runs.hold(tmp_path).close()


def test_a_run_that_was_trained_between_reading_and_locking_is_refused(tmp_path, capsys):
    checkpoint.save(tmp_path, payload(1))
    resumed = checkpoint.load(tmp_path)
    checkpoint.save(tmp_path, payload(2))
    with pytest.raises(SystemExit) as stop:
        runs._cut_back(tmp_path, None, resumed, None)
    assert stop.value.code == 2 and "has trained this run in the meantime" in capsys.readouterr().err
    resumed = checkpoint.load(tmp_path) | {"file": ("checkpoint_previous.pt", 0)}
    (tmp_path / "checkpoint_previous.pt").unlink()  # it was made the latest
    with pytest.raises(SystemExit) as stop:
        runs._cut_back(tmp_path, None, resumed, None)
    assert stop.value.code == 2 and "has trained this run in the meantime" in capsys.readouterr().err


def test_a_row_that_a_full_disk_cuts_off_is_taken_back(tmp_path):
    path = tmp_path / "inference.csv"
    runs.append_rows(path, [{"step": 1, "success": 0.5}])
    before = path.read_bytes()
    with full_disk(len(before) + 3), pytest.raises(SystemExit) as stop:  # three bytes of the row fit
        runs.append_rows(path, [{"step": 2, "success": 0.5}])
    assert "could not write" in str(stop.value.code) and path.read_bytes() == before


def test_two_runs_that_begin_in_one_second_have_two_directories(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.time, "time", lambda: 1000.5)
    args = parse("floq", "--no-cuda", "--runs-dir", str(tmp_path))
    names = [runs._new_directory(args).name for _ in range(2)]
    assert [name.split("__")[-1] for name in names] == ["1000", "1001"]


def test_the_seconds_of_a_run_continue(tmp_path, monkeypatch):
    """And a machine without git runs too."""
    args = parse("floq", "--no-cuda", "--runs-dir", str(tmp_path))
    identity = {"file": "x.npz", "source": "generated", "transitions": 1, "sha256": "0"}
    first = log.Log(args, None, torch.device("cpu"), identity)
    assert set(first.seconds.values()) == {0.0}
    first.seconds |= {"training": 1.5, "evaluating": 2.0}
    checkpoint.save(first.run_dir, first.state() | {"agent": {}, "step": 0})
    first.bar.close()
    first.lock.close()
    monkeypatch.setattr(runs.shutil, "which", lambda name: None)
    args, resumed = dataclasses.replace(args, resume=str(first.run_dir)), checkpoint.load(first.run_dir)
    again = log.Log(args, resumed, torch.device("cpu"), identity)
    again.bar.close()
    assert again.seconds == {"training": 1.5, "evaluating": 2.0}
    assert json.loads((first.run_dir / "args.json").read_text())["git_commit"] is None


def test_the_pace_of_a_run_is_without_warm_up_and_evaluations(tmp_path, monkeypatch):
    """By a clock that is two seconds later at each look."""
    looks = itertools.count()
    monkeypatch.setattr(log.time, "perf_counter", lambda: 2.0 * next(looks))
    args = parse("floq", "--no-cuda", "--log-interval", "10", "--runs-dir", str(tmp_path))
    identity = {"file": "x.npz", "source": "generated", "transitions": 1}
    written, sent = log.Log(args, None, torch.device("cpu"), identity, columns=["a", "b"]), []
    written.wandb_runs = [SimpleNamespace(log=sent.append)]
    for step in range(1, 31):
        name = "a" if step < 25 else "b"  # the losses change, so that it compiles again
        written.training(step, {name: torch.full((1,), 0.5 * step)}, warm_up=step in (1, 25))
        if step == 10:
            written.evaluation(None, "offline")  # given up: no rows
    written.bar.close()
    train = (written.run_dir / "train.csv").read_text().splitlines()
    assert train == ["step,seed,a,b", "10,0,5.0,", "20,0,10.0,", "30,0,,15.0"]
    timing = (written.run_dir / "timing.csv").read_text().splitlines()
    assert timing[0] == "step,updates_per_second,seconds_training,seconds_evaluating"
    # 9 updates in 2 s; 10 in 2 s; 5 in 2 s, since the four before the second warm-up are left out with it
    assert timing[1:] == ["10,4.5,2.0,0.0", "20,5,4.0,2.0", "30,2.5,6.0,2.0"]
    assert not (written.run_dir / "eval.csv").exists()
    losses = [{"training/a": 5.0, "step": 10}, {"training/a": 10.0, "step": 20}, {"training/b": 15.0, "step": 30}]
    assert sent == losses
    written.evaluation([{"step": 30, "seed": 0, "success": 0.5, "episodes": 2}], "offline")
    assert sent[3:] == [{"evaluation/success": 0.5, "evaluation/episodes": 2, "step": 30}]


def test_the_result_of_a_run_is_the_published_statistic(tmp_path):
    success = {1: (0.0, 1.0), 2: (0.5, 0.8), 3: (0.6, 0.7), 4: (0.7, 0.6), 5: (0.1, 0.2), 6: (0.2, 0.4)}

    def result(**steps):
        lines = ["step,seed,phase,success,episode_return,episode_length,episodes"]
        for phase in steps:
            for step in steps[phase]:
                lines += [f"{step},{seed},{phase},{success[step][seed]},-1.0,9.0,50" for seed in (0, 1)]
        (tmp_path / "eval.csv").write_text("\n".join(lines) + "\n")
        return log.result(tmp_path)

    assert result(offline=(1, 2, 3, 4)) == "success, mean of the evaluations at [2, 3, 4]: 65.0% +- 7.1 over 2 seeds"
    before, after = "65.0% +- 7.1 over 2 seeds at 4", "30.0% +- 14.1 over 2 seeds at 6"
    assert result(offline=(2, 4), online=(5, 6)) == f"success: {before}, where the online phase begins, {after}"


def test_wandb_is_asked_for_before_the_data_are(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        parse("floq", "--track")
    assert stop.value.code == 2 and "--track: wandb is not installed" in capsys.readouterr().err


def test_what_may_change_on_resume_is_what_the_docs_say():
    may = "resume runs_dir cuda track wandb_project_name wandb_entity capture_video dataset_dir dataset_path"
    may += " eval_workers save_interval compile cudagraphs matmul_precision total_timesteps online_timesteps"
    assert MAY_CHANGE == set(may.split())


def test_resume_with_contradicting_arguments_lists_them(finished, tmp_path):
    both = ("--gamma 0.9 (the run has 0.99)", "--batch-size 32 (the run has 16)")
    assert_refused("floq", ["--resume", finished, "--gamma", 0.9, "--batch-size", 32], *both)
    assert_refused("floq", ["--resume", finished, "--total-timesteps", 100], "is at step 420 already")
    words = ["--resume", finished, "--total-timesteps", 300, "--online-timesteps", 400]
    assert_refused("floq", words, "is at step 420 of its offline phase already")  # else 120 online rows would be zeros
    assert_refused("floq", ["--resume", tmp_path], "no usable checkpoint")


def test_what_made_a_run_before_is_kept(tmp_path, capsys):
    info = {
        "versions": {"torch": "2"},
        "git_commit": "a",
        "device": "cpu (2 threads)",
        "args": {"matmul_precision": None},
    }
    write = lambda **changes: (tmp_path / "args.json").write_text(json.dumps(info | changes))
    assert runs._earlier(tmp_path, info, 5) == []  # nothing is known
    write()
    assert runs._earlier(tmp_path, info, 5) == [] and capsys.readouterr().err == ""
    write(git_commit="b", args={"matmul_precision": "medium"}, versions={"torch": "1"}, earlier=[{"until": 3}])
    first, second = runs._earlier(tmp_path, info, 5)
    assert first == {"until": 3} and (second["until"], second["git_commit"]) == (5, "b")
    assert second["matmul_precision"] == "medium" and second["versions"] == {"torch": "1"}
    assert "the run had torch 1, it continues with 2" in capsys.readouterr().err


def test_resume_refuses_another_dataset(finished, tmp_path):
    from common.generate import generate

    other = generate("pointmaze-medium-navigate-v0", tmp_path, num_episodes=1, seed=5)
    messages = ("the run's dataset is {'source': 'generated'", "found here: {'source': 'generated'")
    assert_refused("floq", ["--resume", finished, "--dataset-path", other], *messages)


def test_resume_accepts_the_same_dataset_at_another_place(finished, maze_data, tmp_path):
    moved = shutil.copy(maze_data, tmp_path / "moved-generated-set.npz")
    _, identity = datasets.load_dataset(moved, ENV_ID, "cpu")
    run_dir = Path(shutil.copytree(finished, tmp_path / "run"))
    before = {path.name: path.read_bytes() for path in run_dir.glob("*.csv")}
    resumed = checkpoint.load(run_dir)
    assert identity != resumed["dataset"]
    runs._cut_back(run_dir, parse("floq", "--num-seeds", "2"), resumed, identity)
    assert {path.name: path.read_bytes() for path in run_dir.glob("*.csv")} == before


def test_resume_refuses_a_csv_file_that_has_lost_rows(tmp_path, capsys):
    identity = {"sha256": "0" * 64}
    path = tmp_path / "train.csv"
    path.write_text("step,seed,loss\n10,0,0.5\n20,0,0.25\n")
    origin = payload(20) | {"dataset": identity, "csv_sizes": runs.csv_sizes(tmp_path)}
    checkpoint.save(tmp_path, origin)
    resumed = checkpoint.load(tmp_path)
    runs._cut_back(tmp_path, None, resumed, identity)  # which leaves what is whole
    assert path.stat().st_size == origin["csv_sizes"]["train.csv"] > 0
    for damage in (lambda: os.truncate(path, 24), path.unlink):
        damage()
        with pytest.raises(SystemExit) as stop:
            runs._cut_back(tmp_path, None, resumed, identity)
        message = "train.csv has lost rows that were written before the checkpoint"
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_cuda_without_cuda_warns_and_trains_on_the_cpu(flags, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    short = [flag for flag in flags if flag != "--no-cuda"] + ["--total-timesteps", 2, "--cuda", "--runs-dir", tmp_path]
    assert "training on the CPU" in run("floq", *short).stderr


# --- Arguments ---


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_flag_has_a_help_text(algorithm):
    import ast

    source = (ROOT / f"{algorithm}.py").read_text()
    tree, lines = ast.parse(source), source.splitlines()
    (cls,) = [node for node in tree.body if getattr(node, "name", "") == "Args"]
    for field, text in zip(cls.body, [*cls.body[1:], None]):
        if isinstance(field, ast.AnnAssign):
            beside = "  # " in lines[field.end_lineno - 1][field.end_col_offset :]
            below = isinstance(text, ast.Expr) and isinstance(text.value.value, str)
            assert beside != below, f"{field.target.id} has no help text, or two"
    shown = run(algorithm, "--help").stdout
    assert "Adam's learning rate" in shown and ast.get_docstring(tree).split("(")[0].split(":")[0] in shown


def test_tuned_values_apply_and_a_flag_wins():
    args = parse("floq", "--env-id", "antmaze-giant-navigate-singletask-task2-v0")
    assert (args.alpha, args.gamma, args.q_agg, args.batch_size, args.critic_flow_steps) == (10.0, 0.995, "min", 512, 4)
    args = parse("floq", "--env-id", "antmaze-giant-navigate-singletask-v0", "--batch-size", "256", "--q-agg", "mean")
    assert (args.batch_size, args.q_agg, args.gamma) == (256, "mean", 0.995)
    assert parse("floq").block_depth == 2 and parse("floq", "--env-id", "scene-play-singletask-v0").block_depth == 4
    assert parse("floq", "--env-id", "puzzle-4x4-play-singletask-v0").noise_coverage == 0.25


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_quick_is_its_own_values_and_else_the_defaults(algorithm):
    """No published setting is of its environment, and those of the default environment do not apply."""
    module = ALGORITHMS[algorithm]
    assert parse(algorithm, "--quick") == module.Args(**module.QUICK, quick=True)


def test_quick_wins_over_tuned_and_a_flag_over_quick():
    import floq

    args = parse("floq", "--quick")
    assert all(getattr(args, name) == value for name, value in floq.QUICK.items())
    assert parse("floq", "--quick", "--alpha", "1e6").alpha == 1e6
    assert parse("floq", "--quick", "--exp-name", "mine").exp_name == "mine"


# --- Weights & Biases ---


def test_wandb_is_imported_only_when_asked(flags, tmp_path):
    code = (
        "import sys, runpy; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print('wandb' in sys.modules)"
    )
    short = [*flags, "--total-timesteps", 2, "--runs-dir", tmp_path]
    command = [sys.executable, "-c", code, ROOT / "floq.py", *short]
    shown = subprocess.run([str(w) for w in command], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert shown.returncode == 0 and shown.stdout.rstrip().endswith("False"), shown.stderr[-2000:]


def test_tracking_offline_makes_one_run_a_seed(flags, tmp_path):
    short = [*flags, "--total-timesteps", 40, "--track", "--runs-dir", tmp_path]
    run("floq", *short, env={"WANDB_MODE": "offline", "WANDB_SILENT": "true"}, cwd=tmp_path)
    assert len(list(Path(tmp_path).glob("*/wandb/offline-run-*"))) == 2
