"""Extraction of 24 images in twelve blocks, to their codes at ten crops."""

from pathlib import Path

from autoregressive.train import extract_codes_c2i
from tests import tiny_extraction
from tests.soak.killing import Subject


def extraction(folder: Path) -> Subject:
    """`folder` gets images and tokenizer."""
    images = tiny_extraction.make_images(folder / "images")
    tokenizer = tiny_extraction.make_tokenizer(folder / "tiny.pt")
    return Subject(
        main=extract_codes_c2i.main,
        command=lambda results: tiny_extraction.arguments(images, results, tokenizer, "--num-workers", "1"),
        contents=tiny_extraction.contents,
    )
