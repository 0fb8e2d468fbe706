"""Files that are complete or absent, and their hashes."""

import fcntl
import hashlib
import json
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from utils.program import UserError


@contextmanager
def atomic_file(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Open a file that takes its name only when it is complete.

    Written beside `path` under a temporary name, flushed to the disk, then renamed; removed if the block raises.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: str | os.PathLike) -> None:
    """Make renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_folder(folder: Path, refusal: str) -> IO:
    """Lock `folder` for this process until it ends or closes the file returned.

    Raises `UserError(refusal)` if another process holds it.
    """
    file = lock(folder / ".lock", refusal)
    held = weakref.ref(file)  # workers that outlive a killed process must not hold it, too
    os.register_at_fork(after_in_child=lambda: held() and held().close())
    return file


def lock(path: Path, refusal: str) -> IO:
    """Open the file `path` to append to it, alone; file systems without locks let everybody in.

    Raises `UserError(refusal)` if another process has it open so.
    """
    file = open(path, "ab")  # noqa: SIM115 - held open as long as the lock
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(refusal) from error
    except OSError:
        pass
    return file


def write_json(path: str | os.PathLike, value: Any) -> None:
    with atomic_file(path, "w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")


def sha256(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: IO[bytes]) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
