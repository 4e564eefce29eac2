"""Files that are whole or not there: how they are written, and what finds that one is damaged."""

import contextlib
import fcntl
import functools
import hashlib
import os
import pickle
import tokenize
import zipfile
import zlib
from pathlib import Path

from tqdm import tqdm

from common import fail, warn

# What reading a damaged zip, npz or checkpoint file raises, by where the damage is.
DAMAGE = (OSError, EOFError, LookupError, TypeError, ValueError, RuntimeError, MemoryError)
DAMAGE += (zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, tokenize.TokenError)
BAR_DELAY = 5  # seconds before a check of a file shows its progress
# A binary file whose reads move a progress bar.
shown = functools.partial(tqdm.wrapattr, method="read", bytes=False, unit="B", unit_scale=True)


def check_writable(path, flag):
    """Ends with exit code 2 unless `path`, which may be missing yet, is in a place to write to."""
    absolute = Path(path).absolute()
    there = next(place for place in (absolute, *absolute.parents) if os.path.exists(place))  # False where forbidden
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "forbids it" if there.is_dir() else "is not a directory"
        fail(f"{flag} {path} is not writable: {there} {reason}")


def try_lock(file, path):
    """Locks an open file until that is closed; False if another process has the lock.

    On a file system without locks a warning says that processes do not notice each other; `path` is for it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        warn(f"{path} cannot be locked ({error}): two processes would not notice each other")
    return True


@contextlib.contextmanager
def only_one(path):
    """Lets one process at a time make `path`: the jobs of a cluster may all start at once and want the same file."""
    lock = path.with_name(path.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "w")
    except OSError as error:
        fail(f"--dataset-dir {path.parent} is not writable: {error}")
    with file:
        if not try_lock(file, lock):
            print(f"waiting for another process that is making {path.name}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file
        lock.unlink(missing_ok=True)


@contextlib.contextmanager
def written_whole(path, previous=None):
    """A binary file to write, which becomes `path` when the block ends, and is deleted when the block raises.

    Then its bytes are on the disk. What was at `path` moves to the path `previous`, if that is given.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_zip(path):
    """Raises one of DAMAGE unless a zip file (npz files and checkpoints are some) is there and whole."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():  # the checksum is compared at a member's end
            with archive.open(member) as file:
                for _ in _blocks(file, member.file_size, f"{path.name}: {member.filename}"):
                    pass


def is_whole(path):
    """Whether a zip file's checksums are right."""
    try:
        check_zip(path)
    except DAMAGE:
        return False
    return True


def sha256_of(path):
    """SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in _blocks(file, path.stat().st_size, path.name):
            digest.update(block)
    return digest.hexdigest()


def _blocks(file, size, name):
    """The bytes of an open file, MiB by MiB, with a progress bar when that takes longer than BAR_DELAY."""
    with shown(file, total=size, desc=f"checking {name}", delay=BAR_DELAY) as source:
        while block := source.read(2**20):
            yield block
