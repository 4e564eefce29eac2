"""Trained policies: load one from a run or an exported folder, act with it, evaluate it with other episodes."""

from pathlib import Path

import numpy as np
import torch

from common import envs, export, fail, graphs, rollout, runs
from common.arguments import stored_args
from common.files import check_writable
from common.stacked import Stacked

always_act = lambda args, step: "act"  # the name of the method that acts, where an algorithm has one policy only


def rebuild(Agent, args, saved, device, directory):
    """The agents of a run's checkpoint or of an exported folder; the latter's have the networks that acting needs only.

    `args` are the arguments as trained, and `saved` is what export.read_any returned of the directory. Weights or a
    configuration that do not fit the algorithm end the program with exit code 2.
    """
    try:
        seeds = range(args.seed, args.seed + args.num_seeds)
        agents = Stacked(lambda: Agent(args, **saved["agent_inputs"]), seeds, device, args.learning_rate)
        if "optimizer" not in saved:  # an exported folder
            agents.keep(Agent.ACTS)
        agents.load_state_dict(saved)
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        fail(f"{directory}: its weights and its configuration do not fit {saved['algorithm']}.py ({reason})")
    return agents


class Policy:
    """A trained policy of one seed, on the CPU: the agents, of common/stacked.py, act by the method of this name.

    `args` are the run's arguments, `args.env_id` the environment. The `generator` is of the random numbers that a
    stochastic policy draws; `generator.manual_seed(n)` repeats them.
    """

    def __init__(self, agents, method, args):
        self.agents, self.args = agents, args
        self.policy, self.generator = agents.function(method), torch.Generator().manual_seed(0)

    def act(self, observation):
        """Draws an action for an observation: (D,) -> (A,), or of N at once (N, D) -> (N, A), in [-1, 1], as numpy.

        Observations of images are stacks of frames, (H, W, channels) each, of `envs.make_env(..., frame_stack=3)`.
        """
        agent, observation = self.agents.agent, np.asarray(observation)
        single = observation.ndim == (3 if envs.is_pixels(self.args.env_id) else 1)
        observations = torch.as_tensor(observation[None] if single else observation)
        observations = observations if observations.dtype == torch.uint8 else observations.float()
        noise = agent.draw_act_noise(self.generator, len(observations))
        actions = self.policy(observations[None], noise[None])[0].numpy()  # (N, A)
        return actions[0] if single else actions


def load(Agent, Args, directory, seed=None, acting=always_act):
    """The policy of a run directory or of an exported folder; it needs neither a dataset nor a GPU.

    Another algorithm's folder, a seed that it does not hold, and what `export.read_any` and `rebuild` refuse end the
    program with exit code 2.

    Args:
        seed: which of the seeds that were trained side by side; None for the first.
        acting: function (args, step) of the name of the agent's method that acts.
    """
    saved = export.read_any(directory, "load:")
    args = stored_args(Args, saved, directory)
    agents = rebuild(Agent, args, saved, torch.device("cpu"), directory)
    seed = args.seed if seed is None else seed
    if not args.seed <= seed < args.seed + args.num_seeds:
        fail(f"{directory} has seeds {args.seed} to {args.seed + args.num_seeds - 1}, not {seed}")
    return Policy(agents.only(seed - args.seed), acting(args, saved["step"]), args)


def evaluate(Agent, args, saved, inference, device, acting=always_act):
    """Evaluates a run or an exported folder anew (`--evaluate`), and exports its policy (`--export`).

    The same `--seed` and step make the same episodes as in training. A row per seed is added to inference.csv in the
    directory: the settings that may differ, the seed of the episodes, eval.csv's columns. If inference.csv has other
    settings, or the export is refused, the program ends before the evaluation, with exit code 2.

    Args:
        Agent, saved, device, acting: see `rebuild` and `load`.
        args: of this program: `evaluate` is the directory, `seed` the episodes' first.
        inference: names of the settings that --evaluate may change.
    """
    directory, step = Path(args.evaluate), saved["step"]
    check_writable(directory, "--evaluate")  # inference.csv and videos go there
    if args.export is not None:
        export.check(args.export, saved, args.export_seed)  # before the evaluation, which takes long
    path, columns = directory / "inference.csv", ",".join([*inference, "episodes_seed"])
    text = path.read_text() if path.exists() else ""
    if text and not text.startswith(columns + ","):  # a full disk leaves an empty file
        fail(f"{path} does not begin with {columns}: it is of another version of {saved['algorithm']}.py; move it away")
    agents = rebuild(Agent, args, saved, device, directory)
    settings = {name: getattr(args, name) for name in inference}
    episode_seeds = list(range(args.seed, args.seed + args.num_seeds))  # one for each agent
    first = saved["args"]["seed"]
    changed = "".join(f"-{name}-{value}" for name, value in settings.items() if value != saved["args"].get(name))
    videos = [f"seed{first + i}-episodes{seed}{changed}" for i, seed in enumerate(episode_seeds)]  # not the training's
    evaluator = rollout.Evaluator(args, episode_seeds, device, directory, videos)
    policy = graphs.FastPolicy(agents, acting(args, step), args.cudagraphs)
    rows = evaluator(policy, agents.agent.draw_act_noise, step)
    rows = [settings | {"episodes_seed": row["seed"]} | row | {"seed": first + i} for i, row in enumerate(rows)]
    for row in rows:
        chosen = f", {settings}" if settings else ""
        print(f"seed {row['seed']}: success {row['success']:.2f} at step {step}{chosen}", flush=True)
    runs.append_rows(path, rows)
    if args.capture_video:
        print(f"videos: {directory}/videos")
    if args.export is not None:
        export.write(args.export, Agent, saved | {"args": saved["args"] | settings}, rows, args.export_seed)
        print(f"policy: {args.export}")
