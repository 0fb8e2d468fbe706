"""The embedded data set: scikit-learn's UCI digits (1,797 handwritten digits, 8×8) as an ordinary image folder.

    python -m dataset.digits --output DIR

writes DIR/train/digit_0/0000.png … and DIR/test/…, RGB, 36×36 pixels (room for ten crops at 32). Of each class every
fifth image is held out, in the data set's own order, so the split is always the same.
"""

import argparse
import os
from pathlib import Path

import numpy as np
from PIL import Image

from utils.program import UserError, run

SIDE = 36
HOLD_OUT_EVERY = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to make; holds train/ and test/ afterwards")
    folder = parser.parse_args().output
    counts = write_digits(folder)
    print(f"{counts['train']:,} images in {folder}/train, {counts['test']:,} in {folder}/test")
    print(f"next: bash scripts/tokenizer/train_vq.sh --data-path {folder}/train")


def write_digits(folder: Path) -> dict[str, int]:
    """Write the image folder unless it is there already; returns the number of images by part."""
    if not folder.exists():
        partial = folder.with_name(folder.name + ".partial")
        _write(partial)
        os.rename(partial, folder)
    counts = {part: len(list((folder / part).glob("digit_?/*.png"))) for part in ("train", "test")}
    if not all(counts.values()):
        raise UserError(f"{folder} exists and holds something else; give another --output.")
    return counts


def _write(folder: Path) -> None:
    digits = _load_digits()
    seen = [0] * 10
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        part = "test" if seen[label] % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1 else "train"
        seen[label] += 1
        path = folder / part / f"digit_{label}" / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        _enlarged(pixels).save(path)


def _enlarged(pixels: np.ndarray) -> Image.Image:
    """(8, 8) values from 0 to 16 -> a smooth grey RGB image, with a black margin that crops may cut."""
    framed = Image.fromarray(np.pad(pixels.astype(np.float32), 1) * (255 / 16))
    smooth = framed.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return Image.fromarray(np.asarray(smooth).round().clip(0, 255).astype(np.uint8)).convert("RGB")


def _load_digits():
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the digits come with scikit-learn; install it: pip install scikit-learn.") from error
    return load_digits()


if __name__ == "__main__":
    run(main)
