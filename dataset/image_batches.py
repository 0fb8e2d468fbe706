"""Batches of images, decoded by workers: random views to train on, centre crops to measure on.

Which image, which crop and whether mirrored follow from (seed, epoch, image) alone; so neither workers nor ranks
matter, and resuming is starting at another step number.
"""

import atexit
import errno
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import active_children, get_context
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from threading import Thread, current_thread, main_thread
from traceback import walk_tb
from weakref import WeakSet

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from dataset.crops import center_crop, random_crop_and_flip
from dataset.image_folder import ImageFolder, UnreadableImage, load_rgb
from dataset.order import VIEW_STREAM, BatchOrder, counter_hash
from utils.distributed import World
from utils.program import UserError

DRAWS = 4  # random numbers per view
LOCKS_PER_WORKER = 6  # that a loader makes, at most, in /dev/shm


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
    """Item `batch` is `make(batch)`, or the error raised: workers keep neither our types nor the system's numbers."""

    def __init__(self, make: Callable):
        self.make = make

    def __getitem__(self, batch):
        try:
            return self.make(batch)
        except (UnreadableImage, OSError) as error:
            return error


def loaded(make: Callable, batches: Iterable, workers: int, world: World) -> Iterator:
    """`make(batch)` of every one of `batches`, in `workers` processes, as many as this rank's cores at most.

    Raises `UserError` where a worker cannot start or is killed.
    """
    count = _worker_count(workers)
    loader = DataLoader(
        _Made(make),
        sampler=batches,
        batch_size=None,
        num_workers=count,
        multiprocessing_context="fork" if count else None,  # whose workers are children of the rank, with all it holds
        pin_memory=world.device.type == "cuda",
        worker_init_fn=partial(_prepare_worker, os.getpid()),
    )
    with _workers_watched(loader) as made:
        for batch in made:
            if isinstance(batch, UnreadableImage | OSError):
                raise batch
            yield batch


_watched: set[BaseProcess] = set()
_started_here: WeakSet[BaseProcess] = WeakSet()


@atexit.register
def _kill_workers() -> None:
    """An error's traceback keeps its loader, hence workers: Python would end them by SIGTERM, which they ignore."""
    _watched.clear()
    for worker in _started_here:
        worker.kill()


@contextmanager
def _workers_watched(loader: DataLoader) -> Iterator[Iterator]:
    """The loader's results; if one of its workers is killed meanwhile, the main thread gets a `UserError`."""
    others = set(active_children())
    made = _started(loader)
    workers = set(active_children()) - others
    _watched.update(workers)
    _started_here.update(workers)
    if current_thread() is main_thread():
        signal.signal(signal.SIGCHLD, _end_with_worker)  # in place of PyTorch's, which raises what is no user error
    try:
        yield made
    except RuntimeError as error:  # which the loader makes of any other that meets it while it waits
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    finally:
        _watched.difference_update(workers)


def _end_with_worker(number: int, frame) -> None:
    """Reading what a killed worker was sending would wait for ever."""
    dead = next((worker for worker in _watched if not worker.is_alive() and worker.exitcode), None)
    if dead is not None:
        for worker in _watched:  # the others may wait for ever for what the dead one held
            worker.kill()
        _watched.clear()
        raise UserError(
            f"an image worker was ended from outside (status {dead.exitcode}; -9 where the memory was not enough); "
            "use fewer --num-workers, 0 for none, or smaller batches."
        )


def _started(loader: DataLoader) -> Iterator:
    others, lock = set(active_children()), get_context("fork").Lock
    try:
        for _lock in [lock() for _ in range(LOCKS_PER_WORKER * loader.num_workers)]:
            pass  # there is room for them: where there is none, a half-made loader would print a traceback
        return iter(loader)
    except OSError as error:
        _remove_half_made(error, set(active_children()) - others)
        if error.errno not in (errno.ENOSPC, errno.EAGAIN, errno.ENOMEM):
            raise
        raise UserError(
            f"image workers cannot be started ({error.strerror.lower()}: processes, memory, or /dev/shm, which holds "
            "their locks); use fewer --num-workers, 0 for none."
        ) from error


def _remove_half_made(error: OSError, workers: set[BaseProcess]) -> None:
    """End the workers that did start; the loader's iterator, found in the traceback, would fail when it is deleted."""
    for worker in workers:
        worker.kill()
        worker.join()
    for frame, _ in walk_tb(error.__traceback__):
        iterator = frame.f_locals.get("self")
        if isinstance(iterator, _BaseDataLoaderIter):
            iterator._shutdown = True


def _prepare_worker(rank: int, worker: int) -> None:
    """Leave signals to the rank, and send batches through a pipe.

    A batch system signals every process; the rank saves and stops, and needs its workers until then. PyTorch would put
    tensors into /dev/shm, of which containers have little: where it is full, the rank would wait for ever.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    ForkingPickler.register(torch.Tensor, _as_array)
    Thread(target=_end_with_rank, args=(rank,), daemon=True).start()


def _end_with_rank(rank: int) -> None:
    """When the rank, a process, is killed, nobody empties the pipe that this worker fills; it would stay for ever."""
    while os.getppid() == rank:
        time.sleep(1)
    os._exit(1)


def _as_array(tensor: torch.Tensor) -> tuple[Callable, tuple[np.ndarray]]:
    return torch.from_numpy, (tensor.numpy(),)


def _worker_count(wanted: int) -> int:
    """Decoding processes of this rank: those wanted, at most its share of the machine's cores."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(wanted, max(1, len(os.sched_getaffinity(0)) // ranks_here))
