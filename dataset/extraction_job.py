"""The unfinished store: what an extraction is to compute, which parts are done, and how they become the store.

Images are cut into fixed blocks of whole batches, so that neither interruptions nor the number of ranks change what is
encoded together. While working, `{STORE}.partial/work/` holds `plan.json`, `images.jsonl` and one `block-….npz` for
each finished block, every one of them complete or absent. In the end blocks are joined to shards, `meta.json` is
written last, and the folder takes its final name.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import numpy as np

from dataset.arrays import archive_read
from dataset.code_store import (
    IMAGES_FILE,
    META_FILE,
    PLACES_FILE,
    WORK_FOLDER,
    StoreMeta,
    partial_folder,
    read_meta,
    read_sources,
)
from dataset.code_writer import SHARD_IMAGES, give_final_name, shard_name, write_description, write_lines, write_shard
from dataset.image_folder import ImageFolder, UnreadableImage, load_rgb
from utils.files import atomic_file, lock_folder, read_json, remove_folder, write_json
from utils.program import UserError
from utils.settings import refuse_differences

BLOCK_IMAGES = 1024  # at most: what a kill can lose, per rank
UNREADABLE_FILE = "unreadable.jsonl"
MIN_BLOCKS = 64  # so that small data sets spread over ranks and resume finely, too


@dataclass(frozen=True)
class Job:
    """A plan and its folder. `meta` describes the store to be; `meta.settings` is what a resumed run must share."""

    folder: Path  # the store's final place
    meta: StoreMeta  # count: all images, the unreadable ones included
    batch_images: int
    places: dict[str, str] = field(default_factory=dict)  # noted in the store: where its tokenizer and images lie

    @property
    def partial(self) -> Path:
        return partial_folder(self.folder)

    @property
    def work(self) -> Path:
        return self.partial / WORK_FOLDER

    @property
    def unreadable_path(self) -> Path:
        return self.partial / UNREADABLE_FILE

    @property
    def block_images(self) -> int:
        batches = min(BLOCK_IMAGES, self.meta.count // MIN_BLOCKS) // self.batch_images
        return self.batch_images * max(1, batches)

    @property
    def blocks(self) -> range:
        return range(-(-self.meta.count // self.block_images))

    @property
    def blocks_per_shard(self) -> int:
        return max(1, SHARD_IMAGES // self.block_images)

    @property
    def shards(self) -> list[range]:
        """The blocks of each shard."""
        return [self.blocks[i : i + self.blocks_per_shard] for i in self.blocks[:: self.blocks_per_shard]]

    def images_of(self, block: int) -> range:
        return range(self.meta.count)[block * self.block_images : (block + 1) * self.block_images]

    def batches_of(self, block: int) -> list[range]:
        images = self.images_of(block)
        return [images[start : start + self.batch_images] for start in range(0, len(images), self.batch_images)]

    def block_path(self, block: int) -> Path:
        return self.work / f"block-{block:06d}.npz"

    def shard_path(self, shard: int) -> Path:
        return self.partial / shard_name(shard)

    @property
    def sources_path(self) -> Path:
        return self.work / IMAGES_FILE

    def pending_blocks(self) -> list[int]:
        names = {entry.name for entry in os.scandir(self.work)}
        return [block for block in self.blocks if self.block_path(block).name not in names]

    def write_block(self, block: int, codes: np.ndarray, bad: list[tuple[int, str]]) -> None:
        """`codes` (images, crops, H·W) of the block's readable images; `bad` are (image, reason) of the others.

        Raises `UserError` for codes that are none of the tokenizer's codebook.
        """
        size = self.meta.codebook_size
        if codes.size and not 0 <= codes.min() <= codes.max() < size:
            raise UserError(
                f"the tokenizer gives codes from {codes.min()} to {codes.max()}, but its codebook_size is {size}; mend "
                "one of them."
            )
        images, reasons = np.array([image for image, _ in bad], np.int64), np.array([reason for _, reason in bad], str)
        with atomic_file(self.block_path(block)) as file:
            codes = codes.astype(self.meta.dtype)
            np.savez(file, codes=codes, bad_images=images, bad_reasons=reasons, block=np.array(block))

    def bad_images(self) -> list[tuple[int, str]]:
        """(image, reason) of every unreadable image met so far, in order."""
        pending = set(self.pending_blocks())
        return [entry for block in self.blocks if block not in pending for entry in self._bad_of(block)]

    def write_unreadable(self, bad: list[tuple[int, str]]) -> None:
        """List (path, reason) of the unreadable images beside the unfinished store."""
        sources = read_sources(self.sources_path)
        write_lines(self.unreadable_path, ((sources[image][0], reason) for image, reason in bad))

    def join_shard(self, shard: int) -> dict | None:
        """Write a shard from its blocks; its entry for meta.json, None if no image is readable.

        One that an interrupted run has written is written anew: nothing says that it still is what it was.
        """
        blocks = self.shards[shard]
        count = sum(len(self.images_of(block)) - len(list(self._bad_of(block))) for block in blocks)
        codes = (self._read_block(block, "codes") for block in blocks)
        return write_shard(self.shard_path(shard), count, self.meta, codes) if count else None

    def finish(self, labels: np.ndarray, shards: list[dict]) -> None:
        """Once every shard is joined: describe the store and give the folder its name. `labels` are of all images."""
        bad, sources = dict(self.bad_images()), read_sources(self.sources_path)
        kept = [image for image in range(self.meta.count) if image not in bad]
        unreadable = [[sources[image][0], reason] for image, reason in bad.items()]
        meta = replace(self.meta, count=len(kept), unreadable=unreadable, shards=shards)
        write_description(self.partial, meta, labels[kept], [sources[image] for image in kept])
        self.clean_and_rename()

    def clean_and_rename(self) -> None:
        if (self.work / PLACES_FILE).exists():
            os.replace(self.work / PLACES_FILE, self.partial / PLACES_FILE)
        shutil.rmtree(self.work, ignore_errors=True)
        self.unreadable_path.unlink(missing_ok=True)
        give_final_name(self.partial, self.folder)

    def _bad_of(self, block: int) -> Iterator[tuple[int, str]]:
        images, reasons = (self._read_block(block, name).tolist() for name in ("bad_images", "bad_reasons"))
        return zip(images, reasons, strict=True)

    def forget_damaged_blocks(self) -> int:
        """Remove the finished blocks that are not as they were written; how many."""
        pending, damaged = set(self.pending_blocks()), 0
        for block in self.blocks:
            if block not in pending and not self._is_intact(block):
                self.block_path(block).unlink()
                damaged += 1
        return damaged

    def _is_intact(self, block: int) -> bool:
        """Whether the file has the checksums with which it was written, and is that of this block."""
        path, images = self.block_path(block), len(self.images_of(block))
        try:
            with archive_read(), np.load(path, allow_pickle=False) as arrays:
                whole = arrays.zip.testzip() is None
                codes, bad, reasons = (arrays[name] for name in ("codes", "bad_images", "bad_reasons"))
                number = arrays.get("block", block)  # which earlier versions did not write
                fits = codes.shape == (images - len(bad), self.meta.crops, self.meta.tokens) and number == block
                return whole and bool(fits) and codes.dtype == self.meta.dtype and len(reasons) == len(bad)
        except ValueError:
            return False

    def _read_block(self, block: int, name: str) -> np.ndarray:
        path = self.block_path(block)
        try:
            with archive_read(), np.load(path, allow_pickle=False) as arrays:
                return arrays[name]
        except ValueError as error:
            path.unlink(missing_ok=True)
            raise UserError(
                f"{path} was damaged on the disk; run the same command again, which encodes its images anew."
            ) from error


def list_hash(sources: list[tuple[str, int]]) -> str:
    """Identity of a list of images: their relative paths, in order."""
    return hashlib.sha256(b"".join(os.fsencode(path) + b"\0" for path, _ in sources)).hexdigest()


def open_job(job: Job, images: ImageFolder, sources: list[tuple[str, int]]) -> tuple[IO | None, list[int] | None]:
    """Start or continue a job: the lock that keeps others out, and the blocks to encode (None: all are in the store).

    `sources` are the paths and sizes of `images`. Refuses a folder that was begun with other settings or images,
    saying what differs.
    """
    if _is_finished(job.folder, job):
        return None, None
    if job.folder.exists() and not (job.folder / META_FILE).exists():  # another process may just have finished
        raise UserError(f"{job.folder} exists without a {META_FILE} of this program; choose another --code-path.")
    job.work.mkdir(parents=True, exist_ok=True)
    held = lock_folder(job.work, f"another extraction is writing to {job.partial}; wait for it or stop it.")
    if _is_finished(job.folder, job):  # by another process, just now
        remove_folder(job.partial, held)
        return None, None
    if _is_finished(job.partial, job):  # it lacks only its name
        job.clean_and_rename()
        return held, None
    _start_or_resume(job, images, sources)
    return held, job.pending_blocks()


def _is_finished(folder: Path, job: Job) -> bool:
    if not (folder / META_FILE).exists():
        return False
    _refuse_other_settings(folder, read_meta(folder / META_FILE).settings, job.meta.settings)
    return True


def _start_or_resume(job: Job, images: ImageFolder, sources: list[tuple[str, int]]) -> None:
    write_json(job.work / PLACES_FILE, job.places)
    plan = job.work / "plan.json"
    mine = {**job.meta.settings, "block_images": job.block_images, "blocks_per_shard": job.blocks_per_shard}
    if not plan.exists():
        _forget_blocks(job)
        write_lines(job.sources_path, sources)
        write_json(plan, mine)
        return
    there = read_json(plan, f"remove {job.partial} to start anew", "image_list")
    before = _sources_then(job, there["image_list"])
    if there["image_list"] != mine["image_list"]:
        _refuse_other_images(job, before, sources)
    _refuse_other_settings(job.partial, there, mine)
    if damaged := job.forget_damaged_blocks():
        print(f"{damaged:,} finished blocks in {job.work} were damaged on the disk; their images are encoded again")
    bad = job.bad_images()
    if before is None:
        print(f"note: {job.sources_path} was lost or damaged; whether images have changed since is not known")
        write_lines(job.sources_path, sources)
    else:
        _accept_changed_images(job, before, sources, dict(bad))
    for image, _ in bad:
        with suppress(UnreadableImage):
            load_rgb(images.path(image))  # it has been repaired (its size may be the same): once more
            job.block_path(image // job.block_images).unlink(missing_ok=True)


def _refuse_other_settings(folder: Path, there: dict, here: dict) -> None:
    if there.get("precision") == "fp32":  # an older name
        there = there | {"precision": "none"}
    remedy = "give the same ones, remove it, or choose another --code-path"
    refuse_differences(f"{folder} was extracted", there, here, remedy)


def _forget_blocks(job: Job) -> None:
    """Nothing says of which images and settings they are."""
    blocks = list(job.work.glob("block-*.npz"))
    for block in blocks:
        block.unlink()
    if blocks:
        print(f"{job.work} has lost its plan.json; its {len(blocks):,} finished blocks are encoded again")


def _sources_then(job: Job, image_list: str) -> list[tuple[str, int]] | None:
    """The images with which the job was begun; None where their list is lost, or is not the plan's."""
    try:
        before = read_sources(job.sources_path)
    except (UserError, FileNotFoundError):
        return None
    return before if list_hash(before) == image_list else None


def _refuse_other_images(job: Job, before: list[tuple[str, int]] | None, sources: list[tuple[str, int]]) -> None:
    there, now = ({path for path, _ in listed} for listed in (before or sources, sources))
    added, removed = now - there, there - now
    changes = [f"{len(added)} added, such as {min(added)}"] if added else []
    changes += [f"{len(removed)} removed, such as {min(removed)}"] if removed else []
    details = f" ({'; '.join(changes)})" if changes else ""
    raise UserError(
        f"the images are not those with which {job.partial} was begun{details}; "
        "restore them, or remove that folder to start anew."
    )


def _accept_changed_images(
    job: Job, before: list[tuple[str, int]], sources: list[tuple[str, int]], bad: dict[int, str]
) -> None:
    """An image may change until it is encoded, and while it cannot be read."""
    pending = set(job.pending_blocks())
    changed = [image for image, (old, new) in enumerate(zip(before, sources, strict=True)) if old != new]
    encoded = [image for image in changed if image not in bad and image // job.block_images not in pending]
    if encoded:
        raise UserError(
            f"{sources[encoded[0]][0]} has changed since it was encoded ({len(encoded)} such images); "
            f"restore it, or remove {job.partial} to start anew."
        )
    if changed:
        write_lines(job.sources_path, sources)
