"""Randomness that belongs to the image: image i of a seed has its own label and its own uniform numbers.

Both come from Philox4x64 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") keyed by (seed, i), a
counter-based generator whose raw output is the same on every platform. So neither batch size, nor the number of
processes, nor order, nor a restart changes an image.
"""

import numpy as np

MAX_SEED = 2**64 - 1


def image_uniforms(indices: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Uniform numbers `(images, count)` float64 in [0, 1), of 53 bits, one for each token."""
    return np.stack([_uniforms(seed, index, 1 + count)[1:] for index in indices])


def image_labels(indices: np.ndarray, num_classes: int, seed: int, balanced: bool = True) -> np.ndarray:
    """Labels `(images,)` int64: in turn (so that any run of images is balanced), or drawn at random."""
    if balanced:
        return np.asarray(indices, dtype=np.int64) % num_classes
    first = np.array([_uniforms(seed, index, 1)[0] for index in indices])
    return np.floor(first * num_classes).astype(np.int64)


def _uniforms(seed: int, index: int, count: int) -> np.ndarray:
    philox = np.random.Philox(key=np.array([seed, index], dtype=np.uint64))
    return (philox.random_raw(count) >> np.uint64(11)) * 2.0**-53
