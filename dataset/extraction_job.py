"""The unfinished store: what an extraction is to compute, which parts are done, and how they become the store.

Images are cut into fixed blocks of whole batches, so that neither interruptions nor the number of ranks change what is
encoded together. While working, `{STORE}.partial/work/` holds `plan.json`, `images.jsonl` and one `block-….npz` for
each finished block, every one of them complete or absent. In the end blocks are joined to shards, `meta.json` is
written last, and the folder takes its final name.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np

from dataset.code_store import META_FILE, WORK_FOLDER, StoreMeta, partial_folder, read_meta
from dataset.code_writer import SHARD_IMAGES, give_final_name, shard_name, write_description, write_shard
from dataset.image_folder import ImageFolder, PathList, UnreadableImage, load_rgb
from utils.files import atomic_file, write_json
from utils.program import UserError

BLOCK_IMAGES = 1024  # at most: what a kill can lose, per rank
UNREADABLE_FILE = "unreadable.jsonl"
MIN_BLOCKS = 64  # so that small data sets spread over ranks and resume finely, too


@dataclass(frozen=True)
class Job:
    """A plan and its folder. `meta` describes the store to be; `meta.settings` is what a resumed run must share."""

    folder: Path  # the store's final place
    meta: StoreMeta  # count: all images, the unreadable ones included
    batch_images: int

    @property
    def partial(self) -> Path:
        return partial_folder(self.folder)

    @property
    def work(self) -> Path:
        return self.partial / WORK_FOLDER

    @property
    def identity(self) -> dict:
        """What a run that continues this one must share."""
        return {**self.meta.settings, "block_images": self.block_images, "blocks_per_shard": self.blocks_per_shard}

    @property
    def block_images(self) -> int:
        batches = min(BLOCK_IMAGES, self.meta.count // MIN_BLOCKS) // self.batch_images
        return self.batch_images * max(1, batches)

    @property
    def blocks(self) -> int:
        return -(-self.meta.count // self.block_images)

    @property
    def blocks_per_shard(self) -> int:
        return max(1, SHARD_IMAGES // self.block_images)

    @property
    def shards(self) -> int:
        return -(-self.blocks // self.blocks_per_shard)

    def images_of(self, block: int) -> range:
        start = block * self.block_images
        return range(start, min(start + self.block_images, self.meta.count))

    def batches_of(self, block: int) -> list[range]:
        images = self.images_of(block)
        return [images[start : start + self.batch_images] for start in range(0, len(images), self.batch_images)]

    def blocks_of(self, shard: int) -> range:
        start = shard * self.blocks_per_shard
        return range(start, min(start + self.blocks_per_shard, self.blocks))

    def block_path(self, block: int) -> Path:
        return self.work / f"block-{block:06d}.npz"

    def shard_done_path(self, shard: int) -> Path:
        return self.work / f"shard-{shard:05d}.json"

    def sources(self) -> list[tuple[str, int]]:
        """(path relative to the image folder, bytes) of every image of the plan."""
        with open(self.work / "images.jsonl") as file:
            return [tuple(json.loads(line)) for line in file]

    def image_folder(self, root: Path) -> ImageFolder:
        """The images of the plan, without listing `root` once more."""
        paths = [path for path, _ in self.sources()]
        label_of = {name: label for label, name in enumerate(self.meta.class_names)}
        labels = np.array([label_of[path.split(os.sep)[0]] for path in paths], np.int32)
        return ImageFolder(root, self.meta.class_names, PathList(paths), labels)

    def pending_blocks(self) -> list[int]:
        names = {entry.name for entry in os.scandir(self.work)}
        return [block for shard in range(self.shards) if self.shard_done_path(shard).name not in names
                for block in self.blocks_of(shard) if self.block_path(block).name not in names]  # fmt: skip

    def write_block(self, block: int, codes: np.ndarray, bad: list[tuple[int, str]]) -> None:
        """`codes` (images, crops, H·W) of the block's readable images; `bad` are (image, reason) of the others."""
        images, reasons = np.array([image for image, _ in bad], np.int64), np.array([reason for _, reason in bad], str)
        with atomic_file(self.block_path(block)) as file:
            np.savez(file, codes=codes.astype(self.meta.dtype), bad_images=images, bad_reasons=reasons)

    def bad_images(self) -> list[tuple[int, str]]:
        """(image, reason) of every unreadable image met so far, in order."""
        bad = []
        for shard in range(self.shards):
            if self.shard_done_path(shard).exists():
                bad += [tuple(entry) for entry in json.loads(self.shard_done_path(shard).read_text())["bad"]]
            else:
                blocks = [block for block in self.blocks_of(shard) if self.block_path(block).exists()]
                bad += [entry for block in blocks for entry in self._bad_of(block)]
        return bad

    @property
    def unreadable_path(self) -> Path:
        return self.partial / UNREADABLE_FILE

    def write_unreadable(self, bad: list[tuple[int, str]]) -> None:
        """List (path, reason) of the unreadable images beside the unfinished store."""
        sources = self.sources()
        with atomic_file(self.unreadable_path, "w") as file:
            file.writelines(json.dumps([sources[image][0], reason]) + "\n" for image, reason in bad)

    def join_shard(self, shard: int) -> None:
        """Write a shard from its blocks, then remove them; the shard's json marks that it is complete."""
        if self.shard_done_path(shard).exists():
            return
        bad = [entry for block in self.blocks_of(shard) for entry in self._bad_of(block)]
        count = sum(len(self.images_of(block)) for block in self.blocks_of(shard)) - len(bad)
        entry = {"file": None, "count": 0}
        if count:
            codes = (self._read_block(block, "codes") for block in self.blocks_of(shard))
            path, meta = self.partial / shard_name(shard), self.meta
            entry = write_shard(path, count, meta.crops, meta.tokens, meta.dtype, codes)
        write_json(self.shard_done_path(shard), {**entry, "bad": bad})
        for block in self.blocks_of(shard):
            self.block_path(block).unlink()

    def finish(self, labels: np.ndarray) -> StoreMeta:
        """Once every shard is joined: describe the store and give the folder its name. `labels` are of all images."""
        shards = [json.loads(self.shard_done_path(shard).read_text()) for shard in range(self.shards)]
        bad = {image: reason for shard in shards for image, reason in shard.pop("bad")}
        kept = [image for image in range(self.meta.count) if image not in bad]
        shards = [shard for shard in shards if shard["count"]]
        sources = self.sources()
        unreadable = [[sources[image][0], reason] for image, reason in bad.items()]
        meta = replace(self.meta, count=len(kept), unreadable=unreadable, shards=shards)
        write_description(self.partial, meta, labels[kept], [sources[image] for image in kept])
        self.clean_and_rename()
        return meta

    def clean_and_rename(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.unreadable_path.unlink(missing_ok=True)
        give_final_name(self.partial, self.folder)

    def _bad_of(self, block: int) -> Iterator[tuple[int, str]]:
        return zip(self._read_block(block, "bad_images").tolist(),
                   self._read_block(block, "bad_reasons").tolist(), strict=True)  # fmt: skip

    def _read_block(self, block: int, name: str) -> np.ndarray:
        with np.load(self.block_path(block), allow_pickle=False) as arrays:
            return arrays[name]


def list_hash(sources: list[tuple[str, int]]) -> str:
    """Identity of a list of images: their relative paths, in order."""
    digest = hashlib.sha256()
    for path, _ in sources:
        digest.update(os.fsencode(path) + b"\0")
    return digest.hexdigest()


def lock(job: Job) -> IO:
    """Keep a second extraction out of the folder for as long as this process lives and holds the returned file."""
    job.work.mkdir(parents=True, exist_ok=True)
    file = open(job.work / "lock", "w")  # noqa: SIM115 (held open on purpose)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another extraction is writing to {job.partial}; wait for it or stop it.") from error
    return file


def open_job(job: Job, target: Path, root: Path, sources: list[tuple[str, int]]) -> tuple[IO | None, list[int] | None]:
    """Begin the job or continue it: the lock to hold, and the blocks to encode (None when they are all in the store).

    `target` is where the user will find the store (not `job.folder` where that is converted in the end), `root` where
    the paths of `sources` start. Refuses a folder that was begun with other settings or images, saying what differs.
    """
    if any(_is_finished(folder, job) for folder in (target, job.folder)):
        return None, None
    if target.exists():
        raise UserError(f"{target} exists without a {META_FILE} of this program; choose another --code-path.")
    held = lock(job)
    if _is_finished(job.partial, job):  # it lacks only its name
        job.clean_and_rename()
        return held, None
    _start_or_resume(job, root, sources)
    return held, job.pending_blocks()


def _is_finished(folder: Path, job: Job) -> bool:
    if not (folder / META_FILE).exists():
        return False
    _refuse_other_settings(read_meta(folder / META_FILE).settings, job.meta.settings, folder)
    return True


def _start_or_resume(job: Job, root: Path, sources: list[tuple[str, int]]) -> None:
    plan = job.work / "plan.json"
    if not plan.exists():
        write_images(job, sources)
        write_json(plan, job.identity)
        return
    there = json.loads(plan.read_text())
    if there["image_list"] != job.meta.settings["image_list"]:
        _refuse_other_images(job, sources)
    _refuse_other_settings(there, job.identity, job.partial)
    _accept_changed_images(job, sources)
    _forget_repaired_images(job, root, sources)


def write_images(job: Job, sources: list[tuple[str, int]]) -> None:
    with atomic_file(job.work / "images.jsonl", "w") as file:
        file.writelines(json.dumps(source) + "\n" for source in sources)


def _refuse_other_settings(there: dict, asked: dict, folder: Path) -> None:
    different = [key for key in asked if there.get(key) != asked[key]]
    if different:
        changes = ", ".join(f"{key.replace('_', ' ')} {str(there.get(key))[:12]} there, {str(asked[key])[:12]} now"
                            for key in different)  # fmt: skip
        raise UserError(f"{folder} was extracted with other settings ({changes}); give the same ones, remove it, "
                        "or choose another --code-path.")  # fmt: skip


def _refuse_other_images(job: Job, sources: list[tuple[str, int]]) -> None:
    there, now = ({path for path, _ in listed} for listed in (job.sources(), sources))
    added, removed = now - there, there - now
    changes = [f"{len(added)} added, such as {min(added)}"] if added else []
    changes += [f"{len(removed)} removed, such as {min(removed)}"] if removed else []
    raise UserError(f"the images are not those with which {job.partial} was begun ({'; '.join(changes)}); "
                    "restore them, or remove that folder to start anew.")  # fmt: skip


def _accept_changed_images(job: Job, sources: list[tuple[str, int]]) -> None:
    """An image may change until it is encoded, and while it cannot be read."""
    changed = {image for image, (old, new) in enumerate(zip(job.sources(), sources, strict=True)) if old != new}
    if not changed:
        return
    bad = {image for image, _ in job.bad_images()}
    pending = set(job.pending_blocks())
    encoded = [image for image in sorted(changed - bad) if image // job.block_images not in pending]
    if encoded:
        raise UserError(f"{sources[encoded[0]][0]} has changed since it was encoded ({len(encoded)} such images); "
                        f"restore it, or remove {job.partial} to start anew.")  # fmt: skip
    write_images(job, sources)


def _forget_repaired_images(job: Job, root: Path, sources: list[tuple[str, int]]) -> None:
    """The block of an image that was unreadable and no longer is (its size may be the same) is done again."""
    for image, _ in job.bad_images():
        block = job.block_path(image // job.block_images)
        if block.exists() and _can_be_read(root / sources[image][0]):
            block.unlink()


def _can_be_read(path: Path) -> bool:
    try:
        load_rgb(path)
    except UnreadableImage:
        return False
    return True
