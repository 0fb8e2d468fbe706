"""Whether a store can be learned from: checksums, and the range of codes and labels; looked through once, remembered.

A store that was found sound is noted in `{STORE}.checked.json` beside it, with the sizes and times of its files (of the
published layout those of its two folders: its files are compared with these ranges again as they are read).
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataset.code_store import BLOCK_IMAGES, LABELS_FILE, META_FILE, PACKED, CodeStore, published_labels_path
from utils.distributed import World
from utils.files import read_json, sha256, write_json
from utils.program import UserError
from utils.progress import progress


@dataclass(frozen=True)
class Extent:
    """What codes and labels a store holds."""

    largest_code: int
    smallest_label: int
    largest_label: int

    def problems(self, codebook_size: int | None, num_classes: int | None) -> list[str]:
        return code_problems(self.largest_code, codebook_size) + label_problems(
            self.smallest_label, self.largest_label, num_classes
        )


def code_problems(largest: int, codebook_size: int | None) -> list[str]:
    """`largest`: of codes that are not negative."""
    outside = codebook_size is not None and largest >= codebook_size
    return [f"code {largest} is outside the codebook of {codebook_size}"] if outside else []


def label_problems(smallest: int, largest: int, num_classes: int | None) -> list[str]:
    if smallest >= 0 and (num_classes is None or largest < num_classes):
        return []
    return [f"it holds labels from {smallest} to {largest}, but there are {num_classes} classes"]


def file_problems(store: CodeStore, names: Sequence[str] | None = None, show: bool = True) -> list[str]:
    """Of files whose checksums `meta.json` holds: all, or those of `names`."""
    problems, listed = [], listed_files(store)
    for name in progress(listed if names is None else names, description="checksums", unit="files", show=show):
        if not (store.path / name).is_file():
            problems.append(f"{name} is missing")
        elif sha256(store.path / name) != listed[name]:
            problems.append(f"{name} does not match its checksum")
    return problems


def in_short(problems: list[str]) -> list[str]:
    """Two problems, or the first and how many others there are."""
    return problems if len(problems) < 3 else [problems[0], f"{len(problems) - 1:,} more problems"]


def listed_files(store: CodeStore) -> dict[str, str]:
    """SHA-256 of the store's files by name, as far as `meta.json` says."""
    shards = store.meta.shards if store.meta.layout == PACKED else []
    return store.meta.files | {shard["file"]: shard["sha256"] for shard in shards}


def refuse_unsound(store: CodeStore, codebook_size: int | None, num_classes: int | None, world: World) -> None:
    """Raise `UserError` if the store is damaged, or holds codes or labels outside these numbers. A collective.

    The first time, all ranks together read the whole store; then a few times of files.
    """
    extent = world.broadcast(_noted(store) if world.is_main else None)
    problems = []
    if extent is None:
        mine = list(listed_files(store))[world.rank :: world.size]
        problems = sum(world.gather(file_problems(store, mine, world.is_main)), [])
        extent = _look_through(store, world)
        if world.is_main and not problems:
            _note(store, extent)
    problems = in_short(problems) + extent.problems(codebook_size, num_classes)
    if problems:
        raise UserError(
            f"{store.path} cannot be learned from: {'; '.join(problems)}; copy or extract it again, or give the "
            "--vocab-size and --num-classes it was made with."
        )
    store.expect(codebook_size, num_classes)


def _look_through(store: CodeStore, world: World) -> Extent:
    """Each rank reads its share of the images."""
    largest, labels = 0, []
    starts = range(world.rank * BLOCK_IMAGES, len(store), world.size * BLOCK_IMAGES)
    for start in progress(starts, description="looking through the codes", unit="block", show=world.is_main):
        stop = min(start + BLOCK_IMAGES, len(store))
        largest = max(largest, int(store.block(start, stop).max()))
        part = store.labels_of(np.arange(start, stop))
        labels += [int(part.min()), int(part.max())]
    codes, labels = zip(*world.gather((largest, labels)), strict=True)
    found = sum(labels, [])
    return Extent(max(codes), min(found), max(found))


def _note_path(store: CodeStore) -> Path:
    return store.path.with_name(f"{store.path.name}.checked.json")


def _state(store: CodeStore) -> dict[str, Any]:
    """Sizes and times (ns) of what a change of the store changes; a copy may keep all but the last of them."""
    if store.meta.layout == PACKED:
        places = [store.path / name for name in (META_FILE, LABELS_FILE, *listed_files(store))]
    else:
        places = [store.path, published_labels_path(store.path)]
    states = ((place.name, os.stat(place)) for place in places)
    return {name: [state.st_size, state.st_mtime_ns, state.st_ctime_ns] for name, state in states}


def _noted(store: CodeStore) -> Extent | None:
    """What was found before, if nothing has changed since."""
    try:
        note = read_json(_note_path(store), "")
        extent = Extent(**note["extent"])
        sound = note["state"] == _state(store) and all(isinstance(value, int) for value in asdict(extent).values())
        return extent if sound else None
    except (OSError, UserError, KeyError, TypeError):  # no note, a garbled one, or one of another version
        return None


def _note(store: CodeStore, extent: Extent) -> None:
    with suppress(OSError, UserError):  # nobody may write it there: the store is looked through every time
        write_json(_note_path(store), {"extent": asdict(extent), "state": _state(store)})
