"""What weights are called by: paths, published names, repositories of the hub; and starting from them."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from pretrained_models.hub import fetch_repository, may_be_repository
from utils.checkpoint import load_strict, read_checkpoint, select_weights
from utils.program import UserError

FOLDER = Path(__file__).parent
LLAMAGEN, NPP = "FoundationVision/LlamaGen", "pytttttt/LlamaGen-NPP"


@dataclass(frozen=True)
class PublishedFile:
    repository: str  # on the Hugging Face hub
    filename: str  # there
    description: str
    config: dict = field(default_factory=dict)  # what it was trained as, which not every file says itself


def _published_gpt(repository: str, size: str, pixels: int, method: str) -> PublishedFile:
    config = {"gpt_model": f"GPT-{size}", "image_size": pixels, "downsample_size": 16}
    return PublishedFile(repository, f"c2i_{size}_{pixels}.pt", f"GPT-{size}, {method}, {pixels} px", config)


PUBLISHED = {
    "vq_ds16_c2i.pt": PublishedFile(LLAMAGEN, "vq_ds16_c2i.pt", "tokenizer VQ-16", {"vq_model": "VQ-16"}),
    "vq_ds8_c2i.pt": PublishedFile(LLAMAGEN, "vq_ds8_c2i.pt", "tokenizer VQ-8", {"vq_model": "VQ-8"}),
    **{
        f"npp/c2i_{size}_256.pt": _published_gpt(NPP, size, 256, "next patch prediction")
        for size in ("B", "L", "XL", "XXL")
    },
    **{
        f"llamagen/c2i_{size}_{pixels}.pt": _published_gpt(LLAMAGEN, size, pixels, "next token prediction")
        for pixels, sizes in ((256, ("B", "L")), (384, ("B", "L", "XL", "XXL", "3B")))
        for size in sizes
    },
}


def find_weights(name_or_path: str) -> Path:
    """What a flag names, for `read_checkpoint`: a file, or a folder in the hub's form.

    A path; a run folder, for its newest checkpoint; a published name that has been downloaded; or a repository of the
    hub (pretrained_models/hub.py), which is fetched. Raises `UserError` saying how to download a published name that
    has not been, and what is wrong with a repository.
    """
    if not name_or_path:
        raise UserError("weights are named by an empty text; give a path, or a name of pretrained_models/README.md.")
    path = Path(name_or_path)
    if (path / "checkpoints").is_dir():
        return _newest_checkpoint(path)
    name = name_or_path.removeprefix("pretrained_models/")
    if path.exists() or name not in PUBLISHED:
        is_path = path.exists() or not may_be_repository(name_or_path)
        return path if is_path else fetch_repository(name_or_path)  # whoever reads a path says what is wrong with it
    if not (FOLDER / name).exists():
        raise UserError(f"{name} has not been downloaded; run: bash scripts/download.sh {name}")
    return FOLDER / name


def _newest_checkpoint(run: Path) -> Path:
    newest = run / "checkpoints" / "last.pt"
    if not newest.exists():
        raise UserError(f"the run in {run} has no checkpoint yet; wait for its first, or name another.")
    return newest.resolve()  # the training may go on, and the next reader should find the same one


def published_config(path: str | Path) -> dict:
    """What the published file at `path` was trained as: one in `FOLDER`, or in any folder called pretrained_models."""
    place = Path(os.path.abspath(path))
    for name, file in PUBLISHED.items():
        if place == Path(os.path.abspath(FOLDER / name)) or place.match(f"pretrained_models/{name}"):
            return file.config
    return {}


def load_initial(model: nn.Module, name_or_path: str, remedy: str) -> str:
    """Load the weights that `--init-from` names, strictly; returns their kind, "ema" or "raw"."""
    path = find_weights(name_or_path)
    state, kind = select_weights(read_checkpoint(path), path)
    load_strict(model, state, path, remedy)
    return kind
