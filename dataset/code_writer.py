"""Writing code stores: shards, the files beside them, and the folder's final name, which it takes when complete."""

import hashlib
import io
import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision

from dataset.code_store import (
    IMAGES_FILE,
    LABELS_FILE,
    META_FILE,
    PACKED,
    PUBLISHED,
    WORK_FOLDER,
    CodeStore,
    StoreMeta,
    partial_folder,
    published_labels_path,
)
from utils.files import atomic_file, sha256, sync_folder, write_json
from utils.program import UserError
from utils.progress import progress

SHARD_IMAGES = 1 << 17  # 640 MiB at ten crops of 16×16 codes


def codes_dtype(codebook_size: int) -> str:
    return "uint16" if codebook_size <= 1 << 16 else "uint32"


def software_versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }


def shard_name(number: int) -> str:
    return f"codes-{number:05d}.npy"


def write_shard(path: Path, count: int, crops: int, tokens: int, dtype: str, blocks: Iterable[np.ndarray]) -> dict:
    """Stream `blocks` of (n, crops, tokens) codes of `count` images into one `.npy`; returns its entry for meta."""
    header = io.BytesIO()
    layout = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False}
    np.lib.format.write_array_header_1_0(header, {**layout, "shape": (count, crops, tokens)})
    digest, written = hashlib.sha256(header.getvalue()), 0
    with atomic_file(path) as file:
        file.write(header.getvalue())
        for block in blocks:
            block = np.ascontiguousarray(block, dtype)
            if block.shape[1:] != (crops, tokens):
                raise ValueError(f"block of shape {block.shape} in a store of (…, {crops}, {tokens})")
            digest.update(block)
            file.write(block)
            written += len(block)
        if written != count:
            raise ValueError(f"{written} images written to {path}, {count} announced")
    return {"file": path.name, "count": count, "sha256": digest.hexdigest()}


def write_description(folder: Path, meta: StoreMeta, labels: np.ndarray, sources: Sequence[tuple[str, int]]) -> None:
    """Labels, the list of images and, last, meta.json: what makes a folder with shards a store."""
    with atomic_file(folder / LABELS_FILE) as file:
        np.save(file, labels.astype(np.int32))
    with atomic_file(folder / IMAGES_FILE, "w") as file:
        file.writelines(json.dumps(source) + "\n" for source in sources)
    hashes = {name: sha256(folder / name) for name in (LABELS_FILE, IMAGES_FILE)}
    write_json(folder / META_FILE, replace(meta, files=hashes).to_json())


def give_final_name(partial: Path, folder: Path) -> None:
    """Rename a complete `partial` folder; `UserError` where the final name is taken."""
    if folder.exists():
        raise UserError(f"{folder} exists already; remove it or choose another path.")
    for leftover in partial.glob(".*.tmp"):  # of a killed run
        leftover.unlink()
    os.rename(partial, folder)
    sync_folder(folder.parent)


def write_packed(
    folder: Path,
    meta: StoreMeta,
    blocks: Iterable[np.ndarray],
    labels: np.ndarray,
    sources: Sequence[tuple[str, int]] = (),
) -> CodeStore:
    """A packed store from `blocks` of (n, crops, H·W) codes in order; shards as `meta.shards` counts them, if it does.

    `meta.count`, `dtype`, `shards` and `files` are filled in here.
    """
    partial = _free_partial_folder(folder)
    counts = [shard["count"] for shard in meta.shards] or _shard_counts(len(labels))
    rows = _Rows(blocks)
    meta = replace(meta, layout=PACKED, count=len(labels))
    shards = [
        write_shard(partial / shard_name(number), count, meta.crops, meta.tokens, meta.dtype, rows.take(count))
        for number, count in enumerate(counts)
    ]
    write_description(partial, replace(meta, shards=shards), labels, sources)
    give_final_name(partial, folder)
    return CodeStore(folder, replace(meta, shards=shards))


def write_published(folder: Path, store: CodeStore) -> None:
    """The published layout: two small files an image, codes in `folder`, labels beside it; meta.json is an addition."""
    check_published_place(folder, store.labels)
    partial, labels_path = _free_partial_folder(folder), published_labels_path(folder)
    partial.mkdir(parents=True, exist_ok=True)
    with progress(description="publish", total=len(store), unit="images") as bar:
        for start, codes in store.blocks():
            for image, crops in enumerate(codes.astype(np.int64), start):
                np.save(partial / f"{image}.npy", crops[None])
            bar.update(len(codes))
    if not labels_path.exists():  # a run killed just before the codes took their name leaves the same ones
        _publish_labels(labels_path, store.labels.astype(np.int64))
    write_description(partial, replace(store.meta, layout=PUBLISHED), store.labels, store.sources())
    give_final_name(partial, folder)


def check_published_place(folder: Path, labels: np.ndarray) -> None:
    """Refuse what `write_published` could not finish: an unsuitable name, other labels, another run's work."""
    if not folder.name.endswith("_codes"):
        raise UserError(f"the published layout needs a folder whose name ends in _codes, not {folder.name}.")
    _free_partial_folder(folder)
    labels_path = published_labels_path(folder)
    files = (labels_path / f"{image}.npy" for image in range(len(labels)))
    if labels_path.exists() and not all(
        file.is_file() and np.load(file)[0] == label for file, label in zip(files, labels, strict=True)
    ):
        raise UserError(f"{labels_path} exists already and holds other labels; remove it or choose another path.")


def _free_partial_folder(folder: Path) -> Path:
    partial = partial_folder(folder)
    if (partial / WORK_FOLDER).exists():
        raise UserError(f"{partial} holds an interrupted extraction; finish it with its own command, remove it, or "
                        "choose another path.")  # fmt: skip
    return partial


def _publish_labels(labels_path: Path, labels: np.ndarray) -> None:
    partial = partial_folder(labels_path)
    partial.mkdir(exist_ok=True)
    for image, label in enumerate(labels):
        np.save(partial / f"{image}.npy", label[None])
    give_final_name(partial, labels_path)


def _shard_counts(count: int) -> list[int]:
    return [min(SHARD_IMAGES, count - start) for start in range(0, count, SHARD_IMAGES)]


class _Rows:
    """Re-cuts a stream of blocks at other places."""

    def __init__(self, blocks: Iterable[np.ndarray]):
        self._blocks, self._rest = iter(blocks), None

    def take(self, count: int) -> Iterable[np.ndarray]:
        while count:
            block = self._rest if self._rest is not None else next(self._blocks)
            yield block[:count]
            self._rest = block[count:] if len(block) > count else None
            count -= min(count, len(block))
