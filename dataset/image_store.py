"""Images of a run that may be interrupted: a file on the disk that fills in any order, and becomes one `.npz`.

`NAME.partial/` beside the result holds `run.json` (the settings), `images.u8` (all images, each at its place) and
`sums.u32` (the CRC-32 of each image, written after its pixels are on the disk; 0 until then). What lies there is
compared with its sums when a run is continued and when the result is made. Ranks write disjoint parts of the same
files, so a run on many nodes needs a file system that they share. Memory stays that of one batch, however many images.
"""

import glob
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.arrays import archive_read
from utils.files import atomic_file, lock_folder, read_json, remove_folder, sync_folder, write_json
from utils.program import UserError
from utils.progress import progress
from utils.settings import json_values, refuse_differences

PIXELS, SUMS = "images.u8", "sums.u32"
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
        """Whether the result is already there. Raises `UserError` if a damaged or another one has its name."""
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
        self._refuse_other_settings(
            read_json(self.report, f"move {self.result} away", "settings")["settings"], self.result
        )
        self._refuse_damaged_result()
        return True

    def recorded_batch_size(self) -> int | None:
        """The batch size of the interrupted run that `open` will continue. Raises `UserError` if it is another run."""
        run_file = self.partial / "run.json"
        if not run_file.exists():
            return None
        remedy = f"remove {self.partial} to start anew"
        run = read_json(run_file, remedy, "settings", "batch_size")
        self._refuse_other_settings(run["settings"], self.partial)
        if not isinstance(run["batch_size"], int) or run["batch_size"] < 1:
            raise UserError(f"{run_file} is damaged (a batch size of {run['batch_size']}); {remedy}.")
        return run["batch_size"]

    def open(self, batch_size: int, keep: bool = True) -> None:
        """Make the files, or look through those of an interrupted run; on one rank, before any rank writes.

        Images that are damaged, or were cut off, count as missing, and a sentence says so; without `keep` all do.
        Raises `UserError` if they are another run's, another process is writing them or, with `keep`, another has made
        the result since `is_complete` looked for it.
        """
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(
            self.partial, f"another process is writing {self.partial}; wait for it, or {self._remedy}."
        )
        if keep and self.result.exists():
            self.remove_partial()
            raise UserError(f"another process has just finished {self.result}; run the same command again to use it.")
        for path in (self.preview, self.report):  # of a killed process
            for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
                leftover.unlink(missing_ok=True)
        continued = self.recorded_batch_size() is not None and keep
        if continued:
            self._tell_lost_sums()
        for name, size in ((PIXELS, self.count * self._image_bytes), (SUMS, self.count * 4)):
            with open(self.partial / name, "ab" if continued else "wb") as file:
                file.truncate(size)
        damaged = [image for image, _, intact in self._stored() if not intact] if continued else []
        if damaged:
            self._forget(damaged)
            print(f"{len(damaged):,} images in {self.partial} are damaged or were cut off; they are made again")
        write_json(self.partial / "run.json", {"settings": self.settings, "batch_size": batch_size})

    def _tell_lost_sums(self) -> None:
        sums = self.partial / SUMS
        lost = self.count - (sums.stat().st_size // 4 if sums.exists() else 0)
        if lost > 0:
            print(
                f"{sums} is missing or cut off; what {self.partial} held of {lost:,} images cannot be checked, so they "
                "are made again"
            )

    def done(self) -> np.ndarray:
        """Which images are on the disk: `(count,)` bool."""
        return np.fromfile(self.partial / SUMS, dtype=np.uint32) > 0

    def write(self, start: int, images: np.ndarray) -> None:
        """Put `images` `(B, size, size, 3)` uint8 at `start`; those beyond `count` are dropped."""
        images = np.ascontiguousarray(images[: self.count - start])
        self._write_at(PIXELS, start * self._image_bytes, images.data)
        self._write_at(SUMS, start * 4, np.array([_sum(image) for image in images], np.uint32).data)

    def _forget(self, images: list[int]) -> None:
        for image in images:
            self._write_at(SUMS, image * 4, bytes(4))

    def _stored(self) -> Iterator[tuple[int, np.ndarray, bool]]:
        """(number, its bytes, whether they are those that were written) of every image that is on the disk."""
        sums = np.fromfile(self.partial / SUMS, dtype=np.uint32)
        with open(self.partial / PIXELS, "rb") as file:
            for image in np.flatnonzero(sums):
                file.seek(image * self._image_bytes)
                pixels = file.read(self._image_bytes)
                yield int(image), pixels, len(pixels) == self._image_bytes and _sum(pixels) == sums[image]

    def _write_at(self, name: str, place: int, data) -> None:
        with open(self.partial / name, "r+b") as file:
            file.seek(place)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def images(self, indices: np.ndarray) -> np.ndarray:
        """Images `(len(indices), size, size, 3)` read back from the disk."""
        return np.memmap(self.partial / PIXELS, np.uint8, "r", shape=(self.count, *self.shape))[indices]

    def write_pngs(self) -> None:
        """The complete result's images as `name/000000.png` and so on, unless they are there."""
        if self.png_folder.exists() and self.png_folder.stat().st_mtime >= self.result.stat().st_mtime:
            return
        staging = self.png_folder.with_name(f"{self.png_folder.name}.png.partial")
        for folder in (staging, self.png_folder):
            shutil.rmtree(folder, ignore_errors=True)
        staging.mkdir()
        try:
            with archive_read():
                self._write_pngs_into(staging)
        except ValueError as error:
            raise UserError(f"{self.result} is damaged; remove it and run the same command again.") from error
        os.replace(staging, self.png_folder)

    def _write_pngs_into(self, folder: Path) -> None:
        with zipfile.ZipFile(self.result) as archive, archive.open("arr_0.npy") as images:
            np.lib.format.read_magic(images)
            np.lib.format.read_array_header_1_0(images)
            for index in progress(range(self.count), description="png", unit="image"):
                pixels = np.frombuffer(images.read(self._image_bytes), dtype=np.uint8).reshape(self.shape)
                Image.fromarray(pixels).save(folder / f"{index:06d}.png")

    def finish(self, labels: np.ndarray, report: dict) -> None:
        """Turn the complete store into `name.npz` (`arr_0`, `labels`) and `name.settings.json`, without partial files.

        The result takes its name last: interrupted before, the same call starts over; after, it is complete.
        Raises `RuntimeError` while images are missing, `UserError` if one is not as it was written.
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
        remove_folder(self.partial, self._lock)
        self._lock = None

    def _write_npz(self, file, labels: np.ndarray) -> None:
        damaged, intact_images = [], 0
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy", EPOCH), "w", force_zip64=True) as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, *self.shape)}
                np.lib.format.write_array_header_1_0(member, header)
                stored = progress(self._stored(), description="npz", total=self.count, unit="image")
                for image, pixels, intact in stored:
                    damaged += [] if intact else [image]
                    intact_images += intact
                    member.write(pixels)
            with archive.open(zipfile.ZipInfo("labels.npy", EPOCH), "w") as member:
                np.lib.format.write_array(member, labels, allow_pickle=False)
        if intact_images < self.count:
            self._forget(damaged)
            raise UserError(
                f"{self.count - intact_images:,} images in {self.partial} were damaged on the disk; run the same "
                "command again, which makes them anew."
            )

    def _refuse_damaged_result(self) -> None:
        """Of a copy that was cut off, say; whoever reads the images compares their checksum."""
        try:
            with archive_read(), zipfile.ZipFile(self.result) as archive:
                size = archive.getinfo("arr_0.npy").file_size
        except ValueError as error:
            raise UserError(
                f"{self.result} is damaged or cut off; remove it and run the same command again."
            ) from error
        if size <= self.count * self._image_bytes:
            raise UserError(
                f"{self.result} holds fewer images than {self.count:,}; remove it and run the command again."
            )

    def _refuse_other_settings(self, other: dict, path: Path) -> None:
        remedy = f"move it away or {self._remedy}"
        if not isinstance(other, dict):
            raise UserError(f"the settings kept with {path} are damaged; {remedy}.")
        refuse_differences(f"{path} was made by another run", other, json_values(self.settings), remedy)


def _sum(pixels) -> int:
    """CRC-32 of an image's bytes, but never 0."""
    return zlib.crc32(pixels) or 1
