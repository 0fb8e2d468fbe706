"""The order of the data: which images form which batch, and which part of it is a rank's, follow from counters alone.

Every random choice is a hash of (seed, stream, epoch, image), so it depends neither on workers nor on ranks, and any
step can be computed without the ones before it: resuming is starting at another step number.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from utils.program import UserError

ORDER_STREAM, CROP_STREAM, VIEW_STREAM = 0, 1, 2  # separate the draws that share (seed, epoch, image)


def counter_hash(seed: int, stream: int, epoch: int, index: np.ndarray) -> np.ndarray:
    """uint64 hash of the counters, uniform: SplitMix64's mixing step (Steele, Lea & Flood 2014) on each in turn."""
    state = np.zeros(1, np.uint64)
    for counter in (seed, stream, epoch):
        state = _mix(state ^ np.uint64(counter & 0xFFFFFFFFFFFFFFFF))
    return _mix(state + np.asarray(index).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def epoch_order(count: int, epoch: int, seed: int) -> np.ndarray:
    """(count,) int64 permutation of the images for one epoch."""
    return np.argsort(counter_hash(seed, ORDER_STREAM, epoch, np.arange(count)), kind="stable")


class BatchOrder:
    """Which images form global batch `step` (counted over all epochs), and which of those are this rank's."""

    def __init__(self, count: int, global_batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0):
        if global_batch_size > count:
            raise UserError(
                f"the batch of {global_batch_size} is larger than the {count} images of the data; "
                "use a smaller --global-batch-size."
            )
        if global_batch_size % world_size:
            raise UserError(f"--global-batch-size {global_batch_size} is not divisible by {world_size} processes.")
        self.count, self.seed, self.global_batch_size = count, seed, global_batch_size
        self.steps_per_epoch = count // global_batch_size
        share = global_batch_size // world_size
        self._first, self._last = rank * share, (rank + 1) * share
        self._epoch_and_order = (-1, np.empty(0, np.int64))

    def indices(self, step: int) -> tuple[int, np.ndarray]:
        """(epoch, images of this rank) of global batch number `step`."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order_epoch, order = self._epoch_and_order
        if epoch != order_epoch:
            order = epoch_order(self.count, epoch, self.seed)
            self._epoch_and_order = (epoch, order)
        start = position * self.global_batch_size
        return epoch, order[start + self._first : start + self._last]

    def from_step(self, start: int) -> Iterator[tuple[int, np.ndarray]]:
        """`indices` of `start`, `start + 1`, … without end."""
        return map(self.indices, itertools.count(start))
