"""Tiny models with random weights, as files, for the tests of the samplers: 4x4 codes, 16x16 pixels, 10 classes."""

from pathlib import Path

import torch

from autoregressive.models.gpt import GPT_models
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils.files import sha256

CODEBOOK, CLASSES, GRID, PIXELS = 64, 10, (4, 4), 16


def write_models(folder: Path) -> None:
    """`folder/vq.pt`, `folder/c2i_B_256.pt` (as our trainer writes them) and `folder/bare.pt` (a plain state dict)."""
    torch.manual_seed(0)
    tokenizer = VQ_models["VQ-Tiny"](codebook_size=CODEBOOK, codebook_embed_dim=4)
    torch.save({"model": tokenizer.state_dict()}, folder / "vq.pt")
    gpt = GPT_models["GPT-Tiny"](block_size=16, grid=GRID, num_classes=CLASSES, vocab_size=CODEBOOK)
    torch.nn.init.normal_(gpt.output.weight, std=0.3)
    state = gpt.state_dict()
    config = {
        "gpt_model": "GPT-Tiny", "image_size": PIXELS, "downsample_size": 4, "grid": list(GRID),
        "num_classes": CLASSES, "vocab_size": CODEBOOK, "class_names": [f"digit {i}" for i in range(CLASSES)],
        "tokenizer": {"name": "VQ-Tiny", "hash": sha256(folder / "vq.pt"), "weights": "raw"},
    }  # fmt: skip
    torch.save({"model": state, "steps": 7, "config": config}, folder / "c2i_B_256.pt")
    torch.save(state, folder / "bare.pt")


def flags(folder: Path, checkpoint: str = "c2i_B_256.pt", **changes) -> list[str]:
    """The samplers' command line for these models; `changes` by flag name, `None` to leave one out."""
    values = {
        "gpt-model": "GPT-Tiny", "gpt-ckpt": folder / checkpoint, "vq-model": "VQ-Tiny", "vq-ckpt": folder / "vq.pt",
        "codebook-size": CODEBOOK, "codebook-embed-dim": 4, "image-size": PIXELS, "downsample-size": 4,
        "num-classes": CLASSES, "cfg-scale": 2.0,
    } | {name.replace("_", "-"): value for name, value in changes.items()}  # fmt: skip
    line = []
    for name, value in values.items():
        line += [] if value is None else [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return line
