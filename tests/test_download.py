"""Downloads from HTTP servers on 127.0.0.1 that behave badly, then well."""

import errno
import hashlib
import io
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import ROOT, parse

from common import datasets, download, files, generate

FILE = "toy-v0.npz"


def npz_bytes(seed=0, rows=5000, save=np.savez):
    buffer = io.BytesIO()
    save(buffer, observations=np.random.default_rng(seed).normal(size=(rows, 4)))
    return buffer.getvalue()


CONTENT = npz_bytes()
PAGE = b"<html>not a dataset</html>"
MIRRORS = download.MIRRORS


class Server:
    """Serves `content`, or sends to `redirect`, after the answers in `script`: "drop" half-way, "chunked" and broken
    half-way, "short" file or "unsized" whole one without its length, "page" or "garbage" instead, a status code."""

    def __init__(self, *script, ranges=True, content=CONTENT, redirect=None):
        self.script, self.requests, self.ranges = list(script), [], ranges
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append((self.path, self.headers.get("Range")))
                answer = outer.script.pop(0) if outer.script else "whole"
                if isinstance(answer, int):
                    self.send_error(answer)
                    return
                if redirect:
                    self.send_response(302)
                    self.send_header("Location", redirect + self.path)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                start = 0
                if self.headers.get("Range") and outer.ranges:
                    start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
                    if start >= len(content):
                        self.send_error(416)
                        return
                self.send_response(206 if start else 200)
                body = content[start:]
                if answer in ("garbage", "page"):
                    body = PAGE
                if answer == "page":
                    self.send_header("Content-Type", "text/html; charset=utf-8")
                half = body[: len(body) // 2]
                if answer == "chunked":
                    self.send_header("Transfer-Encoding", "chunked")
                    half = b"%x\r\n" % len(body) + half
                elif answer not in ("short", "unsized"):
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(half if answer in ("drop", "short", "chunked") else body)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture(autouse=True)
def quick_and_local(monkeypatch):
    monkeypatch.setattr(download, "BACK_OFF", 0.01)
    monkeypatch.setattr(download, "MIRRORS", ())
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("CLEANFLOW_DATASET_MIRRORS", raising=False)


def use(monkeypatch, *servers):
    monkeypatch.setenv("CLEANFLOW_DATASET_MIRRORS", ", ".join(server.url + "/" for server in servers))


def know(monkeypatch, content=CONTENT):
    """Puts FILE among the files of known content."""
    monkeypatch.setitem(download.KNOWN, FILE, (len(content), hashlib.sha256(content).hexdigest()))


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_dropped_connection_is_resumed_where_it_broke(tmp_path, monkeypatch):
    server = Server("drop", "drop")
    use(monkeypatch, server)
    download.download(FILE, tmp_path / "new")
    assert (tmp_path / "new" / FILE).read_bytes() == CONTENT
    half = len(CONTENT) // 2
    assert server.requests[:2] == [(f"/{FILE}", None), (f"/{FILE}", f"bytes={half}-")]
    assert len(server.requests) == 3
    assert names(tmp_path / "new") == [FILE]


def test_server_without_ranges_sends_everything_again(tmp_path, monkeypatch):
    use(monkeypatch, Server("drop", ranges=False))
    download.download(FILE, tmp_path)
    assert (tmp_path / FILE).read_bytes() == CONTENT


@pytest.mark.parametrize("answer", ["short", "garbage"])
def test_short_or_foreign_file_is_thrown_away_and_fetched_again(tmp_path, monkeypatch, answer):
    server = Server(answer)
    use(monkeypatch, server)
    download.download(FILE, tmp_path)
    assert (tmp_path / FILE).read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_mirrors_are_tried_in_order_and_404_is_not_repeated(tmp_path, monkeypatch):
    first, second, third = Server(404, 404), Server(503, "whole"), Server()
    use(monkeypatch, first, second, third)
    download.download(FILE, tmp_path)
    assert (len(first.requests), len(second.requests), len(third.requests)) == (1, 2, 0)
    assert (tmp_path / FILE).read_bytes() == CONTENT


def test_a_part_file_of_an_earlier_process_is_resumed(tmp_path, monkeypatch):
    server = Server()
    use(monkeypatch, server)
    (tmp_path / f"{FILE}.part").write_bytes(CONTENT[:1000])
    download.download(FILE, tmp_path)
    assert server.requests == [(f"/{FILE}", "bytes=1000-")]
    assert (tmp_path / FILE).read_bytes() == CONTENT


def test_a_part_file_that_is_too_long_or_wrong_is_replaced(tmp_path, monkeypatch):
    for wrong in (CONTENT + b"more", b"x" * 1000):
        use(monkeypatch, Server())
        (tmp_path / FILE).unlink(missing_ok=True)
        (tmp_path / f"{FILE}.part").write_bytes(wrong)
        download.download(FILE, tmp_path)
        assert (tmp_path / FILE).read_bytes() == CONTENT


def test_failure_names_every_answer_and_three_ways_out_and_leaves_no_file(tmp_path, monkeypatch, capsys):
    gone, dropping = Server(404), Server(*["drop"] * 4, ranges=False)
    gone_url, unreachable = gone.url, "http://127.0.0.1:9"
    monkeypatch.setenv("CLEANFLOW_DATASET_MIRRORS", f"{gone_url},{unreachable},{dropping.url}")
    with pytest.raises(SystemExit) as stop:
        download.download(FILE, tmp_path)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    for words in (gone_url, "404", unreachable, "refused", dropping.url, f"of {len(CONTENT)} bytes"):
        assert words in message
    for way in ("--dataset-source generated", "--dataset-path", "CLEANFLOW_DATASET_MIRRORS"):
        assert way in message
    assert not (tmp_path / FILE).exists()
    assert len(dropping.requests) == download.ATTEMPTS


def test_a_run_whose_mirrors_are_unreachable_ends_with_the_ways_out(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("CLEANFLOW_DATASET_MIRRORS", raising=False)
    monkeypatch.setattr(download, "MIRRORS", ("http://127.0.0.1:9",))
    with pytest.raises(SystemExit) as stop:
        datasets.find_dataset(parse("floq", "--dataset-dir", str(tmp_path / "data")))
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "Three ways out: (1) --dataset-source generated" in message


def test_find_dataset_downloads_what_is_missing_and_only_that(tmp_path, monkeypatch):
    server = Server()
    use(monkeypatch, server)
    (tmp_path / "cube-single-play-v0-val.npz").write_bytes(b"already here")
    args = parse("floq", "--env-id", "cube-single-play-singletask-task3-v0", "--dataset-dir", str(tmp_path))
    path = datasets.find_dataset(args)
    assert path == tmp_path / "cube-single-play-v0.npz"
    assert [request[0] for request in server.requests] == ["/cube-single-play-v0.npz"]
    datasets.find_dataset(args)
    assert len(server.requests) == 1
    generate.val_path(path).unlink()  # training does not need it
    assert datasets.find_dataset(args) == path and len(server.requests) == 1


def test_files_can_be_fetched_before_a_run(tmp_path, monkeypatch):
    """As on a cluster whose compute nodes have no internet."""
    server = Server()
    use(monkeypatch, server)
    command = [sys.executable, "-m", "common.datasets", "toy-v0", "--dataset-dir", str(tmp_path)]
    for _ in range(2):  # the second time everything is there
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0 and done.stdout.endswith(f"{tmp_path}/toy-v0.npz\n"), done.stderr
    assert [path for path, _ in server.requests] == ["/toy-v0-val.npz", "/toy-v0.npz"]
    assert {path.name for path in tmp_path.iterdir()} == {"toy-v0-val.npz", "toy-v0.npz"}


# --- Mirrors that serve something else ---


def test_official_mirrors_are_ogbenchs_host_then_the_flat_copy(tmp_path, monkeypatch, capsys):
    asked = []

    def urlopen(request, timeout):
        asked.append(request.full_url)
        raise urllib.error.HTTPError(request.full_url, 404, "Not Found", None, None)

    monkeypatch.setattr(download, "MIRRORS", MIRRORS)
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setenv("CLEANFLOW_DATASET_MIRRORS", "https://a/x,https://b/")
    with pytest.raises(SystemExit):
        download.download("cube-double-play-v0-val.npz", tmp_path)
    assert asked[:2] == ["https://a/x/cube-double-play-v0-val.npz", "https://b/cube-double-play-v0-val.npz"]
    assert asked[2:] == [
        "https://rail.eecs.berkeley.edu/datasets/ogbench/cube-double-play-v0-val.npz",
        "https://huggingface.co/datasets/zhouzypaul/ogbench_datasets/resolve/main/cube-double-play-v0-val.npz",
    ]


WRONG = {
    "another file of the same size": ("whole", {"content": npz_bytes(seed=1)}, "has SHA-256"),
    "a longer file": ("whole", {"content": npz_bytes(rows=6000)}, f"bytes, OGBench's has {len(CONTENT):,}"),
    "a longer file without its length": ("unsized", {"content": npz_bytes(rows=6000)}, "has SHA-256"),
    "a web page": ("page", {}, "web page"),
    "a web page that does not say so": ("garbage", {}, f"has {len(PAGE)} bytes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_of_known_content_is_had_from_the_next_mirror(tmp_path, monkeypatch, capsys, case):
    answer, kwargs, words = WRONG[case]
    know(monkeypatch)
    wrong, right = Server(*[answer] * 9, **kwargs), Server()
    use(monkeypatch, wrong, right)
    download.download(FILE, tmp_path)
    assert (tmp_path / FILE).read_bytes() == CONTENT and names(tmp_path) == [FILE]
    assert wrong.requests == right.requests == [(f"/{FILE}", None)]  # asked once, and nothing of it is continued

    (tmp_path / FILE).unlink()
    use(monkeypatch, wrong)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        download.download(FILE, tmp_path)
    assert stop.value.code == 2 and names(tmp_path) == []
    message = capsys.readouterr().err
    assert words in message and wrong.url in message


def test_a_damaged_compressed_file_is_thrown_away(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, observations=np.random.default_rng(0).integers(0, 9, size=(5000, 4)))
    content = bytearray(buffer.getvalue())
    content[80:130] = b"\xff" * 50  # where the deflated stream begins: zlib, not the checksum, finds it
    use(monkeypatch, Server(content=bytes(content)), Server())
    download.download(FILE, tmp_path)
    assert (tmp_path / FILE).read_bytes() == CONTENT and names(tmp_path) == [FILE]


def test_a_web_page_costs_no_partial_file(tmp_path, monkeypatch):
    """Of a file of unknown content too, and the next mirror continues what was there."""
    page, right = Server("page"), Server()
    use(monkeypatch, page, right)
    (tmp_path / f"{FILE}.part").write_bytes(CONTENT[:1000])
    download.download(FILE, tmp_path)
    assert len(page.requests) == 1 and right.requests == [(f"/{FILE}", "bytes=1000-")]
    assert (tmp_path / FILE).read_bytes() == CONTENT and names(tmp_path) == [FILE]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("known", [True, False])
def test_a_part_of_one_mirror_does_not_mix_with_the_bytes_of_another(tmp_path, monkeypatch, known, save):
    """Of sums known and unknown: the mixture is noticed, and the second mirror's file is fetched from its start."""
    content, other = npz_bytes(save=save), npz_bytes(seed=1, save=save)
    if known:
        know(monkeypatch, content)
        other = other[: len(content)].ljust(len(content), b"\0")
    dropping, right = Server("drop", 503, 503, 503, content=other), Server(content=content)
    use(monkeypatch, dropping, right)
    download.download(FILE, tmp_path)
    assert (tmp_path / FILE).read_bytes() == content and names(tmp_path) == [FILE]
    assert len(dropping.requests) == download.ATTEMPTS
    assert right.requests == [(f"/{FILE}", f"bytes={len(other) // 2}-"), (f"/{FILE}", None)]


def test_a_mirror_with_the_right_bytes_continues_the_part_of_another(tmp_path, monkeypatch):
    know(monkeypatch)
    dropping, right = Server("drop", 503, 503, 503), Server()
    use(monkeypatch, dropping, right)
    download.download(FILE, tmp_path)
    assert (tmp_path / FILE).read_bytes() == CONTENT
    assert right.requests == [(f"/{FILE}", f"bytes={len(CONTENT) // 2}-")]


def test_known_size_finds_a_short_file_without_length_which_is_resumed(tmp_path, monkeypatch):
    know(monkeypatch)
    server = Server("short")
    use(monkeypatch, server)
    download.download(FILE, tmp_path)
    assert (tmp_path / FILE).read_bytes() == CONTENT
    assert server.requests == [(f"/{FILE}", None), (f"/{FILE}", f"bytes={len(CONTENT) // 2}-")]


def test_a_redirect_keeps_the_range(tmp_path, monkeypatch):
    """As Hugging Face answers: 302 to the host that holds the bytes."""
    know(monkeypatch)
    store = Server("drop")
    front = Server(redirect=store.url + "/cdn")
    use(monkeypatch, front)
    download.download(FILE, tmp_path)
    ranges = [None, f"bytes={len(CONTENT) // 2}-"]
    assert front.requests == [(f"/{FILE}", wanted) for wanted in ranges]
    assert store.requests == [(f"/cdn/{FILE}", wanted) for wanted in ranges]
    assert (tmp_path / FILE).read_bytes() == CONTENT and names(tmp_path) == [FILE]


@pytest.mark.parametrize("answer", [429, 408, "chunked"])
def test_a_busy_mirror_or_a_broken_chunk_is_tried_again(tmp_path, monkeypatch, answer):
    server = Server(answer)
    use(monkeypatch, server)
    download.download(FILE, tmp_path)
    assert (tmp_path / FILE).read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_a_full_disk_is_called_so(tmp_path, monkeypatch, capsys):
    calls = []

    def full(url, path):
        calls.append(url)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("CLEANFLOW_DATASET_MIRRORS", "http://a http://b")
    monkeypatch.setattr(download, "_fetch", full)
    with pytest.raises(SystemExit) as stop:
        download.download(FILE, tmp_path)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and f"no space is left for {tmp_path / FILE}" in message and len(calls) == 1


def test_an_address_without_its_scheme_is_one_more_answer(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLEANFLOW_DATASET_MIRRORS", "host/path")
    with pytest.raises(SystemExit) as stop:
        download.download(FILE, tmp_path)
    assert stop.value.code == 2 and "host/path: unknown url type" in capsys.readouterr().err


def test_a_check_shows_its_progress_only_when_it_takes_long(tmp_path, monkeypatch, capsys):
    path = tmp_path / FILE
    path.write_bytes(CONTENT)
    assert files.sha256_of(path) == hashlib.sha256(CONTENT).hexdigest()
    large = tmp_path / "large"  # of several blocks
    large.write_bytes(20 * CONTENT)
    assert large.stat().st_size > 3e6 and files.sha256_of(large) == hashlib.sha256(20 * CONTENT).hexdigest()
    with zipfile.ZipFile(large, "w") as archive:
        archive.writestr("member", 20 * CONTENT)
        end = archive.fp.tell()
    files.check_zip(large)
    content = bytearray(large.read_bytes())
    content[end - 1] ^= 1  # the last byte of the member's content
    large.write_bytes(content)
    with pytest.raises(zipfile.BadZipFile):
        files.check_zip(large)
    files.check_zip(path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(files, "BAR_DELAY", 0)
    files.sha256_of(path)
    assert f"checking {FILE}" in capsys.readouterr().err
    files.check_zip(path)
    assert f"checking {FILE}" in capsys.readouterr().err
