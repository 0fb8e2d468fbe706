"""Training batches of codes: which crop, which order and which rank's share follow from (seed, epoch, image) alone.

Every random choice is a hash of counters, so it depends neither on workers nor on ranks, and any step can be computed
without the ones before it: resuming is starting at another step number.
"""

import hashlib
import queue
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from dataset.code_store import IMAGES_FILE, CodeStore
from utils.program import UserError

ORDER_STREAM, CROP_STREAM = 0, 1  # separate the draws that share (seed, epoch, image)


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
            raise UserError(f"the batch of {global_batch_size} is larger than the {count} images of the data; "
                            "use a smaller --global-batch-size.")  # fmt: skip
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


class CodeDataset:
    """Codes of one crop per image and epoch, drawn from one store or from several that hold the same images.

    `weights` are the stores' probabilities (need not sum to 1; equal by default). With `augment=False` it is always the
    upright centre crop of the first store.
    """

    def __init__(
        self, stores: Sequence[CodeStore], weights: Sequence[float] | None = None, seed: int = 0, augment: bool = True
    ):
        weights = np.ones(len(stores)) if weights is None else np.asarray(weights, np.float64)
        if len(weights) != len(stores) or (weights < 0).any() or weights.sum() <= 0:
            raise UserError(
                f"{len(stores)} code stores need as many weights ≥ 0, not all zero; got {weights.tolist()}."
            )
        self.stores, self.seed, self.augment = list(stores), seed, augment
        self.meta = stores[0].meta
        self.dtype = np.result_type(*(store.meta.dtype for store in stores))
        self._store_bounds = np.cumsum(weights / weights.sum())[:-1]
        self._crops = np.array([store.meta.crops for store in stores], np.uint64)
        for other in stores[1:]:
            _check_same_images(stores[0], other)

    def __len__(self) -> int:
        return self.meta.count

    def draw(self, epoch: int, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) store number and (n,) crop number for each of `images` in `epoch`."""
        if not self.augment:
            return np.zeros(len(images), np.int64), np.full(len(images), self.meta.centre_crop)
        bits = counter_hash(self.seed, CROP_STREAM, epoch, images)
        store = np.searchsorted(self._store_bounds, (bits >> np.uint64(32)) / 2.0**32, side="right")
        crop = ((bits & np.uint64(0xFFFFFFFF)) * self._crops[store]) >> np.uint64(32)
        return store, crop.astype(np.int64)

    def gather(self, epoch: int, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, H·W) unsigned codes and (n,) int64 labels."""
        images = np.asarray(images, np.int64)
        store_of, crops = self.draw(epoch, images)
        codes = np.empty((len(images), self.meta.tokens), self.dtype)
        for number in np.unique(store_of):
            rows = np.nonzero(store_of == number)[0]
            codes[rows] = self.stores[number].codes(images[rows], crops[rows])
        return codes, self.stores[0].labels_of(images)

    def batch(self, epoch: int, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """((n, H·W) codes, (n,) labels), both int64."""
        codes, labels = self.gather(epoch, indices)
        return torch.from_numpy(codes.astype(np.int64)), torch.from_numpy(labels)

    def sequential_batches(
        self, batch_size: int, rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's images once, in order, every image on exactly one rank: for validation."""
        images = np.arange(rank, len(self), world_size)
        for start in range(0, len(images), batch_size):
            codes, labels = self.batch(0, images[start : start + batch_size])
            yield codes.to(device), labels.to(device)


class CodeLoader:
    """This rank's slices of global batches `start_step`, `start_step + 1`, … without end: (codes, labels) on `device`.

    The slices of all ranks, joined in rank order, are the same global batch for any world size. A background thread
    gathers ahead from the memory map into pinned memory; with `resident=True` the stores lie on the device instead.
    """

    QUEUE_DEPTH = 8

    def __init__(
        self,
        dataset: CodeDataset,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start_step: int = 0,
        device: torch.device | str = "cpu",
        resident: bool = False,
    ):
        self.dataset, self.start_step, self.device = dataset, start_step, torch.device(device)
        self.order = BatchOrder(len(dataset), global_batch_size, rank, world_size, seed)
        self._resident = _ResidentCodes(dataset, self.device) if resident else None

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        batches: queue.Queue = queue.Queue(self.QUEUE_DEPTH)
        stop = threading.Event()
        thread = threading.Thread(target=self._produce, args=(batches, stop), daemon=True)
        thread.start()
        try:
            while True:
                batch = batches.get()
                if isinstance(batch, Exception):
                    raise batch
                yield self._to_device(batch)
        finally:  # also when the consumer stops iterating
            stop.set()
            while thread.is_alive():
                _drain(batches)
                thread.join(0.01)

    def _produce(self, batches: queue.Queue, stop: threading.Event) -> None:
        step = self.start_step
        while not stop.is_set():
            try:
                batch = self._prepare(*self.order.indices(step))
            except Exception as error:  # raised again where the batch is asked for
                batch = error
            batches.put(batch)
            if isinstance(batch, Exception):
                return
            step += 1

    def _prepare(self, epoch: int, images: np.ndarray) -> tuple[torch.Tensor, ...]:
        """What travels to the device: codes and labels, or, when resident, the rows to gather there."""
        if self._resident:
            parts = (torch.from_numpy(self._resident.rows(epoch, images)),)
        else:
            codes, labels = self.dataset.gather(epoch, images)
            parts = (_signed(codes), torch.from_numpy(labels))
        return tuple(part.pin_memory() for part in parts) if self.device.type == "cuda" else parts

    def _to_device(self, parts: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        parts = tuple(part.to(self.device, non_blocking=True) for part in parts)
        return self._resident.gather(*parts) if self._resident else (_unsigned(parts[0]), parts[1])


class _ResidentCodes:
    """All stores' codes on the device, one row a crop, and where a draw finds its row."""

    def __init__(self, dataset: CodeDataset, device: torch.device):
        self.dataset = dataset
        self._crops = np.array([store.meta.crops for store in dataset.stores])
        counts = [store.meta.count * store.meta.crops for store in dataset.stores]
        self._starts = np.cumsum([0, *counts])
        dtype = torch.int16 if dataset.dtype == np.uint16 else torch.int32
        self._codes = torch.empty(int(self._starts[-1]), dataset.meta.tokens, dtype=dtype, device=device)
        row = 0
        for store in dataset.stores:
            for _, codes in store.blocks():
                rows = _signed(codes.astype(dataset.dtype).reshape(-1, dataset.meta.tokens))
                self._codes[row : row + len(rows)] = rows.to(device)
                row += len(rows)
        self._labels = torch.from_numpy(dataset.stores[0].labels.astype(np.int64)).to(device)

    def rows(self, epoch: int, images: np.ndarray) -> np.ndarray:
        """(2, n) int64: the row of codes and the image of every sample."""
        store, crops = self.dataset.draw(epoch, images)
        return np.stack([self._starts[store] + images * self._crops[store] + crops, images])

    def gather(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _unsigned(self._codes[rows[0]]), self._labels[rows[1]]


def _signed(codes: np.ndarray) -> torch.Tensor:
    """The same bits as a signed tensor: devices index and copy those everywhere, unlike uint16 and uint32."""
    return torch.from_numpy(codes.view(np.int16 if codes.dtype == np.uint16 else np.int32))


def _unsigned(codes: torch.Tensor) -> torch.Tensor:
    return codes.long() & (0xFFFF if codes.dtype == torch.int16 else 0xFFFFFFFF)


def _drain(batches: queue.Queue) -> None:
    try:
        while True:
            batches.get_nowait()
    except queue.Empty:
        pass


def _image_list(store: CodeStore) -> str | None:
    """Hash of the list of images; None where the store does not say, as after packing a published folder."""
    listed = store.meta.files.get(IMAGES_FILE)
    return None if listed == hashlib.sha256().hexdigest() else listed


def _check_same_images(first: CodeStore, other: CodeStore) -> None:
    for what in ("count", "grid", "codebook_size", "class_names"):
        mine, theirs = getattr(first.meta, what), getattr(other.meta, what)
        if mine != theirs and mine is not None and theirs is not None:
            raise UserError(f"{first.path} and {other.path} cannot be mixed: their {what.replace('_', ' ')} differs; "
                            "extract both from the same images with the same tokenizer.")  # fmt: skip
    hashes = [store.meta.tokenizer.get("hash") for store in (first, other)]
    if None not in hashes and hashes[0] != hashes[1]:
        raise UserError(f"{first.path} and {other.path} come from different tokenizers; extract one of them again.")
    listed = [_image_list(store) for store in (first, other)]
    sample = np.linspace(0, len(first) - 1, min(len(first), 1000), dtype=np.int64)
    same = listed[0] == listed[1] if None not in listed else None
    if same is None:
        same = np.array_equal(first.labels_of(sample), other.labels_of(sample))
    if not same:
        raise UserError(f"{first.path} and {other.path} hold codes of different images; extract both from the same.")
