"""Building a trained tokenizer, in one place, so that extraction, sampling and reconstruction use the same weights."""

from dataclasses import dataclass
from pathlib import Path

import torch

from pretrained_models.catalogue import find_weights, published_config
from tokenizer.tokenizer_image.vq_model import VQ_models, VQModel
from utils.checkpoint import load_strict, read_checkpoint, recorded_settings, select_weights
from utils.files import sha256
from utils.program import UserError


@dataclass(frozen=True)
class TokenizerInfo:
    """Which tokenizer this is; `dataclasses.asdict` of it goes into what it produced."""

    name: str
    codebook_size: int
    codebook_embed_dim: int
    downsample_factor: int
    checkpoint: str
    weights: str  # "ema" or "raw"
    sha256: str  # of the checkpoint's file

    def __str__(self) -> str:
        return f"{self.name} ({self.weights} weights of {self.checkpoint}, sha256 {self.sha256[:12]}…)"


def build_tokenizer(
    name: str,
    codebook_size: int,
    codebook_embed_dim: int,
    checkpoint_path: str | Path,
    weights: str = "auto",
    device: torch.device | str = "cpu",
) -> tuple[VQModel, TokenizerInfo]:
    """The tokenizer `name` of `VQ_models` with the checkpoint's weights, frozen, in eval mode, on `device`.

    `checkpoint_path` may be a published name; `weights` is one of `utils.checkpoint.WEIGHTS_CHOICES`. Raises
    `UserError` for a file that is not a checkpoint, and for one that was trained with another model or codebook than
    the flags say.
    """
    if name not in VQ_models:
        raise UserError(f"there is no tokenizer {name}; --vq-model is one of {', '.join(VQ_models)}.")
    checkpoint_path = find_weights(str(checkpoint_path))
    checkpoint = read_checkpoint(checkpoint_path)
    flags = {"vq_model": name, "codebook_size": codebook_size, "codebook_embed_dim": codebook_embed_dim}
    _refuse_contradictions(published_config(checkpoint_path) | recorded_settings(checkpoint), flags, checkpoint_path)
    state, kind = select_weights(checkpoint, checkpoint_path, weights)
    model = VQ_models[name](codebook_size=codebook_size, codebook_embed_dim=codebook_embed_dim)
    remedy = "check --vq-model, --codebook-size and --codebook-embed-dim."
    load_strict(model, state, checkpoint_path, remedy)
    model.requires_grad_(False).eval().to(device)
    info = TokenizerInfo(
        name=name,
        codebook_size=codebook_size,
        codebook_embed_dim=codebook_embed_dim,
        downsample_factor=model.downsample_factor,
        checkpoint=str(checkpoint_path),
        weights=kind,
        sha256=sha256(checkpoint_path),
    )
    return model, info


def check_image_size(size: int, name: str, model: VQModel) -> None:
    """Raise `UserError` unless the tokenizer's codes tile a square of `size` pixels."""
    factor = model.downsample_factor
    if size < factor or size % factor:
        near = max(1, round(size / factor)) * factor
        raise UserError(f"--image-size {size} is not a multiple of {factor}, the pixels a side that a code of {name} "
                        f"covers; use {near}.")  # fmt: skip


def _refuse_contradictions(recorded: dict, flags: dict, path: str | Path) -> None:
    for flag, value in flags.items():
        if flag in recorded and recorded[flag] != value:
            option = "--" + flag.replace("_", "-")
            raise UserError(f"{path} was trained with {option} {recorded[flag]}, not {value}; give {option} "
                            f"{recorded[flag]} or another checkpoint.")  # fmt: skip
