"""Reading `.npy` files that may be anything."""

import tokenize
from pathlib import Path

import numpy as np

# What numpy raises on other contents; MemoryError and OverflowError for sizes that no file has.
DAMAGED = (ValueError, TypeError, EOFError, SyntaxError, tokenize.TokenError, OverflowError, MemoryError)


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
