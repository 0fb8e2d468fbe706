"""Small public data sets as ordinary image folders, for trying things and for the study: train/ and test/, a folder per
class in each, RGB.

    python -m dataset.embedded fashion-mnist --output DIR

| name | images (training, held out) | pixels | where they come from |
|---|---|---|---|
| `digits` | 1,442, 355 handwritten digits | 36 (8 enlarged, with a margin for crops) | scikit-learn (UCI) |
| `fashion-mnist` | 60,000, 10,000 pieces of clothing | 32 (28 with a margin) | IDX files, or torchvision's download |
| `cifar-10` | 50,000, 10,000 photographs | 32 | torchvision's download, or a folder that holds it |

`--train-images` and `--test-images` keep the first so many, in the data set's own order: the same ones every time.
"""

import gzip
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from utils.commands import command
from utils.files import lock_folder, remove_folder
from utils.program import UserError, run
from utils.progress import progress
from utils.settings import REQUIRED, option, parse, recipe, settings

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
FASHION = ("t_shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle_boot")
HOLD_OUT_EVERY = 5  # of each class's digits
IDX_IMAGES, IDX_LABELS = 2051, 2049  # the first four bytes of an IDX file


class Part(NamedTuple):
    """The images of train/ or test/ in the data set's own order."""

    images: np.ndarray  # (images, height, width) grey or (images, height, width, 3), uint8
    labels: np.ndarray  # (images,)
    numbers: np.ndarray  # (images,): the names of the files


class DataSet(NamedTuple):
    class_names: list[str]
    train: Part
    test: Part


def write_image_folder(data: DataSet, folder: Path, train_images: int | None = None, test_images: int | None = None):
    """Write `folder/{train,test}/CLASS/NUMBER.png` unless they are there already; the number of images of each.

    Raises `UserError` if `folder` holds something else, the data set fewer images than asked for, or another process is
    writing.
    """
    parts = {
        "train": _first(data.train, train_images, "--train-images"),
        "test": _first(data.test, test_images, "--test-images"),
    }
    counts = {name: len(part.labels) for name, part in parts.items()}
    if not folder.exists():
        partial = folder.with_name(folder.name + ".partial")
        lock = lock_folder(partial, f"another process is writing {partial}; wait for it, or give another --output.")
        if not folder.exists():
            shutil.rmtree(partial / "images", ignore_errors=True)  # of a killed process
            for name, part in parts.items():
                _write(part, partial / "images" / name, data.class_names)
            os.rename(partial / "images", folder)
        remove_folder(partial, lock)
    if any(len(list((folder / name).glob("*/*.png"))) != count for name, count in counts.items()):
        raise UserError(f"{folder} exists and holds something else; give another --output.")
    return counts


def _first(part: Part, count: int | None, flag: str) -> Part:
    if count is not None and count > len(part.labels):
        raise UserError(f"{flag} {count}: there are only {len(part.labels)} such images.")
    return Part(*(values[:count] for values in part))


def _write(part: Part, folder: Path, class_names: list[str]) -> None:
    digits = max(4, len(str(part.numbers[-1])))
    bar = progress(zip(*part, strict=True), description=f"writing {folder.name}", total=len(part.labels), unit="image")
    for pixels, label, number in bar:
        path = folder / class_names[label] / f"{number:0{digits}d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).convert("RGB").save(path)


def digits(source: Path | None = None) -> DataSet:
    """Of each class every fifth image is held out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the digits come with scikit-learn; install it: pip install scikit-learn.") from error
    loaded = load_digits()
    labels, numbers = loaded.target, np.arange(len(loaded.target))
    rank_in_class = np.array([np.count_nonzero(labels[:number] == labels[number]) for number in numbers])
    held_out = rank_in_class % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1
    images = np.stack([_enlarged_digit(pixels) for pixels in loaded.images])
    parts = [Part(images[chosen], labels[chosen], numbers[chosen]) for chosen in (~held_out, held_out)]
    return DataSet([f"digit_{digit}" for digit in range(10)], *parts)


def _enlarged_digit(pixels: np.ndarray) -> np.ndarray:
    """(8, 8) values from 0 to 16 -> (36, 36) uint8, smooth, with a black margin."""
    framed = Image.fromarray(np.pad(pixels.astype(np.float32), 1) * (255 / 16))
    smooth = framed.resize((36, 36), Image.Resampling.BICUBIC)
    return np.asarray(smooth).round().clip(0, 255).astype(np.uint8)


def fashion_mnist(source: Path | None = None) -> DataSet:
    """arXiv 1708.07747, from the four IDX files in `source` (compressed or not), else Debian's, else the network."""
    if source is None and DEBIAN_FASHION_MNIST.is_dir():
        source = DEBIAN_FASHION_MNIST
    if source is not None:
        return DataSet(list(FASHION), _idx_part(source, "train"), _idx_part(source, "t10k"))
    with tempfile.TemporaryDirectory() as folder:
        _torchvision(
            "FashionMNIST",
            folder,
            download=True,
            remedy="give --source, a folder of its IDX files (Debian's package dataset-fashion-mnist installs them)",
        )
        return fashion_mnist(Path(folder) / "FashionMNIST/raw")


def _idx_part(folder: Path, name: str) -> Part:
    images = _read_idx(folder, f"{name}-images-idx3-ubyte", IDX_IMAGES)
    labels = _read_idx(folder, f"{name}-labels-idx1-ubyte", IDX_LABELS)
    margin = (32 - images.shape[1]) // 2
    return Part(np.pad(images, ((0, 0), (margin, margin), (margin, margin))), labels, np.arange(len(labels)))


def _read_idx(folder: Path, name: str, magic: int) -> np.ndarray:
    """An IDX file of bytes, `name` or `name.gz` (yann.lecun.com/exdb/mnist describes the format)."""
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if path is None:
        raise UserError(f"{folder} holds no {name} or {name}.gz; --source is a folder with the four IDX files.")
    try:
        content = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read()
        dimensions = magic % 256
        found, *shape = struct.unpack(f">{1 + dimensions}I", content[: 4 * (1 + dimensions)])
        values = np.frombuffer(content, np.uint8, offset=4 * (1 + dimensions)).reshape(shape)
    except (OSError, EOFError, struct.error, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); fetch it again.") from error
    if found != magic:
        raise UserError(f"{path} is not the IDX file that its name promises; fetch it again.")
    return values


def cifar_10(source: Path | None = None) -> DataSet:
    """Krizhevsky 2009, from torchvision's files in `source`, else the network."""
    with tempfile.TemporaryDirectory() as folder:
        root, download = (folder, True) if source is None else (source, False)
        parts = [
            _torchvision(
                "CIFAR10",
                root,
                download,
                "give --source, a folder that holds torchvision's cifar-10-batches-py",
                train=train,
            )
            for train in (True, False)
        ]
    return DataSet(parts[0].classes, *(Part(part.data, np.array(part.targets), np.arange(len(part))) for part in parts))


def _torchvision(name: str, root: str | Path, download: bool, remedy: str, train: bool = True):
    from torchvision import datasets

    try:
        return getattr(datasets, name)(root, train=train, download=download)
    except (OSError, RuntimeError) as error:  # no network, no files, or damaged ones
        raise UserError(f"torchvision cannot load {name} ({error}); {remedy}.") from error


DATA_SETS: dict[str, Callable[[Path | None], DataSet]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "cifar-10": cifar_10,
}


@settings("data set")
class EmbeddedSettings:
    name: str = recipe(REQUIRED, "data set", choices=list(DATA_SETS), flag="name")
    output: Path = option(REQUIRED, "folder to make; holds train/ and test/ afterwards")
    source: Path | None = option(None, "folder with the data set's own files, where it is not to be downloaded")
    train_images: int | None = recipe(None, "training images, default: all", at_least=1)
    test_images: int | None = recipe(None, "held-out images, default: all", at_least=1)


def main() -> None:
    wanted = parse(EmbeddedSettings, "Write a small public data set as an image folder.")
    data = DATA_SETS[wanted.name](wanted.source)
    counts = write_image_folder(data, wanted.output, wanted.train_images, wanted.test_images)
    print(f"{counts['train']:,} images in {wanted.output}/train, {counts['test']:,} in {wanted.output}/test")
    parts = {"data_path": wanted.output / "train", "val_data_path": wanted.output / "test", "image_size": 32}
    small = {"vq_model": "VQ-Tiny", "codebook_size": 256, "perceptual_weight": 0, "disc_weight": 0, "ema": True}
    small |= {"revive_dead_codes": 20, "global_batch_size": 32, "lr": 2e-3, "scheduler": True, "end_lr": 1e-4}
    brief = {"epochs": 7, "mixed_precision": "none", "no_mirror": wanted.name == "digits"}  # minutes on a CPU
    print(f"next: {command('tokenizer/train_vq.sh', **parts, **small, **brief)}")


if __name__ == "__main__":
    run(main)
