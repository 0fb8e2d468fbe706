"""Training batches from the code store against the published loader: samples/s, bytes on disk, time to open.

    python -m benchmarks.loader

The baseline is the published procedure in plain form: a data set that opens two `.npy` files per sample, of which it
uses one crop of ten, behind a `DataLoader` with workers. Both read the same codes, in turn. The store of 1,281,167
images that is opened has sparse shards of full size.
"""

import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from benchmarks.machine import chosen_device, describe
from benchmarks.report import MeasurementSettings, Rows
from dataset.code_dataset import CodeDataset, CodeLoader
from dataset.code_store import CodeStore, StoreMeta, open_store
from dataset.code_writer import SHARD_IMAGES, shard_name, write_description, write_packed, write_published
from utils.program import run
from utils.settings import option, parse, recipe, settings

IMAGENET, CROPS, GRID, CLASSES = 1_281_167, 10, (16, 16), 1000


@settings("benchmark")
class LoaderBenchmark:
    measurement: MeasurementSettings
    images: int = recipe(20_000, "images in the store that is read", at_least=1)
    batch_size: int = recipe(256, "samples per batch", at_least=1)
    steps: int = recipe(1000, "batches per measurement", at_least=1)
    published_steps: int = recipe(70, "batches per measurement of the baseline", at_least=1)
    num_workers: int = recipe(2, "worker processes of the baseline", at_least=0)
    opened: int = recipe(IMAGENET, "images in the store that is opened", at_least=1)
    repeats: int = option(3, "measurements, of which the median counts", at_least=1)


def main() -> None:
    args = parse(LoaderBenchmark, __doc__.split("\n")[0])
    device = chosen_device(args.measurement.device)
    rows = Rows(args.measurement.json, describe(device))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        packed = small_store(folder / "packed256_codes", args.images)
        write_published(folder / "published256_codes", packed)
        old_bytes = disk_bytes(folder / "published256_codes") + disk_bytes(folder / "published256_labels")
        compare_loaders(args, folder, packed, device, rows, old_bytes / args.images)
        time_opening(folder / "imagenet256_codes", args.opened, rows)


def compare_loaders(
    args: LoaderBenchmark, folder: Path, packed: CodeStore, device: torch.device, rows: Rows, old_bytes: float
) -> None:
    dataset = CodeDataset([packed])
    rates = {"published": [], "from the memory map": [], "resident on the device": []}
    for _ in range(args.repeats):
        rates["published"].append(rate(published_batches(folder, args, device), args, args.published_steps, device))
        for resident, name in enumerate(list(rates)[1:]):
            batches = iter(CodeLoader(dataset, args.batch_size, device=device, resident=bool(resident)))
            rates[name].append(rate(batches, args, args.steps, device))
            batches.close()
    median = {name: float(np.median(values)) for name, values in rates.items()}
    sizes = {"bytes_per_image": disk_bytes(packed.path) / args.images, "published_bytes": old_bytes}
    for name in list(rates)[1:]:
        rows.add(
            f"training loader, batch {args.batch_size}, {name}", median[name], "samples/s", median["published"], **sizes
        )


def rate(batches, args: LoaderBenchmark, steps: int, device: torch.device) -> float:
    """Samples/s after the first batch, which starts workers and threads."""
    next(batches)
    start = time.perf_counter()
    for codes, labels in itertools.islice(batches, steps):
        codes, labels = codes.to(device), labels.to(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return steps * args.batch_size / (time.perf_counter() - start)


class PublishedDataset(Dataset):
    def __init__(self, codes: Path, labels: Path, count: int):
        self.codes, self.labels = codes, labels
        self.names = [f"{number}.npy" for number in range(count)]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int):
        codes = np.load(self.codes / self.names[number])
        codes = codes[:, torch.randint(0, codes.shape[1], (1,)).item()]
        return torch.from_numpy(codes), torch.from_numpy(np.load(self.labels / self.names[number]))


def published_batches(folder: Path, args: LoaderBenchmark, device: torch.device):
    data = PublishedDataset(folder / "published256_codes", folder / "published256_labels", args.images)
    sampler, pinned = DistributedSampler(data, num_replicas=1, rank=0, shuffle=True), device.type == "cuda"
    workers = args.num_workers
    loader = DataLoader(data, args.batch_size, False, sampler, num_workers=workers, pin_memory=pinned, drop_last=True)
    while True:
        yield from loader


def small_store(folder: Path, count: int) -> CodeStore:
    codes = np.random.default_rng(0).integers(0, 16384, (count, CROPS, GRID[0] * GRID[1]), np.uint16)
    return write_packed(
        folder, store_description(count), lambda start, stop: codes[start:stop], np.arange(count) % CLASSES
    )


def store_description(count: int, shards: list[dict] | None = None) -> StoreMeta:
    names = [f"n{number:08d}" for number in range(CLASSES)]
    known = {"crop_range": 1.1, "codebook_size": 16384, "num_classes": CLASSES, "class_names": names}
    return StoreMeta(256, GRID, CROPS, count, **known, shards=shards or [])


def time_opening(folder: Path, images: int, rows: Rows) -> None:
    folder.mkdir()
    counts = [min(SHARD_IMAGES, images - start) for start in range(0, images, SHARD_IMAGES)]
    shards = [{"file": shard_name(number), "count": count, "sha256": ""} for number, count in enumerate(counts)]
    for shard in shards:
        shape = (shard["count"], CROPS, GRID[0] * GRID[1])
        np.lib.format.open_memmap(folder / shard["file"], "w+", np.uint16, shape).flush()
    sources = [(f"n{number % CLASSES:08d}/n{number:08d}.JPEG", 110_000) for number in range(images)]
    write_description(folder, store_description(images, shards), np.arange(images) % CLASSES, sources)
    start = time.perf_counter()
    store = open_store(folder)
    opened = time.perf_counter()
    next(iter(CodeLoader(CodeDataset([store]), 256)))
    first = time.perf_counter() - start
    rows.add(
        f"opening a store of {len(store):,} images", 1e3 * (opened - start), "ms", first_batch_after_ms=1e3 * first
    )


def disk_bytes(folder: Path) -> int:
    """Allocated blocks of all files."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    run(main)
