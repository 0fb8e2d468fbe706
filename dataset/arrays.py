"""Reading `.npy` files and archives that may be anything."""

import errno
import struct
import tarfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

# What numpy raises on other contents; MemoryError and OverflowError for sizes that no file has.
DAMAGED = (ValueError, TypeError, EOFError, SyntaxError, tokenize.TokenError, OverflowError, MemoryError)
# And what the modules zipfile and tarfile raise, for damage in one place or another.
DAMAGED_ARCHIVE = (
    *DAMAGED,
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    struct.error,
    NotImplementedError,
    RuntimeError,
    LookupError,
    AttributeError,  # of an .npy in an archive's place
)


@contextmanager
def archive_read() -> Iterator[None]:
    """Raises `ValueError` for whatever reading a damaged archive raises; a failing disk remains an `OSError`."""
    try:
        yield
    except DAMAGED_ARCHIVE as error:
        raise ValueError(str(error) or type(error).__name__) from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # a place before the file's beginning
            raise
        raise ValueError("its directory leads nowhere") from error


def load_array(path: Path, mmap_mode: str | None = None) -> np.ndarray:
    """The array in `path`; nothing is unpickled.

    Raises `FileNotFoundError` if there is no such regular file, and `ValueError` if it holds no whole array.
    """
    if not path.is_file():
        raise FileNotFoundError(path)
    try:
        array = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except DAMAGED as error:
        raise ValueError(f"{path} is no whole .npy file") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} is an archive of arrays")
    return array
