"""Batches of images, decoded by workers: random views to train on, centre crops to measure on.

Which image, which crop and whether mirrored follow from (seed, epoch, image) alone; so neither workers nor ranks
matter, and resuming is starting at another step number.
"""

import os
import signal
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dataset.code_dataset import BatchOrder, counter_hash
from dataset.crops import center_crop, random_crop_and_flip
from dataset.image_folder import ImageFolder, UnreadableImage, load_rgb
from utils.distributed import World

VIEW_STREAM = 2  # of `counter_hash`: apart from the order's and the codes' draws
DRAWS = 4  # random numbers a view takes


class RandomViews(Dataset):
    """Item `(epoch, images)` is a batch: (n, size, size, 3) uint8, one random view of each of `images`."""

    def __init__(self, folder: ImageFolder, size: int, seed: int, mirror: bool):
        self.folder, self.size, self.seed, self.mirror = folder, size, seed, mirror

    def __getitem__(self, batch: tuple[int, np.ndarray]) -> torch.Tensor | UnreadableImage:
        epoch, images = batch
        try:
            return torch.stack([self.view(epoch, int(image)) for image in images])
        except UnreadableImage as error:  # raised where the batch is used: workers do not keep an exception's type
            return error

    def view(self, epoch: int, image: int) -> torch.Tensor:
        draws = counter_hash(self.seed, VIEW_STREAM, epoch, image * DRAWS + np.arange(DRAWS))
        uniform = (draws >> np.uint64(11)) / 2.0**53
        if not self.mirror:
            uniform[3] = 1.0
        pixels = random_crop_and_flip(load_rgb(self.folder.path(image)), self.size, uniform)
        return torch.from_numpy(pixels.copy())


class _StepsFrom:
    """The batches of step `start`, `start + 1`, … without end."""

    def __init__(self, order: BatchOrder, start: int):
        self.order, self.start = order, start

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        step = self.start
        while True:
            yield self.order.indices(step)
            step += 1


def random_view_batches(views: RandomViews, order: BatchOrder, start: int, workers: int, world: World) -> Iterator:
    """This rank's (n, size, size, 3) uint8 batches from step `start` on, on the CPU (pinned if the device is a GPU).

    Raises `UnreadableImage` where an image is broken.
    """
    return _loaded(views, _StepsFrom(order, start), workers, world)


class CenterCrops(Dataset):
    """Item `images`, a range, is a batch: (first image, (n, size, size, 3) uint8 centre crops)."""

    def __init__(self, folder: ImageFolder, size: int):
        self.folder, self.size = folder, size

    def __getitem__(self, images: range) -> tuple[int, torch.Tensor] | UnreadableImage:
        try:
            crops = [center_crop(load_rgb(self.folder.path(image)), self.size) for image in images]
        except UnreadableImage as error:
            return error
        return images[0], torch.from_numpy(np.stack(crops))


def center_crop_batches(folder: ImageFolder, size: int, batch_size: int, workers: int, world: World) -> Iterator:
    """This rank's batches of `CenterCrops`: over all ranks every image once. Raises `UnreadableImage`."""
    starts = range(world.rank * batch_size, len(folder), world.size * batch_size)
    batches = [range(start, min(start + batch_size, len(folder))) for start in starts]
    return _loaded(CenterCrops(folder, size), batches, workers, world)


def _loaded(dataset: Dataset, batches: Iterable, workers: int, world: World) -> Iterator:
    loader = DataLoader(
        dataset,
        sampler=batches,
        batch_size=None,
        num_workers=worker_count(workers),
        pin_memory=world.device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_rank,
    )
    for batch in loader:
        if isinstance(batch, UnreadableImage):
            raise batch
        yield batch


def _leave_signals_to_the_rank(worker: int) -> None:
    """A batch system signals every process; the rank saves and stops, and needs its workers until then."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def worker_count(wanted: int) -> int:
    """Decoding processes of this rank: those wanted, at most its share of the machine's cores."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(wanted, max(1, len(os.sched_getaffinity(0)) // ranks_here))
