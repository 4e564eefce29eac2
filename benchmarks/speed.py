"""Updates per second, operations and efficiency of the algorithms, each setting in turn with the plain eager version.

    python -m benchmarks.speed                                          # all four, 1 and 8 seeds, published sizes
    python -m benchmarks.speed --algorithms floq --num-seeds 1 --quick  # one setting, at the sizes of --quick
    python -m benchmarks.speed --algorithms fql c51 iqn                 # the baselines
    python -m benchmarks.speed --store                                  # also results/speed_MACHINE.csv and .png
    python -m benchmarks.speed --check                                  # exit code 1 below a stored efficiency
    python -m benchmarks.speed --profile --quick                        # where the time of an update goes
    python -m benchmarks.speed --against-one-seed --quick --num-seeds 8 # stacked seeds and one seed, in turn
    python -m benchmarks.speed --compare --repeats 100                  # how far updates are from plain eager ones
    python -m benchmarks.speed --evaluation --num-seeds 3               # time evaluations instead

Every setting is a process of its own. It times A B M A B M ...: an update of the setting, one of the same algorithm
without compile, graph or reduced precision, and a float32-sized matrix product at the setting's precision (on a GPU
bursts of 20 updates, since a training run does not wait for each). Efficiency = operations (counted by torch) / seconds
/ the rate of that product, so that a busy machine slows both. Medians after a warm-up, with quartiles; speed-up =
median of the ratios of neighbours. Start (warm_up_seconds) = the time to make the agents and of three updates, the
first of which may wait for the compiler.
"""

import contextlib
import importlib
import itertools
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks import tables
from common import fail, graphs, num_cores, rollout, runs, warn
from common.device import setup_torch
from common.draws import CHUNK, Draws
from common.replay import Replay
from common.stacked import Stacked
from common.workers import Workers

ALGORITHMS = ("floq", "value_flows", "q_flow", "evor")
OBS_DIM, ACTION_DIM = 28, 5  # cube-single's
RESULTS = Path(__file__).parent / "results"
TOLERANCE = 0.85  # --check: efficiency may fall to this share of the stored one
SETTING = ("machine", "size", "algorithm", "num_seeds", "precision", "variant")  # what names a row
VARIANTS = {  # (compile, cudagraphs)
    "eager": (False, False),
    "compile": (True, False),
    "graph": (False, True),
    "compile+graph": (True, True),
}
GROUPS = {  # what a profile's events are, by their names: operations on the CPU, kernels on a GPU; the first that fits
    "products": "^aten::(bmm|mm|addmm)$|gemm|gemv|cutlass|xmma|nvjet",
    "compiled loops": "CompiledFxGraph|triton",
    "Adam": "adam",
    "copies": "copy|memcpy|memset|clone|::cat$|::fill_",
    "the rest": "",
}


@dataclass
class SpeedArgs:
    algorithms: tuple[Literal["floq", "value_flows", "q_flow", "evor", "fql", "c51", "iqn"], ...] = ALGORITHMS
    """files to measure; fql, c51 and iqn are those of benchmarks/baselines"""
    num_seeds: tuple[int, ...] = (1, 8)
    """agents trained side by side"""
    precisions: tuple[Literal["highest", "high", "medium"], ...] = ()
    """matrix-product precisions (default: highest; on a GPU also high)"""
    variants: tuple[Literal["eager", "compile", "graph", "compile+graph"], ...] = ()
    """how updates run (default: compile; on a GPU graph and compile+graph)"""
    cuda: bool = True
    """measure the GPU where there is one"""
    repeats: int = 15
    """timed updates of each setting"""
    quick: bool = False
    """measure at the sizes of --quick instead"""
    profile: bool = False
    """show what the time of an update goes to instead: products, compiled loops, copies, Adam, the rest, the gaps"""
    against_one_seed: bool = False
    """time an update of the stacked seeds and updates of one seed in turn instead: how many times as long it takes"""
    compare: bool = False
    """compare gradients, and the weights after --repeats updates, with those of the plain eager version instead"""
    evaluation: bool = False
    """time an evaluation of 50 cube-single episodes a seed instead (untrained policies: full-length episodes)"""
    store: bool = False
    """add the rows to benchmarks/results/speed_MACHINE.csv, which --check compares with, and redraw its picture"""
    check: bool = False
    """measure the stored settings among those asked for; exit code 1 if one is below 0.85 of its stored efficiency"""
    output: str | None = None
    """csv and PNG get this path's stem"""
    json: bool = False
    """print one line of JSON a row instead of the table"""


# --- One setting ---


def machine_name(device):
    """What is measured: a GPU's name, or the CPU's with its family, model and number of cores.

    A virtual machine may say "AMD EPYC" only, of processors one of which is twice as fast as the other.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
        keys = ("model name", "cpu family", "model")
        name, family, model = (re.search(rf"^{key}\s*: (.*)", cpuinfo, re.M)[1] for key in keys)
        name = f"{name.strip()} (family {family}, model {model})"
    except (OSError, TypeError):
        name = "CPU"
    return f"{name}, {num_cores()} cores"


def peak_memory(device):
    """Largest memory so far in bytes: the GPU's, or this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def module_of(algorithm):
    """The module of an algorithm or baseline, by its name."""
    return importlib.import_module(algorithm if algorithm in ALGORITHMS else f"benchmarks.baselines.{algorithm}")


def prepare(algorithm, num_seeds, precision, cuda, quick):
    """Sets torch up for a setting.

    Returns:
        device; a function that waits for it; and make(variant), new agents, always the same, and their update as a
        function without arguments: its n-th call is on the n-th random rows of a random dataset.
    """
    module = module_of(algorithm)
    args = module.Args(**(module.QUICK if quick else module.TUNED.get("scene-play", {})))  # 4 x 512 in all four
    cuda = cuda and torch.cuda.is_available()
    args = replace(args, num_seeds=num_seeds, cuda=cuda, matmul_precision=None if precision == "highest" else precision)
    args = replace(args, matmul_precision="highest") if cuda and precision == "highest" else args
    device = setup_torch(args)
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.rand(*shape, generator=generator, device=device)
    N, seeds = 10_000, list(range(num_seeds))
    dataset = {
        "observations": draw(N, OBS_DIM),
        "next_observations": draw(N, OBS_DIM),
        "actions": draw(N, ACTION_DIM) * 2 - 1,
        "rewards": -torch.ones(N, device=device),
        "masks": torch.ones(N, device=device),
    }

    def make(variant):
        compiled, captured = VARIANTS[variant]
        make_agent = lambda: module.Agent(args, OBS_DIM, ACTION_DIM, -1.0, 0.0)
        agents = Stacked(make_agent, seeds, device, args.learning_rate)
        draw, numbers = Draws(agents.agent, args, seeds, N, device), itertools.count()
        inputs = lambda i: draw(i % CHUNK)  # one chunk again and again: to draw it is not part of an update
        agents.compiled = compiled
        replay = Replay(dataset, num_seeds, 0)
        update = lambda inputs: module.update(agents, *replay.inputs(inputs))
        if captured and cuda:
            update = graphs.capture(update, inputs(0), agents.state_tensors())
        return agents, lambda: update(inputs(next(numbers)))

    return device, torch.cuda.synchronize if cuda else lambda: None, make


def timed(action, count, synchronize):
    """Seconds of one of `count` calls of `action` in a row."""
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        action()
    synchronize()
    return (time.perf_counter() - start) / count


class NoModules(contextlib.nullcontext):
    """Stands in for the counter's tracker of modules, whose hooks fail in torch.func.vjp; only the total is read."""

    parents = ("Global",)


def burst(device):
    """Updates that are timed together: on a GPU several, since a training run does not wait for each."""
    return 20 if device.type == "cuda" else 1


def named(algorithm, num_seeds, precision, variant, quick):
    """The columns that name a setting on a machine."""
    size = "quick" if quick else "published"
    return dict(size=size, algorithm=algorithm, num_seeds=num_seeds, precision=precision, variant=variant)


def measure(algorithm, num_seeds, precision, variant, cuda=True, repeats=15, quick=False):
    """Times updates on random data; returns the row of this setting as a dictionary."""
    device, synchronize, make = prepare(algorithm, num_seeds, precision, cuda, quick)
    cuda = device.type == "cuda"
    plain_precision = "highest" if cuda else torch.get_float32_matmul_precision()  # the CPU's exact one
    own_precision = torch.get_float32_matmul_precision()

    # The setting itself comes first, alone, so that start-up and memory are its own.
    start = time.perf_counter()
    _, update = make(variant)
    timed(update, 3, synchronize)
    warm_up, peak = time.perf_counter() - start, peak_memory(device)

    _, plain = make("eager")
    torch.set_float32_matmul_precision(plain_precision)
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()
    with counter:
        plain()
    plain()
    draw = lambda *shape: torch.rand(*shape, device=device)
    a, b = (draw(4096, 4096), draw(4096, 4096)) if cuda else (draw(2, 2048, 512), draw(2, 512, 512))
    flop = 2 * a.numel() * b.shape[-1]
    actions = {"update": update, "plain": plain, "matmul": lambda: [a @ b for _ in range(4)]}
    seconds = {name: [] for name in actions}
    for i in range(-1, repeats):
        for name, action in actions.items():
            torch.set_float32_matmul_precision(plain_precision if name == "plain" else own_precision)
            each = timed(action, burst(device), synchronize)
            if i >= 0:  # the first round warms up
                seconds[name].append(each)

    low, median, high = statistics.quantiles(seconds["update"], n=4) if repeats > 1 else 3 * seconds["update"]
    rate = 4 * flop / statistics.median(seconds["matmul"])
    gigaflop = counter.get_total_flops() / 1e9
    digits = lambda value: float(f"{value:.4g}")
    return {
        "machine": machine_name(device),
        **named(algorithm, num_seeds, precision, variant, quick),
        "updates_per_second": digits(1 / median),
        "quartile_low": digits(1 / high),
        "quartile_high": digits(1 / low),
        "seed_updates_per_second": digits(num_seeds / median),
        "gflop_per_update": digits(gigaflop),
        "matmul_gflops": digits(rate / 1e9),
        "efficiency": digits(gigaflop * 1e9 / median / rate),
        "plain_updates_per_second": digits(1 / statistics.median(seconds["plain"])),
        "speedup": digits(statistics.median(b / a for a, b in zip(seconds["update"], seconds["plain"]))),
        "warm_up_seconds": digits(warm_up),
        "peak_memory_gib": digits(peak / 2**30),
        "torch": torch.__version__,
    }


def profile(algorithm, num_seeds, precision, variant, cuda=True, repeats=15, quick=False):
    """What the time of an update goes to, by torch's profiler, after a warm-up.

    Returns:
        A row as a dictionary: milliseconds an update takes while it is profiled, and for each of GROUPS its share of
        that time and its number of operations (kernels on a GPU) an update. What is left is `gaps`: Python, and on a
        GPU whatever keeps it waiting.
    """
    device, synchronize, make = prepare(algorithm, num_seeds, precision, cuda, quick)
    _, update = make(variant)
    timed(update, 3, synchronize)
    kind = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kind.CPU] + [kind.CUDA] * (device.type == "cuda")) as profiler:
        seconds = timed(update, repeats, synchronize)
    row = named(algorithm, num_seeds, precision, variant, quick) | {"milliseconds": round(1e3 * seconds, 2)}
    shares, counts = dict.fromkeys(GROUPS, 0.0), dict.fromkeys(GROUPS, 0)
    for event in profiler.key_averages():
        if device.type == "cuda":  # kernels, not the spans of Python's that hold them
            kernel = event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
            microseconds = event.self_device_time_total if kernel else 0
        else:
            microseconds = event.self_cpu_time_total
        if microseconds:
            group = next(name for name, pattern in GROUPS.items() if re.search(pattern, event.key, re.IGNORECASE))
            shares[group] += microseconds / 1e6 / repeats / seconds
            counts[group] += event.count / repeats
    row |= {name: round(share, 3) for name, share in shares.items()} | {"gaps": round(1 - sum(shares.values()), 3)}
    return row | {"operations": {name: round(count, 1) for name, count in counts.items()}}


def against_one_seed(algorithm, num_seeds, precision, variant, cuda=True, repeats=15, quick=False):
    """Times an update of stacked seeds and `num_seeds` updates of one seed in turn, after a warm-up.

    Returns:
        A row as a dictionary: median milliseconds of both, and median and quartiles of how many times as long the
        stacked update takes as its neighbours of one seed.
    """
    updates = {}
    for number in (1, num_seeds):
        device, synchronize, make = prepare(algorithm, number, precision, cuda, quick)
        _, updates[number] = make(variant)
    seconds = {number: [] for number in updates}
    for i in range(-3, repeats):
        for number, update in updates.items():
            each = timed(update, burst(device) * num_seeds // number, synchronize)
            if i >= 0:  # the first rounds warm up
                seconds[number].append(each)
    ratios = [many / one for one, many in zip(seconds[1], seconds[num_seeds])]
    low, median, high = statistics.quantiles(ratios, n=4) if repeats > 1 else 3 * ratios
    row = named(algorithm, num_seeds, precision, variant, quick)
    row |= {"milliseconds": 1e3 * statistics.median(seconds[num_seeds])}
    row |= {"milliseconds_one_seed": 1e3 * statistics.median(seconds[1])}
    row |= {"times_one_seed": median, "quartile_low": low, "quartile_high": high}
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}


def compare(algorithm, num_seeds, precision, variant, cuda=True, repeats=15, quick=False):
    """How far a setting's updates are from those of the plain version (eager, no graph, exact float32).

    Returns:
        A row as a dictionary. Errors are the norm of the difference over the plain version's norm, the largest of all
        weights: `gradient_error` of the first update's gradients, and `weights_error` after `repeats` updates, both in
        exact float32; `precision_error`, of the first gradients at the setting's precision, eager. `compiled` is the
        number of functions that were compiled: two losses, unless one was compiled again.
    """
    device, _, make = prepare(algorithm, num_seeds, precision, cuda, quick)
    count_compiled = lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled_before = count_compiled()
    gradients = lambda agents: {n: p.grad.clone() for n, p in agents.parameters.items() if p.grad is not None}

    def largest_error(found, plain):
        if found.keys() != plain.keys():
            raise RuntimeError(f"{algorithm}: other weights get a gradient: {sorted(found.keys() ^ plain.keys())}")
        error = lambda name: (found[name] - plain[name]).norm() / plain[name].norm().clamp(min=1e-30)
        return max(error(name).item() for name in plain)

    if precision != "highest":
        reduced, reduced_update = make("eager")
        reduced_update()
    if device.type == "cuda" or precision != "highest":  # else it is the CPU's exact one
        torch.set_float32_matmul_precision("highest")
    (plain, plain_update), (agents, update) = make("eager"), make(variant)
    plain_update(), update()
    first = gradients(plain)
    row = named(algorithm, num_seeds, precision, variant, quick) | {"updates": repeats}
    row |= {"gradient_error": largest_error(gradients(agents), first)}
    for _ in range(repeats - 1):
        plain_update(), update()
    detached = lambda agents: {name: p.detach() for name, p in agents.parameters.items() if p.any()}
    row |= {"weights_error": largest_error(detached(agents), detached(plain))}
    row |= {"precision_error": 0.0 if precision == "highest" else largest_error(gradients(reduced), first)}
    row = {name: float(f"{value:.2g}") if isinstance(value, float) else value for name, value in row.items()}
    compiled = count_compiled() - compiled_before
    return {"machine": machine_name(device)} | row | {"compiled": compiled, "torch": torch.__version__}


def measure_evaluation(algorithm, num_seeds, cuda):
    """Seconds to start the evaluation workers, and of each of three evaluations."""
    module = module_of(algorithm)
    args = module.Args(env_id="cube-single-play-singletask-v0", cuda=cuda and torch.cuda.is_available())
    device = setup_torch(args)
    seeds = list(range(num_seeds))
    make_agent = lambda: module.Agent(args, OBS_DIM, ACTION_DIM, -1.0, 0.0)
    agents = Stacked(make_agent, seeds, device, args.learning_rate)
    act, draw_act_noise = graphs.FastPolicy(agents, "act", args.cudagraphs), agents.agent.draw_act_noise
    marks = [time.perf_counter()]
    evaluator = rollout.Evaluator(args, seeds, device, Path())
    evaluator.workers = Workers(args, num_seeds, args.eval_episodes)
    marks.append(time.perf_counter())
    for step in range(3):
        evaluator(act, draw_act_noise, step)
        marks.append(time.perf_counter())
    num_workers = len(evaluator.workers.processes)
    start, *evaluations = [round(b - a, 1) for a, b in zip(marks, marks[1:])]
    figures = {"num_seeds": num_seeds, "workers": num_workers, "start_seconds": start}
    return {"algorithm": algorithm} | figures | {"evaluation_seconds": evaluations}


# --- Tables ---


def read_rows(path):
    """The rows of a stored csv file, numbers as numbers."""
    texts = ("machine", "size", "algorithm", "precision", "variant", "torch")
    numbers = lambda row: {name: value if name in texts else float(value) for name, value in row.items()}
    return [numbers(row) | {"num_seeds": int(row["num_seeds"])} for row in tables.read_rows(path)]


def setting(row):
    """What names a row."""
    return tuple(row[name] for name in SETTING)


def slower(rows, stored):
    """Messages, one for each row whose efficiency is below TOLERANCE of the stored row of its setting."""
    known = {setting(row): row["efficiency"] for row in stored}
    return [
        f"{' '.join(str(value) for value in setting(row)[1:])}: efficiency {row['efficiency']:.3f}, "
        f"stored {known[setting(row)]:.3f}"
        for row in rows
        if row["efficiency"] < TOLERANCE * known.get(setting(row), 0)
    ]


def table(rows):
    """The rows as a markdown table."""
    header = ["size", "algorithm", "seeds", "precision", "variant", "updates/s (quartiles)", "seed-updates/s", "GFLOP"]
    header += ["GFLOP/s of products", "efficiency", "times plain eager", "start", "peak memory"]
    lines = [
        [
            *(row[name] for name in SETTING[1:]),
            f"{row['updates_per_second']:.4g} ({row['quartile_low']:.3g} to {row['quartile_high']:.3g})",
            f"{row['seed_updates_per_second']:.4g}",
            f"{row['gflop_per_update']:.4g}",
            f"{row['matmul_gflops']:.0f}",
            f"{row['efficiency']:.2f}",
            f"{row['speedup']:.2f}",
            f"{row['warm_up_seconds']:.0f} s",
            f"{row['peak_memory_gib']:.2f} GiB",
        ]
        for row in rows
    ]
    return tables.markdown(header, lines)


def draw(path, rows):
    """Saves bars of the efficiency of every row, and the plain eager version's beside it."""
    from matplotlib.figure import Figure

    seeds = lambda r: f"{r['num_seeds']} seed" + "s" * (r["num_seeds"] > 1)
    labels = [f"{r['algorithm']}, {seeds(r)}, {r['size']}\n{r['variant']}, {r['precision']}" for r in rows]
    own = [r["efficiency"] for r in rows]
    plain = [r["efficiency"] / r["speedup"] for r in rows]
    figure = Figure(figsize=(8, 0.5 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh([y - 0.2 for y in places], own, 0.4, label="this setting")
    axes.barh([y + 0.2 for y in places], plain, 0.4, color="lightgrey", label="plain eager")
    axes.set(yticks=places, xlim=(0, 1), xlabel="efficiency: share of the rate of plain matrix products")
    axes.set_yticklabels(labels, fontsize="small")
    axes.invert_yaxis()
    axes.legend(fontsize="small")
    axes.set_title(f"{rows[0]['machine']}, torch {rows[0]['torch']}", fontsize="medium")
    figure.savefig(path, dpi=90)


def profile_table(rows):
    """Profiles as a markdown table: shares of an update's time, operations per update in brackets."""
    lines = []
    for row in rows:
        shares = [f"{100 * row[name]:.1f}% ({row['operations'][name]:.0f})" for name in GROUPS]
        named = [row["size"], row["algorithm"], row["num_seeds"], f"{row['variant']}, {row['precision']}"]
        lines.append([*named, row["milliseconds"], *shares, f"{100 * row['gaps']:.1f}%"])
    return tables.markdown(["size", "algorithm", "seeds", "variant", "milliseconds", *GROUPS, "gaps"], lines)


def against_table(rows):
    """Rows of `against_one_seed` as a markdown table."""
    lines = []
    for row in rows:
        named = [row["size"], row["algorithm"], f"{row['variant']}, {row['precision']}", row["num_seeds"]]
        times = [f"{row['milliseconds']:.1f}", f"{row['milliseconds_one_seed']:.1f}"]
        ratio = f"{row['times_one_seed']:.2f} ({row['quartile_low']:.2f} to {row['quartile_high']:.2f})"
        lines.append([*named, *times, ratio])
    header = ["size", "algorithm", "variant", "seeds", "milliseconds", "one seed", "times one seed (quartiles)"]
    return tables.markdown(header, lines)


def compare_table(rows):
    """Rows of `compare` as a markdown table."""
    header = ["size", "algorithm", "seeds", "variant", "precision", "gradients", "weights after so many updates"]
    lines = []
    for row in rows:
        named = [row["size"], row["algorithm"], row["num_seeds"], row["variant"], row["precision"]]
        weights = f"{row['weights_error']:.2g} ({row['updates']})"
        errors = [f"{row['gradient_error']:.2g}", weights, f"{row['precision_error']:.2g}", row["compiled"]]
        lines.append([*named, *errors])
    return tables.markdown([*header, "gradients at the precision", "compiled"], lines)


KINDS = {  # what can be asked of a setting: a function of it, and a table of its rows
    "measure": (measure, table),
    "profile": (profile, profile_table),
    "against_one_seed": (against_one_seed, against_table),
    "compare": (compare, compare_table),
}


def measure_apart(kind, arguments):
    """One of KINDS of a setting in a process of its own: the row, or None if it failed (its last line is shown)."""
    command = [sys.executable, "-m", "benchmarks.speed", "--setting", kind, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        warn(f"{json.dumps(arguments)}: {lines[-1]}")
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def store(path, stored, rows):
    """Writes the stored rows with `rows` in place of those of the same settings, whole or not at all; returns all."""
    new = {setting(row) for row in rows}
    every = sorted([row for row in stored if setting(row) not in new] + rows, key=setting)
    runs.write_text(path, tables.csv_text(every))
    return every


def main():
    """What the command line asks for; bad arguments end it with exit code 2, before any measurement."""
    if sys.argv[1:2] == ["--setting"]:  # the process of one setting
        print(json.dumps(KINDS[sys.argv[2]][0](**json.loads(sys.argv[3]))))
        raise SystemExit

    options = tyro.cli(SpeedArgs, description=__doc__)
    if options.repeats < 1 or min(options.num_seeds, default=0) < 1:
        fail("--repeats and --num-seeds must be above zero")
    on_gpu = options.cuda and torch.cuda.is_available()
    if options.evaluation:
        for algorithm in options.algorithms:
            for num_seeds in options.num_seeds:
                print(json.dumps(measure_evaluation(algorithm, num_seeds, options.cuda)), flush=True)
        raise SystemExit
    kinds = [kind for kind in ("profile", "against_one_seed", "compare") if getattr(options, kind)]
    if len(kinds) > 1:
        fail("--profile, --against-one-seed and --compare exclude each other")
    kind = kinds[0] if kinds else "measure"
    if kind != "measure" and (options.store or options.check or (options.output and kind != "compare")):
        fail("--profile, --against-one-seed and --compare are printed only (--compare also with --output)")
    if options.against_one_seed:
        options = replace(options, num_seeds=tuple(n for n in options.num_seeds if n > 1))
        if not options.num_seeds:
            fail("--against-one-seed: --num-seeds must have a number above 1")
    if not on_gpu and any("graph" in variant for variant in options.variants):
        fail("--variants: CUDA graphs need a GPU")
    machine = machine_name(torch.device("cuda" if on_gpu else "cpu"))
    stored_path = RESULTS / f"speed_{re.sub('[^a-z0-9]+', '_', machine.lower()).strip('_')}.csv"
    stored = read_rows(stored_path)
    if options.check and not stored:
        missing = f"{stored_path.name} is missing: no figures of this machine ({machine}) are stored"
        fail(f"--check: {missing}; make them by --store")

    settings = [
        dict(algorithm=algorithm, num_seeds=num_seeds, precision=precision, variant=variant)
        for algorithm in options.algorithms
        for num_seeds in options.num_seeds
        for precision in options.precisions or (("highest", "high") if on_gpu else ("highest",))
        for variant in options.variants or (("graph", "compile+graph") if on_gpu else ("compile",))
    ]
    if options.check:
        size = "quick" if options.quick else "published"
        known = {setting(row) for row in stored}
        settings = [s for s in settings if setting({"machine": machine, "size": size} | s) in known]
        if not settings:
            fail(f"--check: none of the settings asked for is in {stored_path.name}")
    if options.output:
        tables.output_path(options.output)
    rows = []
    for words in tqdm(settings, unit=" settings"):
        common = dict(cuda=options.cuda, repeats=options.repeats, quick=options.quick)
        row = measure_apart(kind, words | common)
        if row is not None:
            rows.append(row)
            if options.store:  # as it goes: what was measured is not lost
                rows_of_machine = store(stored_path, stored, rows)
            if options.json:
                print(json.dumps(row), flush=True)
    if not rows:
        fail("no setting could be measured")
    if not options.json:
        print(KINDS[kind][1](rows))
    if options.output:
        tables.write(tables.beside(options.output, ".csv"), rows)
        if kind == "measure":
            draw(tables.beside(options.output, ".png"), rows)
    if options.store:
        draw(stored_path.with_suffix(".png"), rows_of_machine)
        print(f"saved {stored_path.name} and its picture in {RESULTS.name}")
    if options.check:
        problems = slower(rows, stored)
        for problem in problems:
            print(f"slower than stored: {problem}", file=sys.stderr)
        failed = len(settings) - len(rows)
        print(f"{len(rows)} settings checked, {len(problems)} slower, {failed} failed")
        raise SystemExit(1 if problems or failed else 0)


if __name__ == "__main__":
    main()
