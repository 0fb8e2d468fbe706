"""A tiny image folder, a tiny tokenizer and the command line that extracts the one with the other."""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from autoregressive.train import extract_codes_c2i
from tokenizer.tokenizer_image.vq_model import VQ_models

CLASSES, IMAGES = ("ant", "bee", "cat"), 8  # images per class
CODEBOOK = 64


def make_images(folder: Path) -> Path:
    """Smooth random colour images of several shapes."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(IMAGES):
            colours = Image.fromarray(rng.integers(0, 256, (5, 4, 3), np.uint8))
            size = (30 + 5 * number, 40)
            colours.resize(size, Image.Resampling.BICUBIC).save(folder / name / f"{number}.png")
    return folder


def make_tokenizer(path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = VQ_models["VQ-Tiny"](codebook_size=CODEBOOK, codebook_embed_dim=8)
    torch.save({"model": model.state_dict()}, path)
    return path


def arguments(data: Path, codes: Path, tokenizer: Path, *more: str) -> list[str]:
    """Ten crops at 16 px; blocks of two images."""
    flags = {
        "--data-path": data,
        "--code-path": codes,
        "--vq-model": "VQ-Tiny",
        "--vq-ckpt": tokenizer,
        "--codebook-size": CODEBOOK,
        "--dataset": "toy",
        "--image-size": 16,
        "--batch-size": 20,
        "--num-workers": 0,
    }
    return [str(word) for flag in flags.items() for word in flag] + ["--ten-crop", *map(str, more)]


def extract(monkeypatch, command: list[str]) -> None:
    """Run the program in this process."""
    monkeypatch.setattr(sys, "argv", ["extract_codes_c2i", *command])
    extract_codes_c2i.main()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
