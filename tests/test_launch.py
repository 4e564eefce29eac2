"""benchmarks.launch as a user starts it: which jobs, mistakes, killed workers, Ctrl-C, two at once, a real SLURM."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import (
    ENV_ID,
    ROOT,
    SMALL_FLAGS,
    assert_same_csv,
    only_run,
    process_as_before,
    run,
    wait_for,
    wait_for_row,
)

from benchmarks import scores
from benchmarks.launch import jobs, local, state, table
from benchmarks.launch import slurm as slurm_jobs
from benchmarks.launch.__main__ import prepare

STUB = Path(__file__).parent / "stub_algorithm.py"
OTHER_ENV_ID = ENV_ID.replace("task4", "task5")
BOTH = ENV_ID.replace("task4", "task{4,5}")
TWENTY = "cube-{single,double}-play-singletask-task{1..5}-v0"  # with two seeds, one a job
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
LENGTHS = "--total-timesteps 240 --eval-interval 240 --log-interval 20 --save-interval 70 --eval-episodes 1".split()


def start_launch(*words, env=None):
    """Starts the launcher; returns the process."""
    environment = os.environ | ONE_THREAD | (env or {})
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.launch", *map(str, words)],
        env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish_launch(process, code=0):
    """Waits for a launcher; returns its (stdout, stderr) after a look at its exit code."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out[-3000:] + err[-3000:]
    assert "Traceback" not in err
    return out, err


def stub_sweep(runs_dir, *words, env_ids=TWENTY, seeds=2):
    """The launcher's words for jobs of the stub."""
    own = ["--methods", STUB, "--env-ids", env_ids, "--seeds", seeds, "--seeds-per-job", 1]
    return [*own, "--runs-dir", runs_dir, "--slots-per-device", 4, *words]


def trainers(runs_dir):
    """Process ids of the training processes at work, which are named in the jobs' states."""
    names = [state.read_json(path).get("process", "") for path in Path(runs_dir).glob("launch/*/state.json")]
    return [int(name.split()[-1]) for name in names if name and is_alive(name.split()[-1])]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def stub_runs(runs_dir):
    return [path.parent for path in Path(runs_dir).glob("cube-*/args.json")]


def assert_each_step_once(run_dir, last=20):
    steps = [line.split(",")[0] for line in (run_dir / "eval.csv").read_text().splitlines()]
    assert steps == ["step", *map(str, range(1, last + 1))]


def kill_a_trainer(process, runs_dir):
    """Kills one of the training processes at work as the kernel does when memory is short."""
    os.kill(wait_for(process, lambda: trainers(runs_dir))[0], signal.SIGKILL)


# --- Which jobs ---


def test_patterns_are_expanded(capsys):
    expand = jobs.expand_env_ids
    assert expand(["cube-double-play-singletask-task{1..3}-v0"]) == [
        f"cube-double-play-singletask-task{i}-v0" for i in (1, 2, 3)
    ]
    assert expand(["{scene,cube-single}-play-singletask-v0"]) == [
        "scene-play-singletask-v0",
        "cube-single-play-singletask-v0",
    ]
    assert len(expand(["scene-play-singletask-task*-v0", "scene-play-singletask-task1-v0"])) == 5
    five = expand(["scene-play-*"])  # the default task is task 2 under another name
    assert len(five) == 5 == len({scores.canonical(env_id) for env_id in five})
    assert sorted(five) == expand(["scene-play-singletask-task{1..5}-v0"])  # under the same names
    with pytest.raises(SystemExit) as error:
        expand(["cube-duoble-play-singletask-task{1..3}-v0"])
    assert error.value.code == 2
    assert "nearest: cube-double-play-singletask-task1-v0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        expand(["scene-play-*", "scnee-play-*"])
    assert "scnee-play-* matches no environment of ogbench; nearest: scene-play-" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        ("--methods flow --env-ids scene-*", "--methods flow is unknown; nearest: q_flow, floq"),
        ("--methods floq --env-ids scene-* --seeds 0", "must be above zero"),
        ("--methods floq --env-ids scene-* --seeds-per-job 0", "must be above zero"),
        ("--methods floq --env-ids scene-* -- --num_seeds=3", "--num_seeds=3 after --: the launcher sets it itself"),
        ("--methods q_flow floq --env-ids scene-play-* -- --noise-samples 2", "Unrecognized options: --noise-samples"),
        ("--methods q_flow --env-ids scene-play-* -- --time-embed-dim 3", "--time-embed-dim 3 must be even"),
        ("--methods floq --env-ids scene-play-* -- --dataset-path nowhere.npz", "nowhere.npz is not a file"),
        (
            "--methods floq --env-ids scene-play-* --executor slurm",
            "sbatch not found: install SLURM or use --executor local / print",
        ),
    ],
)
def test_mistakes_end_before_anything_starts(words, message, tmp_path):
    process = start_launch("--runs-dir", tmp_path / "runs", *words.split(), env={"PATH": ""})
    out, err = finish_launch(process, 2)
    assert message in err and not (tmp_path / "runs").exists()


def test_commands_are_printed(tmp_path):
    (tmp_path / "submitit.py").write_text("raise ImportError('print needs no submitit')")
    words = ["--methods", "floq", "value_flows", "--env-ids", BOTH, "--seeds", 5, "--seed", 3, "--seeds-per-job", 4]
    words += ["--runs-dir", tmp_path / "a b", "--executor", "print", "--", "--quick", "--total-timesteps", 100]
    out, _ = finish_launch(start_launch(*words, env={"PYTHONPATH": str(tmp_path)}))
    common = ["--runs-dir", str(tmp_path / "a b"), "--quick", "--total-timesteps", "100"]
    assert [shlex.split(line) for line in out.splitlines()] == [
        ["python", f"{method}.py", "--env-id", env_id, "--seed", str(seed), "--num-seeds", str(number), *common]
        for method in ("floq", "value_flows")
        for env_id in (ENV_ID, OTHER_ENV_ID)
        for seed, number in ((3, 4), (7, 1))
    ]


@pytest.fixture
def stub_job(tmp_path):
    """One job of the stub."""
    env_id = "cube-single-play-singletask-task1-v0"
    own = dict(exp_name="stub", total_timesteps=20, online_timesteps=0, log_interval=1, dataset_path=None)
    own |= dict(seed=0, num_seeds=2)
    identity = {name: own[name] for name in ("seed", "num_seeds", "dataset_path", "exp_name")}
    words = ["--env-id", env_id, "--seed", "0", "--num-seeds", "2", "--runs-dir", str(tmp_path)]
    return jobs.Job(STUB, env_id, (0, 1), tmp_path, words, own, identity, own)


def test_what_there_is_decides(stub_job):
    assert state.choose(stub_job) == ("new", None)
    words = local.command(stub_job, sys.executable, "new", None)
    subprocess.run([*words, "--die-at", "4"])  # before its first checkpoint
    (dead,) = stub_runs(stub_job.runs_dir)
    assert state.choose(stub_job) == ("new", None)
    subprocess.run([*words, "--die-at", "7"])
    (cut,) = set(stub_runs(stub_job.runs_dir)) - {dead}
    assert state.choose(stub_job) == ("resume", cut)
    subprocess.run([*words, "--die-at", "12"])
    (further,) = set(stub_runs(stub_job.runs_dir)) - {dead, cut}
    assert state.choose(stub_job) == ("resume", further)
    shutil.rmtree(further)
    whole = (cut / "checkpoint.pt").read_bytes()
    (cut / "checkpoint.pt").write_bytes(whole[:30])
    assert state.choose(stub_job) == ("new", None)
    (cut / "checkpoint.pt").write_bytes(whole)
    subprocess.run(local.command(stub_job, sys.executable, "resume", cut), check=True)
    assert state.choose(stub_job) == ("skip", cut)

    rows = (cut / "eval.csv").read_text().splitlines(keepends=True)
    (cut / "eval.csv").write_text("".join(rows[:-1]))  # one of the seeds lacks its last evaluation
    assert state.choose(stub_job) == ("resume", cut)
    (cut / "eval.csv").write_text("".join(rows))
    stub_job.args = stub_job.args | {"total_timesteps": 30}
    assert state.choose(stub_job) == ("resume", cut)  # a longer run goes on from a shorter one
    stub_job.args = stub_job.args | {"total_timesteps": 10}
    assert state.choose(stub_job) == ("new", None)
    for lengths in ((15, 10), (20, 10), (30, 10)):  # another online phase is another job's run
        stub_job.args = stub_job.args | dict(zip(("total_timesteps", "online_timesteps"), lengths))
        assert state.choose(stub_job) == ("new", None)
    stub_job.args = stub_job.args | {"total_timesteps": 20, "online_timesteps": 0}
    stub_job.identity = stub_job.identity | {"num_seeds": 3}
    assert state.choose(stub_job) == ("new", None)


def test_a_job_continues_to_its_own_lengths(stub_job):
    """A stored run's lengths are its own: without the job's the program would end where the run does, at once."""
    own = stub_job.args
    for length in (0, 30):
        stub_job.args = own | {"online_timesteps": length}
        words = local.command(stub_job, "python", "resume", Path("run"))
        lengths = ["--total-timesteps", "20", "--online-timesteps", str(length)]
        assert words[2:] == ["--resume", "run", *lengths, *stub_job.words]
    online = [dict(zip(("total_timesteps", "online_timesteps"), lengths)) for lengths in ((20, 20), (10, 20), (30, 20))]
    run_dir = stub_job.runs_dir / f"{stub_job.env_id}__stub__0__1"
    run_dir.mkdir()
    info = {"algorithm": "stub_algorithm", "args": stub_job.args | online[0]}
    (run_dir / "args.json").write_text(json.dumps(info))
    for step, fits in ((5, [True, True, True]), (15, [True, False, True]), (25, [True, False, False])):
        (run_dir / "eval.csv").write_text(f"step,seed,success\n{step},0,0.5\n{step},1,0.5\n")
        found = []
        for lengths in online:  # the border between the phases may not move past the run
            stub_job.args = stub_job.args | lengths
            found.append(state.find_runs(stub_job)[0].fits)
        assert found == fits, step
    stub_job.args = own
    for log_interval, fits in ((1, True), (5, True), (6, False)):  # the checkpoint may be that far past the csv files
        info["args"] = own | {"total_timesteps": 40, "log_interval": log_interval}
        (run_dir / "args.json").write_text(json.dumps(info))
        (run_dir / "eval.csv").write_text("step,seed,success\n16,0,0.5\n16,1,0.5\n")
        assert state.find_runs(stub_job)[0].fits == fits, log_interval


def test_nothing_is_submitted_again_while_the_queue_is_not_known(stub_job, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")  # no squeue
    state.write_state(stub_job, slurm="7_0")
    with pytest.raises(SystemExit) as stop:
        prepare([stub_job], on_slurm=True)
    assert stop.value.code == 2 and "would be submitted twice" in capsys.readouterr().err
    assert state.read_state(stub_job)["slurm"] == "7_0"


# --- On this machine ---


def test_killed_worker_changes_no_number(maze_data, tmp_path):
    flags = [*SMALL_FLAGS["floq"], *LENGTHS, "--dataset-path", maze_data]
    words = ["--methods", "floq", "--env-ids", BOTH, "--seeds", 2, "--runs-dir", tmp_path / "runs"]
    words += ["--slots-per-device", 2, "--", *flags]
    process = start_launch(*words)
    run_dir = wait_for_row(process, tmp_path / "runs", "train.csv", "100,0")
    (killed,) = [pid for pid in trainers(tmp_path / "runs") if run_dir.name.split("__")[0] in command_line(pid)]
    os.kill(killed, signal.SIGKILL)
    out, _ = finish_launch(process)
    assert "killed by SIGKILL, to be restarted" in out and "restarts 1" in out
    assert out.count(": done, step 240/240") == 2

    env_id = run_dir.name.split("__")[0]
    run("floq", *flags, "--env-id", env_id, "--num-seeds", 2, "--runs-dir", tmp_path / "uninterrupted", env=ONE_THREAD)
    assert_same_csv(run_dir, only_run(tmp_path / "uninterrupted"))

    out, _ = finish_launch(start_launch(*words))  # nothing is left to do
    assert out.count(": skipped (done: ") == 2 and "running" not in out


def command_line(pid):
    return Path(f"/proc/{pid}/cmdline").read_text()


def test_twenty_jobs_lose_none(tmp_path):
    process = start_launch(*stub_sweep(tmp_path))
    for number in (3, 9):
        wait_for(process, lambda: len([d for d in stub_runs(tmp_path) if (d / "checkpoint.pt").exists()]) > number)
        kill_a_trainer(process, tmp_path)
    out, _ = finish_launch(process)
    assert out.count(": done, step 20/20") == 20 and "killed by SIGKILL, to be restarted" in out
    finished = [d for d in stub_runs(tmp_path) if (d / "eval.csv").exists() and "\n20," in (d / "eval.csv").read_text()]
    assert len(finished) == 20
    for run_dir in finished:
        assert_each_step_once(run_dir)


def test_a_job_that_always_dies_is_given_up(tmp_path):
    words = stub_sweep(tmp_path, "--max-restarts", 1, "--", "--die-at", 7, env_ids="cube-single-play-singletask-v0")
    out, err = finish_launch(start_launch(*words), 1)
    assert out.count("to be restarted") == 2  # once for each of two jobs
    assert "failed: stub_algorithm cube-single-play-singletask-v0 seeds 0: killed by SIGKILL" in err
    assert "    this stub dies\n    log: " in err
    out, _ = finish_launch(start_launch("--status", *words))
    assert "2 jobs: 2 failed" in out


def test_a_mistake_is_not_repeated(tmp_path):
    words = stub_sweep(tmp_path, "--", "--exit-at", 3, env_ids="cube-single-play-singletask-v0")
    out, err = finish_launch(start_launch(*words), 1)
    assert "to be restarted" not in out and err.count("exit code 2") == 2 and len(stub_runs(tmp_path)) == 2


def test_a_job_sees_its_gpu_and_has_its_share_of_the_cores(stub_job, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    seeds = dict(seed=2, num_seeds=2)
    words = [*stub_job.words[:2], "--seed", "2", *stub_job.words[4:]]
    changes = dict(args=stub_job.args | seeds, identity=stub_job.identity | seeds)
    both = [stub_job, replace(stub_job, seeds=(2, 3), words=words, **changes)]
    with process_as_before():
        assert local.run(both, ["0", "1"], cores=8, max_restarts=0) == 0
    found = [json.loads((path / "args.json").read_text())["environment"] for path in stub_runs(stub_job.runs_dir)]
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    assert sorted(tuple(one[name] for name in names) for one in found) == [("0", "4"), ("1", "4")]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_same_command_goes_on(number, code, tmp_path):
    words = stub_sweep(tmp_path, "--", "--total-timesteps", 200, env_ids="cube-single-play-singletask-task{1,2}-v0")
    process = start_launch(*words)
    wait_for(process, lambda: len([d for d in stub_runs(tmp_path) if (d / "eval.csv").exists()]) == 4)
    process.send_signal(number)
    out, _ = finish_launch(process, code)
    for run_dir in stub_runs(tmp_path):  # at its last step, not only at every fifth
        with zipfile.ZipFile(run_dir / "checkpoint.pt") as archive:
            saved, _ = json.loads(archive.read("state"))
        assert (run_dir / "eval.csv").read_text().splitlines()[-1].startswith(f"{saved},")
    assert "continue with the same command: python -m benchmarks.launch --methods" in out and "done" not in out
    assert not trainers(tmp_path)
    out, _ = finish_launch(start_launch(*words))
    assert out.count("done, step 200/200") == 4
    assert len(stub_runs(tmp_path)) == 4
    for run_dir in stub_runs(tmp_path):
        assert_each_step_once(run_dir, 200)


def test_two_launchers_share_the_jobs(tmp_path):
    words = stub_sweep(tmp_path, env_ids="cube-single-play-singletask-task{1,2}-v0")
    processes = [start_launch(*words), start_launch(*words)]
    for process in processes:
        out, _ = finish_launch(process)
        assert "failed" not in out
    assert len(stub_runs(tmp_path)) == 4
    for run_dir in stub_runs(tmp_path):
        assert_each_step_once(run_dir)


def test_a_machine_that_vanishes(tmp_path):
    """Everything is killed at once, and the files are left as a power cut leaves them: half a row, zeros, no state."""
    words = stub_sweep(tmp_path, "--", "--total-timesteps", 100, env_ids="cube-single-play-singletask-task{1,2}-v0")
    process = start_launch(*words)
    wait_for(process, lambda: len([d for d in stub_runs(tmp_path) if (d / "checkpoint.pt").exists()]) == 4)
    process.kill()
    for pid in trainers(tmp_path):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    for run_dir, torn in zip(stub_runs(tmp_path), (b"1", b"99,0,0.", b"\0" * 100, b"\0" * 100 + b"\n")):
        with open(run_dir / "eval.csv", "ab") as file:
            file.write(torn)
    for path in tmp_path.glob("launch/*/state.json"):
        path.write_bytes(b"")
    finish_launch(start_launch("--status", *words))
    out, _ = finish_launch(start_launch(*words))
    assert out.count("done, step 100/100") == 4 and len(stub_runs(tmp_path)) == 4
    for run_dir in stub_runs(tmp_path):
        assert_each_step_once(run_dir, 100)


def test_jobs_outlive_their_launcher(tmp_path):
    words = stub_sweep(tmp_path, "--", "--total-timesteps", 200, env_ids="cube-single-play-singletask-task{1,2}-v0")
    process = start_launch(*words)
    wait_for(process, lambda: len(trainers(tmp_path)) == 4)
    process.kill()
    process.communicate()
    before = set(trainers(tmp_path))
    process = start_launch(*words)
    out, _ = finish_launch(process)
    assert before and not trainers(tmp_path)
    assert out.count("step 200/200") == 4 and len(stub_runs(tmp_path)) == 4
    for run_dir in stub_runs(tmp_path):
        assert_each_step_once(run_dir, 200)


def test_jobs_that_outlive_their_launcher_keep_their_slots(tmp_path):
    words = ["--methods", STUB, "--env-ids", "cube-single-play-singletask-task{1,2,3}-v0", "--runs-dir", tmp_path]
    words += ["--slots-per-device", 1, "--", "--total-timesteps", 150]
    process = start_launch(*words)
    wait_for(process, lambda: len(trainers(tmp_path)) == 1)
    process.kill()
    process.communicate()
    process, most = start_launch(*words), 0
    while process.poll() is None:
        most = max(most, len(trainers(tmp_path)))
        time.sleep(0.05)
    out, _ = finish_launch(process)
    assert most == 1 and out.count("step 150/150") == 3 and len(stub_runs(tmp_path)) == 3


def test_devices_that_are_taken_are_left_out():
    assert local.unoccupied(["0", "1", "0", "1"], ["0", None, "cpu"]) == ["1", "0", "1"]
    assert local.unoccupied(["0", "1"], ["1", "0", "0"]) == []


def test_a_stopped_process_is_waited_for_and_woken_to_save(tmp_path):
    words = stub_sweep(tmp_path, "--", "--total-timesteps", 60, env_ids="cube-single-play-singletask-task{1,2}-v0")
    process = start_launch(*words)
    wait_for(process, lambda: len([d for d in stub_runs(tmp_path) if (d / "checkpoint.pt").exists()]) == 4)
    stopped = trainers(tmp_path)[0]
    os.kill(stopped, signal.SIGSTOP)
    wait_for(process, lambda: trainers(tmp_path) == [stopped])  # the others end; it is neither given up nor doubled
    process.send_signal(signal.SIGINT)
    out, _ = finish_launch(process, 130)
    assert out.count("done, step 60/60") == 3 and "killed" not in out and "failed" not in out
    out, _ = finish_launch(start_launch(*words))
    assert out.count("skipped") == 3 and out.count("done, step 60/60") == 1 and len(stub_runs(tmp_path)) == 4
    for run_dir in stub_runs(tmp_path):
        assert_each_step_once(run_dir, 60)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 128 MB, mounted for the test."""
    directory = tmp_path / "disk"
    directory.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs", str(directory)]
    if os.geteuid() != 0 or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("a disk cannot be mounted here")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)])


def test_a_full_disk_is_waited_for(small_disk):
    """No restart is used up, no traceback is shown although the launcher's own output is on that disk."""
    words = stub_sweep(small_disk, "--", "--total-timesteps", 60, env_ids="cube-single-play-singletask-v0")
    with open(small_disk / "output", "w") as output:
        command = [sys.executable, "-m", "benchmarks.launch", *map(str, words)]
        process = subprocess.Popen(command, env=os.environ | ONE_THREAD, cwd=ROOT, stdout=output, stderr=output)
    wait_for(process, lambda: len([d for d in stub_runs(small_disk) if (d / "checkpoint.pt").exists()]) == 2)
    with open(small_disk / "large", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**16))
    wait_for(process, lambda: not trainers(small_disk))
    time.sleep(3)  # several looks at the jobs
    assert process.poll() is None and not trainers(small_disk)
    (small_disk / "large").unlink()
    assert process.wait(timeout=60) == 0
    text = (small_disk / "output").read_text(errors="replace")
    assert text.count("done, step 60/60") == 2 and "Traceback" not in text
    assert len(stub_runs(small_disk)) == 2
    for run_dir in stub_runs(small_disk):
        assert_each_step_once(run_dir, 60)


def test_the_table(stub_job):
    several = [replace(stub_job, state=name) for name in ("done", "running", "waiting", "failed", "done")]
    running = several[1]
    running.step, running.success, running.rate, running.restarts, running.note = 10, 0.5, 123.456, 1, "on GPU 3"
    header, *rows, summary = table.table(several)
    assert header.split() == ["method", "environment", "seeds", "state", "step", "success", "updates/s", "restarts"]
    assert rows[1].split() == f"stub_algorithm {stub_job.env_id} 0-1 running 10/20 0.50 123.5 1 on GPU 3".split()
    assert summary == "5 jobs: 2 done, 1 running, 1 waiting, 1 failed"
    short = table.table(several, height=5)
    assert len(short) == 4 and "running" in short[1] and "failed" in short[2] and "(3 not shown)" in short[3]


def test_devices(monkeypatch, capsys):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert local.find_devices((), 2) == ["0", "1"]
    assert local.find_devices((), 0) == ["cpu"]
    assert local.find_devices(("1", "cpu"), 2) == ["1", "cpu"]
    with pytest.raises(SystemExit):
        local.find_devices(("2",), 2)
    assert "--devices 2: visible here are 0, 1, cpu" in capsys.readouterr().err
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5f2")
    assert local.find_devices((), 2) == ["3", "GPU-5f2"]


# --- SLURM ---


def test_states_of_slurm_jobs(stub_job, monkeypatch):
    state.write_state(stub_job, slurm="7_1")

    def look(queued):
        monkeypatch.setattr(slurm_jobs, "queue", lambda jobs: queued)
        slurm_jobs.look([stub_job])
        return stub_job.state

    places = {"PENDING": "waiting", "RUNNING": "running", "COMPLETING": "running"}
    for queued, expected in [({"7_1": place}, name) for place, name in places.items()] + [(None, "waiting")]:
        assert look(queued) == expected
    assert (look({"7_0": "RUNNING"}), stub_job.note) == ("failed", "SLURM job 7_1 has left the queue")
    lock = state.take_lock(stub_job)
    state.write_state(stub_job, process=f"here process {os.getpid()}")
    assert look({}) == "running" and stub_job.note.endswith(f"process {os.getpid()}")
    assert state.take_lock(stub_job) is None
    lock.close()
    assert state.locked_by(stub_job) is None


SLURM_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
CredType=cred/munge
# A job that is queued again starts once its old credential has expired.
AuthInfo=socket={directory}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
JobRequeue=1
KillWait=5
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm(tmp_path):
    """A SLURM of one node with a configuration of its own, started and ended here: the environment to use it."""
    missing = [name for name in SLURM_PROGRAMS if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"SLURM's {', '.join(missing)} missing" if missing else "SLURM's daemons are started by root only")
    directory = tmp_path / "slurm"
    for path in (directory, directory / "state", directory / "spool"):
        path.mkdir()
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [listening.getsockname()[1] for listening in sockets]
    for listening in sockets:
        listening.close()
    host = socket.gethostname().split(".")[0]
    (directory / "slurm.conf").write_text(SLURM_CONF.format(host=host, ports=ports, directory=directory))
    (directory / "key").write_bytes(os.urandom(1024))
    (directory / "key").chmod(0o600)
    environment = {"SLURM_CONF": str(directory / "slurm.conf")}

    munge = {"key-file": "key", "socket": "munge.socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    commands = [["munged", "--foreground", "--force", *(f"--{flag}={directory / munge[flag]}" for flag in munge)]]
    commands += [["slurmctld", "-D"], ["slurmd", "-D"]]
    daemons, output = [], open(directory / "output", "w")
    deadline = time.monotonic() + 60
    try:
        for command in commands:
            options = dict(env=os.environ | environment, stdout=output, stderr=output)
            daemons.append(subprocess.Popen(command, **options))
            while not (directory / "munge.socket").exists() and time.monotonic() < deadline:
                time.sleep(0.1)
        while "idle" not in slurm_says(environment, "sinfo", "--noheader", "--format=%T"):
            if time.monotonic() > deadline:
                pytest.skip(f"SLURM does not start here: {(directory / 'output').read_text()[-500:]}")
            time.sleep(0.5)
        yield environment
        slurm_says(environment, "scancel", "--user=root")
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()
        output.close()


def slurm_says(environment, *words):
    """What a SLURM command prints, errors included."""
    done = subprocess.run(words, env=os.environ | environment, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_slurm_jobs_are_killed_and_queued_again(slurm, maze_data, tmp_path):
    flags = [*SMALL_FLAGS["floq"], *LENGTHS, "--total-timesteps", 500, "--dataset-path", maze_data]
    runs_dir = tmp_path / "runs"
    words = ["--methods", "floq", "--env-ids", BOTH, "--seeds", 2, "--runs-dir", runs_dir, "--executor", "slurm"]
    own = ["--gpus-per-node", 0, "--cpus-per-task", 1, "--mem-gb", 1]
    _, err = finish_launch(start_launch(*words, *own, "--partition", "none", "--", *flags, env=slurm), 2)
    assert "sbatch refuses the jobs" in err and "partition" in err

    process = start_launch(*words, *own, "--watch", "--", *flags, env=slurm)
    first = lambda env_id, row: wait_for(process, lambda: has_row(runs_dir, env_id, row))
    run_dir = first(ENV_ID, 80)
    (killed,) = [pid for pid in trainers(runs_dir) if ENV_ID in command_line(pid)]
    os.kill(killed, signal.SIGKILL)  # within its SLURM job it starts again
    array = json.loads(next(runs_dir.glob(f"launch/*{ENV_ID}*/state.json")).read_text())["slurm"].split("_")[0]
    first(OTHER_ENV_ID, 80)
    assert slurm_says(slurm, "scontrol", "requeue", f"{array}_1") == ""  # as a preemption or an administrator
    first(ENV_ID, 240)
    slurm_says(slurm, "scancel", "--signal=USR2", f"{array}_0")  # as before its time limit
    again, _ = finish_launch(start_launch(*words, *own, "--", *flags, env=slurm))
    assert "2 jobs: 2 skipped" in again and "runs or waits already: " in again
    out, _ = finish_launch(process)
    assert out.count(": done, step 500/500") == 2
    restarts = [json.loads(path.read_text())["starts"] - 1 for path in sorted(runs_dir.glob("launch/*/state.json"))]
    assert restarts == [2, 1]

    run("floq", *flags, "--env-id", ENV_ID, "--num-seeds", 2, "--runs-dir", tmp_path / "uninterrupted", env=ONE_THREAD)
    assert_same_csv(run_dir, only_run(tmp_path / "uninterrupted"))
    out, _ = finish_launch(start_launch(*words, *own, "--", *flags, env=slurm))
    assert "2 jobs: 2 skipped" in out and out.count("done: ") == 2


def test_a_single_slurm_job_which_is_no_array_is_queued_again_too(slurm, tmp_path):
    words = ["--executor", "slurm", "--gpus-per-node", 0, "--cpus-per-task", 1, "--mem-gb", 1, "--watch"]
    words = stub_sweep(
        tmp_path, *words, "--", "--total-timesteps", 200, env_ids="cube-single-play-singletask-v0", seeds=1
    )
    process = start_launch(*words, env=slurm)
    wait_for(process, lambda: [path for path in stub_runs(tmp_path) if (path / "checkpoint.pt").exists()])
    (path,) = tmp_path.glob("launch/*/state.json")
    slurm_says(slurm, "scancel", "--signal=USR2", json.loads(path.read_text())["slurm"])
    out, _ = finish_launch(process)
    assert ": done, step 200/200" in out and json.loads(path.read_text())["starts"] == 2


def has_row(runs_dir, env_id, step):
    """The run directory of an environment once its train.csv has a step."""
    found = [path for path in runs_dir.glob(f"{env_id}__*/train.csv") if f"\n{step}," in path.read_text()]
    return found and found[0].parent
