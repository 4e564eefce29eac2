"""Small utilities shared by the algorithm files: data, random draws, seeds side by side, evaluation, logs, checkpoints.

Plain functions, no inheritance. An algorithm file imports from here and from nothing else of this project; nothing
here imports an algorithm.
"""

import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # the project's folder


def fail(message):
    """Ends the program for a user's mistake: `message` (what is wrong, where, what to do) on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def warn(message):
    """Prints a warning on stderr; the program continues."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def check_system(
    platform=sys.platform, version=sys.version_info, packages=("torch", "ogbench", "mujoco", "tyro", "safetensors")
):
    """Ends the program where this project cannot run: on Windows, on another Python, without its packages."""
    if platform == "win32":
        fail("CleanFlow runs on Linux and macOS, not on Windows (WSL is Linux)")
    if not (3, 10) <= tuple(version[:2]) <= (3, 13):
        fail(f"Python {version[0]}.{version[1]}: CleanFlow runs on 3.10 to 3.13 (mujoco 3.3.7 has no other packages)")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        install = "pip install -r requirements.txt && pip install --no-deps -r requirements-no-deps.txt"
        fail(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed; {install}")


def num_cores():
    """CPU cores that this process may use (a scheduler may have given it fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def python_environment():
    """The environment variables of a child process that has to import this project (with -m, started in ROOT)."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}


def versions():
    """{name: version} of Python and of the packages that a run's numbers depend on."""
    packages = ("torch", "ogbench", "mujoco", "gymnasium", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


check_system()
