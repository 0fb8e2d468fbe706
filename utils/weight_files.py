"""Files of weights as bytes: whether each byte is as it was written, and what a file is that holds no weights.

A `.pt` and a `.pt2` are zip archives with a checksum (CRC-32) per record, which PyTorch does not compare when it maps a
file; a `.safetensors` file has none of its own, so ours carry one per tensor. Comparing reads about 3 GB/s per core.
"""

import errno
import json
import os
import re
import struct
import time
import zipfile
import zlib
from pathlib import Path

import torch

from utils.program import UserError, first_line

CHECKSUMS = "crc32"  # the entry of a safetensors file's metadata: JSON, CRC-32 by name of the tensor
AGAIN = "copy or download it again"
CLOCK_TICK = 2_000_000_000  # ns: two versions of a file may have one time on the coarsest of file systems
SAFETENSORS_HEADER = 100_000_000  # bytes that the format allows

FOREIGN = {  # how files begin that are taken for weights now and then
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"RIFF": "a WebP image or a sound",
    b"%PDF": "a PDF document",
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"7z\xbc\xaf": "a 7-Zip archive: unpack it first",
    b"Rar!": "a RAR archive: unpack it first",
    b"\xfd7zXZ": "compressed by xz: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it first",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file",
    b"GGUF": "a GGUF file",
    b"version https://git-lfs": "a pointer of git-lfs: run git lfs pull in its repository",
}
ARCHIVE_ERRORS = (  # of the module zipfile, for damage in one place or another
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    LookupError,
    OverflowError,
)
_verified: set[tuple[str, int, int]] = set()  # path, size and time of the archives that this process has verified


def verify_archive(path: str | Path) -> None:
    """Raise `UserError` unless every byte of the zip archive `path` (`.pt`, `.pt2`) is as it was written.

    An archive is read once per process, unless its size or time changes, or it is but seconds old. One written without
    checksums (`torch.serialization.set_crc32_options(False)`) passes.
    """
    status = Path(path).stat()
    version = (str(Path(path).absolute()), status.st_size, status.st_mtime_ns)
    if version in _verified:
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = any(record.CRC for record in archive.infolist()) and archive.testzip()
    except ARCHIVE_ERRORS as error:
        raise UserError(f"{path} is cut short or damaged ({first_line(error)}); {AGAIN}.") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # a place before the file's beginning
            raise
        raise UserError(f"{path} is damaged: its directory leads nowhere; {AGAIN}.") from error
    if damaged:
        raise UserError(f"{path} is damaged: {damaged} in it differs from its checksum; {AGAIN}.")
    if time.time_ns() - status.st_mtime_ns > CLOCK_TICK:
        _verified.add(version)


def refuse_foreign(path: str | Path, wanted: str) -> None:
    """Raise `UserError` if `path` is plainly another kind of file than `wanted` ("a PyTorch checkpoint")."""
    kind = _kind(Path(path))
    if kind is not None:
        what, _, remedy = kind.partition(": ")
        raise UserError(f"{path} is {what}, not {wanted}; {remedy or 'check the path, or download it again'}.")


def _kind(path: Path) -> str | None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        return "empty: copy or download it again"
    for beginning, what in FOREIGN.items():
        if head.startswith(beginning):
            return what
    if looks_like_safetensors(head, size):
        return "a safetensors file: give it a name that ends in .safetensors"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page (a login or an error, as a rule): open the address in a browser, or use scripts/download.sh"
    if head.isascii() and all(byte >= 32 or byte in b"\t\r\n\f" for byte in head):
        return "a text file"
    return _kind_of_archive(path) if is_archive(path) else None


def is_archive(path: Path) -> bool:
    """Whether a file is a zip archive, if only a damaged one."""
    try:
        return zipfile.is_zipfile(path)
    except ARCHIVE_ERRORS:
        return True


def _kind_of_archive(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (*ARCHIVE_ERRORS, OSError):  # damaged: `verify_archive` will say so
        return None
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript program"
    if any(name.endswith("archive_format") for name in names):
        return "an exported program (.pt2)"
    if any(name.endswith(".npy") for name in names):
        return "a NumPy archive"
    return None if any(name.endswith("data.pkl") for name in names) else "a zip archive: unpack it first"


def looks_like_safetensors(head: bytes, size: int) -> bool:
    """Whether a file of `size` bytes that begins with `head` has a safetensors header."""
    length = struct.unpack("<Q", head[:8])[0] if len(head) > 8 else 0
    return 0 < length <= min(SAFETENSORS_HEADER, size) and head[8:9] == b"{"


def read_safetensors(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU; compared with their checksums where it carries them."""
    library = safetensors_library()
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}; check the path.")
    try:
        with library.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dictionary
        sums = json.loads(metadata.get(CHECKSUMS, "{}"))
    except (library.SafetensorError, ValueError, RuntimeError) as error:
        refuse_foreign_unless_safetensors(path)
        raise UserError(f"{path} is cut short or damaged ({first_line(error)}); {AGAIN}.") from error
    damaged = [name for name, tensor in state.items() if name in sums and checksum(tensor) != sums[name]]
    if damaged or sums.keys() - state.keys():
        named = damaged[0] if damaged else min(sums.keys() - state.keys())
        raise UserError(f"{path} is damaged: {named} in it differs from its checksum; {AGAIN}.")
    return state


def refuse_foreign_unless_safetensors(path: str | Path) -> None:
    with open(path, "rb") as file:
        head = file.read(16)
    if not looks_like_safetensors(head, Path(path).stat().st_size):
        refuse_foreign(path, "a safetensors file")


def write_safetensors(path: str | Path, state: dict[str, torch.Tensor]) -> None:
    """Write `state`, every tensor as it is, with checksums beside them."""
    library = safetensors_library()
    from safetensors.torch import save_file

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    sums = {name: checksum(tensor) for name, tensor in state.items()}
    Path(path).touch()
    mode = os.stat(path).st_mode  # of a new file here; the library puts one in its place that only its owner reads
    try:
        save_file(state, path, metadata={"format": "pt", CHECKSUMS: json.dumps(sums)})
    except library.SafetensorError as error:  # which tells of a full disk in words alone
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise
    os.chmod(path, mode)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of the bytes of a tensor on the CPU, in row-major order."""
    return zlib.crc32(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())


def safetensors_library():
    """The package, imported when it is needed; `UserError` if it is not installed."""
    try:
        import safetensors
    except ImportError as error:
        raise UserError(
            "reading and writing .safetensors needs the package safetensors; run: pip install -r requirements.txt"
        ) from error
    return safetensors
