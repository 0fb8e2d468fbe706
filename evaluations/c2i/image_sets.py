"""Images in batches from an .npz or a folder, whatever their number and size; nothing is ever unpickled."""

import itertools
import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np

from dataset.background import work_ahead
from dataset.crops import center_crop
from dataset.image_archives import ArchivedImage, archives_at
from dataset.image_folder import list_image_folder, load_rgb
from dataset.image_tree import EXTENSIONS, ImageTree
from utils.memory import require_memory
from utils.program import UserError

MAX_BATCH_BYTES = 1 << 28  # of images; a batch may always hold one
DECODERS = 8  # threads
PIXEL_BYTES = 6  # while an image is scaled: before and after


class ImageSet:
    """Where images come from: `count` images of `height` × `width`, read in order with `batches`."""

    path: Path
    count: int
    height: int
    width: int
    labels: np.ndarray | None = None  # (count,) int64: the class that each image was asked to show

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """Batches (≤ size, H, W, 3) of uint8, at most `MAX_BATCH_BYTES` each."""
        raise NotImplementedError

    def array(self, name: str) -> np.ndarray | None:
        """Another array of the same file, such as `mu`; None if there is none."""
        return None

    def batch_limit(self, size: int) -> int:
        return max(1, min(size, MAX_BATCH_BYTES // (self.height * self.width * 3)))


def open_images(path: Path, crop: int | None = None) -> ImageSet:
    """The images at `path`: an .npz with uint8 `arr_0` (N, H, W, 3), a folder of image files or an archive of one.

    Those of the latter are centre crops of `crop` pixels, where given.
    """
    if path.is_dir() or archives_at(path):
        return FolderImages(path, crop)
    if not path.is_file():
        raise UserError(f"there is no file or folder {path}; give an .npz with arr_0 or a folder of images.")
    return NpzImages(path)


class NpzImages(ImageSet):
    """An .npz, compressed or not: arr_0 (N, H, W, 3) uint8, perhaps labels (or arr_1) and statistics."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._archive() as archive:
            members = archive.namelist()
        self.names = {name.removesuffix(".npy") for name in members if name.endswith(".npy")}
        if "arr_0" not in self.names:
            raise UserError(
                f"{path} holds no arr_0.npy (it holds: {', '.join(members[:10]) or 'nothing'}); "
                "store the images as uint8 arr_0 of shape (N, height, width, 3)."
            )
        with self._open("arr_0") as (_, shape, dtype, fortran_order):
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran_order or 0 in shape[1:]:
                order = " in Fortran order" if fortran_order else ""
                raise UserError(
                    f"arr_0 of {path} is {dtype} {shape}{order}; "
                    "images must be uint8 of shape (N, height, width, 3), values 0 to 255."
                )
        self.count, self.height, self.width = shape[:3]
        self.labels = self._labels()

    def batches(self, size: int) -> Iterator[np.ndarray]:
        size = self.batch_limit(size)
        with self._open("arr_0") as (file, *_):
            for start in range(0, self.count, size):
                shape = (min(size, self.count - start), self.height, self.width, 3)
                yield np.frombuffer(bytearray(file.read(math.prod(shape))), np.uint8).reshape(shape)
            file.read(1)  # at the end zipfile compares the checksum

    def array(self, name: str) -> np.ndarray | None:
        if name not in self.names:
            return None
        with self._open(name) as (file, shape, dtype, fortran_order):
            return np.frombuffer(file.read(), dtype).reshape(shape, order="F" if fortran_order else "C")

    def _labels(self) -> np.ndarray | None:
        """`labels`, or ADM's `arr_1` if it looks like labels."""
        labels = self.array("labels")
        if labels is None and "arr_1" in self.names:
            with suppress(UserError), self._open("arr_1") as (_, shape, dtype, _):  # else it is nobody's business
                if dtype.kind in "iu" and shape == (self.count,):
                    labels = self.array("arr_1")
        if labels is None:
            return None
        if labels.dtype.kind not in "iu" or labels.shape != (self.count,):
            raise UserError(
                f"labels of {self.path} are {labels.dtype} {labels.shape}; "
                f"they must be integers of shape ({self.count},), one per image."
            )
        return labels.astype(np.int64)

    @contextmanager
    def _archive(self) -> Iterator[zipfile.ZipFile]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                yield archive
        except (UserError, PermissionError, MemoryError):
            raise
        except Exception as error:  # whatever a damaged archive makes zipfile and NumPy raise
            raise UserError(
                f"{self.path} is damaged or is not an .npz ({error or type(error).__name__}); "
                "copy or generate it again."
            ) from error

    @contextmanager
    def _open(self, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype, bool]]:
        """An array's file after its header, with its shape, type and whether it is in Fortran order."""
        with self._archive() as archive, archive.open(f"{name}.npy") as file:
            formats = np.lib.format
            first_version = formats.read_magic(file) == (1, 0)
            read_header = formats.read_array_header_1_0 if first_version else formats.read_array_header_2_0
            shape, fortran_order, dtype = read_header(file)
            if dtype.hasobject:
                raise UserError(
                    f"{name} of {self.path} is an object array, which could run code when loaded; store plain numbers."
                )
            size, held = math.prod(shape) * dtype.itemsize, archive.getinfo(f"{name}.npy").file_size - file.tell()
            if size != held:
                raise ValueError(f"{name} should take {size} bytes and takes {held}")
            yield file, shape, dtype, fortran_order


class FolderImages(ImageSet):
    """Every image file below a folder, sorted by path, or in its archive, as RGB; of one size, unless they are cut."""

    def __init__(self, path: Path, crop: int | None) -> None:
        self.path, self.crop = path, crop
        if archives_at(path):
            archived = list_image_folder(path)
            self.files = [archived.path(image) for image in range(len(archived))]
        else:
            tree = ImageTree(path)
            self.files = sorted(path / name for name in tree.images())
            tree.remarks().tell(path)
        if not self.files:
            raise UserError(f"the folder {path} holds no images ({', '.join(EXTENSIONS)}).")
        if crop:
            needed = crop * crop * PIXEL_BYTES * DECODERS
            require_memory(needed, f"decoding images of {crop} pixels", "use a smaller --image-size")
        self.count = len(self.files)
        self.width, self.height = (crop, crop) if crop else load_rgb(self.files[0]).size

    def batches(self, size: int) -> Iterator[np.ndarray]:
        images = work_ahead(self._decode, self.files, DECODERS, DECODERS)
        while batch := list(itertools.islice(images, self.batch_limit(size))):
            yield np.stack(batch)

    def _decode(self, file: Path | ArchivedImage) -> np.ndarray:
        image = load_rgb(file)
        if self.crop:
            return center_crop(image, self.crop)
        if image.size != (self.width, self.height):
            raise UserError(
                f"{file} has {image.width} x {image.height} pixels and the first image of the folder "
                f"{self.width} x {self.height}; give --image-size, or resize them to one size."
            )
        return np.asarray(image)


def prefetched(batches: Iterator[np.ndarray], depth: int = 2) -> Iterator[np.ndarray]:
    """The same batches, up to `depth` of them read ahead by a thread while the caller works on earlier ones."""
    ahead = work_ahead(lambda _: next(batches, None), itertools.count(), depth)
    yield from itertools.takewhile(lambda batch: batch is not None, ahead)
