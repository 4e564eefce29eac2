"""Downloads of OGBench's dataset files: resumed where the connection broke, and checked when whole."""

import errno
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request

from common import fail
from common.files import DAMAGE, check_zip, sha256_of, shown

# Hosts that serve OGBench's files; CLEANFLOW_DATASET_MIRRORS (comma-separated base URLs) is tried first.
MIRRORS = (
    "https://rail.eecs.berkeley.edu/datasets/ogbench",
    # The copy that OGBench's author names (OGBench's issue 49): all standard state sets, none of the 100M ones.
    "https://huggingface.co/datasets/zhouzypaul/ogbench_datasets/resolve/main",
)
# Official files whose content is known: (bytes, SHA-256). Others are checked by the checksums within the npz file.
KNOWN = {
    "cube-double-play-v0.npz": (297_435_656, "a73d1a33d029cedb8bc170ef94791ec585fa2d9450096f4f2a02b8cfbcf608c9"),
    "cube-double-play-v0-val.npz": (29_726_524, "b1fcdf4bd40750351a58d0d491d6be198366ce898f0c6a2e4cb5db331966013e"),
}
ATTEMPTS = 4  # tries of one mirror that drops connections or sends short files
BACK_OFF = float(os.environ.get("CLEANFLOW_DOWNLOAD_BACKOFF", 1.0))  # seconds before the second try, then doubled


def download(file, directory):
    """Downloads one file from the first mirror that has it; a `.part` file is resumed, and renamed when it is whole.

    A part may be continued by another mirror than began it: the check of the whole file finds bytes that do not belong
    together, and the file is then fetched from its start. When no mirror serves the file, the program ends with exit
    code 2, what each mirror answered, and the three ways out.
    """
    directory.mkdir(parents=True, exist_ok=True)
    own, answers = os.environ.get("CLEANFLOW_DATASET_MIRRORS", ""), []
    for mirror in (*own.replace(",", " ").split(), *MIRRORS):
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(BACK_OFF * 2 ** (attempt - 1))
            try:
                return _fetch(f"{mirror.rstrip('/')}/{file}", directory / file)
            except ValueError as error:  # to ask this mirror again would not help
                answer = str(error)
                break
            except (OSError, EOFError, http.client.HTTPException) as error:
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                    fail(f"no space is left for {directory / file} (what has come is in its .part file)")
                answer = str(error) or type(error).__name__
        answers.append(f"  {mirror}: {answer}\n")
    name = file.removesuffix(".npz").removesuffix("-val")
    fail(
        f"{file} is not in {directory} and could not be downloaded:\n{''.join(answers)}Three ways out: "
        "(1) --dataset-source generated makes a set here with OGBench's scripted collectors; "
        f"(2) put {name}.npz and {name}-val.npz from another machine into {directory} (or name a file with "
        "--dataset-path); (3) set CLEANFLOW_DATASET_MIRRORS to a host that serves them"
    )


def _fetch(url, path):
    """One try: the rest of `path`'s `.part` file from `url`, then check and rename.

    Raises:
        OSError, EOFError, http.client.HTTPException: the connection broke (what came is kept), or what is there now is
            not whole, or a resumed part does not fit (it is deleted).
        ValueError: the mirror has another file, of which nothing is kept, or none; or it is no address.
    """
    part = path.with_name(path.name + ".part")
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to send: the part is whole or another file's, so begin again
            part.unlink(missing_ok=True)
        elif error.code < 500 and error.code not in (408, 429):  # it does not have the file, and will not later
            raise ValueError(str(error)) from None
        raise
    with response:
        if response.headers.get_content_type() == "text/html":
            raise ValueError("answered with a web page instead of the file")
        done = done if response.status == 206 else 0  # else the server sends everything again
        size, sha256 = KNOWN.get(path.name, (None, None))
        total = size if response.length is None else done + response.length
        if size is not None and total != size:
            raise ValueError(f"its file has {total:,} bytes, OGBench's has {size:,}")
        with open(part, "ab" if done else "wb") as file:
            with shown(response, total=total, initial=done, desc=f"downloading {path.name}") as source:
                shutil.copyfileobj(source, file, 2**20)
    if total is not None and part.stat().st_size < total:
        raise EOFError(f"connection closed after {part.stat().st_size} of {total} bytes")
    try:
        if sha256 is None:
            check_zip(part)
        elif (found := sha256_of(part)) != sha256:
            raise ValueError(f"its file has SHA-256 {found}, OGBench's has {sha256}")
    except DAMAGE as error:
        part.unlink()
        if done or sha256 is None:  # bytes that do not belong together, or came broken
            raise EOFError(f"what arrived is not the whole file ({error})") from None
        raise
    os.replace(part, path)
