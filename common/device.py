"""The device: determinism, the precision of float32 products, memory."""

import contextlib
import ctypes
import functools
import os
import re
import resource
import sys
from pathlib import Path

import torch

from common import fail, warn


def setup_torch(args):
    """Sets up determinism and float32 matrix products; returns the device (the CPU, with a warning, without CUDA).

    A precision that the device lacks ends the program with exit code 2.
    """
    if args.cuda and not torch.cuda.is_available():
        driver = f", or its driver is too old for CUDA {torch.version.cuda}" if torch.version.cuda else ""
        warn(f"--cuda: torch finds no CUDA device{driver}; training on the CPU (--no-cuda silences this)")
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.torch_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    set_matmul_precision(args.matmul_precision, device)
    torch.set_num_threads(torch.get_num_threads())  # as after an evaluation: MKL may divide products otherwise
    if device.type == "cpu":  # glibc reuses large freed blocks: to give them back costs a quarter of an update's time
        with contextlib.suppress(OSError, AttributeError):  # another system's C library
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD; before glibc 2.35 at most 32 MiB
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    sys.excepthook = functools.partial(explain_out_of_memory, args.num_seeds, device)
    return device


def explain_out_of_memory(num_seeds, device, kind, error, traceback):
    """Exception hook: where torch found no memory, a message with a number of seeds that may fit, and exit code 2.

    What a run needs is known only up to the allocation that failed, so at most half of the seeds are suggested.
    """
    size = re.search(r"ried to allocate ([\d.]+) ?(bytes|[KMGT]iB)", str(error))
    if not issubclass(kind, RuntimeError) or size is None:
        return sys.__excepthook__(kind, error, traceback)
    requested = float(size[1]) * 1024 ** ["bytes", "KiB", "MiB", "GiB", "TiB"].index(size[2])
    if device.type == "cuda":
        used, total = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    else:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        total = total if limit == resource.RLIM_INFINITY else min(total, limit)
    needed, machine = used + requested, "GPU" if device.type == "cuda" else "machine"
    seeds = min(num_seeds // 2, int(num_seeds * total / needed))
    found = f"{needed / 2**30:.1f} GiB or more are needed, the {machine} has {total / 2**30:.1f}"
    advice = f"--num-seeds {seeds} may fit" if seeds > 0 else "take a smaller --batch-size"
    number = f"{num_seeds} seed{'s' * (num_seeds > 1)}"
    fail(f"out of memory with {number}: {found}; {advice}. Checkpoints already written are kept (--resume)")


def set_matmul_precision(precision, device):
    """Sets how a torch device computes float32 matrix products; a precision that it lacks ends the program.

    Args:
        precision: "highest" (exact), "high" (TF32), "medium" (bfloat16 where torch has that, else as high), or None for
            the device's default: high on a GPU with TF32 units, highest elsewhere.
    """
    if device.type == "cuda":
        has_tf32 = torch.cuda.get_device_capability(device) >= (8, 0)
        if precision in ("high", "medium") and not has_tf32:
            name = torch.cuda.get_device_name(device)
            fail(f"--matmul-precision {precision}: {name} has no units for it (compute capability 8.0 on); use highest")
        torch.set_float32_matmul_precision(precision or ("high" if has_tf32 else "highest"))
        torch.backends.cudnn.allow_tf32 = torch.get_float32_matmul_precision() != "highest"  # convolutions
        return
    if precision == "high":
        fail("--matmul-precision high: the CPU has no TF32; use highest, or medium where it multiplies bfloat16")
    # On AMD, "highest" goes through MKL at half speed. "medium" goes through oneDNN, which is exact unless the CPU has
    # units for bfloat16.
    torch.set_float32_matmul_precision("medium")
    exact = onednn_is_exact()
    if precision == "medium" and exact:
        fail("--matmul-precision medium: this CPU does not multiply in bfloat16; use highest")
    cpuinfo = Path("/proc/cpuinfo")
    is_amd = cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()
    if precision != "medium" and not (exact and is_amd):
        torch.set_float32_matmul_precision("highest")


def onednn_is_exact():
    """Whether products are float32's at the present setting; by one's error, since a time depends on the load."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 512, 512, generator=generator) for _ in range(2))
    exact = torch.bmm(a.double(), b.double())
    return bool((torch.bmm(a, b) - exact).norm() <= 1e-6 * exact.norm())
