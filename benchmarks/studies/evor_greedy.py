"""Why EVOR's greedy end fails: the same checkpoint's candidates, chosen by ratings of different quality.

    python -m benchmarks.studies.evor_greedy --run runs/RUN_DIR     # a run of several seeds
    python -m benchmarks.studies.evor_greedy --run runs/RUN_DIR --policies own --num-actions 2 4 8 16

Nothing is trained. Policies that differ in the choice among the same candidates alone:

    own          the best by the run's own return fields
    seeds_mean   the best by the mean rating of all seeds' fields, whose errors differ
    untrained    the best by fields as they were initialised: ratings without meaning, but the same at each visit
    tempered     the run's own choice, softmax(Q / tau_Q)
    cloning      any candidate

Two explanations are told apart. If the fields' errors differ between seeds, two seeds' ratings of the same candidates
agree little, and `seeds_mean` is better than `own`. If a preference that is the same at each visit carries the arm away
from the data, whatever it prefers, then `untrained` is worse than `cloning`, and few candidates (`--num-actions 2`: a
mild preference) are better than many.

At states of the cloning episodes it also measures, over the candidates of one state: the spread of the ratings, the
correlation of two seeds' ratings (1: they agree), the correlation of a rating with the candidate's distance from the
candidates' mean (above 0: unusual actions are preferred), and how equal the preferred direction is in all these states
(1: the same everywhere). Writes OUTPUT.csv, one row per policy and seed as it goes, and OUTPUT_ratings.csv, of the last
cloning episodes. A policy whose rows are there already is not evaluated again.
"""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

import evor
from benchmarks import tables
from common import arguments, checkpoint, fail, policies, rollout, runs
from common.device import setup_torch
from common.stacked import Stacked

KEEP_EVERY = 20  # steps between the states at which ratings are compared


@dataclass
class GreedyArgs:
    run: str  # run directory of evor.py
    episodes: int = 50  # episodes per policy and seed
    num_actions: tuple[int, ...] = ()  # numbers of candidates (default: the run's)
    policies: tuple[str, ...] = ("cloning", "untrained", "own", "seeds_mean", "tempered")  # which, see above
    cuda: bool = True  # use the GPU where there is one
    output: str | None = None  # csv files get this path's stem (default: greedy in the run directory)


def make_ratings(agents):
    """Function of (observations (S, N, D), actions (S, N, C, A), noise (S, N, R)): each agent's ratings (S, N, C)."""
    return agents.function("ratings")


def by_all_seeds(ratings):
    """Ratings of every seed's candidates by every seed's fields: like `ratings`, with an axis of the S raters in front.

    Seed s' candidates are rated by the fields of seed s + k, for k = 0..S - 1, by turning the candidates round.
    """

    def rate(observations, actions, noise):
        S = len(observations)
        turned = lambda x, k: x.roll(k, 0)
        each = [turned(ratings(*(turned(x, k) for x in (observations, actions, noise))), -k) for k in range(S)]
        return torch.stack(each)  # (S raters, S, N, C)

    return rate


def make_policy(name, agents, untrained):
    """The named policy of all seeds: (observations (S, N, D), noise (S, N, C A + C + R)) -> actions (S, N, A)."""
    agent, act = agents.agent, agents.function("act")
    if name == "tempered":
        return act
    C, A, R = agent.args.num_actions, agent.action_dim, agent.args.num_returns
    flow_actions = agents.function("flow_actions")
    rate = {
        "own": make_ratings(agents),
        "untrained": make_ratings(untrained),
        "seeds_mean": lambda *inputs: by_all_seeds(make_ratings(agents))(*inputs).mean(dim=0),
        "cloning": lambda observations, actions, noise: torch.zeros(actions.shape[:-1], device=actions.device),
    }[name]

    def policy(observations, noise):
        action_noise, _, return_noise = noise.split([C * A, C, R], dim=-1)
        actions = flow_actions(observations, action_noise.unflatten(-1, (C, A)))  # (S, N, C, A)
        best = rate(observations, actions, return_noise).argmax(dim=-1)  # (S, N)
        return actions.gather(2, best[..., None, None].expand(-1, -1, -1, A)).squeeze(2)

    return policy


def recording(policy, visited):
    """The policy, which also adds the states of each KEEP_EVERY-th step to `visited`, a list for each seed.

    Slots whose episodes have ended are left out: their observations are old ones (and their noise is zero, see
    rollout.Evaluator).
    """
    steps = itertools.count()

    def watched(observations, noise):
        if next(steps) % KEEP_EVERY == 0:
            for of_seed, states, playing in zip(visited, observations, noise.any(dim=-1)):
                of_seed.append(states[playing])  # (n, D), a copy: the evaluator writes over its observations
        return policy(observations, noise)

    return watched


def compare_ratings(agents, observations, generator):
    """Spread and agreement of ratings over the candidates of single states.

    Args:
        agents: of S seeds.
        observations: (S, N, D).
        generator: of the candidates' and return samples' noise.

    Returns:
        {seed index: {spread: mean over states of the ratings' standard deviation over candidates; correlation: mean
        correlation of the own fields' ratings with another seed's, NaN for one seed; with_distance: mean correlation
        of ratings with the candidate's distance from the candidates' mean; same_direction: length of the mean over
        states of the unit vectors from the candidates' mean to the best candidate}}. A state whose ratings are all
        equal counts as correlation 0.
    """
    agent, (S, N, _) = agents.agent, observations.shape
    noise = torch.stack([agent.draw_act_noise(generator, N) for _ in range(S)])  # (S, N, C A + C + R)
    C, A, R = agent.args.num_actions, agent.action_dim, agent.args.num_returns
    action_noise, _, return_noise = noise.split([C * A, C, R], dim=-1)
    actions = agents.function("flow_actions")(observations, action_noise.unflatten(-1, (C, A)))
    q = by_all_seeds(make_ratings(agents))(observations, actions, return_noise)  # (S raters, S, N, C)
    centred = q - q.mean(dim=-1, keepdim=True)
    unit = centred / centred.norm(dim=-1, keepdim=True).clamp(min=1e-9)
    correlation = (unit[0] * unit[1:]).sum(dim=-1).mean(dim=(0, 2)) if S > 1 else torch.full((S,), torch.nan)  # (S,)
    offsets = actions - actions.mean(dim=2, keepdim=True)  # (S, N, C, A)
    distance = offsets.norm(dim=-1)  # (S, N, C)
    distance = distance - distance.mean(dim=-1, keepdim=True)
    with_distance = (unit[0] * distance / distance.norm(dim=-1, keepdim=True)).sum(dim=-1).mean(dim=-1)  # (S,)
    best = offsets.gather(2, q[0].argmax(dim=-1)[..., None, None].expand(-1, -1, -1, A)).squeeze(2)  # (S, N, A)
    columns = {
        "spread": q[0].std(dim=-1).mean(dim=-1),
        "correlation": correlation,
        "with_distance": with_distance,
        "same_direction": (best / best.norm(dim=-1, keepdim=True)).mean(dim=1).norm(dim=-1),
    }
    return {s: {name: value[s].item() for name, value in columns.items()} for s in range(S)}


def store_ratings(path, agents, visited, seeds, step):
    """Compares ratings at the states `visited`, see `recording`, and writes and prints a row per seed."""
    states = [torch.cat(of_seed) for of_seed in visited]
    N = min(512, *map(len, states))
    observations = torch.stack([of_seed[:N] for of_seed in states])  # (S, N, D)
    generator = torch.Generator(observations.device).manual_seed(0)
    compared = compare_ratings(agents, observations, generator)
    tables.write(path, [{"step": step, "seed": seeds[s]} | row for s, row in compared.items()])
    for s, row in compared.items():
        tqdm.write(f"seed {seeds[s]}: " + ", ".join(f"{column} {value:.2f}" for column, value in row.items()))


if __name__ == "__main__":
    options = tyro.cli(GreedyArgs, description=__doc__)
    known = GreedyArgs.policies
    if set(options.policies) - set(known):
        fail(f"--policies {' '.join(options.policies)}: known are {', '.join(known)}")
    if min((options.episodes, *options.num_actions)) < 1:
        fail("--episodes and --num-actions must be above zero")
    saved = checkpoint.load(options.run, "--run")
    args = arguments.stored_args(evor.Args, saved, f"--run {options.run}")
    args = replace(args, eval_episodes=options.episodes, capture_video=False)
    output = tables.output_path(options.output or Path(options.run) / "greedy")
    csv_path = tables.beside(output, ".csv")
    run = {"run": Path(options.run).resolve().name}  # whose rows, in each of them
    identity = run | {"step": saved["step"], "episodes": options.episodes}
    stored = tables.stored_rows(csv_path, ("policy", "num_actions"), identity)
    device = setup_torch(replace(args, cuda=options.cuda and torch.cuda.is_available(), matmul_precision=None))
    seeds = list(range(args.seed, args.seed + args.num_seeds))
    agents = policies.rebuild(evor.Agent, args, saved, device, options.run)
    other_seeds = [1000 + seed for seed in seeds]
    untrained = Stacked(lambda: evor.Agent(args, **saved["agent_inputs"]), other_seeds, device, args.learning_rate)
    evaluator = rollout.Evaluator(args, seeds, device, Path(options.run))
    numbers = options.num_actions or (args.num_actions,)
    for name, number in tqdm(list(itertools.product(options.policies, numbers)), unit=" policies"):
        if (name, number) in stored:
            continue
        agents.agent.args, visited = replace(args, num_actions=number), [[] for _ in seeds]
        policy = make_policy(name, agents, untrained)
        policy = recording(policy, visited) if name == "cloning" else policy
        rows = evaluator(policy, agents.agent.draw_act_noise, saved["step"])
        if name == "cloning":  # before its rows: where those are stored, nothing is missing
            agents.agent.args = args
            store_ratings(output.with_name(output.name + "_ratings.csv"), agents, visited, seeds, saved["step"])
        rows = [{"policy": name, "num_actions": number} | row | run for row in rows]
        runs.append_rows(csv_path, rows)
        stored[name, number] = rows
        success = " ".join(f"{row['success']:.2f}" for row in rows)
        tqdm.write(f"{name}, {number} candidates: success {success}")
    print(f"saved {csv_path}")
