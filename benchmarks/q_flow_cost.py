"""What an update of Q-Flow costs beside other ways to improve a policy, with the same networks on the same machine.

    python -m benchmarks.q_flow_cost                      # published sizes, this machine's default device
    python -m benchmarks.q_flow_cost --output benchmarks/results/q_flow_cost.csv

    q_flow        q_flow.py's update: values on the latents, guidance, two roll-outs of the flow without gradients
    actor_critic  no flow at all: TD with a one-step policy's action, and alpha * squared distance to the data - Q
    one_step      FQL: that, distilled from a cloning flow that is trained beside it and integrated without gradients
    backprop      TD with the flow's action, and the flow improved by -Q of its end point through every Euler step

All have q_flow.py's critics (two, 4 x 512) and policy networks (4 x 512), batch 256, 10 Euler steps, one Adam. Updates are
timed in turn (q_flow, actor_critic, ..., q_flow, ...), so that a busy machine slows all alike. Medians.
"""

import csv
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import q_flow
from benchmarks import toy_2d
from common import fail, graphs
from common.device import setup_torch

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
    output: Optional[str] = None
    """csv file for the table"""


class Baseline(torch.nn.Module):
    """The other three: an agent's critics and flow, and a one-step policy mu(s, n)."""

    def __init__(self, kind, args, seeds):
        super().__init__()
        self.kind, self.args = kind, args
        self.agent = q_flow.Agent(args, OBS_DIM, ACTION_DIM, seeds, -1.0, 0.0)
        dims = (OBS_DIM + ACTION_DIM, *args.actor_hidden_dims, ACTION_DIM)
        self.one_step = q_flow.MLP((len(seeds),), dims, args.actor_layer_norm)
        q_flow.init_weights(self, seeds)

    def make_optimizer(self):
        """One Adam over the networks that this kind trains."""
        policies = {"actor_critic": [self.one_step], "one_step": [self.one_step, self.agent.actor_flow]}
        trained = [self.agent.critic, *policies.get(self.kind, [self.agent.actor_flow])]
        parameters = [p for network in trained for p in network.parameters()]
        self.optimizer = torch.optim.Adam(
            parameters, lr=self.args.learning_rate, fused=True, capturable=parameters[0].is_cuda
        )

    def policy(self, observations, noise):
        """The action that is improved: of the flow for `backprop`, else of the one-step policy."""
        if self.kind == "backprop":
            return toy_2d.solve(self.agent, observations, noise)
        return self.one_step(torch.cat([observations, noise], dim=-1)).clamp(-1, 1)

    def update(self, batch, noise):
        """One update; as in q_flow.py, the EMA comes before Adam's step."""
        agent, args = self.agent, self.args
        observations, actions, next_observations = batch["observations"], batch["actions"], batch["next_observations"]
        self.optimizer.zero_grad()
        with torch.no_grad():
            next_actions = self.policy(next_observations, noise["next_action"])
            next_q = agent.q_values(agent.target_critic, next_observations, next_actions).mean(dim=1)  # (S, B)
            target = batch["rewards"] + args.gamma * batch["masks"] * next_q  # (S, B)
        q = agent.q_values(agent.critic, observations, actions)  # (S, E, B)
        (q - target.unsqueeze(1)).square().mean(dim=(1, 2)).sum().backward()

        loss = 0 if self.kind == "actor_critic" else toy_2d.flow_matching(agent, batch, noise)
        made = self.policy(observations, noise["value_action"])
        if self.kind != "backprop":
            with torch.no_grad():
                goal = actions
                if self.kind == "one_step":
                    goal = toy_2d.solve(agent, observations, noise["value_action"])
            loss = loss + args.alpha * (made - goal).square().mean(dim=(1, 2))
        loss = loss - toy_2d.mean_q(agent, batch, made)
        loss.sum().backward()
        with torch.no_grad():
            targets, online = list(agent.target_critic.parameters()), list(agent.critic.parameters())
            torch._foreach_lerp_(targets, online, args.tau)
        self.optimizer.step()
        return {"loss": loss.detach()}


def measure(options):
    """Times all four in turn; returns rows {method, gflop, seconds, quartiles, ratio of q_flow's time to it}."""
    args = q_flow.Args(**(q_flow.QUICK if options.quick else q_flow.TUNED["scene-play"]))
    args = replace(args, num_seeds=options.num_seeds)
    device = setup_torch(replace(args, cuda=options.cuda and torch.cuda.is_available()))
    seeds = list(range(options.num_seeds))
    models = {"q_flow": q_flow.Agent(args, OBS_DIM, ACTION_DIM, seeds, -1.0, 0.0)}
    models |= {kind: Baseline(kind, args, seeds) for kind in ("actor_critic", "one_step", "backprop")}
    generator, S, B = torch.Generator(device).manual_seed(0), options.num_seeds, args.batch_size
    normal = lambda *shape: torch.randn(S, B, *shape, generator=generator, device=device)
    batch = {"observations": normal(OBS_DIM), "next_observations": normal(OBS_DIM)}
    batch |= {"actions": normal(ACTION_DIM).clamp(-1, 1), "rewards": -normal().abs(), "masks": normal().abs().sign()}
    noise = {name: torch.stack([value[0]] * S) for name, value in models["q_flow"].draw_noise(generator, 1).items()}
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    updates, gflop, seconds = {}, {}, {name: [] for name in models}
    for name, model in models.items():
        model.to(device).make_optimizer()
        split = lambda inputs, model=model: model.update(
            {key: inputs[key] for key in batch}, {key: inputs[key] for key in noise}
        )
        with FlopCounterMode(display=False) as counter:
            split(batch | noise)
        gflop[name] = counter.get_total_flops() / 1e9
        state = [*model.parameters(), *(v for s in model.optimizer.state.values() for v in s.values())]
        updates[name] = graphs.capture(split, batch | noise, state)
        for _ in range(2):
            updates[name](batch | noise)
    for _ in tqdm(range(options.repeats), desc="timing", unit=" rounds"):
        for name, update in updates.items():
            synchronize()
            start = time.perf_counter()
            update(batch | noise)
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
    table = measure(options)
    for row in table:
        print(
            f"{row['method']:>13}: {row['gflop']:6.1f} GFLOP  {1000 * row['seconds']:7.1f} ms "
            f"({1000 * row['low']:.1f}-{1000 * row['high']:.1f})  q_flow takes {row['q_flow_is']:.2f} times as long"
        )
    if options.output:
        with open(Path(options.output), "w", newline="") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)
