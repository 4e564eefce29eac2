"""Honours the algorithms' interface and computes nothing: a step is 20 ms, a checkpoint comes every fifth."""

import json
import os
import signal
import sys
import time
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass
class Args:
    exp_name: str = "stub"
    env_id: str = ""
    seed: int = 0
    num_seeds: int = 1
    runs_dir: str = "runs"
    resume: str | None = None
    dataset_path: str | None = None
    dataset_source: str = "official"
    dataset_dir: str = ""
    total_timesteps: int = 20
    online_timesteps: int = 0
    log_interval: int = 1
    die_at: int = 0
    exit_at: int = 0


def parse_args(words=None):
    import tyro

    return tyro.cli(Args, args=words), None


def main():
    args = Args()
    for flag, value in zip(sys.argv[1::2], sys.argv[2::2]):  # not tyro, which takes longer than all the rest
        name = flag.lstrip("-").replace("-", "_")
        setattr(args, name, int(value) if isinstance(getattr(args, name), int) else value)
    stopped = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    if args.resume:
        run_dir = Path(args.resume)
        with zipfile.ZipFile(run_dir / "checkpoint.pt") as archive:
            step, size = json.loads(archive.read("state"))
        os.truncate(run_dir / "eval.csv", size)
    else:
        run_dir = Path(args.runs_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns()}"
        run_dir.mkdir(parents=True)
        step = 0
    info = {"algorithm": "stub_algorithm", "args": asdict(args)}
    info["environment"] = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
    (run_dir / "args.json").write_text(json.dumps(info))

    def save():
        size = (run_dir / "eval.csv").stat().st_size if step else 0
        with zipfile.ZipFile(run_dir / "part", "w") as archive:
            archive.writestr("state", json.dumps([step, size]))
        os.replace(run_dir / "part", run_dir / "checkpoint.pt")

    while step < args.total_timesteps:
        time.sleep(0.02)
        step += 1
        with open(run_dir / "eval.csv", "a") as file:
            if file.tell() == 0:
                file.write("step,seed,success\n")
            file.writelines(f"{step},{seed},0.5\n" for seed in range(args.seed, args.seed + args.num_seeds))
        if step == args.die_at:
            print("this stub dies", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if step == args.exit_at:
            sys.exit(2)
        if step % 5 == 0 or stopped:
            save()
        if stopped:
            sys.exit(143)


if __name__ == "__main__":
    main()
