"""EVOR's improvement at inference, from one checkpoint: candidates, temperatures, return samples, noisy transitions.

    python -m benchmarks.studies.evor_inference --run runs/RUN_DIR
    python -m benchmarks.studies.evor_inference --run runs/RUN_DIR --episodes 20 --output docs/evor_inference

Nothing is trained: each setting changes one of --num-actions, --tau-q, --tau-r and --num-returns of the run (evor.py
--evaluate does one). --action-noise makes transitions stochastic, which EVOR's theory excludes: the environment gets
each action with Gaussian noise of that deviation, clipped; once with the run's candidates, once with one (cloning).
Writes OUTPUT.csv, one row per setting and seed, as it goes, and OUTPUT.png: means over the seeds with 95% intervals.
A setting whose rows are there already is not evaluated again.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

import evor
from benchmarks import tables
from benchmarks.scores import interval, interval_text
from common import arguments, checkpoint, policies, rollout, runs
from common.device import setup_torch

SWEEPS = {
    "num_actions": (1, 2, 4, 8, 16, 32, 64),
    "tau_q": (0.01, 0.1, 1.0, 10.0, 100.0),
    "tau_r": (0.1, 1.0, 10.0, 100.0, 1000.0),
    "num_returns": (1, 4, 16, 64),
    "action_noise": (0.0, 0.1, 0.3, 1.0),
}
LABELS = {
    "num_actions": "candidates $N_\\pi$",
    "tau_q": "$\\tau_Q$ (return)",
    "tau_r": "$\\tau_R$ (return)",
    "num_returns": "return samples $N$",
    "action_noise": "deviation of the action noise",
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
    action_noise: tuple[float, ...] = SWEEPS["action_noise"]
    """values of the fifth: deviations of the noise that the environment adds to actions, which lie in [-1, 1]"""
    episodes: int | None = None
    """episodes of each setting and seed (default: the run's)"""
    cuda: bool = True
    """use the GPU where there is one"""
    output: str | None = None
    """csv and PNG get this path's stem (default: inference_scaling in the run directory)"""


def settings_of(options, base):
    """[(sweep, setting)] of a command line: the run's own settings `base` with one value changed; action noise also
    with one candidate.
    """
    settings = [(name, base | {name: value}) for name in SWEEPS for value in getattr(options, name)]
    cloning = [("action_noise", base | {"num_actions": 1, "action_noise": value}) for value in options.action_noise]
    return settings + cloning * (base["num_actions"] > 1)


def disturbed(agents, deviation):
    """The policy and its random numbers where the environment adds noise of this deviation to actions, and clips them.

    Returns:
        policy, draw_noise: see rollout.Evaluator. Without noise both give the run's own evaluation.
    """
    agent, A = agents.agent, agents.agent.action_dim

    def act(agent, observations, noise):
        actions = agent.act(observations, noise[:, :-A])  # (N, A)
        return (actions + deviation * noise[:, -A:]).clamp(-1, 1)

    def draw_noise(generator, num_steps):
        own = agent.draw_act_noise(generator, num_steps)  # first, so that the policy's numbers stay the same
        return torch.cat([own, torch.randn(num_steps, A, generator=generator)], dim=-1)

    return agents.function(act), draw_noise


def success_text(rows):
    """The mean success of one setting's rows with its interval, which one seed does not have."""
    return interval_text([100 * row["success"] for row in rows], ".1f", "%")


def draw(path, rows, base):
    """Saves the picture of the rows; `base` are the run's own settings, which the sweeps share."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3.2), layout="constrained")
    sweeps = [name for name in SWEEPS if any(row["sweep"] == name for row in rows)]
    panels = dict(zip(sweeps, figure.subplots(1, len(sweeps), sharey=True, squeeze=False)[0]))
    for name, axes in panels.items():
        chosen = [row for row in rows if row["sweep"] == name]
        for candidates in sorted({row["num_actions"] for row in chosen}) if name == "action_noise" else [None]:
            line = [row for row in chosen if candidates in (None, row["num_actions"])]
            values = sorted({row[name] for row in line})
            groups = [[100 * row["success"] for row in line if row[name] == value] for value in values]
            means, halves = np.nan_to_num([interval(group) for group in groups]).T  # no bar for one seed
            label = None if candidates is None else f"$N_\\pi$ = {candidates:g}"
            axes.errorbar(values, means, yerr=halves, marker="o", capsize=3, label=label)
            for value, group in zip(values, groups):
                axes.scatter([value] * len(group), group, color="grey", s=8, alpha=0.6)
        axes.axvline(base[name], color="grey", linestyle=":", linewidth=1)
        axes.set(xlabel=LABELS[name], ylim=(-3, 103))
        axes.grid(alpha=0.3)
    for name in {"num_actions", "num_returns"} & panels.keys():
        panels[name].set_xscale("log", base=2)
    for name in {"tau_q", "tau_r"} & panels.keys():
        panels[name].set_xscale("log")
    panels[sweeps[0]].set_ylabel("success (%)")
    if "action_noise" in panels:
        panels["action_noise"].legend(fontsize="small")
    others = ", ".join(f"{name} {value:g}" for name, value in base.items() if name != "action_noise")
    figure.suptitle(f"one checkpoint; dotted: the run's settings ({others})", fontsize="medium")
    figure.savefig(path, dpi=100)


def main(options):
    """Evaluates what has no rows yet, and draws the picture."""
    payload = checkpoint.load(options.run, "--run")
    args = arguments.stored_args(evor.Args, payload, f"--run {options.run}")
    above_zero = [name for name in (*SWEEPS, "episodes") if name != "action_noise"]
    arguments.check_numbers(options, above_zero, at_least_zero=["action_noise"])
    args = replace(args, eval_episodes=options.episodes or args.eval_episodes, capture_video=False)
    base = {name: getattr(args, name, 0.0) for name in SWEEPS}  # no run has action noise
    output = tables.output_path(options.output or Path(options.run) / "inference_scaling")
    csv_path, png_path = tables.beside(output, ".csv"), tables.beside(output, ".png")
    identity = {"run": Path(options.run).resolve().name}  # whose rows, in each of them
    stored = tables.stored_rows(
        csv_path, ("sweep", *SWEEPS), identity | {"step": payload["step"], "episodes": args.eval_episodes}
    )

    device = setup_torch(replace(args, cuda=options.cuda and torch.cuda.is_available(), matmul_precision=None))
    agents = policies.rebuild(evor.Agent, args, payload, device, options.run)
    seeds = list(range(args.seed, args.seed + args.num_seeds))
    evaluator = rollout.Evaluator(args, seeds, device, Path(options.run))
    rows, known = [], {key[1:]: value for key, value in stored.items()}
    for name, setting in tqdm(settings_of(options, base), unit=" settings"):
        key, start = tuple(setting.values()), time.perf_counter()
        if (name, *key) in stored:
            rows += stored[(name, *key)]
            continue
        if key not in known:  # the run's own settings are a point of every sweep
            agents.agent.args = replace(args, **{field: v for field, v in setting.items() if field != "action_noise"})
            played = evaluator(*disturbed(agents, setting["action_noise"]), payload["step"])
            known[key] = [{"sweep": name} | setting | row | identity for row in played]
        new = [row | {"sweep": name} for row in known[key]]
        rows += new
        stored[(name, *key)] = []  # a value that is given twice
        runs.append_rows(csv_path, new)
        tqdm.write(f"{name} {setting[name]:g}: success {success_text(new)} ({time.perf_counter() - start:.0f} s)")
    draw(png_path, rows, base)
    print(f"saved {csv_path} and {png_path}")


if __name__ == "__main__":
    main(tyro.cli(ScalingArgs, description=__doc__))
