"""Files that are complete or absent, and their hashes."""

import fcntl
import hashlib
import io
import json
import os
import secrets
import shutil
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from utils.program import UserError, first_line

BUFFER = 1 << 20


class HeldError(UserError):
    """Another process has the lock."""


@contextmanager
def atomic_file(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Open a file (`mode` "wb" or "w") that takes its name only when it is complete.

    Written beside `path` under a temporary name, flushed to the disk, then renamed; removed if the block raises.
    A write that fails raises its `OSError`, whatever a library in between makes of it. Raises `UserError` if `path` is
    there and no regular file: the rename would replace a device.
    """
    path = Path(path)
    refuse_as_output(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # other nodes may have this process's number
    raw = None
    try:
        raw = _RememberingFile(temporary, "w")
        buffered = io.BufferedWriter(raw, BUFFER)
        with buffered if "b" in mode else io.TextIOWrapper(buffered, "utf-8") as file:
            yield file
            file.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if raw is not None and raw.failure is not None:
            raw.failure.filename = str(path)
            if raw.failure is not error:
                raise raw.failure from error
        raise
    sync_folder(path.parent)


class _RememberingFile(io.FileIO):
    """Remembers which write failed first: torch.save tells of it in words of its own."""

    failure: OSError | None = None

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise


def refuse_as_output(path: Path) -> None:
    """Raise `UserError` if `path` is there and no regular file, so that no result can take its name."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file to write to.")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is a device or a pipe; name a file to write to.")


def refuse_overwriting(output: Path, *inputs: Path | None) -> None:
    """Raise `UserError` if the file to write cannot be one, or is one of those that are read, or lies among them."""
    refuse_as_output(output)
    for path in inputs:
        if path is None or not output.exists() or not path.exists():
            continue
        if output.samefile(path) or (path.is_dir() and path.resolve() in output.resolve().parents):
            raise UserError(f"{output} is one of the files that are read, or lies among them; name another to write.")


def sweep(folder: Path) -> None:
    """Remove what `atomic_file` left in `folder` when its process was killed; call it under the folder's lock."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def remove_folder(folder: Path, lock: IO | None) -> None:
    """Remove a folder under its lock, which is closed: nobody else ever finds a part of it under its name."""
    doomed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)  # of a killed process
    with suppress(OSError):
        os.replace(folder, doomed)
    if lock is not None:
        lock.close()
    shutil.rmtree(doomed, ignore_errors=True)


def append(path: Path, text: str) -> None:
    """Append `text` to a file, all of it or, where that raises `OSError`, nothing."""
    with open(path, "ab", buffering=0) as file:
        size, rest = file.tell(), text.encode()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            error.filename = str(path)
            file.truncate(size)
            raise


def warn_unwritten(path: str | os.PathLike, error: OSError, then: str) -> None:
    """Say that a file that the program can do without was not written, and what `then` happens."""
    print(f"warning: {path} could not be written ({error.strerror or error}); {then}.", file=sys.stderr)


def sync_folder(folder: str | os.PathLike) -> None:
    """Make renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_folder(folder: Path, refusal: str, required: bool = False) -> IO:
    """Lock `folder` for this process until it ends or closes the file returned; like `lock`."""
    file = lock(folder / ".lock", refusal, required)
    held = weakref.ref(file)  # workers that outlive a killed process must not hold it, too
    os.register_at_fork(after_in_child=lambda: held() and held().close())
    return file


def lock(path: Path, refusal: str, required: bool = False) -> IO:
    """Open the file `path` to append to it, alone.

    Raises `HeldError(refusal)` if another process has it open so. A file system without locks lets everybody in, or is
    refused (`UserError`) where a lock is `required`.
    """
    while True:
        refuse_as_output(path)  # a pipe would wait for a reader
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")  # noqa: SIM115 - held open as long as the lock
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise HeldError(refusal) from error
        except OSError as error:
            if not required:
                return file
            file.close()
            raise UserError(f"the file system of {path.parent} has no locks; choose a folder elsewhere.") from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()  # who held it before has removed it


def read_json(path: str | os.PathLike, remedy: str, *names: str) -> dict:
    """The object in a JSON file that a program wrote, which holds `names` at least.

    Raises `UserError`, which ends with `remedy`, for anything else.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise UserError(f"{path} is no file; {remedy}.")
    try:
        value = json.loads(Path(path).read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # neither JSON nor text, or nested without end
        raise UserError(f"{path} is damaged ({first_line(error)}); {remedy}.") from error
    if not isinstance(value, dict) or (missing := [name for name in names if name not in value]):
        found = f"no {missing[0]}" if isinstance(value, dict) else "no object"
        raise UserError(f"{path} is damaged (it holds {found}); {remedy}.")
    return value


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
