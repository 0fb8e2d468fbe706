"""The published weights by name, where they lie once downloaded, and starting from them."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

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
    """The file that a flag names: a path, or a published name that has been downloaded.

    Raises `UserError` saying how to download it, if it is a published name that has not been.
    """
    path = Path(name_or_path)
    if path.exists() or name_or_path.removeprefix("pretrained_models/") not in PUBLISHED:
        return path  # whoever reads it says what is wrong with it
    name = name_or_path.removeprefix("pretrained_models/")
    if not (FOLDER / name).exists():
        raise UserError(f"{name} has not been downloaded; run: bash scripts/download.sh {name}")
    return FOLDER / name


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
