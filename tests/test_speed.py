"""The speed benchmark: operations by hand, what --check refuses, the precision flag, missing compilers and GPUs."""

import functools
import itertools
import os
import resource
import sys
from pathlib import Path

import pytest
import torch
from conftest import ALGORITHMS, make_agents, small_args, stacked_inputs, update

from benchmarks import speed, tables
from common import device as devices
from common import graphs

ROW = dict(
    machine="abacus, 2 cores", size="quick", algorithm="evor", num_seeds=1, precision="highest", variant="compile",
    updates_per_second=100.0, quartile_low=90.0, quartile_high=110.0, seed_updates_per_second=100.0,
    gflop_per_update=1.7, matmul_gflops=400.0, efficiency=0.4, plain_updates_per_second=70.0, speedup=1.4,
    warm_up_seconds=9.0, peak_memory_gib=0.5, torch="2.13.0",
)  # fmt: skip


def test_operations_are_those_counted_by_hand():
    """EVOR at the size of --quick: 5 Euler steps, 2 fields, 256 rows, widths 256; 2 operations a weight and row."""
    row = speed.measure("evor", 1, "highest", "eager", cuda=False, repeats=2, quick=True)
    K, E, B, H, D, A = 5, 2, 256, 256, 28, 5
    policy = (D * H, (A + 1) * H, H * H, H * H, H * A)  # weights: of s, of x and t, of the other layers
    critic = ((D + A) * H, 2 * H, H * H, H * H, H)
    next_action = 2 * B * K * sum(policy)  # eager: the product of s once per step
    next_return = E * 2 * B * K * sum(critic)
    regression = E * 2 * B * sum(critic)
    cloning = 2 * B * sum(policy)
    # Backward: every product twice, for its two factors, but those of the inputs, which are no parameters.
    backward = E * 2 * B * (2 * sum(critic) - critic[0] - critic[1])
    backward += 2 * B * (2 * sum(policy) - policy[0] - policy[1])
    expected = (next_action + next_return + regression + cloning + backward) / 1e9
    assert abs(row["gflop_per_update"] - expected) < 1e-3 * expected, (row["gflop_per_update"], expected)
    assert row["updates_per_second"] > 0 and 0 < row["efficiency"] < 10 and 0.1 < row["peak_memory_gib"] < 20
    assert row["quartile_low"] <= row["updates_per_second"] <= row["quartile_high"]


@pytest.mark.parametrize("algorithm", ["value_flows", "fql", "iqn"])
def test_value_flows_and_the_baselines_are_measured_too(algorithm):
    row = speed.measure(algorithm, 1, "highest", "eager", cuda=False, repeats=1, quick=True)
    assert (row["algorithm"], row["size"], row["num_seeds"]) == (algorithm, "quick", 1)
    assert row["gflop_per_update"] > 0.1 and 0 < row["efficiency"] < 10


def test_a_profile_divides_the_whole_time_of_an_update():
    row = speed.profile("evor", 1, "highest", "eager", cuda=False, repeats=3, quick=True)
    shares = [row[name] for name in (*speed.GROUPS, "gaps")]
    assert abs(sum(shares) - 1) < 0.01 and min(shares) >= 0 and row["products"] > 0.01 and row["the rest"] > 0.01
    assert row["operations"]["Adam"] >= 1 and row["operations"]["compiled loops"] == 0
    agents = make_agents(small_args("evor", flow_steps=5, value_hidden_dims=(8,) * 3, actor_hidden_dims=(8,) * 3))
    with torch.profiler.profile() as profiler:  # as many products as an update of as many layers and steps has
        update(agents, *stacked_inputs(agents))
    products = sum(event.count for event in profiler.key_averages() if event.key in ("aten::bmm", "aten::mm"))
    assert row["operations"]["products"] == products
    assert speed.profile_table([row]).splitlines()[2].startswith("| quick | evor | 1 | eager, highest | ")


def test_efficiency_and_speedup_by_a_clock_of_our_own(monkeypatch):
    """An update takes 0.2 s, a plain one 0.3 s, four products of 2 x 2048 x 512 x 512 0.1 s."""
    seconds = itertools.chain([9.0], itertools.cycle((0.2, 0.3, 0.1)))  # the first is the warm-up
    monkeypatch.setattr(speed, "timed", lambda action, count, synchronize: action() and 0 or next(seconds))
    row = speed.measure("evor", 2, "highest", "eager", cuda=False, repeats=3, quick=True)
    rate = 4 * 2 * (2 * 2048 * 512 * 512) / 0.1 / 1e9
    assert row["matmul_gflops"] == pytest.approx(rate, rel=1e-3)
    assert row["efficiency"] == pytest.approx(row["gflop_per_update"] / 0.2 / rate, rel=1e-3)
    assert (row["updates_per_second"], row["seed_updates_per_second"], row["speedup"]) == (5, 10, 1.5)
    assert row["plain_updates_per_second"] == pytest.approx(1 / 0.3, rel=1e-3)


def test_stacked_seeds_against_one_seed(monkeypatch):
    """By a clock that does not depend on the machine: a warm-up of three rounds, then 2 ms beside 5, 5, 6 ms."""
    counts = []

    def timed(action, count, synchronize):
        action()
        counts.append(count)
        if len(counts) <= 6:
            return 1.0
        return 0.002 if count == 3 else 0.006 if len(counts) == 12 else 0.005

    monkeypatch.setattr(speed, "timed", timed)
    row = speed.against_one_seed("evor", 3, "highest", "eager", cuda=False, repeats=3, quick=True)
    assert counts == [3, 1] * 6  # as many updates of a seed in both
    assert (row["num_seeds"], row["milliseconds"], row["milliseconds_one_seed"]) == (3, 5.0, 2.0)
    assert (row["times_one_seed"], row["quartile_low"], row["quartile_high"]) == (2.5, 2.5, 3.0)
    assert "| quick | evor | eager, highest | 3 | " in speed.against_table([row])


@pytest.mark.parametrize("scale", [1.0, 1.01])
def test_updates_are_compared_with_plain_eager_ones(scale, monkeypatch):
    """By a compiler that scales the losses, and with them the gradients."""

    def compile(function, options):
        def scaled(*inputs):
            losses, metrics = function(*inputs)
            return scale * losses, metrics

        return scaled

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setitem(torch._dynamo.utils.counters["stats"], "unique_graphs", 5)  # of settings before this one
    row = speed.compare("evor", 2, "highest", "compile", cuda=False, repeats=3, quick=True)
    assert row["gradient_error"] == pytest.approx(scale - 1, abs=1e-5) and row["precision_error"] == 0
    assert (row["weights_error"] > 0) == (scale > 1) and row["weights_error"] < 1e-3  # Adam's step has no scale
    assert (row["updates"], row["num_seeds"], row["compiled"]) == (3, 2, 0)
    assert "| quick | evor | 2 | compile | highest |" in speed.compare_table([row])


def test_a_weight_that_only_one_side_trains_ends_the_comparison(monkeypatch):
    backward = speed.Stacked.backward
    skips = lambda agents, loss: agents.compiled and loss == "actor_loss"
    monkeypatch.setattr(
        speed.Stacked, "backward", lambda a, loss, *x, **k: {} if skips(a, loss) else backward(a, loss, *x, **k)
    )
    monkeypatch.setattr(torch, "compile", lambda function, options: function)
    with pytest.raises(RuntimeError, match="evor: other weights get a gradient: "):
        speed.compare("evor", 1, "highest", "compile", cuda=False, repeats=1, quick=True)


@pytest.mark.parametrize(
    "words", [("--profile", "--compare"), ("--compare", "--store"), ("--profile", "--output", "x")]
)
def test_what_the_modes_exclude(words, main, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(*words)
    assert stopped.value.code == 2 and ("exclude each other" in (error := capsys.readouterr().err) or "only" in error)


def test_check_compares_efficiency_with_the_stored_row_of_the_setting():
    stored = [ROW, ROW | {"num_seeds": 8, "efficiency": 0.6}]
    fine = [ROW | {"efficiency": 0.35, "updates_per_second": 1.0}, ROW | {"num_seeds": 8, "efficiency": 0.9}]
    assert speed.slower(fine, stored) == []  # the time may be anything
    assert speed.slower([ROW | {"variant": "eager", "efficiency": 0.01}], stored) == []  # nothing to compare with
    (message,) = speed.slower([ROW | {"num_seeds": 8, "efficiency": 0.5}], stored)
    assert message == "quick evor 8 highest compile: efficiency 0.500, stored 0.600"


def test_stored_rows_read_back_as_written(tmp_path):
    rows = [ROW, ROW | {"num_seeds": 8}]
    tables.write(tmp_path / "speed.csv", rows)
    assert speed.read_rows(tmp_path / "speed.csv") == rows
    speed.draw(tmp_path / "speed.png", rows)
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert "| quick | evor | 8 | highest | compile | 100 (90 to 110) |" in speed.table(rows)


def test_paths_beside_a_name_with_dots_are_different():
    names = ["a", "a.csv", "a.png", "tau_0.1", "tau_0.01", "tau_0.1.csv"]
    assert [tables.beside(f"x/{name}", ".csv").name for name in names] == [
        "a.csv", "a.csv", "a.csv", "tau_0.1.csv", "tau_0.01.csv", "tau_0.1.csv",
    ]  # fmt: skip


def test_rows_of_two_calls_at_once_are_refused(tmp_path, capsys):
    rows = [{"sweep": "tau_q", "tau_q": 0.1, "seed": seed, "success": 0.5} for seed in (0, 1, 0)]
    tables.write(tmp_path / "a.csv", rows[:2])
    assert tables.stored_rows(tmp_path / "a.csv", ("sweep", "tau_q"), {}) == {("tau_q", 0.1): rows[:2]}
    tables.write(tmp_path / "a.csv", rows)
    with pytest.raises(SystemExit) as end:
        tables.stored_rows(tmp_path / "a.csv", ("sweep", "tau_q"), {})
    assert end.value.code == 2 and "has seed 0 of ('tau_q', 0.1) twice" in capsys.readouterr().err


@pytest.fixture
def main(monkeypatch, tmp_path):
    """main(*words), with a results directory of the test's own; rows are made up, and the third setting is Ctrl-C."""
    measured = []

    def measure_apart(kind, words):
        measured.append(words)
        if len(measured) == 3:
            raise KeyboardInterrupt
        names = ("algorithm", "num_seeds", "precision", "variant")
        return ROW | {"machine": speed.machine_name(torch.device("cpu"))} | {name: words[name] for name in names}

    def main(*words):
        monkeypatch.setattr("sys.argv", ["speed", "--no-cuda", *map(str, words)])
        speed.main()

    monkeypatch.setattr(speed, "measure_apart", measure_apart)
    monkeypatch.setattr(speed, "RESULTS", tmp_path)
    return main


def test_rows_are_stored_as_they_are_measured(main, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        main("--algorithms", "floq", "evor", "--store")
    (path,) = tmp_path.glob("speed_*.csv")
    assert [(row["algorithm"], row["num_seeds"]) for row in speed.read_rows(path)] == [("floq", 1), ("floq", 8)]
    main("--algorithms", "evor", "--num-seeds", 8, "--store")
    main("--algorithms", "floq", "--num-seeds", 8, "--store")
    rows = [(row["algorithm"], row["num_seeds"]) for row in speed.read_rows(path)]
    assert rows == [("evor", 8), ("floq", 1), ("floq", 8)] and path.with_suffix(".png").exists()


@pytest.mark.parametrize("efficiency, code", [(0.4, 0), (0.9, 1)])
def test_check_ends_with_1_where_a_setting_is_slower(efficiency, code, main, tmp_path, capsys):
    words = ("--algorithms", "evor", "--num-seeds", 8)
    with pytest.raises(SystemExit) as end:
        main(*words, "--check")
    assert end.value.code == 2 and "no figures of this machine" in capsys.readouterr().err
    main(*words, "--store", "--quick")
    (path,) = tmp_path.glob("speed_*.csv")
    tables.write(path, [row | {"efficiency": efficiency} for row in speed.read_rows(path)])
    with pytest.raises(SystemExit) as end:
        main(*words, "--check", "--quick")
    assert end.value.code == code


def test_output_goes_to_a_new_folder_or_is_refused_before_the_work(main, tmp_path, monkeypatch, capsys):
    main("--algorithms", "evor", "--num-seeds", 1, "--output", tmp_path / "new" / "a")
    assert len(speed.read_rows(tmp_path / "new" / "a.csv")) == 1 and (tmp_path / "new" / "a.png").exists()
    monkeypatch.setattr(speed, "measure_apart", None)
    with pytest.raises(SystemExit) as stop:
        main("--algorithms", "evor", "--output", tmp_path / "new" / "a.csv" / "b")
    assert stop.value.code == 2 and "a.csv is not writable" in capsys.readouterr().err


def test_a_product_at_the_cpus_default_is_exact(capsys):
    """To the bit or nearly; TF32 is refused."""
    cpu, (a, b) = torch.device("cpu"), torch.randn(2, 4, 300, 300)
    for precision in (None, "highest"):
        devices.set_matmul_precision(precision, cpu)
        torch.testing.assert_close(a @ b, (a.double() @ b.double()).float(), rtol=1e-4, atol=1e-4)
        assert devices.onednn_is_exact()
    with pytest.raises(SystemExit) as stopped:
        devices.set_matmul_precision("high", cpu)
    assert stopped.value.code == 2 and "--matmul-precision high: the CPU has no TF32" in capsys.readouterr().err


@pytest.mark.parametrize("vendor", ["GenuineIntel", "AuthenticAMD"])
@pytest.mark.parametrize("bfloat16", [True, False])
def test_precisions_of_a_cpu(tmp_path, monkeypatch, capsys, vendor, bfloat16):
    """With a product that at "medium" rounds to bfloat16, as on CPUs with units for it, or is exact."""
    bmm, cpu = torch.bmm, torch.device("cpu")

    def product(a, b):
        if bfloat16 and a.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium":
            a, b = a.bfloat16(), b.bfloat16()
        return bmm(a.double(), b.double())

    monkeypatch.setattr(torch, "bmm", product)
    (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {vendor}\n")
    monkeypatch.setattr(devices, "Path", lambda path: tmp_path / Path(path).name)
    for precision in (None, "highest"):
        devices.set_matmul_precision(precision, cpu)
        through_onednn = vendor == "AuthenticAMD" and not bfloat16
        assert torch.get_float32_matmul_precision() == ("medium" if through_onednn else "highest")
        assert devices.onednn_is_exact()
    if bfloat16:
        devices.set_matmul_precision("medium", cpu)
        assert torch.get_float32_matmul_precision() == "medium" and not devices.onednn_is_exact()
    else:
        with pytest.raises(SystemExit) as stopped:
            devices.set_matmul_precision("medium", cpu)
        message = "--matmul-precision medium: this CPU does not multiply in bfloat16"
        assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "capability, precision, expected",
    [
        ((8, 0), None, "high"),
        ((7, 5), None, "highest"),
        ((8, 0), "highest", "highest"),
        ((9, 0), "medium", "medium"),
        ((7, 5), "high", "refused"),
        ((7, 5), "medium", "refused"),
    ],
)
def test_precisions_of_a_gpu(monkeypatch, capsys, capability, precision, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Abacus 3")
    if expected == "refused":
        with pytest.raises(SystemExit) as stopped:
            devices.set_matmul_precision(precision, torch.device("cuda"))
        message = f"--matmul-precision {precision}: Abacus 3 has no units for it"
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    else:
        devices.set_matmul_precision(precision, torch.device("cuda"))
        assert torch.get_float32_matmul_precision() == expected
        assert torch.backends.cudnn.allow_tf32 == (expected != "highest")


@pytest.mark.parametrize("deterministic", [True, False])
def test_torch_is_set_up_deterministic_and_explains_a_lack_of_memory(monkeypatch, deterministic):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    args = small_args("evor", cuda=False, num_seeds=3, torch_deterministic=deterministic)
    device = devices.setup_torch(args)
    assert device == torch.device("cpu")
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)
    assert torch.utils.deterministic.fill_uninitialized_memory != deterministic  # which would cost time
    assert (sys.excepthook.func, sys.excepthook.args) == (devices.explain_out_of_memory, (3, device))


def test_no_test_leaves_torch_as_it_set_it_up():
    """See process_as_before in conftest.py: the tests above have called setup_torch in this process."""
    assert not torch.are_deterministic_algorithms_enabled() and not isinstance(sys.excepthook, functools.partial)
    assert torch.get_float32_matmul_precision() == "highest"


def test_without_a_compiler_the_losses_stay_and_a_warning_says_so(monkeypatch, capsys):
    def no_compiler(function, options):
        raise RuntimeError("\nno C++ compiler was found\nmore lines")

    monkeypatch.setattr(torch, "compile", no_compiler)
    eager, agents = (make_agents(small_args("evor")) for _ in range(2))
    batch, noise = stacked_inputs(agents)
    one_update = lambda draws: update(agents, batch, draws)
    fast = graphs.FastUpdate(agents, one_update, compile=True, cudagraphs=False)
    expected, updated = update(eager, batch, noise), fast(noise)
    assert all(torch.equal(updated[name], value) for name, value in expected.items()) and not agents.compiled
    assert "--compile fails here (no C++ compiler was found)" in capsys.readouterr().err


def test_out_of_memory_says_how_many_seeds_may_fit(monkeypatch, capsys):
    monkeypatch.setattr("resource.getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 2**12, "SC_PHYS_PAGES": 2**22}[name])  # 16 GiB
    with pytest.raises(RuntimeError) as caught:  # a whole exabyte
        torch.empty(2**58)
    usage = lambda who: type("Usage", (), {"ru_maxrss": 2**20})  # 1 GiB in KiB
    monkeypatch.setattr("resource.getrusage", usage)
    monkeypatch.setattr("sys.platform", "linux")
    explain = lambda error, seeds: devices.explain_out_of_memory(seeds, torch.device("cpu"), type(error), error, None)
    small = RuntimeError(str(caught.value).replace(str(2**60), str(31 * 2**30)))
    smaller = RuntimeError(str(caught.value).replace(str(2**60), str(13 * 2**30)))  # only the first of what is needed
    for error, seeds, message in (
        (
            small,
            10,
            "out of memory with 10 seeds: 32.0 GiB or more are needed, the machine has 16.0; --num-seeds 5 may fit",
        ),
        (
            small,
            1,
            "out of memory with 1 seed: 32.0 GiB or more are needed, the machine has 16.0; take a smaller --batch",
        ),
        (smaller, 10, "14.0 GiB or more are needed, the machine has 16.0; --num-seeds 5 may fit"),
        (caught.value, 10, "take a smaller --batch-size"),
    ):
        with pytest.raises(SystemExit) as stopped:
            explain(error, seeds)
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    explain(RuntimeError("another mistake"), 10)
    assert "RuntimeError: another mistake" in capsys.readouterr().err


def test_cudagraphs_asked_for_on_the_cpu_are_ignored_with_a_note(capsys):
    words = ["--no-cuda", "--cudagraphs"]
    for argv, noted in ((words, True), (words[:1], False)):
        args, _ = ALGORITHMS["evor"].parse_args(argv)
        assert not args.cuda and ("--cudagraphs is ignored" in capsys.readouterr().out) == noted
