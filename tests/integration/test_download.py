"""Downloads of published weights, against a small hub on this machine."""

import hashlib
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from pretrained_models import catalogue, download
from tests.small_hub import point_to
from utils.files import lock
from utils.program import UserError

NAME = "npp/c2i_B_256.pt"
CONTENT = bytes(range(256)) * 4000


class Hub(BaseHTTPRequestHandler):
    """What the downloader needs of the hub: file metadata in headers, and byte ranges."""

    content, served, breaks_at, announced, sha = CONTENT, [], None, None, hashlib.sha256(CONTENT).hexdigest()
    logins, elsewhere = [], None

    def do_HEAD(self):
        self.reply(b"", self.announced or len(self.content))

    def do_GET(self):
        self.logins.append(self.headers.get("Authorization"))
        if self.elsewhere and self.path != self.elsewhere:
            self.send_response(302)
            self.send_header("Location", self.elsewhere)
            self.end_headers()
            return None
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        if "/resolve/" in self.path:
            self.served.append(start)
        if start >= len(self.content):
            return self.send_error(416)
        self.reply(self.content[start:], len(self.content) - start, start)

    def reply(self, body: bytes, length: int, start: int = 0) -> None:
        if not self.path.startswith("/pytttttt/LlamaGen-NPP/resolve/main/c2i_B_256.pt"):
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(length))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        self.send_header("ETag", f'"{self.sha}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("X-Linked-Size", str(self.announced or len(self.content)))
        self.end_headers()
        if self.breaks_at and start:
            body = b""  # nothing more after the break
        self.wfile.write(body[: self.breaks_at])
        if self.breaks_at:
            self.wfile.flush()
            self.connection.close()

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    """The handler class of a running hub, to be changed by the test."""
    handler = type("TestHub", (Hub,), {"served": [], "logins": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    point_to(monkeypatch, server.server_port)
    yield handler
    server.shutdown()
    server.server_close()


def test_a_file_arrives_under_its_name(hub, tmp_path):
    path = download.download(NAME, tmp_path)
    assert path == tmp_path / NAME
    assert path.read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == ["c2i_B_256.pt"]
    hub.content = b"other"
    assert download.download(NAME, tmp_path).read_bytes() == CONTENT  # present: nothing is fetched
    assert hub.served == [0]


def test_an_interrupted_download_continues(hub, tmp_path):
    hub.breaks_at = 100_000
    with pytest.raises(UserError, match="run the same command again to continue"):
        download.download(NAME, tmp_path)
    assert not (tmp_path / NAME).exists()
    (part,) = (tmp_path / "npp").iterdir()
    assert part.stat().st_size == 100_000
    hub.breaks_at = None
    assert download.download(NAME, tmp_path).read_bytes() == CONTENT
    assert hub.served == [0, 100_000, 100_000]  # the second connection brought nothing, so there was no third


def test_a_file_that_changed_on_the_hub_is_not_mixed_with_an_old_part(hub, tmp_path):
    hub.breaks_at = 100_000
    with pytest.raises(UserError):
        download.download(NAME, tmp_path)
    hub.breaks_at, hub.content = None, CONTENT[::-1]
    hub.sha = hashlib.sha256(hub.content).hexdigest()
    assert download.download(NAME, tmp_path).read_bytes() == CONTENT[::-1]


def test_a_wrong_size_is_refused(hub, tmp_path):
    for wrong in (len(CONTENT) + 7, len(CONTENT) - 7):
        hub.announced = wrong
        with pytest.raises(UserError, match=r"not the file expected and was removed \(1024000 bytes instead of"):
            download.download(NAME, tmp_path)
        assert not (tmp_path / NAME).exists()
    hub.announced = None
    assert download.download(NAME, tmp_path).read_bytes() == CONTENT


def test_one_download_at_a_time_of_one_file(hub, tmp_path):
    (tmp_path / "npp").mkdir()
    held = lock(tmp_path / f"npp/.c2i_B_256.pt.{hub.sha[:16]}.part", "")  # by another program, as good as
    with pytest.raises(UserError, match="another program is downloading"):
        download.download(NAME, tmp_path)
    held.close()
    assert download.download(NAME, tmp_path).read_bytes() == CONTENT


def test_a_login_stays_at_the_hub(hub, tmp_path, monkeypatch):
    """The hub sends to storage elsewhere, which must not see the token (and refuses requests that bring one)."""
    monkeypatch.setattr("huggingface_hub.utils.build_hf_headers", lambda: {"authorization": "Bearer secret"})
    hub.elsewhere = "/pytttttt/LlamaGen-NPP/resolve/main/c2i_B_256.pt?elsewhere"
    assert download.download(NAME, tmp_path).read_bytes() == CONTENT
    assert hub.logins == ["Bearer secret", None]


def test_damaged_content_is_removed(hub, tmp_path):
    hub.content = b"x" + CONTENT[1:]
    with pytest.raises(UserError, match="not the file expected and was removed .another SHA-256"):
        download.download(NAME, tmp_path)
    assert list((tmp_path / "npp").iterdir()) == []


def test_a_hub_that_does_not_say_the_size(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url: SimpleNamespace(size=None, etag="x"))
    with pytest.raises(UserError, match="the hub does not say how large"):
        download.download(NAME, tmp_path)


def test_a_file_that_the_hub_does_not_have(hub, tmp_path):
    with pytest.raises(UserError, match="the hub has no file vq_ds16_c2i.pt in FoundationVision/LlamaGen"):
        download.download("vq_ds16_c2i.pt", tmp_path)


def test_no_network(monkeypatch, tmp_path):
    point_to(monkeypatch, 9)  # nobody listens there
    with pytest.raises(UserError, match="the Hugging Face hub cannot be reached for npp/c2i_B_256.pt .* check the net"):
        download.download(NAME, tmp_path)


def test_the_command_lists_and_refuses_unknown_names(monkeypatch, tmp_path, capsys):
    (tmp_path / "vq_ds16_c2i.pt").write_bytes(b"0" * 2**20)
    monkeypatch.setattr(sys, "argv", ["download", "--folder", str(tmp_path)])
    download.main()
    listed = capsys.readouterr().out
    assert all(name in listed for name in catalogue.PUBLISHED)
    assert "1 MiB here" in listed
    assert listed.count("not here") == len(catalogue.PUBLISHED) - 1
    monkeypatch.setattr(sys, "argv", ["download", "c2i_Z.pt"])
    with pytest.raises(UserError, match="there is no published file c2i_Z.pt; the names are vq_ds16_c2i.pt"):
        download.main()


def test_weights_are_found_by_path_or_name(monkeypatch, tmp_path):
    monkeypatch.setattr(catalogue, "FOLDER", tmp_path)
    (tmp_path / "own.pt").write_bytes(b"")
    assert catalogue.find_weights(str(tmp_path / "own.pt")) == tmp_path / "own.pt"
    with pytest.raises(UserError, match="has not been downloaded; run: bash scripts/download.sh npp/c2i_B_256.pt"):
        catalogue.find_weights(NAME)
    (tmp_path / "npp").mkdir()
    (tmp_path / NAME).write_bytes(b"")
    assert catalogue.find_weights(NAME) == catalogue.find_weights(f"pretrained_models/{NAME}") == tmp_path / NAME
