"""The weights of ADM's feature network, downloaded once into a cache folder."""

import os
from collections.abc import Callable
from pathlib import Path

from utils.download import download

GRAPH_URL = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/classify_image_graph_def.pb"


def cached_graph(check: Callable[[Path], None], url: str = GRAPH_URL, folder: Path | None = None) -> Path:
    """The path of the graph in the cache folder, downloaded first if it is not there.

    The publisher gives neither size nor hash of the file, so `check` must accept it (it raises `UserError` otherwise)
    before it takes its name; the hash goes into reports.
    """
    path = (folder or cache_folder()) / "classify_image_graph_def.pb"
    return download(url, path, f"download {url} by other means and name it with --graph", check=check)


def cache_folder() -> Path:
    """$NPP_CACHE, else next-patch-prediction in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "next-patch-prediction"
    return Path(os.environ.get("NPP_CACHE") or default)
