"""Images of a run that may be interrupted: a file on the disk that fills in any order, and becomes one `.npz`.

`NAME.partial/` beside the result holds `run.json` (the settings), `images.u8` (all images, each at its place) and
`done.u8` (one byte per image, set after its pixels are on the disk). Ranks write disjoint parts of the same files, so
a run on many nodes needs a file system that they share. Memory stays that of one batch, however many images.
"""

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from utils.files import atomic_file, lock_folder, sync_folder, write_json
from utils.program import UserError
from utils.progress import progress
from utils.settings import json_values, refuse_differences

CHUNK_BYTES = 1 << 24
EPOCH = (1980, 1, 1, 0, 0, 0)  # the zip format's first date, so that equal results are equal files


class ImageStore:
    """`count` images of `size`x`size` pixels on their way to `folder/name.npz`. `settings` is what decides them.

    `remedy` ends the sentence that refuses a name which another run has taken.
    """

    def __init__(
        self, folder: Path, name: str, settings: dict, count: int, size: int, remedy: str = "give another --sample-dir"
    ):
        self.result = folder / f"{name}.npz"
        self.report = folder / f"{name}.settings.json"
        self.preview = folder / f"{name}.png"
        self.png_folder = folder / name
        self.partial = folder / f"{name}.partial"
        self.settings, self.count, self.shape = settings, count, (size, size, 3)
        self._image_bytes = size * size * 3
        self._remedy, self._lock = remedy, None

    def is_complete(self) -> bool:
        """Whether the result is already there. Raises `UserError` if one of other settings has its name."""
        for place in (self.result.parent, *self.result.parent.parents):
            if place.is_file():
                raise UserError(f"{place} is a file, not a folder for results; give another --sample-dir.")
        if not self.result.exists():
            return False
        if not self.report.exists():
            raise UserError(
                f"{self.result} exists without the .settings.json that says how it was made; move it away "
                f"or {self._remedy}."
            )
        self._refuse_other_settings(json.loads(self.report.read_text())["settings"], self.result)
        return True

    def recorded_batch_size(self) -> int | None:
        """The batch size of the interrupted run that `open` will continue. Raises `UserError` if it is another run."""
        run_file = self.partial / "run.json"
        if not run_file.exists():
            return None
        run = json.loads(run_file.read_text())
        self._refuse_other_settings(run["settings"], self.partial)
        return run["batch_size"]

    def open(self, batch_size: int) -> None:
        """Make the files, unless an interrupted run has; on one rank, before any rank writes.

        Raises `UserError` if they are another run's, or another process is writing them.
        """
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(
            self.partial, f"another process is writing {self.partial}; wait for it, or {self._remedy}."
        )
        if self.recorded_batch_size() is None:
            for name, size in (("images.u8", self.count * self._image_bytes), ("done.u8", self.count)):
                with open(self.partial / name, "wb") as file:
                    file.truncate(size)
        write_json(self.partial / "run.json", {"settings": self.settings, "batch_size": batch_size})

    def done(self) -> np.ndarray:
        """Which images are on the disk: `(count,)` bool."""
        return np.fromfile(self.partial / "done.u8", dtype=np.uint8) > 0

    def write(self, start: int, images: np.ndarray) -> None:
        """Put `images` `(B, size, size, 3)` uint8 at `start`; those beyond `count` are dropped."""
        images = images[: self.count - start]
        self._write_at("images.u8", start * self._image_bytes, np.ascontiguousarray(images).data)
        self._write_at("done.u8", start, b"\1" * len(images))

    def _write_at(self, name: str, place: int, data) -> None:
        with open(self.partial / name, "r+b") as file:
            file.seek(place)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def images(self, indices: np.ndarray) -> np.ndarray:
        """Images `(len(indices), size, size, 3)` read back from the disk."""
        return np.memmap(self.partial / "images.u8", np.uint8, "r", shape=(self.count, *self.shape))[indices]

    def write_pngs(self) -> None:
        """The complete result's images as `name/000000.png` and so on, unless they are there."""
        if self.png_folder.exists() and self.png_folder.stat().st_mtime >= self.result.stat().st_mtime:
            return
        staging = self.png_folder.with_name(f"{self.png_folder.name}.png.partial")
        for folder in (staging, self.png_folder):
            shutil.rmtree(folder, ignore_errors=True)
        staging.mkdir()
        with zipfile.ZipFile(self.result) as archive, archive.open("arr_0.npy") as images:
            np.lib.format.read_magic(images)
            np.lib.format.read_array_header_1_0(images)
            for index in progress(range(self.count), description="png", unit="image"):
                pixels = np.frombuffer(images.read(self._image_bytes), dtype=np.uint8).reshape(self.shape)
                Image.fromarray(pixels).save(staging / f"{index:06d}.png")
        os.replace(staging, self.png_folder)

    def finish(self, labels: np.ndarray, report: dict) -> None:
        """Turn the complete store into `name.npz` (`arr_0`, `labels`) and `name.settings.json`, without partial files.

        The result takes its name last: interrupted before, the same call starts over; after, it is complete.
        Raises `RuntimeError` while images are missing.
        """
        missing = int((~self.done()).sum())
        if missing:
            raise RuntimeError(f"{missing} of the {self.count} images in {self.partial} are missing")
        assembled = self.partial / "assembled.npz"
        with atomic_file(assembled) as file:
            self._write_npz(file, labels)
        write_json(self.report, {"settings": self.settings, **report})
        os.replace(assembled, self.result)
        sync_folder(self.result.parent)
        self.remove_partial()

    def remove_partial(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        shutil.rmtree(self.partial, ignore_errors=True)

    def _write_npz(self, file, labels: np.ndarray) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy", EPOCH), "w", force_zip64=True) as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, *self.shape)}
                np.lib.format.write_array_header_1_0(member, header)
                total = self.count * self._image_bytes
                with (
                    open(self.partial / "images.u8", "rb") as images,
                    progress(description="npz", total=total, unit="B") as bar,
                ):
                    while block := images.read(CHUNK_BYTES):
                        member.write(block)
                        bar.update(len(block))
            with archive.open(zipfile.ZipInfo("labels.npy", EPOCH), "w") as member:
                np.lib.format.write_array(member, labels, allow_pickle=False)

    def _refuse_other_settings(self, other: dict, path: Path) -> None:
        remedy = f"move it away or {self._remedy}"
        refuse_differences(f"{path} was made by another run", other, json_values(self.settings), remedy)
