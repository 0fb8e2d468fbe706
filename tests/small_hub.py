"""A Hugging Face hub on this machine: repositories that are made, written to, read, private or missing."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import huggingface_hub.constants

TOKEN = "hf_secret"


class SmallHub:
    """Its repositories: files by repository, revision and name."""

    def __init__(self):
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.announces = 0  # how many bytes more than there are
        self.asked: list[str] = []

    def publish(self, repository: str, files: dict[str, bytes], revision: str = "main") -> None:
        self.repositories.setdefault(repository, {}).setdefault(revision, {}).update(files)

    def commit(self, repository: str, revision: str) -> str:
        """The name of what a revision holds: a hash of it, as Git's."""
        revisions = self.repositories[repository]
        named = {self._hash(files): name for name, files in revisions.items()}
        return revision if revision in named else self._hash(revisions[revision])

    def files(self, repository: str, revision: str) -> dict[str, bytes] | None:
        revisions = self.repositories[repository]
        return revisions.get(revision) or next((f for f in revisions.values() if self._hash(f) == revision), None)

    @staticmethod
    def _hash(files: dict[str, bytes]) -> str:
        parts = (name.encode() + hashlib.sha1(content).digest() for name, content in sorted(files.items()))
        return hashlib.sha1(b"".join(parts)).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: SmallHub

    def do_HEAD(self):
        self.resolve()

    def do_GET(self):
        if self.path.startswith("/api/models/"):
            return self.information()
        self.resolve()

    def do_POST(self):
        path, body = urlsplit(self.path).path, self.rfile.read(int(self.headers["Content-Length"]))
        if path == "/api/validate-yaml":  # of the model card
            return self.answer({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.hub.publish(name, {".gitattributes": b""})
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(name)
            return self.answer({"url": f"{huggingface_hub.constants.ENDPOINT}/{name}"})
        repository, action = re.fullmatch(r"/api/models/(\w+/[\w.-]+)/(\w+)(?:/\w+)?", path).groups()
        if action == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self.answer({"files": [file | {"shouldIgnore": False} for file in files]})
        assert action == "commit"
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.hub.publish(repository, {line["value"]["path"]: base64.b64decode(line["value"]["content"])})
        url = f"{huggingface_hub.constants.ENDPOINT}/{repository}/commit/0"
        self.answer({"success": True, "commitUrl": url, "commitOid": self.hub.commit(repository, "main")})

    def information(self) -> None:
        repository = re.match(r"/api/models/(\w+/[\w.-]+)", self.path)[1]
        if repository not in self.hub.repositories:
            return self.refuse(404, "RepoNotFound")
        self.answer({"id": repository, "sha": self.hub.commit(repository, "main"), "siblings": []})

    def resolve(self) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        asked = re.fullmatch(r"/(\w+/[\w.-]+)/resolve/([^/]+)/(.*)", self.path)
        if asked is None:  # what the library wants to know for itself
            return self.refuse(404, "")
        repository, revision, name = asked.groups()
        private = repository in self.hub.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        if repository not in self.hub.repositories or private:
            return self.refuse(401, "RepoNotFound")  # as the hub answers to both
        files = self.hub.files(repository, revision)
        if files is None:
            return self.refuse(404, "RevisionNotFound")
        if name not in files:
            return self.refuse(404, "EntryNotFound")
        self.answer(
            files[name],
            ETag=f'"{hashlib.sha1(files[name]).hexdigest()}"',
            **{
                "X-Repo-Commit": self.hub.commit(repository, revision),
                "X-Linked-Size": str(len(files[name]) + self.hub.announces),
            },
        )

    def answer(self, body: bytes | dict, **headers: str) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


@contextmanager
def small_hub(monkeypatch, cache) -> Iterator[SmallHub]:
    """A running hub to which the library is pointed; what is fetched goes into `cache`."""
    hub = SmallHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    point_to(monkeypatch, server.server_port)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    yield hub
    server.shutdown()
    server.server_close()


def point_to(monkeypatch, port: int) -> None:
    """Point the hub's library to a port of this machine."""
    endpoint = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between its attempts
