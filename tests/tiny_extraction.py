"""A tiny image folder, a tiny tokenizer and the command line that extracts the one with the other."""

import errno
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.train import extract_codes_c2i, verify_codes
from dataset import convert_codes, extraction_job
from dataset.crops import center_crop, cut_crops, to_model_range
from dataset.image_folder import list_image_folder, load_rgb
from tokenizer.tokenizer_image.load import TokenizerSettings, build_tokenizer
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


def interrupt(monkeypatch, command, after_blocks=2):
    """Stop an extraction by a full disk after some blocks."""
    write_block, written = extraction_job.Job.write_block, []

    def fail_later(job, block, codes, bad):
        if len(written) == after_blocks:
            raise OSError(errno.ENOSPC, "No space left on device", "block")
        written.append(block)
        write_block(job, block, codes, bad)

    with monkeypatch.context() as patch:
        patch.setattr(extraction_job.Job, "write_block", fail_later)
        with pytest.raises(OSError, match="No space left"):
            extract(patch, command)


def run_tool(monkeypatch, module, *arguments):
    monkeypatch.setattr("sys.argv", [module.__name__, *map(str, arguments)])
    module.main()


def publish(monkeypatch, packed, output):
    run_tool(monkeypatch, convert_codes, "--codes", packed, "--output", output, "--layout", "published")


def foreign_published(monkeypatch, data, codes, tokenizer, *options):
    """A store in the published layout without the description that is kept here."""
    extract(monkeypatch, arguments(data, codes / "packed", tokenizer, *options))
    publish(monkeypatch, codes / "packed" / "toy16_codes", codes / "toy16_codes")
    for name in ("meta.json", "images.jsonl", "labels.npy"):
        (codes / "toy16_codes" / name).unlink()


def verify(monkeypatch, store, data, tokenizer, sheet, *options):
    paths = ("--codes", store, "--data-path", data, "--vq-ckpt", tokenizer, "--output", sheet)
    run_tool(monkeypatch, verify_codes, *paths, *options)


def load(tokenizer):
    return build_tokenizer(TokenizerSettings(str(tokenizer), "VQ-Tiny", CODEBOOK))[0]


def one_at_a_time(data, tokenizer, image_size=16, crop_range=1.1):
    """(images, 10, H·W) codes by the published procedure: one image a pass, float32."""
    model = load(tokenizer)
    folder = list_image_folder(data)
    codes = []
    for image in range(len(folder)):
        square = center_crop(load_rgb(folder.path(image)), int(image_size * crop_range))
        crops = cut_crops(torch.from_numpy(square.copy())[None], image_size, 10)[0]
        codes.append(model.encode_indices(to_model_range(crops)))
    return torch.stack(codes).numpy()
