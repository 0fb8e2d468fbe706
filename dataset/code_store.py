"""The code store: the codes and labels of a whole data set behind one reader, packed or in the published layout.

Packed (docs/code-store.md): a few `.npy` shards of shape (images, crops, H·W), `labels.npy`, `images.jsonl` and,
written last, `meta.json`. Shards are memory-mapped: opening costs the same for a hundred images as for a million.
Published: `{i}.npy` of shape (1, crops, H·W), int64, in `…_codes/`, and `{i}.npy` of shape (1,) in `…_labels/`.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from dataset.arrays import load_array
from dataset.crops import FIVE_PLACES
from utils.files import read_json
from utils.program import UserError

META_FILE = "meta.json"
LABELS_FILE = "labels.npy"
IMAGES_FILE = "images.jsonl"
PLACES_FILE = "places.json"
PARTIAL_SUFFIX, WORK_FOLDER = ".partial", "work"
PACKED, PUBLISHED = "packed", "published"
VERSION = 1
BLOCK_IMAGES = 4096  # read at a time
MOST_CODES, MOST_CLASSES = 1 << 32, 1 << 31  # where a published folder does not tell


@dataclass(frozen=True)
class StoreMeta:
    """What `meta.json` says; None where a published folder without one does not tell."""

    image_size: int
    grid: tuple[int, int]  # (height, width) in codes
    crops: int
    count: int
    layout: str = PACKED
    dtype: str = "uint16"
    crop_range: float | None = None
    codebook_size: int | None = None
    num_classes: int | None = None
    class_names: list[str] | None = None  # in label order
    tokenizer: dict = field(default_factory=dict)  # name, hash of the weights, weights (ema or raw)
    shards: list[dict] = field(default_factory=list)  # file, count, sha256
    files: dict = field(default_factory=dict)  # sha256 of labels.npy and images.jsonl
    unreadable: list = field(default_factory=list)  # (path, reason) of every image left out
    settings: dict = field(default_factory=dict)  # how the codes were computed
    software: dict = field(default_factory=dict)
    version: int = VERSION

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def centre_crop(self) -> int:
        """Index of the upright centre crop (dataset/crops.py has the order)."""
        return 4 if self.crops in FIVE_PLACES else 0


class CodeStore:
    """A packed store. `store.codes(images, crops)` gathers rows; `store.labels` and `store.meta` are what they say."""

    def __init__(self, path: Path, meta: StoreMeta):
        self.path, self.meta = path, meta
        self._shards = []  # each (images · crops, H·W)
        for shard in meta.shards:
            array = _map_array(path / shard["file"], (shard["count"], meta.crops, meta.tokens), meta.dtype)
            self._shards.append(array.reshape(-1, meta.tokens))
        self._ends = np.cumsum([shard["count"] for shard in meta.shards])  # first image after each shard
        if not meta.shards or self._ends[-1] != meta.count:
            raise UserError(
                f"{path}/{META_FILE} is damaged: its shards hold another number of images than it says; extract again."
            )

    def __len__(self) -> int:
        return self.meta.count

    def __str__(self) -> str:
        meta = self.meta
        crop_range = f" at crop range {meta.crop_range:g}" if meta.crop_range else ""
        return (
            f"{self.path}: {meta.count:,} images × {meta.crops} crops{crop_range}, {meta.image_size} px, "
            f"{meta.grid[0]}×{meta.grid[1]} codes"
        )

    @cached_property
    def labels(self) -> np.ndarray:
        """(count,) class of every image."""
        return _map_array(self.path / LABELS_FILE, (self.meta.count,), "int32")

    def labels_of(self, images: np.ndarray) -> np.ndarray:
        """(n,) int64 labels of `images`."""
        return self.labels[images].astype(np.int64)

    def codes(self, images: np.ndarray, crops: np.ndarray) -> np.ndarray:
        """(n, H·W) codes of crop `crops[i]` of image `images[i]`, in the store's dtype."""
        images, crops = self._checked(images, crops)
        if len(self._shards) == 1:
            return self._shards[0][images * self.meta.crops + crops]
        codes = np.empty((len(images), self.meta.tokens), self.meta.dtype)
        shard_of = np.searchsorted(self._ends, images, side="right")
        for number in np.unique(shard_of):
            rows = np.nonzero(shard_of == number)[0]
            first = self._ends[number] - self.meta.shards[number]["count"]
            codes[rows] = self._shards[number][(images[rows] - first) * self.meta.crops + crops[rows]]
        return codes

    def block(self, start: int, stop: int) -> np.ndarray:
        """(stop - start, crops, H·W) codes of consecutive images."""
        images, crops = np.mgrid[start:stop, : self.meta.crops].reshape(2, -1)
        return self.codes(images, crops).reshape(stop - start, self.meta.crops, self.meta.tokens)

    def blocks(self, size: int = BLOCK_IMAGES) -> Iterator[tuple[int, np.ndarray]]:
        """All codes in order: (number of the first image, (n ≤ size, crops, H·W) codes)."""
        for start in range(0, self.meta.count, size):
            yield start, self.block(start, min(start + size, self.meta.count))

    def sources(self) -> list[tuple[str, int]]:
        """(path relative to the image folder, bytes) of every image, in order; none where the store does not say."""
        return read_sources(self.path / IMAGES_FILE) if (self.path / IMAGES_FILE).exists() else []

    @property
    def places(self) -> dict[str, str]:
        """Where the tokenizer and the images lay at extraction, as far as known; no part of what the store is."""
        file = self.path / PLACES_FILE
        return read_json(file, "remove it; it only says where things lay") if file.exists() else {}

    def expect(self, codebook_size: int | None, num_classes: int | None) -> None:
        """What numbers codes and labels stay below, for files that are first looked at when they are read."""

    def _checked(self, images: np.ndarray, crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images, crops = np.asarray(images, np.int64), np.asarray(crops, np.int64)
        for name, values, size in (("image", images, self.meta.count), ("crop", crops, self.meta.crops)):
            if len(values) and (values.min() < 0 or values.max() >= size):
                raise IndexError(f"{name} outside 0 … {size - 1} of {self.path}")
        return images, crops


class PublishedStore(CodeStore):
    """One `.npy` of codes and one of the label per image, as the published extraction wrote them."""

    def __init__(self, path: Path, meta: StoreMeta):
        self.path, self.meta = path, meta
        self.labels_path = published_labels_path(path)
        self._most_codes, self._most_classes = meta.codebook_size or MOST_CODES, meta.num_classes or MOST_CLASSES
        if not self.labels_path.is_dir():
            raise UserError(f"{path} has no labels beside it; expected the folder {self.labels_path}.")

    def expect(self, codebook_size: int | None, num_classes: int | None) -> None:
        self._most_codes = min(self._most_codes, codebook_size or MOST_CODES)
        self._most_classes = min(self._most_classes, num_classes or MOST_CLASSES)

    @cached_property
    def labels(self) -> np.ndarray:
        return self.labels_of(np.arange(self.meta.count)).astype(np.int32)

    def labels_of(self, images: np.ndarray) -> np.ndarray:
        most = self._most_classes
        return np.array([_read_array(self.labels_path / f"{image}.npy", (1,), most)[0] for image in images], np.int64)

    def block(self, start: int, stop: int) -> np.ndarray:
        shape, most = (1, self.meta.crops, self.meta.tokens), self._most_codes
        files = [_read_array(self.path / f"{image}.npy", shape, most) for image in range(start, stop)]
        return np.concatenate(files).astype(self.meta.dtype)

    def codes(self, images: np.ndarray, crops: np.ndarray) -> np.ndarray:
        images, crops = self._checked(images, crops)
        rows = [self.block(image, image + 1)[0, crop] for image, crop in zip(images, crops, strict=True)]
        return np.array(rows, self.meta.dtype).reshape(len(rows), self.meta.tokens)


def open_store(path: str | Path) -> CodeStore:
    """Open a store folder of either layout; `UserError` where there is none or it does not hold together."""
    path = Path(path)
    if (path / META_FILE).is_file():
        meta = read_meta(path / META_FILE)
    elif (path / "0.npy").is_file():
        meta = _scan_published(path)
    else:
        raise UserError(f"{path} is no code store (no {META_FILE}, no 0.npy); make one with extract_codes_c2i.sh.")
    return (PublishedStore if meta.layout == PUBLISHED else CodeStore)(path, meta)


def store_folder(code_path: str | Path, dataset: str, image_size: int) -> Path:
    """`CODE_PATH/{dataset}{image_size}_codes`; the trainer's name of the data set ends in `_code`, which is cut."""
    return Path(code_path) / f"{dataset.removesuffix('_code')}{image_size}_codes"


def published_labels_path(codes_path: Path) -> Path:
    return codes_path.with_name(codes_path.name.removesuffix("_codes") + "_labels")


def find_stores(
    code_path: str | Path, dataset: str, image_size: int, second_code_path: str | Path | None = None
) -> list[CodeStore]:
    """The store under `code_path` and, where there is one, that of crop range 1.05.

    The second is `second_code_path` where given; else, as published, `code_path` with `ten_crop` replaced by
    `ten_crop_105`, if a store is there. Raises `UserError` naming the sizes that `code_path` holds.
    """
    folders = [store_folder(code_path, dataset, image_size)]
    if second_code_path:
        folders.append(store_folder(second_code_path, dataset, image_size))
    elif "ten_crop" in str(code_path) and "ten_crop_105" not in str(code_path):
        sibling = store_folder(str(code_path).replace("ten_crop", "ten_crop_105"), dataset, image_size)
        folders += [sibling] if sibling.is_dir() or partial_folder(sibling).is_dir() else []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(_missing_store_sentence(folder, dataset, image_size))
    return [open_store(folder) for folder in folders]


def partial_folder(folder: Path) -> Path:
    """Where an extraction works until the store is complete and takes its name."""
    return folder.with_name(folder.name + PARTIAL_SUFFIX)


def _missing_store_sentence(folder: Path, dataset: str, image_size: int) -> str:
    if partial_folder(folder).is_dir():
        return f"the extraction into {folder} is unfinished; run the same extract_codes_c2i.sh command again."
    if not folder.parent.is_dir():
        return f"there is no folder {folder.parent}; give --code-path as it was given to extract_codes_c2i.sh."
    name = dataset.removesuffix("_code")
    pattern = re.compile(rf"{re.escape(name)}(\d+)_codes")
    matches = (pattern.fullmatch(entry.name) for entry in folder.parent.iterdir() if entry.is_dir())
    sizes = sorted(int(match[1]) for match in matches if match)
    if sizes:
        held = ", ".join(map(str, sizes))
        remedy = f"use --image-size {sizes[0]} or extract at {image_size}"
        return f"{folder.parent} holds codes of {name} at image size {held}, not {image_size}; {remedy}."
    return f"{folder.parent} holds no codes of {name} ({folder.name} expected); run extract_codes_c2i.sh first."


def read_sources(path: Path) -> list[tuple[str, int]]:
    """The lines of an `images.jsonl`: (path relative to the image folder, bytes)."""
    try:
        with open(path) as file:
            return [(str(name), int(size)) for name, size in map(json.loads, file)]
    except (ValueError, TypeError) as error:  # no JSON, no text, no pairs
        raise UserError(f"{path} is damaged ({error}); copy it again or run the extraction again.") from error


def read_meta(path: Path) -> StoreMeta:
    """Read a `meta.json`; `UserError` where it is damaged or newer than this program."""
    remedy = "extract again or restore the file"
    fields = read_json(path, remedy, "version", "grid")
    if not isinstance(fields["version"], int) or fields["version"] > VERSION:
        raise UserError(f"{path} has format version {fields['version']}, newer than this program; update it.")
    try:
        meta = StoreMeta(**{**fields, "grid": tuple(fields["grid"])})
        wrong = _wrong_fields(meta)
    except (TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}.") from error
    if wrong:
        raise UserError(f"{path} is damaged ({wrong[0]} is {getattr(meta, wrong[0])!r:.60}); {remedy}.")
    return meta


def _wrong_fields(meta: StoreMeta) -> list[str]:
    """Fields of values that no store has."""

    def is_number(value, optional: bool = False) -> bool:
        return (optional and value is None) or (isinstance(value, int) and value > 0)

    names = meta.class_names
    fine = {
        "image_size": is_number(meta.image_size),
        "grid": len(meta.grid) == 2 and all(map(is_number, meta.grid)),
        "crops": is_number(meta.crops),
        "count": is_number(meta.count),
        "codebook_size": is_number(meta.codebook_size, optional=True),
        "num_classes": is_number(meta.num_classes, optional=True),
        "class_names": names is None or (isinstance(names, list) and len(names) == meta.num_classes),
        "crop_range": meta.crop_range is None or isinstance(meta.crop_range, int | float),
        "layout": meta.layout in (PACKED, PUBLISHED),
        "dtype": meta.dtype in ("uint16", "uint32"),
        "tokenizer": isinstance(meta.tokenizer, dict),
        "files": isinstance(meta.files, dict),
        "settings": isinstance(meta.settings, dict),
        "shards": all(
            isinstance(shard["file"], str) and isinstance(shard["sha256"], str) and is_number(shard["count"])
            for shard in meta.shards
        ),
    }
    return [name for name, is_fine in fine.items() if not is_fine]


def _scan_published(path: Path) -> StoreMeta:
    """Count the files of a published folder (it has no description of its own) and look into the first."""
    numbers = [int(file.stem) for file in path.iterdir() if re.fullmatch(r"\d+\.npy", file.name)]
    count = len(numbers)
    if max(numbers) != count - 1:
        raise UserError(f"{path} has gaps: {count} files, the last {max(numbers)}.npy; run its extraction again.")
    first = _load(path / "0.npy")
    if first.ndim != 3 or first.shape[0] != 1 or first.dtype.kind not in "iu":
        raise UserError(f"{path}/0.npy holds {first.dtype} of shape {first.shape}, not (1, crops, codes) integers.")
    _, crops, tokens = first.shape
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise UserError(f"{path}/0.npy holds {tokens} codes per crop, which is not a square grid.")
    size = re.search(r"(\d+)_codes$", path.name)
    if not size:
        raise UserError(
            f"the name of {path} does not say its image size; rename it and its labels' folder to end in, "
            "say, 256_codes and 256_labels."
        )
    # The codebook's size is not known here, so its codes get the wider type.
    return StoreMeta(int(size[1]), (side, side), crops, count, layout=PUBLISHED, dtype="uint32")


def _map_array(path: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    array = _load(path, mmap_mode="r")
    if array.shape != shape or array.dtype != dtype:
        raise UserError(
            f"{path} holds {array.dtype} {array.shape}, but {META_FILE} says {dtype} {shape}; extract again."
        )
    return array.view(np.ndarray)


def _read_array(path: Path, shape: tuple[int, ...], most: int) -> np.ndarray:
    """Integers from 0 to `most` - 1."""
    array = _load(path)
    if array.shape != shape or array.dtype.kind not in "iu":
        raise UserError(f"{path} holds {array.dtype} {array.shape}, not integers {shape}; run the extraction again.")
    if array.min() < 0 or array.max() >= most:
        raise UserError(
            f"{path} holds {array.min() if array.min() < 0 else array.max()}, which is not between 0 and {most - 1}; "
            "run the extraction again."
        )
    return array


def _load(path: Path, mmap_mode: str | None = None) -> np.ndarray:
    try:
        return load_array(path, mmap_mode)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; copy it again or run the extraction again.") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged or incomplete; copy it again or run the extraction again.") from error
