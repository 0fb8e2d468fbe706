"""What stands before each image where that is not its class label: an array of your own, one row per image."""

import hashlib
from pathlib import Path

import numpy as np

from dataset.arrays import load_array
from utils.program import UserError

SAMPLED_ROWS = 1000  # that are looked at: the whole may be larger than the memory


def open_conditions(path: str | Path, count: int | None = None) -> np.ndarray:
    """The memory-mapped `(images, …)` array of floats or integers in the `.npy` file `path`.

    Raises `UserError` if the file is missing, no such array, or has another number of rows than `count`, where given;
    or if one of about 1,000 rows is not finite.
    """
    try:
        array = load_array(Path(path), mmap_mode="r")
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}; conditions are a .npy file with one row per image.") from error
    except ValueError as error:
        raise UserError(f"{path} is not a complete .npy file; write it again with numpy.save.") from error
    if array.dtype.kind not in "fiu":
        raise UserError(f"{path} holds {array.dtype}; conditions are one array of floats or integers.")
    rows = array.shape[0] if array.ndim else 0
    if rows == 0 or count not in (None, rows):
        images = "" if count is None else f", but there are {count:,} images"
        raise UserError(f"{path} has {rows:,} rows{images}; write one row per image, in order.")
    if not np.isfinite(_sample(array)).all():
        raise UserError(f"{path} holds numbers that are not finite; write it again without them.")
    return array.view(np.ndarray)


def rows_of(conditions: np.ndarray, images: np.ndarray) -> np.ndarray:
    """(n, …) float32 or int64 rows of `images`."""
    return conditions[images].astype(np.float32 if conditions.dtype.kind == "f" else np.int64)


def conditions_identity(conditions: np.ndarray) -> str:
    """A hash of shape, dtype and about 1,000 evenly spaced rows."""
    digest = hashlib.sha256(f"{conditions.shape} {conditions.dtype.str}".encode())
    digest.update(np.ascontiguousarray(_sample(conditions)))
    return digest.hexdigest()


def _sample(array: np.ndarray) -> np.ndarray:
    return array[np.linspace(0, len(array) - 1, min(len(array), SAMPLED_ROWS), dtype=np.int64)]
