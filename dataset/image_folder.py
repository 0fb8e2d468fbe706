"""Image folders, `ROOT/CLASS/**/IMAGE`: their classes and images in torchvision's order, and reading one image as RGB.

Archives of one (dataset/image_archives.py) are listed and read as the folder would be.

What is read how (tests/unit/test_image_folder.py): every image becomes 8-bit RGB. Grayscale is repeated over the
channels, CMYK converted, transparency dropped (the colours beneath stay), EXIF orientation ignored; so did the
published pipeline. Unlike it, 16-bit grayscale keeps its upper 8 bits (there it is clipped at 255: a white image).
"""

import errno
import os
import stat
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.image_archives import ArchivedImage, Members, archives_at, list_archives
from dataset.image_tree import EXTENSIONS, STAT_THREADS, ImageTree
from utils.program import UserError

MAX_ASPECT = 200  # with the shorter side scaled up, the longer one would fill the memory
STAT_IMAGES = 1000
# What is wrong with the file itself; any other failure is that of the disk or the network.
BROKEN_FILE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
# On broken files, beside OSError.
PILLOW_RAISES = (SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, struct.error)
PILLOW_RAISES += (Image.DecompressionBombError,)


class UnreadableImage(UserError):
    """An image file that is broken, or no image; `reason` says how."""

    def __init__(self, path: str | os.PathLike, reason: str):
        super().__init__(f"{os.fspath(path)} cannot be read as an image ({reason}); repair or remove it.")
        self.path, self.reason = os.fspath(path), reason

    def __reduce__(self):  # travels between processes
        return type(self), (self.path, self.reason)


class PathList(Sequence[str]):
    """Many paths in two arrays: a list of a million strings would be copied into every worker, page by page."""

    def __init__(self, paths: Sequence[str]):
        encoded = [os.fsencode(path) for path in paths]
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]].tobytes())


@dataclass(frozen=True)
class ImageFolder:
    root: Path
    class_names: list[str]
    paths: PathList  # relative to root
    labels: np.ndarray  # (images,) int32
    archived: Members | None = None  # the images, where they lie in archives

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str | ArchivedImage:
        """What `load_rgb` takes."""
        return os.path.join(self.root, self.paths[index]) if self.archived is None else self.archived[index]

    def subset(self, images: np.ndarray) -> "ImageFolder":
        paths = PathList([self.paths[image] for image in images])
        archived = self.archived and Members([self.archived[image] for image in images], paths)
        return ImageFolder(self.root, self.class_names, paths, self.labels[images], archived)


def list_image_folder(root: str | Path) -> ImageFolder:
    """Every image below `root`, or in the archives that it names; its class is the name of the first folder.

    Says what is left out (dataset/image_tree.py). Raises `UserError` if there is no image.
    """
    root = Path(root)
    if archives := archives_at(root):
        class_names, names, labels, places = list_archives(archives)
        paths = PathList(names)
        return ImageFolder(root, class_names, paths, np.array(labels, np.int32), Members(places, paths))
    if root.is_file():
        raise UserError(f"{root} is a file; --data-path is a folder of images per class, a .zip, or .tar shards.")
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; --data-path must hold one folder of images per class.")
    tree = ImageTree(root)
    class_names = tree.folders()
    if not class_names:
        raise UserError(f"{root} holds no class folders; put the images into {root}/CLASS/, one folder per class.")
    paths, labels = [], []
    for label, name in enumerate(class_names):
        files = tree.images(name)
        if not files:
            raise UserError(f"{root / name} holds no images ({', '.join(EXTENSIONS)}); fill or remove that folder.")
        paths += files
        labels += [label] * len(files)
    tree.remarks().tell(root)
    return ImageFolder(root, class_names, PathList(paths), np.array(labels, np.int32))


def file_sizes(folder: ImageFolder) -> list[tuple[str, int]]:
    """(relative path, bytes) of every image, -1 for a link to nowhere; many at a time, for network file systems."""

    def source(image: int) -> tuple[str, int]:
        place = folder.path(image)
        if isinstance(place, ArchivedImage):
            return folder.paths[image], place.length
        return folder.paths[image], os.path.getsize(place) if os.path.exists(place) else -1

    images = range(len(folder))
    parts = [images[start : start + STAT_IMAGES] for start in images[::STAT_IMAGES]]
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        return [entry for part in pool.map(lambda part: list(map(source, part)), parts) for entry in part]


def load_rgb(path: str | os.PathLike) -> Image.Image:
    """Decode an image file to 8-bit RGB as this file's first lines say; `UnreadableImage` where that fails."""
    try:
        if not isinstance(path, ArchivedImage) and not stat.S_ISREG(os.stat(path).st_mode):
            raise UnreadableImage(path, "not a regular file")  # reading a pipe or a device may never end
        with Image.open(path.open() if isinstance(path, ArchivedImage) else path) as image:
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise UnreadableImage(path, f"{image.width} × {image.height} pixels, beyond 1 : {MAX_ASPECT}")
            image.info.pop("transparency", None)  # it is dropped anyway; Pillow would warn about palettes
            if image.mode == "I" or image.mode.startswith("I;16"):
                upper = np.asarray(image).astype(np.int64) >> 8
                return Image.fromarray(upper.clip(0, 255).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except OSError as error:
        if error.errno is not None and error.errno not in BROKEN_FILE:
            raise
        raise UnreadableImage(path, _reason(error)) from error
    except PILLOW_RAISES as error:
        raise UnreadableImage(path, _reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return "not an image file" if isinstance(error, Image.UnidentifiedImageError) else str(error)
