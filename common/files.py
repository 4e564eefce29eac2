"""Files that are whole or not there: how they are written, and what finds that one is damaged."""

import contextlib
import os
import pickle
import zipfile
import zlib

# What reading a damaged zip, npz or checkpoint file raises, by where the damage is.
DAMAGE = (OSError, EOFError, KeyError, TypeError, ValueError, RuntimeError, MemoryError)
DAMAGE += (zipfile.BadZipFile, zlib.error, pickle.UnpicklingError)


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
        if damaged := archive.testzip():  # the first member with a wrong checksum
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
