"""What an update of Q-Flow costs beside other ways to improve a policy, with the same networks on the same machine.

    python -m benchmarks.studies.q_flow_cost                      # published sizes, this machine's default device
    python -m benchmarks.studies.q_flow_cost --output benchmarks/results/q_flow_cost.csv

    q_flow        q_flow.py's update: values on the latents, guidance, two roll-outs of the flow without gradients
    actor_critic  no flow at all: TD with a one-step policy's action, and alpha * squared distance to the data - Q
    one_step      FQL: that, distilled from a cloning flow that is trained beside it and integrated without gradients
    backprop      TD with the flow's action, and the flow improved by -Q of its end point through every Euler step

All have q_flow.py's critics (two, 4 x 512) and policy networks (4 x 512), batch 256, 10 Euler steps, one Adam. Updates
are timed in turn (q_flow, actor_critic, ..., q_flow, ...), so that a busy machine slows all alike. Medians.
"""

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import q_flow
from benchmarks import tables
from benchmarks.studies import toy_2d
from common import fail, graphs
from common.device import setup_torch
from common.stacked import Stacked

OBS_DIM, ACTION_DIM = 28, 5  # cube-single's


@dataclass
class CostArgs:
    repeats: int = 15
    """timed updates of each"""
    num_seeds: int = 1
    """agents trained side by side"""
    cuda: bool = True
    """measure the GPU where there is one"""
    quick: bool = False
    """measure at the sizes of --quick instead"""
    output: str | None = None
    """csv file for the table"""


class Baseline(toy_2d.Study):
    """The critic's loss and the policy losses of the other three, for transitions of many steps."""

    def policy(self, observations, noise):
        """The action that is improved: of the flow for `backprop`, else of the one-step policy."""
        if self.kind == "backprop":
            return self.solve(observations, noise)
        return self.one_step_action(observations, noise).clamp(-1, 1)

    def td(self, batch, noise):
        """The critic's regression on r + gamma mask Q(s', a')."""
        with torch.no_grad():
            next_actions = self.policy(batch["next_observations"], noise["next_action"])
            next_q = self.q_values(self.target_critic, batch["next_observations"], next_actions).mean(dim=0)  # (B,)
            target = batch["rewards"] + self.args.gamma * batch["masks"] * next_q  # (B,)
        q = self.q_values(self.critic, batch["observations"], batch["actions"])  # (E, B)
        return (q - target).square().mean(), {}

    def actor_critic(self, batch, noise):
        """TD3+BC's: squared distance to the data's action - Q."""
        made = self.policy(batch["observations"], noise["value_action"])
        return self.args.alpha * (made - batch["actions"]).square().mean() - self.mean_q(batch, made), {}


class ActorCritic(Baseline):
    kind = "actor_critic"
    losses = {"td": ("critic",), "actor_critic": ("one_step",)}


class OneStep(Baseline):
    kind = "one_step"
    losses = {"td": ("critic",), "cloning": ("actor_flow",), "improved_one_step": ("one_step",)}


class Backprop(Baseline):
    kind = "backprop"
    losses = {"td": ("critic",), "backprop": ("actor_flow",)}


def update(agents, batch, noise):
    """One update; as in q_flow.py, the EMA comes before Adam's step."""
    agents.optimizer.zero_grad()
    for loss, trains in agents.agent.losses.items():
        agents.backward(loss, batch, noise, trains)
    agents.ema("target_critic", "critic", agents.agent.args.tau)
    agents.optimizer.step()
    return {}


def measure(options):
    """Times all four in turn; returns rows {method, gflop, seconds, quartiles, ratio of q_flow's time to it}."""
    args = q_flow.Args(**(q_flow.QUICK if options.quick else q_flow.TUNED["scene-play"]))
    args = replace(args, num_seeds=options.num_seeds)
    device = setup_torch(replace(args, cuda=options.cuda and torch.cuda.is_available()))
    seeds = list(range(options.num_seeds))
    stack = lambda make_agent: Stacked(make_agent, seeds, device, args.learning_rate)
    models = {"q_flow": stack(lambda: q_flow.Agent(args, OBS_DIM, ACTION_DIM, -1.0, 0.0))}
    for kind in (ActorCritic, OneStep, Backprop):
        models[kind.kind] = stack(lambda kind=kind: kind(args, OBS_DIM, ACTION_DIM))
    generator, S, B = torch.Generator(device).manual_seed(0), options.num_seeds, args.batch_size
    normal = lambda *shape: torch.randn(S, B, *shape, generator=generator, device=device)
    batch = {"observations": normal(OBS_DIM), "next_observations": normal(OBS_DIM)}
    batch |= {"actions": normal(ACTION_DIM).clamp(-1, 1), "rewards": -normal().abs(), "masks": normal().abs().sign()}
    noise = models["q_flow"].agent.draw_noise(generator, 1)
    noise = {name: torch.stack([value[0]] * S) for name, value in noise.items()}
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    updates, gflop, seconds = {}, {}, {name: [] for name in models}
    for name, agents in models.items():
        step = q_flow.update if name == "q_flow" else update
        split = lambda inputs, agents=agents, step=step: step(
            agents, {key: inputs[key] for key in batch}, {key: inputs[key] for key in noise}
        )
        with FlopCounterMode(display=False) as counter:
            split(batch | noise)
        gflop[name] = counter.get_total_flops() / 1e9
        on_gpu = device.type == "cuda"
        updates[name] = graphs.capture(split, batch | noise, agents.state_tensors()) if on_gpu else split
        for _ in range(2):
            updates[name](batch | noise)
    for _ in tqdm(range(options.repeats), desc="timing", unit=" rounds"):
        for name, timed in updates.items():
            synchronize()
            start = time.perf_counter()
            timed(batch | noise)
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, times in seconds.items():
        low, median, high = statistics.quantiles(times, n=4)
        ratio = statistics.median(a / b for a, b in zip(seconds["q_flow"], times))
        row = {"method": name, "gflop": round(gflop[name], 2), "seconds": round(median, 5), "low": round(low, 5)}
        rows.append(row | {"high": round(high, 5), "q_flow_is": round(ratio, 2)})
    return rows


if __name__ == "__main__":
    options = tyro.cli(CostArgs, description=__doc__)
    if options.repeats < 2 or options.num_seeds < 1:
        fail("--repeats must be at least 2, --num-seeds at least 1")
    if options.output:
        if Path(options.output).is_dir():
            fail(f"--output {options.output} is a directory; name a csv file")
        tables.output_path(options.output)
    table = measure(options)
    for row in table:
        print(
            f"{row['method']:>13}: {row['gflop']:6.1f} GFLOP  {1000 * row['seconds']:7.1f} ms "
            f"({1000 * row['low']:.1f}-{1000 * row['high']:.1f})  q_flow takes {row['q_flow_is']:.2f} times as long"
        )
    if options.output:
        tables.write(options.output, table)
