"""Files from the network: whole and checked, or absent; continued where a download broke off."""

import http.client
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO

from utils.files import lock, sha256, sync_folder
from utils.program import UserError
from utils.progress import progress

TIMEOUT = 60  # seconds without a byte
BLOCK = 1 << 20  # bytes
BROKEN = (urllib.error.URLError, http.client.HTTPException, ssl.SSLError, TimeoutError, ConnectionError)


def download(
    url: str,
    path: Path,
    remedy: str,
    *,
    size: int | None = None,
    digest: str = "",
    headers: dict[str, str] | None = None,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Fetch `url` into `path` unless it is there; returns `path`.

    What has arrived waits beside it under a hidden name, where the next call continues. It takes its name when it has
    `size` bytes, a SHA-256 that begins with `digest`, and `check` does not raise `UserError`; else it is removed.
    `headers` go to the first server only, not to where it redirects. Raises `UserError` with `remedy` as its last
    words ("name it with --graph"), also if another process is downloading the file.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{digest[:16] or 'any'}.part")  # one part per version of the file
    with lock(part, f"another program is downloading {path}; run this again when it has ended.") as file:
        if path.exists():  # by now
            return path
        try:
            _receive(url, headers or {}, file, path.name)
        except BROKEN as error:
            again = "run the same command again to continue"
            raise UserError(f"{path.name} could not be downloaded ({error}); {again}, or {remedy}.") from error
        os.fsync(file.fileno())
        try:
            _verify(part, size, digest)
            if check is not None:
                check(part)
        except UserError as error:
            part.unlink()
            what = f"what {url} sent is not the file expected and was removed ({str(error).rstrip('.')})"
            raise UserError(f"{what}; run the same command again, or {remedy}.") from error
        os.replace(part, path)
    sync_folder(path.parent)
    return path


def _receive(url: str, headers: dict[str, str], file: IO[bytes], name: str) -> None:
    """Append what is missing to `file`, over as many connections as it takes, if each brings it further."""
    while True:
        before = file.tell()
        try:
            return _append(url, headers, file, name)
        except BROKEN as error:
            if isinstance(error, urllib.error.HTTPError) and error.code == 416 and before:  # nothing is missing
                return
            if file.tell() <= before:
                raise


def _append(url: str, headers: dict[str, str], file: IO[bytes], name: str) -> None:
    done = file.tell()
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    for header, value in headers.items():
        request.add_unredirected_header(header, value)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        if done and response.status != 206:  # the server starts over
            file.truncate(0)
            done = 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        with progress(description=name, total=total, unit="B", done=done) as bar:
            while block := response.read(BLOCK):
                file.write(block)
                bar.update(len(block))
    file.flush()
    if total is not None and file.tell() != total:
        raise ConnectionError(f"it stopped after {file.tell()} of {total} bytes")


def _verify(path: Path, size: int | None, digest: str) -> None:
    if size is not None and path.stat().st_size != size:
        raise UserError(f"{path.stat().st_size} bytes instead of {size}")
    if digest and not sha256(path).startswith(digest):
        raise UserError(f"another SHA-256 than {digest}")
