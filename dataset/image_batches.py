"""Batches of images, decoded by workers: random views to train on, centre crops to measure on.

Which image, which crop and whether mirrored follow from (seed, epoch, image) alone; so neither workers nor ranks
matter, and resuming is starting at another step number.
"""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dataset.crops import center_crop, random_crop_and_flip
from dataset.image_folder import ImageFolder, UnreadableImage, load_rgb
from dataset.order import VIEW_STREAM, BatchOrder, counter_hash
from utils.distributed import World

DRAWS = 4  # random numbers per view


class RandomViews:
    """Called with `(epoch, images)`: (n, size, size, 3) uint8, one random view of each of `images`."""

    def __init__(self, folder: ImageFolder, size: int, seed: int, mirror: bool):
        self.folder, self.size, self.seed, self.mirror = folder, size, seed, mirror

    def __call__(self, batch: tuple[int, np.ndarray]) -> torch.Tensor:
        epoch, images = batch
        return torch.stack([self.view(epoch, int(image)) for image in images])

    def view(self, epoch: int, image: int) -> torch.Tensor:
        draws = counter_hash(self.seed, VIEW_STREAM, epoch, image * DRAWS + np.arange(DRAWS))
        uniform = (draws >> np.uint64(11)) / 2.0**53
        if not self.mirror:
            uniform[3] = 1.0
        pixels = random_crop_and_flip(load_rgb(self.folder.path(image)), self.size, uniform)
        return torch.from_numpy(pixels.copy())


def random_view_batches(views: RandomViews, order: BatchOrder, start: int, workers: int, world: World) -> Iterator:
    """This rank's (n, size, size, 3) uint8 batches from step `start` on, on the CPU (pinned if the device is a GPU).

    Raises `UnreadableImage` where an image is broken.
    """
    return loaded(views, order.from_step(start), workers, world)


def center_crop_batches(folder: ImageFolder, size: int, batch_size: int, workers: int, world: World) -> Iterator:
    """This rank's batches: (first image, (n, size, size, 3) uint8 centre crops); over all ranks every image once.

    Raises `UnreadableImage` where an image is broken.
    """
    starts = range(world.rank * batch_size, len(folder), world.size * batch_size)
    batches = [range(len(folder))[start : start + batch_size] for start in starts]
    return loaded(partial(_center_crops, folder, size), batches, workers, world)


def _center_crops(folder: ImageFolder, size: int, images: range) -> tuple[int, torch.Tensor]:
    crops = [center_crop(load_rgb(folder.path(image)), size) for image in images]
    return images[0], torch.from_numpy(np.stack(crops))


class _Made(Dataset):
    """Item `batch` is `make(batch)`, or the `UnreadableImage` raised: workers do not keep an exception's type."""

    def __init__(self, make: Callable):
        self.make = make

    def __getitem__(self, batch):
        try:
            return self.make(batch)
        except UnreadableImage as error:
            return error


def loaded(make: Callable, batches: Iterable, workers: int, world: World) -> Iterator:
    """`make(batch)` of every one of `batches`, in `workers` processes, as many as this rank's cores at most."""
    loader = DataLoader(
        _Made(make),
        sampler=batches,
        batch_size=None,
        num_workers=_worker_count(workers),
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


def _worker_count(wanted: int) -> int:
    """Decoding processes of this rank: those wanted, at most its share of the machine's cores."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(wanted, max(1, len(os.sched_getaffinity(0)) // ranks_here))
