"""Downloads from HTTP servers on 127.0.0.1 that behave badly, then well."""

import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from common import datasets

FILE = "toy-v0.npz"


def npz_bytes():
    buffer = io.BytesIO()
    np.savez(buffer, observations=np.random.default_rng(0).normal(size=(5000, 4)))
    return buffer.getvalue()


CONTENT = npz_bytes()


class Server:
    """Serves CONTENT after the answers in `script`: "drop" half-way, "short" file without its length, a status code."""

    def __init__(self, *script, ranges=True):
        self.script, self.requests, self.ranges = list(script), [], ranges
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append((self.path, self.headers.get("Range")))
                answer = outer.script.pop(0) if outer.script else "whole"
                if isinstance(answer, int):
                    self.send_error(answer)
                    return
                start = 0
                if self.headers.get("Range") and outer.ranges:
                    start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
                    if start >= len(CONTENT):
                        self.send_error(416)
                        return
                self.send_response(206 if start else 200)
                body = CONTENT[start:]
                if answer == "garbage":
                    body = b"<html>not a dataset</html>"
                if answer != "short":
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if answer in ("drop", "short") else body)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture(autouse=True)
def quick_and_local(monkeypatch):
    monkeypatch.setattr(datasets, "BACK_OFF", 0.01)
    monkeypatch.setattr(datasets, "MIRRORS", ())


def use(monkeypatch, *servers):
    monkeypatch.setenv("CLEANFLOW_DATASET_MIRRORS", ", ".join(server.url + "/" for server in servers))


def test_dropped_connection_is_resumed_where_it_broke(tmp_path, monkeypatch):
    server = Server("drop", "drop")
    use(monkeypatch, server)
    datasets.download(FILE, tmp_path / "new")
    assert (tmp_path / "new" / FILE).read_bytes() == CONTENT
    half = len(CONTENT) // 2
    assert server.requests[:2] == [(f"/{FILE}", None), (f"/{FILE}", f"bytes={half}-")]
    assert len(server.requests) == 3
    assert [path.name for path in (tmp_path / "new").iterdir()] == [FILE]


def test_server_without_ranges_sends_everything_again(tmp_path, monkeypatch):
    use(monkeypatch, Server("drop", ranges=False))
    datasets.download(FILE, tmp_path)
    assert (tmp_path / FILE).read_bytes() == CONTENT


@pytest.mark.parametrize("answer", ["short", "garbage"])
def test_short_or_foreign_file_is_thrown_away_and_fetched_again(tmp_path, monkeypatch, answer):
    server = Server(answer)
    use(monkeypatch, server)
    datasets.download(FILE, tmp_path)
    assert (tmp_path / FILE).read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_mirrors_are_tried_in_order_and_404_is_not_repeated(tmp_path, monkeypatch):
    first, second, third = Server(404, 404), Server(503, "whole"), Server()
    use(monkeypatch, first, second, third)
    datasets.download(FILE, tmp_path)
    assert (len(first.requests), len(second.requests), len(third.requests)) == (1, 2, 0)
    assert (tmp_path / FILE).read_bytes() == CONTENT


def test_a_part_file_of_an_earlier_process_is_resumed(tmp_path, monkeypatch):
    server = Server()
    use(monkeypatch, server)
    (tmp_path / f"{FILE}.part").write_bytes(CONTENT[:1000])
    datasets.download(FILE, tmp_path)
    assert server.requests == [(f"/{FILE}", "bytes=1000-")]
    assert (tmp_path / FILE).read_bytes() == CONTENT


def test_a_part_file_that_is_too_long_or_wrong_is_replaced(tmp_path, monkeypatch):
    for wrong in (CONTENT + b"more", b"x" * 1000):
        use(monkeypatch, Server())
        (tmp_path / FILE).unlink(missing_ok=True)
        (tmp_path / f"{FILE}.part").write_bytes(wrong)
        datasets.download(FILE, tmp_path)
        assert (tmp_path / FILE).read_bytes() == CONTENT


def test_failure_names_every_answer_and_three_ways_out_and_leaves_no_file(tmp_path, monkeypatch, capsys):
    gone, dropping = Server(404), Server(*["drop"] * 4, ranges=False)
    gone_url, unreachable = gone.url, "http://127.0.0.1:9"
    monkeypatch.setenv("CLEANFLOW_DATASET_MIRRORS", f"{gone_url},{unreachable},{dropping.url}")
    with pytest.raises(SystemExit) as stop:
        datasets.download(FILE, tmp_path)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    for words in (gone_url, "404", unreachable, "refused", dropping.url, "of %d bytes" % len(CONTENT)):
        assert words in message
    for way in ("--dataset-source generated", "--dataset-path", "CLEANFLOW_DATASET_MIRRORS"):
        assert way in message
    assert not (tmp_path / FILE).exists()
    assert len(dropping.requests) == datasets.ATTEMPTS


def test_find_dataset_downloads_what_is_missing_and_only_that(tmp_path, monkeypatch):
    server = Server()
    use(monkeypatch, server)
    (tmp_path / "cube-single-play-v0-val.npz").write_bytes(b"already here")
    path = datasets.find_dataset("cube-single-play-singletask-task3-v0", tmp_path)
    assert path == tmp_path / "cube-single-play-v0.npz"
    assert [request[0] for request in server.requests] == ["/cube-single-play-v0.npz"]
    datasets.find_dataset("cube-single-play-singletask-task3-v0", tmp_path)
    assert len(server.requests) == 1
