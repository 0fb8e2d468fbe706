"""Training batches of codes: one crop per image and epoch, drawn by counters (dataset/order.py), loaded ahead."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from dataset.background import work_ahead
from dataset.code_store import IMAGES_FILE, CodeStore
from dataset.conditions import rows_of
from dataset.order import CROP_STREAM, BatchOrder, counter_hash
from utils.program import UserError
from utils.settings import refuse_differences

BATCHES_AHEAD = 8


class CodeDataset:
    """Codes of one crop per image and epoch, drawn from one store or from several that hold the same images.

    `weights` are the stores' probabilities (need not sum to 1; equal by default). With `augment=False` it is always the
    upright centre crop of the first store. `conditions`, an `(images, …)` array, takes the place of the labels.
    """

    def __init__(
        self,
        stores: Sequence[CodeStore],
        weights: Sequence[float] | None = None,
        seed: int = 0,
        augment: bool = True,
        conditions: np.ndarray | None = None,
    ):
        weights = np.ones(len(stores)) if weights is None else np.asarray(weights, np.float64)
        if len(weights) != len(stores) or (weights < 0).any() or weights.sum() <= 0:
            raise UserError(
                f"{len(stores)} code stores need as many weights ≥ 0, not all zero; got {weights.tolist()}."
            )
        self.stores, self.seed, self.augment = list(stores), seed, augment
        self.meta = stores[0].meta
        if conditions is not None and len(conditions) != self.meta.count:
            raise ValueError(f"{len(conditions)} conditions for {self.meta.count} images")
        self.conditions = conditions
        self.dtype = np.result_type(*(store.meta.dtype for store in stores))
        self._store_bounds = np.cumsum(weights / weights.sum())[:-1]
        self._crops = np.array([store.meta.crops for store in stores], np.uint64)
        for other in stores[1:]:
            what = f"{stores[0].path} and {other.path} cannot be mixed: the second was extracted"
            remedy = "extract both from the same images with the same tokenizer"
            refuse_differences(what, _shared_facts(other), _shared_facts(stores[0]), remedy)

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

    def codes_of(self, epoch: int, images: np.ndarray) -> np.ndarray:
        """(n, H·W) unsigned codes."""
        store_of, crops = self.draw(epoch, images)
        codes = np.empty((len(images), self.meta.tokens), self.dtype)
        for number in np.unique(store_of):
            rows = np.nonzero(store_of == number)[0]
            codes[rows] = self.stores[number].codes(images[rows], crops[rows])
        return codes

    def conditions_of(self, images: np.ndarray) -> np.ndarray:
        """(n,) int64 labels; or the (n, …) float32 or int64 conditions, where there are any."""
        return self.stores[0].labels_of(images) if self.conditions is None else rows_of(self.conditions, images)

    def batch(self, epoch: int, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """((n, H·W) int64 codes, labels or conditions)."""
        codes = self.codes_of(epoch, images).astype(np.int64)
        return torch.from_numpy(codes), torch.from_numpy(self.conditions_of(images))

    def sequential_batches(
        self, batch_size: int, rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's images once, in order, every image on exactly one rank: for validation."""
        images = np.arange(rank, len(self), world_size)
        for start in range(0, len(images), batch_size):
            codes, conditions = self.batch(0, images[start : start + batch_size])
            yield codes.to(device), conditions.to(device)


class CodeLoader:
    """This rank's slices of global batches `start_step`, `start_step + 1`, … without end, on `device`: as `batch` is.

    The slices of all ranks, joined in rank order, are the same global batch for any world size. A background thread
    gathers ahead from the memory map into pinned memory; with `resident=True` the stores lie on the device instead.
    """

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
        for parts in work_ahead(self._prepare, itertools.count(self.start_step), BATCHES_AHEAD):
            codes, conditions = (part.to(self.device, non_blocking=True) for part in parts)
            yield _unsigned(self._resident.codes[codes] if self._resident else codes), conditions

    def _prepare(self, step: int) -> list[torch.Tensor]:
        """What travels to the device: codes (when resident, the rows to gather there), labels or conditions."""
        epoch, images = self.order.indices(step)
        if self._resident:
            codes = torch.from_numpy(self._resident.rows(epoch, images))
        else:
            codes = _signed(self.dataset.codes_of(epoch, images))
        parts = [codes, torch.from_numpy(self.dataset.conditions_of(images))]
        return [part.pin_memory() for part in parts] if self.device.type == "cuda" else parts


class _ResidentCodes:
    """All stores' codes on the device, one row per crop, and where a draw finds its row."""

    def __init__(self, dataset: CodeDataset, device: torch.device):
        self.dataset = dataset
        self._crops = np.array([store.meta.crops for store in dataset.stores])
        self._starts = np.cumsum([0, *(len(store) * store.meta.crops for store in dataset.stores)])
        dtype = torch.int16 if dataset.dtype == np.uint16 else torch.int32
        self.codes = torch.empty(int(self._starts[-1]), dataset.meta.tokens, dtype=dtype, device=device)
        row = 0
        for _, codes in itertools.chain.from_iterable(store.blocks() for store in dataset.stores):
            rows = _signed(codes.astype(dataset.dtype).reshape(-1, dataset.meta.tokens))
            self.codes[row : row + len(rows)] = rows.to(device)
            row += len(rows)

    def rows(self, epoch: int, images: np.ndarray) -> np.ndarray:
        """(n,) int64: where the codes of `images` in `epoch` lie."""
        store, crops = self.dataset.draw(epoch, images)
        return self._starts[store] + images * self._crops[store] + crops


def _signed(codes: np.ndarray) -> torch.Tensor:
    """The same bits as a signed tensor: devices index and copy those everywhere, unlike uint16 and uint32."""
    return torch.from_numpy(codes.view(np.int16 if codes.dtype == np.uint16 else np.int32))


def _unsigned(codes: torch.Tensor) -> torch.Tensor:
    return codes.long() & (0xFFFF if codes.dtype == torch.int16 else 0xFFFFFFFF)


def _shared_facts(store: CodeStore) -> dict[str, Any]:
    """What stores that are mixed must share, as far as they say."""
    meta, sample = store.meta, np.linspace(0, len(store) - 1, min(len(store), 1000), dtype=np.int64)
    facts = {
        "images": meta.count,
        "grid": meta.grid,
        "codebook_size": meta.codebook_size,
        "class_names": meta.class_names,
        "tokenizer": meta.tokenizer.get("hash"),
        "image_list": meta.files.get(IMAGES_FILE),
        "labels": store.labels_of(sample).tolist(),
    }
    if facts["image_list"] == hashlib.sha256().hexdigest():  # empty, as after packing a published folder
        del facts["image_list"]
    return {name: value for name, value in facts.items() if value is not None}
