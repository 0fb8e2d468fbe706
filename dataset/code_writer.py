"""Writing code stores: shards, the files beside them, and the folder's final name, which it takes when complete."""

import json
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import PIL
import torch

from dataset.arrays import load_array
from dataset.code_store import (
    BLOCK_IMAGES,
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
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }


def shard_name(number: int) -> str:
    return f"codes-{number:05d}.npy"


def write_shard(path: Path, count: int, meta: StoreMeta, blocks: Iterable[np.ndarray]) -> dict:
    """Stream `blocks` of (n, crops, H·W) codes of `count` images into one `.npy`; returns its entry for meta.json."""
    written, shape = 0, (count, meta.crops, meta.tokens)
    with atomic_file(path) as file:
        header = {"descr": np.dtype(meta.dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block.reshape(-1, *shape[1:]), meta.dtype))
            written += len(block)
        if written != count:
            raise ValueError(f"{written} images written to {path}, {count} announced")
    return {"file": path.name, "count": count, "sha256": sha256(path)}


def write_lines(path: Path, entries: Iterable[Sequence]) -> None:
    """A JSON list per line."""
    with atomic_file(path, "w") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)


def write_description(folder: Path, meta: StoreMeta, labels: np.ndarray, sources: Sequence[tuple[str, int]]) -> None:
    """Labels, the list of images and, last, meta.json: what makes a folder with shards a store."""
    with atomic_file(folder / LABELS_FILE) as file:
        np.save(file, labels.astype(np.int32))
    write_lines(folder / IMAGES_FILE, sources)
    hashes = {name: sha256(folder / name) for name in (LABELS_FILE, IMAGES_FILE)}
    write_json(folder / META_FILE, asdict(replace(meta, files=hashes)))


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
    read: Callable[[int, int], np.ndarray],
    labels: np.ndarray,
    sources: Sequence[tuple[str, int]] = (),
) -> CodeStore:
    """A packed store of `read(start, stop)`: the (n, crops, H·W) codes of those images.

    Shards are as `meta.shards` counts them, if it does; `meta.count`, `dtype`, `shards` and `files` are filled in here.
    """
    partial, total = _free_partial_folder(folder), len(labels)
    counts = [shard["count"] for shard in meta.shards] or [
        min(SHARD_IMAGES, total - start) for start in range(0, total, SHARD_IMAGES)
    ]
    shards, end = [], 0
    for number, count in enumerate(counts):
        first, end = end, end + count
        blocks = (read(start, min(start + BLOCK_IMAGES, end)) for start in range(first, end, BLOCK_IMAGES))
        shards.append(write_shard(partial / shard_name(number), count, meta, blocks))
    meta = replace(meta, layout=PACKED, count=total, shards=shards)
    write_description(partial, meta, labels, sources)
    give_final_name(partial, folder)
    return CodeStore(folder, meta)


def write_published(folder: Path, store: CodeStore) -> None:
    """The published layout: two small files per image, codes in `folder`, labels beside it; meta.json is an addition.

    Raises `UserError`, before anything is written, for an unsuitable name, other labels, or another run's work.
    """
    if not folder.name.endswith("_codes"):
        raise UserError(f"the published layout needs a folder whose name ends in _codes, not {folder.name}.")
    partial, labels_path = _free_partial_folder(folder), published_labels_path(folder)
    if labels_path.exists() and not _holds_labels(labels_path, store.labels):
        raise UserError(f"{labels_path} exists already and holds other labels; remove it or choose another path.")
    partial.mkdir(parents=True, exist_ok=True)
    with progress(description="publish", total=len(store), unit="images") as bar:
        for start, codes in store.blocks():
            for image, crops in enumerate(codes.astype(np.int64), start):
                np.save(partial / f"{image}.npy", crops[None])
            bar.update(len(codes))
    if not labels_path.exists():  # a run killed just before the codes took their name leaves the same ones
        partial_labels = partial_folder(labels_path)
        partial_labels.mkdir(exist_ok=True)
        for image, label in enumerate(store.labels.astype(np.int64)):
            np.save(partial_labels / f"{image}.npy", label[None])
        give_final_name(partial_labels, labels_path)
    write_description(partial, replace(store.meta, layout=PUBLISHED), store.labels, store.sources())
    give_final_name(partial, folder)


def _holds_labels(labels_path: Path, labels: np.ndarray) -> bool:
    files = (labels_path / f"{image}.npy" for image in range(len(labels)))
    try:
        return all(load_array(file).tolist() == [label] for file, label in zip(files, labels, strict=True))
    except (FileNotFoundError, ValueError):  # missing, or damaged
        return False


def _free_partial_folder(folder: Path) -> Path:
    partial = partial_folder(folder)
    if (partial / WORK_FOLDER).exists():
        raise UserError(
            f"{partial} holds an interrupted extraction; finish it with its own command, remove it, or "
            "choose another path."
        )
    return partial
