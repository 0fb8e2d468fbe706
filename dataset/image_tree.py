"""Which files below a folder are images: hidden ones and circles of symlinks are left out, and a sentence says so."""

import os
import sys
from array import array
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils.program import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
HIDDEN = ("@eaDir", "__MACOSX")  # what file servers and archivers put beside files, besides names that begin with .
STAT_THREADS = 32

Identity = tuple[int, int]  # device and inode


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in HIDDEN


def is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


@dataclass
class Remarks:
    """What a listing leaves out, or holds more than once: names relative to its root."""

    hidden: list[str] = field(default_factory=list)
    circles: list[str] = field(default_factory=list)  # symlinks to a folder that they lie in
    lost: list[str] = field(default_factory=list)  # links in an archive, to a folder or to nothing
    repeated: list[str] = field(default_factory=list)
    crossing: list[str] = field(default_factory=list)  # symlinks between folders that are there more than once

    def tell(self, root: str | os.PathLike) -> None:
        """A line for each kind, on the main rank."""
        kinds = {
            "hidden files or folders are left out": self.hidden,
            "symlinks that lead back to a folder around them are left out": self.circles,
            "symlinks to folders that are listed already are left out": self.crossing,
            "links in it, to a folder or to nothing, are left out": self.lost,
            "images are there more than once, through links": self.repeated,
        }
        for what, names in kinds.items():
            if names and os.environ.get("RANK", "0") == "0":
                print(f"note: {root}: {len(names):,} {what}, such as {min(names)}", file=sys.stderr)


class ImageTree:
    """The folders and images below `root`, in torchvision's order; symlinks are followed.

    Names are relative to `root`. Methods raise `UserError` for a folder that cannot be listed.
    """

    def __init__(self, root: str | os.PathLike):
        self.root, self._remarks = Path(root), Remarks()
        real = self.root.resolve()
        self._around_root = frozenset(_identity(folder) for folder in (real, *real.parents))
        self._listed: set[Identity] = set()  # folders
        self._links: list[str] = []  # images that are symlinks
        self._inodes: dict[int, array] = defaultdict(lambda: array("Q"))  # of those that are not, by device

    def folders(self) -> list[str]:
        """The folders of `root` itself."""
        return sorted(name for name, is_folder, _ in self._entries("", self._around_root) if is_folder)

    def images(self, below: str = "") -> list[str]:
        """All images below a folder."""
        found, waiting, here = [], [(below, self._around_root)], set()
        while waiting:
            folder, around = waiting.pop()
            identity = _identity(self.root / folder)
            around |= {identity}
            names, again, again_here = [], identity in self._listed, identity in here
            self._listed.add(identity)
            here.add(identity)
            for name, is_folder, inode in sorted(self._entries(folder, around), key=lambda entry: entry[0]):
                if is_folder and again_here and inode is None and _identity(self.root / name) in here:
                    self._remarks.crossing.append(name)  # folders that link to each other would multiply
                    continue
                if is_folder:
                    waiting.append((name, around))
                    continue
                names.append(name)
                if again:
                    self._remarks.repeated.append(name)
                elif inode is None:
                    self._links.append(name)
                else:
                    self._inodes[identity[0]].append(inode)
            found.append((folder, sorted(names)))
        return [name for _, names in sorted(found) for name in names]

    def remarks(self) -> Remarks:
        """On what has been listed; asks once where each symlink leads."""
        with ThreadPoolExecutor(STAT_THREADS) as pool:
            targets = list(pool.map(lambda name: _identity(self.root / name), self._links))
        files = {device: set(np.array(inodes)) for device, inodes in self._inodes.items() if targets}
        seen: set[Identity | None] = set()
        for name, target in zip(self._links, targets, strict=True):
            if target is not None and (target in seen or target[1] in files.get(target[0], ())):
                self._remarks.repeated.append(name)
            seen.add(target)
        self._links.clear()
        return self._remarks

    def _entries(self, folder: str, around: frozenset[Identity]) -> Iterator[tuple[str, bool, int | None]]:
        """(name, whether it is a folder, the inode of an image that is no symlink) of what counts in `folder`."""
        try:
            with os.scandir(self.root / folder) as entries:
                for entry in entries:
                    name, is_folder = os.path.join(folder, entry.name), _is_folder(entry)
                    if not (is_folder or is_image(name)):
                        continue
                    if is_hidden(entry.name):
                        self._remarks.hidden.append(name)
                    elif is_folder and entry.is_symlink() and _identity(entry) in around:
                        self._remarks.circles.append(name)
                    else:
                        yield name, is_folder, None if entry.is_symlink() else entry.inode()
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UserError(f"{error.filename} cannot be listed ({reason}); make it readable or remove it.") from error


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a symlink to itself, say
        return False


def _identity(path: str | os.PathLike) -> Identity | None:
    """Device and inode of what `path` leads to; None if it leads nowhere."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
