"""Small utilities shared by the four algorithm files: everything that no paper's equation needs.

Plain functions, no inheritance. An algorithm file imports from here and from nothing else of this project; nothing
here imports an algorithm.
"""

import os
import sys
from pathlib import Path


def fail(message):
    """Ends the program for a user's mistake: `message` (what is wrong, where, what to do) on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def warn(message):
    """Prints a warning on stderr and goes on."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def num_cores():
    """CPU cores that this process may use (a scheduler may have given it fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def python_environment():
    """The environment variables of a child process that has to import this project."""
    root = str(Path(__file__).resolve().parent.parent)
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
