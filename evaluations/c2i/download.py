"""The weights of ADM's feature network, downloaded once into a cache folder."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from utils.download import download
from utils.files import atomic_file, sha256
from utils.program import UserError

GRAPH_URL = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/classify_image_graph_def.pb"


def cached_graph(check: Callable[[Path], None], url: str = GRAPH_URL, folder: Path | None = None) -> Path:
    """The path of the graph in the cache folder, downloaded first if it is not there.

    The publisher gives neither size nor hash of the file, so `check` must accept it (it raises `UserError` otherwise)
    before it takes its name. Its hash is kept beside it from then on: a graph has no checksum of its own, and changed
    weights give other numbers in silence. Raises `UserError` if it is not what it was.
    """
    path = (folder or cache_folder()) / "classify_image_graph_def.pb"
    download(url, path, f"download {url} by other means and name it with --graph", check=check)
    kept, now = path.with_name(f"{path.name}.sha256"), sha256(path)
    if not kept.exists():
        with suppress(OSError), atomic_file(kept, "w") as file:  # a cache that others filled may be read-only
            file.write(now + "\n")
    elif kept.read_text(errors="replace").strip() != now:
        raise UserError(f"{path} is not the file that was downloaded; remove it and {kept.name} to fetch it again.")
    return path


def cache_folder() -> Path:
    """$NPP_CACHE, else next-patch-prediction in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "next-patch-prediction"
    return Path(os.environ.get("NPP_CACHE") or default)
