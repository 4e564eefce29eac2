"""Trained policies as folders that can be passed on: written from a checkpoint, read without running a stranger's code.

A folder holds `policy.safetensors` (the weights that acting needs, each with a leading axis of seeds), `config.json`
(what else acting needs, where the weights come from and what they scored) and `README.md` (the same for people).
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch

from common import ROOT, checkpoint, curves, envs, fail, versions
from common.files import check_writable, written_whole

WEIGHTS, CONFIG, CARD = "policy.safetensors", "config.json", "README.md"
KEYS = {"algorithm": str, "args": dict, "agent_inputs": dict, "step": int, "dataset": dict, "evaluation": tuple}
# Arguments that say where and how a run was made on its machine; they are left out.
PRIVATE = set(
    "resume evaluate export export_seed runs_dir dataset_dir dataset_path track wandb_entity wandb_project_name "
    "eval_workers".split()
)


def write(directory, Agent, saved, rows, seed=None):
    """Writes a policy's folder, made if need be; files of the same names are replaced.

    A seed that the run does not have, a folder that holds something else, or one that cannot be written end the program
    with exit code 2.

    Args:
        Agent: the algorithm's; its `ACTS` names the networks that acting needs.
        saved: a checkpoint, or what `read` returned.
        rows: of an evaluation, {seed, success, episode_return, episode_length, episodes, ...} for each seed.
        seed: the one seed to write; None for all.
    """
    directory = Path(directory)
    seeds = check(directory, saved, seed)
    chosen = seeds if seed is None else [seed]
    index = [seeds.index(s) for s in chosen]
    acting = {name: value for name, value in saved["agent"].items() if name.split(".")[0] in Agent.ACTS}
    weights = {name: value[index].cpu().contiguous() for name, value in acting.items()}
    args = {name: value for name, value in saved["args"].items() if name not in PRIVATE}
    config = {"algorithm": saved["algorithm"], "module": module_path(Agent)}
    config |= {name: saved[name] for name in ("agent_inputs", "step", "dataset")}
    config["args"] = args | {"seed": chosen[0], "num_seeds": len(chosen)}
    config["evaluation"] = [row for row in rows if row["seed"] in chosen]
    config["versions"] = versions()
    text = json.dumps(config, indent=2)
    files = {WEIGHTS: safetensors.torch.save(weights), CONFIG: text.encode(), CARD: card(json.loads(text)).encode()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            with written_whole(directory / name) as file:
                file.write(content)
    except OSError as error:
        fail(f"could not write the policy to {directory}: {error}")


def module_path(Agent):
    """What Python imports an algorithm's file as: `floq`, `benchmarks.baselines.fql`."""
    path = Path(sys.modules[Agent.__module__].__file__).resolve().with_suffix("")  # the module's name may be __main__
    return ".".join(path.relative_to(ROOT).parts) if path.is_relative_to(ROOT) else path.name


def check(directory, saved, seed=None):
    """The seeds of a checkpoint; ends the program (exit code 2) where `write` would refuse the folder or the seed."""
    directory, args = Path(directory), saved["args"]
    seeds = list(range(args["seed"], args["seed"] + args["num_seeds"]))
    if seed is not None and seed not in seeds:
        fail(f"--export-seed {seed}: the run has seeds {seeds[0]} to {seeds[-1]}")
    check_writable(directory, "--export")
    others = [path for path in directory.glob("*") if path.suffix != ".part"]  # a killed write leaves such a file
    if others and not (directory / WEIGHTS).exists():
        fail(f"--export {directory}: the folder holds something else; name a new or an empty one")
    return seeds


def write_run(run_dir, Agent):
    """Writes the policy of a run's latest checkpoint to `policy/` in its directory, with that step's evaluation."""
    saved = checkpoint.load(run_dir)
    rows = [row for row in curves.read_evaluations(run_dir / "eval.csv") if row["step"] == saved["step"]]
    write(run_dir / "policy", Agent, saved, rows)


def read(directory):
    """A policy's folder as a checkpoint that holds nothing but what acting needs, on the CPU.

    Missing or damaged files, an unknown environment, or non-finite weights end the program with exit code 2.
    """
    with_tuples = lambda entries: {name: tuple(v) if isinstance(v, list) else v for name, v in entries.items()}
    try:
        path = Path(directory) / CONFIG
        config = json.loads(path.read_text(), object_hook=with_tuples)
        path = Path(directory) / WEIGHTS
        weights = safetensors.torch.load_file(path)
    except (OSError, ValueError, safetensors.SafetensorError) as error:  # errors of JSON and Unicode are ValueErrors
        fail(f"{path} cannot be read ({error}); export the policy again")
    wrong = [n for n, kind in KEYS.items() if not isinstance(config, dict) or not isinstance(config.get(n), kind)]
    wrong += [n for n in ("env_id", "seed", "num_seeds") if not wrong and n not in config["args"]]
    if wrong:
        fail(f"{directory}/{CONFIG} has no proper {', '.join(wrong)}; export the policy again")
    envs.check_env_id(str(config["args"]["env_id"]), f"{directory}/{CONFIG}: env_id")
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            fail(f"{path}: the weights {name} are not finite; export the policy again, from an earlier checkpoint")
    return config | {"agent": weights}


def read_any(directory, flag):
    """What `read` returns for a policy's folder, else the checkpoint of a run directory; `flag` is for messages."""
    return read(directory) if os.path.exists(Path(directory) / CONFIG) else checkpoint.load(directory, flag)


def card(config):
    """The model card of a folder, as markdown: policy_card.md with the entries of its config.json."""
    package, _, name = config.get("module", config["algorithm"]).rpartition(".")
    rows, scores = config["evaluation"], "This policy has not been evaluated."
    if rows:
        success = [100 * row["success"] for row in rows]
        spread = f" +- {np.std(success, ddof=1):.1f} (standard deviation over seeds)" if len(rows) > 1 else ""
        columns = ("seed", "success", "episode_return", "episode_length")
        lines = [f"Success: {np.mean(success):.1f}%{spread}, {rows[0]['episodes']} episodes per seed.", ""]
        lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(f"{row[column]:.4g}" for column in columns) + " |" for row in rows]
        scores = "\n".join(lines)
    text = Path(__file__).with_name("policy_card.md").read_text()
    return text.format(
        **config,
        name=name,
        scores=scores,
        importing=f"from {package} import {name}" if package else f"import {name}",
        program=f"python -m {package}.{name}" if package else f"python {name}.py",
        settings="\n".join(f"{key} = {value}" for key, value in config["args"].items()),
        packages=", ".join(f"{key} {value}" for key, value in config["versions"].items()),
    )
