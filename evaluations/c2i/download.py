"""Fetches the weights of ADM's feature network once, into a cache folder, resuming where a download broke off."""

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from utils.files import lock_folder, sync_folder
from utils.program import UserError
from utils.progress import progress

GRAPH_URL = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/classify_image_graph_def.pb"
MAX_BYTES = 1 << 30
TIMEOUT = 60  # seconds without a byte
BLOCK = 1 << 20


def cached_graph(check: Callable[[Path], None], url: str = GRAPH_URL, folder: Path | None = None) -> Path:
    """The path of the graph in the cache folder, downloaded first if it is not there.

    The publisher gives neither size nor hash of the file. So the size is compared with what the server announces, and
    `check` must accept the file (it raises `UserError` otherwise) before it takes its name; the hash goes into reports.
    """
    folder = folder or cache_folder()
    path = folder / "classify_image_graph_def.pb"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        busy = f"another program is downloading the Inception graph to {folder}; run this again when it has ended."
        with lock_folder(folder, busy) or nullcontext():
            if path.exists():  # by now
                return path
            partial = path.with_suffix(".part")
            _download(url, partial)
            try:
                check(partial)
            except UserError as error:
                partial.unlink()
                raise UserError(f"what {url} sent is not the expected graph: {error}") from None
            os.replace(partial, path)
            sync_folder(folder)
    return path


def cache_folder() -> Path:
    """$NPP_CACHE, else next-patch-prediction in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "next-patch-prediction"
    return Path(os.environ.get("NPP_CACHE") or default)


def _download(url: str, partial: Path) -> None:
    done = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    advice = f"run the same command again to go on, or download {url} by other means and name it with --graph."
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            if response.status != 206:  # the server starts over
                done = 0
            total = done + int(response.headers.get("Content-Length") or 0)
            if total > MAX_BYTES:
                raise UserError(f"{url} announces {total} bytes, far more than the graph has.")
            received = _save(response, partial, done, total)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # everything was there already
            return
        raise UserError(f"the graph could not be downloaded ({error}); {advice}") from None
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ValueError) as error:
        raise UserError(f"the graph could not be downloaded ({error}); {advice}") from None
    if total > done and received != total:
        raise UserError(f"the download stopped after {received} of {total} bytes; {advice}")


def _save(response, partial: Path, done: int, total: int) -> int:
    """Append the response to the first `done` bytes of `partial`; the size that the file has then."""
    with open(partial, "ab") as file, progress(description="Inception graph", total=total or None, unit="B",
                                               done=done) as bar:  # fmt: skip
        file.truncate(done)
        while block := response.read(BLOCK):
            file.write(block)
            bar.update(len(block))
            if file.tell() > MAX_BYTES:
                raise UserError("the server sends more than 1 GiB; that is not the graph.")
        return file.tell()
