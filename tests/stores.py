"""Small code stores with random contents, for tests of what reads them."""

from pathlib import Path

import numpy as np

from dataset.code_store import CodeStore, StoreMeta
from dataset.code_writer import codes_dtype, write_packed


def random_codes(count: int, crops: int = 10, grid: tuple[int, int] = (4, 4), codebook_size: int = 64, seed: int = 0):
    shape = (count, crops, grid[0] * grid[1])
    return np.random.default_rng(seed).integers(0, codebook_size, shape).astype(codes_dtype(codebook_size))


def make_store(
    folder: Path,
    count: int = 20,
    crops: int = 10,
    grid: tuple[int, int] = (4, 4),
    codebook_size: int = 64,
    num_classes: int = 4,
    image_size: int = 16,
    crop_range: float = 1.1,
    seed: int = 0,
    shards: tuple[int, ...] = (),
    tokenizer_hash: str = "0" * 64,
) -> CodeStore:
    """A packed store of random codes in `folder` (named `{dataset}{image_size}_codes`); labels go 0, 1, 2, 3, 0, …"""
    meta = StoreMeta(
        image_size,
        grid,
        crops,
        count,
        dtype=codes_dtype(codebook_size),
        crop_range=crop_range,
        codebook_size=codebook_size,
        num_classes=num_classes,
        class_names=[f"class_{number}" for number in range(num_classes)],
        tokenizer={"name": "VQ-Tiny", "hash": tokenizer_hash, "weights": "raw"},
        shards=[{"count": images} for images in shards],
    )
    codes = random_codes(count, crops, grid, codebook_size, seed)
    sources = [(f"class_{image % num_classes}/{image}.png", 100 + image) for image in range(count)]
    return write_packed(folder, meta, lambda start, stop: codes[start:stop], np.arange(count) % num_classes, sources)
