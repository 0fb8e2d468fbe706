"""Images inside plain `.tar` shards or a `.zip`, found once and then read from their place as files are.

Names are those of an image folder, `CLASS/**/IMAGE`; one folder around all of them is left out. Images without a
folder have their class beside them, as WebDataset shards do: `000123.jpg` with `000123.cls`.
"""

import io
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path

import numpy as np

from dataset.arrays import archive_read
from dataset.image_tree import EXTENSIONS, Remarks, is_hidden, is_image
from utils.program import UserError

SUFFIXES = (".tar", ".zip")
LISTING_THREADS = 16
MOST_LINKS = 40  # in a row, as Linux follows them
LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip's member: what precedes its data is 30 bytes, its name and extras


@dataclass(frozen=True)
class ArchivedImage:
    """An image in an archive; prints as the path it would have if the archive were a folder.

    `length` is -1 for what is no regular file there, such as a symlink to nothing.
    """

    archive: str
    name: str
    offset: int  # of its data, in a zip of its local header
    size: int  # bytes there
    length: int  # bytes of the image
    zipped: bool
    deflated: bool

    def __fspath__(self) -> str:
        return os.path.join(self.archive, self.name)

    __str__ = __fspath__

    def open(self) -> io.BytesIO:
        """Its bytes. Raises `ValueError` for damaged ones."""
        if self.length < 0:
            raise ValueError("not a regular file")
        with open(self.archive, "rb") as file:
            file.seek(self.offset)
            if self.zipped:
                file.seek(sum(LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))), os.SEEK_CUR)
            data = file.read(self.size)
        try:
            return io.BytesIO(zlib.decompress(data, wbits=-15) if self.deflated else data)
        except zlib.error as error:
            raise ValueError(f"damaged in the archive: {error}") from error


class Members(Sequence[ArchivedImage]):
    """Many images in a few arrays, which workers do not copy."""

    def __init__(self, found: Sequence[ArchivedImage], names: Sequence[str]):
        self._archives = sorted({image.archive for image in found})
        numbers = {archive: number for number, archive in enumerate(self._archives)}
        places = [(numbers[i.archive], i.offset, i.size, i.length, i.zipped, i.deflated) for i in found]
        self._places, self._names = np.array(places, np.int64), names

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> ArchivedImage:
        archive, *place, zipped, deflated = self._places[index].tolist()
        return ArchivedImage(self._archives[archive], self._names[index], *place, bool(zipped), bool(deflated))


def archives_at(path: Path) -> list[Path]:
    """The archives that `path` means: itself, those that match the pattern, or those in a folder without folders."""
    if path.suffix in SUFFIXES and path.is_file():
        return [path]
    if path.is_dir():
        inside = [entry for entry in os.scandir(path) if not is_hidden(entry.name)]
        held = [] if any(entry.is_dir() for entry in inside) else [Path(entry.path) for entry in inside]
    else:
        held = [Path(name) for name in glob(str(path))]
    return sorted(file for file in held if file.suffix in SUFFIXES and file.is_file())


def list_archives(archives: Sequence[Path]) -> tuple[list[str], list[str], list[int], list[ArchivedImage]]:
    """Class names, and in an image folder's order the path, label and place of every image. Raises `UserError`."""
    remarks = Remarks()
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        parts = pool.map(lambda archive: list(_with_classes(archive, remarks)), archives)
        found = [entry for part in parts for entry in part]
    remarks.tell(archives[0] if len(archives) == 1 else archives[0].parent)
    if not found:
        raise UserError(f"{archives[0]} holds no images ({', '.join(EXTENSIONS)}).")
    tops = {name.split("/")[0] for name, *_ in found}
    if len(tops) == 1 and all(name.count("/") > 1 for name, *_ in found):
        found = [(name.split("/", 1)[1], *rest) for name, *rest in found]
    names = {name.split("/")[0] for name, *_ in found}
    numbered = all(by_file for *_, by_file in found) and all(name.isdecimal() for name in names)
    class_names = sorted(names, key=int if numbered else str)
    labels = {name: label for label, name in enumerate(class_names)}
    found.sort(key=lambda entry: (labels[entry[0].split("/")[0]], *os.path.split(entry[0])))
    paths = [name for name, *_ in found]
    for name, following in zip(paths, paths[1:], strict=False):
        if name == following:
            raise UserError(f"{archives[0].parent} holds {name} twice; give images of all shards names of their own.")
    return class_names, paths, [labels[path.split("/")[0]] for path in paths], [place for _, place, _ in found]


def _with_classes(archive: Path, remarks: Remarks) -> Iterator[tuple[str, ArchivedImage, bool]]:
    """(path that begins with the class, place, whether the class stands in a file) of every image."""
    try:
        with archive_read():
            members = list(_members(archive, remarks))
            classes = {
                _key(place.name): place.open().read().decode(errors="replace").strip()
                for place in members
                if place.name.endswith(".cls")
            }
    except ValueError as error:
        raise UserError(f"{archive} is damaged or no {archive.suffix} ({error}); copy it again.") from error
    for place in members:
        name = place.name
        if not is_image(name):
            continue
        if any(map(is_hidden, name.split("/"))):
            remarks.hidden.append(name)
            continue
        by_file = _key(name) in classes or "/" not in name
        if by_file and not classes.get(_key(name)):
            raise UserError(
                f"{name} in {archive} has no class; images lie in a folder per class, or have a .cls file beside them."
            )
        yield f"{classes[_key(name)]}/{name}" if by_file else name, place, by_file


def _key(name: str) -> str:
    """What the files of one sample share in WebDataset: the path up to the first point of the file's name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _members(archive: Path, remarks: Remarks) -> Iterator[ArchivedImage]:
    """Every file in an archive, images or not."""
    place = os.path.abspath(archive)
    if archive.suffix == ".tar":
        yield from _tar_members(place, remarks)
        return
    with zipfile.ZipFile(archive) as zipped:
        for entry in zipped.infolist():
            if entry.is_dir():
                continue
            if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError(f"{archive} is encrypted or not compressed as usual; zip the folder again.")
            name, deflated = os.path.normpath(entry.filename), entry.compress_type == zipfile.ZIP_DEFLATED
            yield ArchivedImage(place, name, entry.header_offset, entry.compress_size, entry.file_size, True, deflated)


def _tar_members(archive: str, remarks: Remarks) -> Iterator[ArchivedImage]:
    """Every file; a link, hard or symbolic, is the file that it leads to, and an image that is none is kept as such."""
    files, links = {}, {}
    with tarfile.open(archive, "r:") as tar:
        for entry in tar:
            name = os.path.normpath(entry.name)
            if entry.isreg() and not entry.issparse():
                files[name] = ArchivedImage(archive, name, entry.offset_data, entry.size, entry.size, False, False)
                yield files[name]
            elif entry.islnk():
                links[name] = os.path.normpath(entry.linkname)
            elif entry.issym():
                links[name] = os.path.normpath(os.path.join(os.path.dirname(name), entry.linkname))
            elif not entry.isdir() and is_image(name):
                yield ArchivedImage(archive, name, 0, 0, -1, False, False)
    for name in links:
        target = name
        for _ in range(MOST_LINKS):
            target = links.get(target, target)
        if target in files:
            remarks.repeated += [name] if is_image(name) else []
            yield replace(files[target], name=name)
        elif is_image(name):
            yield ArchivedImage(archive, name, 0, 0, -1, False, False)
        else:
            remarks.lost.append(name)
