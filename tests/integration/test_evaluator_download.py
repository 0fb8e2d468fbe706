"""Fetching the graph from a server on this machine: whole, resumed, cut short, wrong."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from evaluations.c2i import features
from evaluations.c2i.download import cache_folder, cached_graph
from tests.inception_graph import InceptionGraph
from utils.files import lock
from utils.program import UserError

CONTENT = InceptionGraph(32, repeated=True).content()
NAME = "classify_image_graph_def.pb"
PART = f".{NAME}.any.part"


class Server(ThreadingHTTPServer):
    content, honours_range, status = CONTENT, True, 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges: list[str | None] = []
        self.stops_after: list[int] = []  # bytes, one for each connection
        self.url = f"http://127.0.0.1:{self.server_port}/{NAME}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.honours_range else 0
        if self.server.status != 200 or start >= len(self.server.content):
            return self.send_error(416 if self.server.status == 200 else self.server.status)
        body = self.server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.stops_after.pop(0)] if self.server.stops_after else body)

    def log_message(self, *_) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def accept(path: Path) -> None:
    features.InceptionNetwork(path)


def left(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_two_programs_do_not_download_at_once(server, tmp_path):
    held = lock(tmp_path / PART, "")  # by another program, as good as
    with pytest.raises(UserError, match="another program is downloading"):
        cached_graph(accept, server.url, tmp_path)
    assert server.ranges == []
    held.close()
    assert cached_graph(accept, server.url, tmp_path).read_bytes() == CONTENT


def test_downloaded_once(server, tmp_path):
    for _ in range(2):
        path = cached_graph(accept, server.url, tmp_path)
        assert path == tmp_path / NAME
        assert path.read_bytes() == CONTENT
    assert server.ranges == [None]
    assert left(tmp_path) == [NAME, f"{NAME}.sha256"]
    path.write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(UserError, match="is not the file that was downloaded; remove it and .*sha256 to fetch it"):
        cached_graph(accept, server.url, tmp_path)


@pytest.mark.parametrize("honours_range", [True, False])
def test_a_broken_download_is_resumed(server, tmp_path, honours_range):
    server.stops_after = [1_000, 0]
    with pytest.raises(UserError, match=f"stopped after 1000 of {len(CONTENT)} bytes.; run the same command again"):
        cached_graph(accept, server.url, tmp_path)
    assert not (tmp_path / NAME).exists()
    server.honours_range = honours_range
    assert cached_graph(accept, server.url, tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=1000-", "bytes=1000-"]


def test_a_connection_that_ends_early_is_made_again(server, tmp_path):
    server.stops_after = [5_000]
    assert cached_graph(accept, server.url, tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=5000-"]


def test_a_download_that_was_complete_but_not_renamed(server, tmp_path):
    (tmp_path / PART).write_bytes(CONTENT)
    assert cached_graph(accept, server.url, tmp_path).read_bytes() == CONTENT


def test_something_else_is_refused_and_removed(server, tmp_path):
    server.content = b"<html>log in to the hotel's network</html>"
    with pytest.raises(UserError, match="is not the file expected"):
        cached_graph(accept, server.url, tmp_path)
    assert left(tmp_path) == []


def test_a_graph_of_other_widths_is_not_the_published_one(server, tmp_path):
    with pytest.raises(UserError, match=r"classifier has the shape .* instead of \(2048, 1008\)"):
        cached_graph(features.check_published_graph, server.url, tmp_path)
    assert left(tmp_path) == []


def test_server_errors_and_no_server(server, tmp_path):
    server.status = 404
    with pytest.raises(UserError, match=r"could not be downloaded .*404.* name it with --graph"):
        cached_graph(accept, server.url, tmp_path)
    with pytest.raises(UserError, match="could not be downloaded .* name it with --graph"):
        cached_graph(accept, "http://127.0.0.1:9/graph.pb", tmp_path)


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("NPP_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "next-patch-prediction"
    monkeypatch.setenv("NPP_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
