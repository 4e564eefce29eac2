"""Seconds, floating-point operations and efficiency of one update at the published size.

    python -m benchmarks.speed --algorithm floq                 # on this machine's default device
    python -m benchmarks.speed --algorithm value_flows --compile --num-seeds 4 --json
    python -m benchmarks.speed --algorithm floq --evaluation --num-seeds 3

Efficiency = operations / seconds / the device's float32 matrix-product rate, which is measured between the updates, so
that a busy machine slows both. Medians over the repeats, with the quartiles.
"""

import importlib
import json
import resource
import statistics
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from common import datasets, graphs, rollout, runs

OBS_DIM, ACTION_DIM = 28, 5  # cube-single's


@dataclass
class SpeedArgs:
    algorithm: Literal["floq", "value_flows", "q_flow", "evor"] = "floq"
    """file to measure"""
    num_seeds: int = 1
    """agents trained side by side"""
    cuda: bool = True
    """measure the GPU where there is one"""
    compile: bool = False
    """compile the losses"""
    cudagraphs: bool = True
    """capture the update in a CUDA graph (on a GPU)"""
    repeats: int = 15
    """timed updates"""
    quick: bool = False
    """measure at the sizes of --quick instead"""
    evaluation: bool = False
    """time an evaluation of 50 cube-single episodes a seed instead (untrained policies: full-length episodes)"""
    json: bool = False
    """print one line of JSON"""


def measure(options):
    """Times updates on random data; returns a dictionary of figures."""
    algorithm = importlib.import_module(options.algorithm)
    args = replace(algorithm.Args(), num_seeds=options.num_seeds, cuda=options.cuda)
    args = replace(args, **algorithm.QUICK) if options.quick else args
    device = runs.setup_torch(replace(args, cuda=options.cuda and torch.cuda.is_available()))
    seeds = list(range(options.num_seeds))
    S, B = options.num_seeds, args.batch_size
    agent = algorithm.Agent(args, OBS_DIM, ACTION_DIM, seeds, -1.0, 0.0).to(device)
    agent.make_optimizer()
    generator = torch.Generator(device).manual_seed(0)
    N = 10_000
    draw = lambda *shape: torch.rand(*shape, generator=generator, device=device)
    dataset = {
        "observations": draw(N, OBS_DIM),
        "next_observations": draw(N, OBS_DIM),
        "actions": draw(N, ACTION_DIM) * 2 - 1,
    }
    dataset |= {"rewards": -torch.ones(N, device=device), "masks": torch.ones(N, device=device)}
    chunk = runs.draw_chunk(agent, args, seeds, N, 0, device)
    update = lambda inputs: agent.update(datasets.gather(dataset, None, inputs), inputs)
    inputs = lambda i: {name: value[i % runs.CHUNK] for name, value in chunk.items()}

    with FlopCounterMode(display=False) as counter:
        update(inputs(0))
    start = time.perf_counter()
    if options.compile:
        agent.critic_loss, agent.actor_loss = torch.compile(agent.critic_loss), torch.compile(agent.actor_loss)
    update = graphs.capture(update, inputs(0), agent.state_tensors(), options.cudagraphs)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for i in range(3):
        update(inputs(i))
    synchronize()
    warm_up = time.perf_counter() - start

    a, b = draw(2 * S, 8 * B, 512), draw(2 * S, 512, 512)
    seconds, matmul_seconds = [], []
    for i in range(options.repeats):
        start = time.perf_counter()
        update(inputs(i))
        synchronize()
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        for _ in range(4):
            torch.bmm(a, b)
        synchronize()
        matmul_seconds.append((time.perf_counter() - start) / 4)
    low, median, high = statistics.quantiles(seconds, n=4)
    rate = 2 * a.numel() * 512 / statistics.median(matmul_seconds)
    gigaflop = counter.get_total_flops() / 1e9
    peak = (
        torch.cuda.max_memory_allocated()
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return {
        "algorithm": options.algorithm,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "num_seeds": S,
        "compile": options.compile,
        "cudagraphs": options.cudagraphs and device.type == "cuda",
        "seconds_per_update": round(median, 5),
        "quartiles": [round(low, 5), round(high, 5)],
        "seed_updates_per_second": round(S / median, 3),
        "gflop_per_update": round(gigaflop, 2),
        "matmul_gflops": round(rate / 1e9, 1),
        "efficiency": round(gigaflop * 1e9 / median / rate, 3),
        "warm_up_seconds": round(warm_up, 1),
        "peak_memory_gib": round(peak / 2**30, 2),
    }


def measure_evaluation(options):
    """Seconds to start the evaluation workers, and of each of three evaluations."""
    algorithm = importlib.import_module(options.algorithm)
    args = algorithm.Args(env_id="cube-single-play-singletask-v0")
    device = runs.setup_torch(replace(args, cuda=options.cuda and torch.cuda.is_available()))
    seeds = list(range(options.num_seeds))
    agent = algorithm.Agent(args, OBS_DIM, ACTION_DIM, seeds, -1.0, 0.0).to(device)
    marks = [time.perf_counter()]
    workers = rollout.start_workers(args.env_id, options.num_seeds, args.eval_episodes)
    marks.append(time.perf_counter())
    for step in range(3):
        rollout.evaluate(workers, agent.act, agent.draw_act_noise, seeds, args.eval_episodes, step, device)
        marks.append(time.perf_counter())
    rollout.stop_workers(workers)
    start, *evaluations = [round(b - a, 1) for a, b in zip(marks, marks[1:])]
    return {"num_seeds": options.num_seeds, "start_seconds": start, "evaluation_seconds": evaluations}


if __name__ == "__main__":
    options = tyro.cli(SpeedArgs, description=__doc__)
    figures = measure_evaluation(options) if options.evaluation else measure(options)
    print(json.dumps(figures) if options.json else "\n".join(f"{name:>24}: {value}" for name, value in figures.items()))
