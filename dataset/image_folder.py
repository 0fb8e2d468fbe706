"""Image folders, `ROOT/CLASS/**/IMAGE`: their classes and images in torchvision's order, and reading one image as RGB.

Archives of one (dataset/image_archives.py) are listed and read as the folder would be.

What is read how (tests/unit/test_image_folder.py): every image becomes 8-bit RGB. Grayscale is repeated over the
channels, CMYK converted, transparency dropped (the colours beneath stay), EXIF orientation ignored; so did the
published pipeline. Unlike it, 16-bit grayscale keeps its upper 8 bits (there it is clipped at 255: a white image).
"""

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image

from dataset.image_archives import ArchivedImage, Members, archives_at, list_archives
from utils.program import UserError

MAX_ASPECT = 200  # with the shorter side scaled up, the longer one would fill the memory
STAT_IMAGES, STAT_THREADS = 1000, 32
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


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

    Raises `UserError` if there is none.
    """
    root = Path(root)
    if archives := archives_at(root):
        class_names, names, labels, places = list_archives(archives, EXTENSIONS)
        paths = PathList(names)
        return ImageFolder(root, class_names, paths, np.array(labels, np.int32), Members(places, paths))
    if root.is_file():
        raise UserError(f"{root} is a file; --data-path is a folder of images per class, a .zip, or .tar shards.")
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; --data-path must hold one folder of images per class.")
    class_names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not class_names:
        raise UserError(f"{root} holds no class folders; put the images into {root}/CLASS/, one folder per class.")
    paths, labels = [], []
    for label, name in enumerate(class_names):
        files = _images_below(root, name)
        if not files:
            raise UserError(f"{root / name} holds no images ({', '.join(EXTENSIONS)}); fill or remove that folder.")
        paths += files
        labels += [label] * len(files)
    return ImageFolder(root, class_names, PathList(paths), np.array(labels, np.int32))


def _images_below(root: Path, class_name: str) -> list[str]:
    found = []
    for folder, _, names in sorted(os.walk(root / class_name, onerror=_refuse, followlinks=True)):
        below = os.path.relpath(folder, root)
        found += [os.path.join(below, name) for name in sorted(names) if name.lower().endswith(EXTENSIONS)]
    return found


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename} cannot be listed ({_reason(error)}); make it readable or remove it.") from error


def file_sizes(folder: ImageFolder) -> list[tuple[str, int]]:
    """(relative path, bytes) of every image, -1 for a link to nowhere; many at a time, for network file systems."""

    def source(image: int) -> tuple[str, int]:
        place = folder.path(image)
        if isinstance(place, ArchivedImage):
            return folder.paths[image], place.length
        return folder.paths[image], os.path.getsize(place) if os.path.exists(place) else -1

    with ThreadPool(STAT_THREADS) as pool:
        return pool.map(source, range(len(folder)), chunksize=STAT_IMAGES)


def load_rgb(path: str | os.PathLike) -> Image.Image:
    """Decode an image file to 8-bit RGB as this file's first lines say; `UnreadableImage` where that fails."""
    try:
        with Image.open(path.open() if isinstance(path, ArchivedImage) else path) as image:
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise UnreadableImage(path, f"{image.width} × {image.height} pixels, beyond 1 : {MAX_ASPECT}")
            image.info.pop("transparency", None)  # it is dropped anyway; Pillow would warn about palettes
            if image.mode == "I" or image.mode.startswith("I;16"):
                upper = np.asarray(image).astype(np.int64) >> 8
                return Image.fromarray(upper.clip(0, 255).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except OSError as error:
        if error.errno is not None and not isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
            raise  # the disk or the network failed, not the image
        raise UnreadableImage(path, _reason(error)) from error
    except (SyntaxError, ValueError, TypeError, IndexError, struct.error, Image.DecompressionBombError) as error:
        raise UnreadableImage(path, _reason(error)) from error  # what Pillow's decoders raise on broken files


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return "not an image file" if isinstance(error, Image.UnidentifiedImageError) else str(error)
