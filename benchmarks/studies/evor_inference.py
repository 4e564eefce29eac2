"""EVOR's improvement at inference: success against candidates, temperatures and return samples, from one checkpoint.

    python -m benchmarks.studies.evor_inference --run runs/RUN_DIR
    python -m benchmarks.studies.evor_inference --run runs/RUN_DIR --episodes 20 --output docs/evor_inference

Nothing is trained: each setting changes one of --num-actions, --tau-q, --tau-r and --num-returns of the run (evor.py
--evaluate does one). Writes OUTPUT.csv, one row a setting and seed, as it goes, and OUTPUT.png:
means over the seeds with 95% intervals.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

import evor
from benchmarks.scores import interval
from common import checkpoint, fail, policies, rollout, runs
from common.device import setup_torch

SWEEPS = {
    "num_actions": (1, 2, 4, 8, 16, 32, 64),
    "tau_q": (0.01, 0.1, 1.0, 10.0, 100.0),
    "tau_r": (0.1, 1.0, 10.0, 100.0, 1000.0),
    "num_returns": (1, 4, 16, 64),
}
LABELS = {
    "num_actions": "candidates $N_\\pi$",
    "tau_q": "$\\tau_Q$ (return)",
    "tau_r": "$\\tau_R$ (return)",
    "num_returns": "return samples $N$",
}


@dataclass
class ScalingArgs:
    run: str
    """run directory of evor.py"""
    num_actions: tuple[int, ...] = SWEEPS["num_actions"]
    """values of the first sweep"""
    tau_q: tuple[float, ...] = SWEEPS["tau_q"]
    """values of the second"""
    tau_r: tuple[float, ...] = SWEEPS["tau_r"]
    """values of the third"""
    num_returns: tuple[int, ...] = SWEEPS["num_returns"]
    """values of the fourth"""
    episodes: int | None = None
    """episodes of each setting and seed (default: the run's)"""
    cuda: bool = True
    """use the GPU where there is one"""
    output: str | None = None
    """csv and PNG get this path's stem (default: inference_scaling in the run directory)"""


def success_text(rows):
    """The mean success of one setting's rows with its interval, which one seed does not have."""
    mean, half = interval([100 * row["success"] for row in rows])
    return f"{mean:.1f}%" + (f" +- {half:.1f}" if len(rows) > 1 else "")


def draw(path, rows, base):
    """Saves the picture of the rows; `base` are the run's own settings, which the sweeps share."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.2), layout="constrained")
    panels = figure.subplots(1, 4, sharey=True)
    for axes, name in zip(panels, SWEEPS):
        values = sorted({row[name] for row in rows if row["sweep"] == name})
        groups = [[100 * row["success"] for row in rows if row["sweep"] == name and row[name] == v] for v in values]
        means, halves = np.nan_to_num([interval(group) for group in groups]).T  # no bar for one seed
        axes.errorbar(values, means, yerr=halves, marker="o", capsize=3)
        for value, group in zip(values, groups):
            axes.scatter([value] * len(group), group, color="grey", s=8, alpha=0.6)
        axes.axvline(base[name], color="grey", linestyle=":", linewidth=1)
        axes.set(xscale="log", xlabel=LABELS[name], ylim=(-3, 103))
        axes.grid(alpha=0.3)
    panels[0].set_xscale("log", base=2)
    panels[3].set_xscale("log", base=2)
    panels[0].set_ylabel("success (%)")
    others = ", ".join(f"{name} {value:g}" for name, value in base.items())
    figure.suptitle(f"one checkpoint; dotted: the run's settings ({others})", fontsize="medium")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    options = tyro.cli(ScalingArgs, description=__doc__)
    payload = checkpoint.load(options.run, "--run")
    if payload["algorithm"] != "evor":
        fail(f"--run {options.run} is a run of {payload['algorithm']}.py, not of evor.py")
    for name in SWEEPS:
        if min(getattr(options, name), default=1) <= 0:
            fail(f"--{name.replace('_', '-')} {getattr(options, name)}: must be above zero")
    if options.episodes is not None and options.episodes < 1:
        fail(f"--episodes {options.episodes}: must be above zero")
    args = evor.Args(**payload["args"])
    args = replace(args, eval_episodes=options.episodes or args.eval_episodes, capture_video=False)
    device = setup_torch(replace(args, cuda=options.cuda and torch.cuda.is_available(), matmul_precision=None))
    seeds = list(range(args.seed, args.seed + args.num_seeds))
    agents = policies.rebuild(evor.Agent, args, payload, device, options.run)
    agent, act = agents.agent, agents.function("act")
    base = {name: getattr(args, name) for name in SWEEPS}
    settings = [(name, base | {name: value}) for name in SWEEPS for value in getattr(options, name)]
    output = Path(options.output) if options.output else Path(options.run) / "inference_scaling"
    output.with_suffix(".csv").unlink(missing_ok=True)

    evaluator = rollout.Evaluator(args, seeds, device, Path(options.run))
    rows, known = [], {}
    for name, setting in tqdm(settings, unit=" settings"):
        key, start = tuple(setting.values()), time.perf_counter()
        if key not in known:  # the run's own settings are a point of every sweep
            agent.args = replace(args, **setting)
            known[key] = evaluator(act, agent.draw_act_noise, payload["step"])
        new = [{"sweep": name} | setting | row for row in known[key]]
        rows += new
        runs.append_rows(output.with_suffix(".csv"), new)
        tqdm.write(f"{name} {setting[name]:g}: success {success_text(new)} ({time.perf_counter() - start:.0f} s)")
    evaluator.close()
    draw(output.with_suffix(".png"), rows, base)
    print(f"saved {output.with_suffix('.csv')} and {output.with_suffix('.png')}")
