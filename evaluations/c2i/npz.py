"""Images in batches from an .npz or a folder, whatever their number and size; nothing is ever unpickled."""

import ast
import math
import os
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Full, Queue
from typing import IO

import numpy as np
from PIL import Image

from utils.program import UserError

MAX_IMAGE_BYTES = 1 << 28  # of one decoded image; a batch never holds more than this, or one image
MAX_SMALL_ARRAY_BYTES = 1 << 30  # statistics and labels, which are read whole
MAX_DEFLATE_RATIO = 1032  # of the format: a match of 258 bytes takes two bits
MAX_HEADER_BYTES = 10_000
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
DECODERS = 8  # threads

# What a damaged archive can raise while it is being read.
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    struct.error,
    NotImplementedError,
    ValueError,
    OSError,
    RuntimeError,
)
BROKEN_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises


class ImageSet:
    """Where images come from: `count` images of `height` × `width`, read in order with `batches`."""

    path: Path
    count: int
    height: int
    width: int
    labels: np.ndarray | None = None  # (count,) int64: the class that each image was asked to show

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """Batches (≤ size, H, W, 3) of uint8, at most `MAX_IMAGE_BYTES` each."""
        raise NotImplementedError

    def array(self, name: str) -> np.ndarray | None:
        """Another array of the same file, such as `mu`; None if there is none."""
        return None

    def batch_limit(self, size: int) -> int:
        return max(1, min(size, MAX_IMAGE_BYTES // (self.height * self.width * 3)))


def open_images(path: str | os.PathLike) -> ImageSet:
    """The images at `path`, an .npz with uint8 `arr_0` (N, H, W, 3) or a folder of image files."""
    path = Path(path)
    if path.is_dir():
        return ImageFolder(path)
    if not path.is_file():
        raise UserError(f"there is no file or folder {path}; give an .npz with arr_0 or a folder of images.")
    return NpzImages(path)


class NpzImages(ImageSet):
    """An .npz, compressed or not: arr_0 (N, H, W, 3) uint8, perhaps labels (or arr_1) and statistics."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._archive() as archive:
            members = sorted(archive.namelist())
            self.names = {name.removesuffix(".npy") for name in members if name.endswith(".npy")}
            if "arr_0" not in self.names:
                raise UserError(f"{path} holds no arr_0.npy (it holds: {', '.join(members[:10]) or 'nothing'}); "
                                "store the images as uint8 arr_0 of shape (N, height, width, 3).")  # fmt: skip
            with archive.open("arr_0.npy") as file:
                shape, dtype, fortran_order = self._header(file, self._size(archive, "arr_0"), "arr_0")
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran_order:
            order = " in Fortran order" if fortran_order else ""
            raise UserError(f"arr_0 of {path} is {dtype} {shape}{order}; "
                            "images must be uint8 of shape (N, height, width, 3), values 0 to 255.")  # fmt: skip
        self.count, self.height, self.width = shape[:3]
        if not 1 <= self.height * self.width * 3 <= MAX_IMAGE_BYTES:
            raise UserError(f"arr_0 of {path} holds images of {self.height} x {self.width} pixels; "
                            f"each must have at least one pixel and at most {MAX_IMAGE_BYTES >> 20} MiB.")  # fmt: skip
        self.labels = self._labels()

    def batches(self, size: int) -> Iterator[np.ndarray]:
        size = self.batch_limit(size)
        with self._archive() as archive, archive.open("arr_0.npy") as file:
            self._header(file, self._size(archive, "arr_0"), "arr_0")
            for start in range(0, self.count, size):
                length = min(size, self.count - start)
                batch = np.empty((length, self.height, self.width, 3), np.uint8)
                _read_into(file, memoryview(batch).cast("B"))
                yield batch
            if file.read(1):  # also makes zipfile compare the checksum
                raise zipfile.BadZipFile("more data than the header promises")

    def array(self, name: str) -> np.ndarray | None:
        if name not in self.names:
            return None
        with self._archive() as archive, archive.open(f"{name}.npy") as file:
            size = self._size(archive, name)
            shape, dtype, fortran_order = self._header(file, size, name)
            if size > MAX_SMALL_ARRAY_BYTES:
                raise UserError(f"{name} of {self.path} takes {size >> 20} MiB; statistics are never that large.")
            array = np.empty(shape[::-1] if fortran_order else shape, dtype)
            _read_into(file, memoryview(array.reshape(-1).view(np.uint8)))
            if file.read(1):
                raise zipfile.BadZipFile("more data than the header promises")
        return array.T if fortran_order else array

    def _labels(self) -> np.ndarray | None:
        """`labels`, or ADM's `arr_1` if it looks like labels."""
        labels = self.array("labels")
        if labels is None and "arr_1" in self.names:
            with self._archive() as archive, archive.open("arr_1.npy") as file:
                shape, dtype, *_ = _npy_header(file)
            if dtype.kind in "iu" and shape == (self.count,):  # else it is something else, and nobody's business
                labels = self.array("arr_1")
        if labels is None:
            return None
        if labels.dtype.kind not in "iu" or labels.shape != (self.count,):
            raise UserError(f"labels of {self.path} are {labels.dtype} {labels.shape}; "
                            f"they must be integers of shape ({self.count},), one per image.")  # fmt: skip
        return labels.astype(np.int64)

    def _size(self, archive: zipfile.ZipFile, name: str) -> int:
        """Bytes of an array as the archive gives them, which must be possible for the file's own length."""
        member = archive.getinfo(f"{name}.npy")
        ratio = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: MAX_DEFLATE_RATIO}.get(member.compress_type)
        if ratio is None:
            raise zipfile.BadZipFile(f"{name} is packed otherwise than numpy does")
        if member.file_size > ratio * min(member.compress_size, self.path.stat().st_size):
            raise zipfile.BadZipFile(f"{name} cannot hold {member.file_size} bytes")
        return member.file_size

    @contextmanager
    def _archive(self) -> Iterator[zipfile.ZipFile]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                yield archive
        except PermissionError:
            raise
        except DAMAGE as error:
            raise UserError(f"{self.path} is damaged or is not an .npz ({error or type(error).__name__}); "
                            "copy or generate it again.") from None  # fmt: skip

    def _header(self, file: IO[bytes], size: int, name: str) -> tuple[tuple[int, ...], np.dtype, bool]:
        """Shape, type and order from an .npy header, checked against the `size` that the archive gives."""
        shape, dtype, fortran_order, start = _npy_header(file)
        if dtype.hasobject:
            raise UserError(f"{name} of {self.path} is an object array, which could run code when loaded; "
                            "store plain numbers.")  # fmt: skip
        if math.prod(shape) * dtype.itemsize != size - start:
            raise ValueError(f"{name} should take {math.prod(shape) * dtype.itemsize} bytes and takes {size - start}")
        return shape, dtype, fortran_order


class ImageFolder(ImageSet):
    """Every image file below a folder, sorted by path, converted to RGB; all must have the same size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if not self.files:
            raise UserError(f"the folder {path} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
        self.count = len(self.files)
        try:
            with Image.open(self.files[0]) as first:
                self.width, self.height = first.size
        except BROKEN_IMAGE as error:
            raise UserError(f"{self.files[0]} cannot be read as an image ({error}).") from None
        if self.height * self.width * 3 > MAX_IMAGE_BYTES:
            raise UserError(f"{self.files[0]} has {self.height} x {self.width} pixels, which is too large.")

    def batches(self, size: int) -> Iterator[np.ndarray]:
        size = self.batch_limit(size)
        with ThreadPoolExecutor(DECODERS) as pool:
            for start in range(0, self.count, size):
                yield np.stack(list(pool.map(self._decode, self.files[start : start + size])))

    def _decode(self, file: Path) -> np.ndarray:
        try:
            with Image.open(file) as image:
                if image.size != (self.width, self.height):
                    raise UserError(f"{file} has {image.width} x {image.height} pixels and the first image of the "
                                    f"folder {self.width} x {self.height}; resize them to one size.")  # fmt: skip
                return np.asarray(image.convert("RGB"))
        except BROKEN_IMAGE as error:
            raise UserError(f"{file} cannot be read as an image ({error}).") from None


def prefetched(batches: Iterator[np.ndarray], depth: int = 2) -> Iterator[np.ndarray]:
    """The same batches, read by a thread while the caller works on earlier ones; at most `depth` wait."""
    queue: Queue = Queue(depth)
    stop = threading.Event()

    def offer(item) -> None:
        while not stop.is_set():
            try:
                return queue.put(item, timeout=0.1)
            except Full:
                continue

    def read() -> None:
        try:
            for batch in batches:
                offer((batch, None))
                if stop.is_set():
                    return
            offer((None, None))
        except BaseException as error:  # raised again where the batches are used
            offer((None, error))

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            batch, error = queue.get()
            if error is not None:
                raise error
            if batch is None:
                return
            yield batch
    finally:
        stop.set()


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, bool, int]:
    """Shape, type, Fortran order and the header's own length (numpy.lib.format, versions 1 and 2)."""
    magic = _read(file, 8)
    if magic[:6] != b"\x93NUMPY" or magic[6] not in (1, 2):
        raise ValueError("not an .npy inside")
    length_bytes = _read(file, 2 if magic[6] == 1 else 4)
    length = int.from_bytes(length_bytes, "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"an .npy header of {length} bytes")
    try:
        header = ast.literal_eval(_read(file, length).decode("latin1").strip())
        shape, fortran_order, dtype = header["shape"], header["fortran_order"], np.dtype(header["descr"])
    except (SyntaxError, TypeError, KeyError, ValueError, MemoryError, RecursionError):
        raise ValueError("an .npy header that cannot be read") from None
    if not isinstance(shape, tuple) or not all(type(length) is int and 0 <= length < 2**40 for length in shape):
        raise ValueError("an .npy header with an impossible shape")
    return shape, dtype, bool(fortran_order), 8 + len(length_bytes) + length


def _read(file: IO[bytes], length: int) -> bytes:
    content = file.read(length)
    if len(content) != length:
        raise EOFError("it ends too early")
    return content


def _read_into(file: IO[bytes], target: memoryview) -> None:
    position = 0
    while position < len(target):
        count = file.readinto(target[position:])
        if not count:
            raise EOFError("it ends too early")
        position += count
