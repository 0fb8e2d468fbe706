"""Turn every image of a folder, and its crops, into codes of a frozen image tokenizer: the code store, written once.

Workers decode and scale images; the device cuts the crops and encodes many at a time; a thread writes finished blocks.
The same command continues an interrupted run, on any number of ranks, to the same store bit for bit: what is encoded
together is fixed by the plan (dataset/extraction_job.py), and on the CPU each batch is computed by one thread.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import torch
from tqdm import tqdm

from autoregressive.train.first_run import first_settings
from dataset.background import work_ahead
from dataset.code_store import META_FILE, StoreMeta, open_store, store_folder
from dataset.code_writer import codes_dtype, software_versions
from dataset.crops import center_crop, crop_count, cut_crops, enlarged_size, to_model_range
from dataset.extraction_job import Job, list_hash, open_job
from dataset.image_batches import loaded
from dataset.image_folder import ImageFolder, UnreadableImage, file_sizes, list_image_folder, load_rgb
from tokenizer.base import ImageTokenizer, LatentTokenizer
from tokenizer.tokenizer_image.load import StandaloneTokenizerSettings, TokenizerInfo, build_tokenizer, check_image_size
from utils.commands import absolute_component, command
from utils.component import is_component
from utils.distributed import World, init_world
from utils.memory import require_memory
from utils.precision import autocast, forbid_tf32
from utils.program import UserError, run
from utils.progress import progress
from utils.settings import MAX_SEED, REQUIRED, identity, option, parse, recipe, settings

DEBUG_IMAGES = 8  # of each class with --debug
BATCH_PIXELS = {"cuda": 64 << 16, "cpu": 2 << 16}  # default batch: 64 or 2 crops of 256×256, or as many pixels
BLOCKS_AHEAD = 4  # blocks that wait to be written, at most
Unreadable = list[tuple[int, str]]  # (image, reason)


@settings("extraction")
class ExtractionSettings:
    """Which images become which codes; the list of images and the tokenizer's hash are part of a job's identity."""

    tokenizer: StandaloneTokenizerSettings
    data_path: Path = option(REQUIRED, "image folder, one folder per class; or its .zip, or .tar shards")
    code_path: Path = option(REQUIRED, "the store becomes CODE_PATH/{dataset}{image size}_codes")
    dataset: str = option("imagenet", "name of the data set, part of the store's name")
    image_size: int = recipe(256, "side of a crop in pixels; any multiple of the downsample factor", at_least=1)
    ten_crop: bool = recipe(False, "ten crops per image instead of the centre crop and its mirror image")
    crop_range: float | None = recipe(
        1.1, "ten crops are cut from a square this many times --image-size", at_least=1, at_most=100
    )
    mirror: bool = recipe(True, "store mirror images as well; not for digits or text")
    global_seed: int = option(
        0, "accepted as published; extraction draws no random numbers", at_least=0, at_most=MAX_SEED
    )
    num_workers: int = option(24, "decoding processes per rank, at most its share of the cores", at_least=0)
    batch_size: int | None = recipe(
        None, "crops encoded at a time; default: as many as hold the pixels of 64 (CPU: 2) at 256 px", at_least=1
    )
    precision: str = recipe(
        "tf32",
        "number format of the encoder's convolutions; tf32 as published; none, or fp32, is float32 as it is",
        choices=("none", "tf32", "bf16", "fp32"),
    )
    compile: bool | None = recipe(None, "compile the encoder; default: on GPUs")
    skip_bad_images: bool = option(False, "leave unreadable images out instead of stopping in the end")
    debug: bool = option(
        False, f"only the first {DEBUG_IMAGES} images of each class, into the store of {{dataset}}_debug"
    )

    @property
    def target(self) -> Path:
        return store_folder(self.code_path, self.dataset + "_debug" * self.debug, self.image_size)

    def settled(self, device: torch.device) -> "ExtractionSettings":
        """With what was left open decided for `device`, and one spelling for what has two."""
        return replace(
            self,
            crop_range=self.crop_range if self.ten_crop else None,
            batch_size=self.batch_size or min(1024, max(1, BATCH_PIXELS[device.type] // self.image_size**2)),
            precision="none" if self.precision == "fp32" else self.precision,
            compile=device.type == "cuda" if self.compile is None else self.compile,
        )


def main() -> None:
    asked = parse(ExtractionSettings, __doc__.split("\n")[0])
    world = init_world(timeout=timedelta(hours=12))  # ranks wait while the first one lists a million files
    tokenizer, info = build_tokenizer(asked.tokenizer, world.device)
    check_image_size(asked.image_size, info.name, info.downsample_factor)
    held_lock, *begun = begin(asked, info, world.device) if world.is_main else (None,)
    job, folder, pending = world.broadcast(begun)
    if pending is not None:
        extract(job, folder, pending, Encoder(tokenizer, job.meta, world.device), asked.num_workers, world)
        refuse_bad_images(job, folder, asked.skip_bad_images, world)
        shards = join_shards(job, world)
        if world.is_main:
            job.finish(folder.labels, shards)
    if world.is_main:
        report(asked, info, world)
        if held_lock:
            held_lock.close()
    world.barrier()
    world.close()


def begin(
    asked: ExtractionSettings, info: TokenizerInfo, device: torch.device
) -> tuple[IO | None, Job, ImageFolder, list[int] | None]:
    """The lock that keeps others out of a job; the job, its images, and the blocks to encode (None: all is done)."""
    settled = asked.settled(device)
    refuse_too_large(settled)
    folder = list_image_folder(asked.data_path)
    if asked.debug:
        first = [np.flatnonzero(folder.labels == label)[:DEBUG_IMAGES] for label in range(len(folder.class_names))]
        folder = folder.subset(np.concatenate(first))
    sources = file_sizes(folder)
    job = plan_job(settled, info, folder, list_hash(sources), device)
    lock, pending = open_job(job, folder, sources)
    return lock, job, folder, pending


def refuse_too_large(settled: ExtractionSettings) -> None:
    """Raise `UserError` if the main memory does not hold a batch: its squares as bytes, its crops as numbers."""
    crops = crop_count(settled.ten_crop, settled.mirror)
    side = enlarged_size(settled.image_size, crops, settled.crop_range or 1)
    squares = max(1, settled.batch_size // crops) * side**2 * 3
    require_memory(
        squares + settled.batch_size * settled.image_size**2 * 15,
        f"a batch of {settled.batch_size:,} crops of {settled.image_size:,} px",
        "use a smaller --image-size or --batch-size",
    )


def plan_job(
    settled: ExtractionSettings, info: TokenizerInfo, folder: ImageFolder, image_list: str, device: torch.device
) -> Job:
    grid, crops = settled.image_size // info.downsample_factor, crop_count(settled.ten_crop, settled.mirror)
    facts = {
        "tokenizer": info.name,
        "tokenizer_sha256": info.sha256,
        "weights": info.weights,
        "crops": crops,
        "device": device.type,
        "images": len(folder),
        "image_list": image_list,
    }
    meta = StoreMeta(
        image_size=settled.image_size,
        grid=(grid, grid),
        crops=crops,
        count=len(folder),
        dtype=codes_dtype(info.codebook_size),
        crop_range=settled.crop_range,
        codebook_size=info.codebook_size,
        num_classes=len(folder.class_names),
        class_names=folder.class_names,
        tokenizer={
            "name": info.name,
            "hash": info.sha256,
            "weights": info.weights,
            "codebook_embed_dim": info.codebook_embed_dim,
            "downsample_factor": info.downsample_factor,
        },
        settings=identity(settled) | facts,
        software=software_versions(),
    )
    return Job(settled.target, meta, max(1, settled.batch_size // crops), places_of(settled, info))


def load_squares(folder: ImageFolder, batch_images: int, side: int, images: range) -> tuple[torch.Tensor, Unreadable]:
    """(batch_images, side, side, 3) uint8: `images` scaled and cut to the squares that the crops come from.

    Rows without a readable image are black; the unreadable ones are listed.
    """
    squares, bad = torch.zeros(batch_images, side, side, 3, dtype=torch.uint8), []
    for row, image in enumerate(images):
        try:
            squares[row] = torch.from_numpy(center_crop(load_rgb(folder.path(image)), side).copy())
        except UnreadableImage as error:
            bad.append((image, error.reason))
    return squares, bad


class Encoder:
    """(n, side, side, 3) uint8 squares -> (n, crops, H·W) int32 codes on the device, without waiting for it."""

    def __init__(self, tokenizer: ImageTokenizer, meta: StoreMeta, device: torch.device):
        self.tokenizer, self.meta, self.device = tokenizer.to(memory_format=torch.channels_last), meta, device
        self.precision = meta.settings["precision"]
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        forbid_tf32()  # in attention, and in the search for the nearest code
        torch.backends.cudnn.allow_tf32 = self.precision == "tf32"
        if meta.settings["compile"]:
            part = "latent" if isinstance(tokenizer, LatentTokenizer) else "encode_indices"
            compiled = torch.compile(getattr(tokenizer, part), dynamic=False, options={"deterministic": True})
            setattr(tokenizer, part, compiled)

    def start_thread(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # each thread has its own current device

    @torch.no_grad()
    def __call__(self, squares: torch.Tensor) -> torch.Tensor:
        squares = squares.to(self.device, non_blocking=True)
        views = to_model_range(cut_crops(squares, self.meta.image_size, self.meta.crops).flatten(0, 1))
        with autocast(self.device, self.precision):
            codes = self.tokenizer.encode_indices(views)
        return codes.to(torch.int32).view(len(squares), self.meta.crops, self.meta.tokens)


def extract(job: Job, folder: ImageFolder, pending: list[int], encode: Encoder, workers: int, world: World) -> None:
    """Encode and write this rank's share of the `pending` blocks; returns when every rank has done so."""
    done = job.meta.count - sum(len(job.images_of(block)) for block in pending)
    if done and world.is_main:
        print(f"continuing: {done:,} of {job.meta.count:,} images are encoded")
    blocks = pending[world.rank :: world.size]
    total = sum(len(job.images_of(block)) for block in blocks)

    def encoded_blocks() -> Iterator[tuple[int, list[torch.Tensor], Unreadable]]:
        results = encoded_batches(job, folder, blocks, encode, workers, world)
        for block in blocks:
            codes, bad = [], []
            for images in job.batches_of(block):
                batch_codes, batch_bad = next(results)
                codes.append(batch_codes[: len(images)])
                bad += batch_bad
                bar.update(len(images))
            for image, reason in bad:
                tqdm.write(f"unreadable: {folder.path(image)} ({reason})", file=sys.stderr)
            yield block, codes, bad

    def write(encoded: tuple[int, list[torch.Tensor], Unreadable]) -> None:
        block, codes, bad = encoded
        unreadable = {image for image, _ in bad}
        rows = [row for row, image in enumerate(job.images_of(block)) if image not in unreadable]
        job.write_block(block, torch.cat(codes).cpu().numpy()[rows], bad)

    with progress(description="extract", total=total, unit="images", show=world.is_main) as bar:
        try:
            for _ in work_ahead(write, encoded_blocks(), BLOCKS_AHEAD):
                pass
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the GPU's memory does not hold {job.meta.settings['batch_size']} crops of "
                f"{job.meta.image_size} px at a time; use a smaller --batch-size."
            ) from error
    world.barrier()


def encoded_batches(
    job: Job, folder: ImageFolder, blocks: list[int], encode: Encoder, workers: int, world: World
) -> Iterator[tuple[torch.Tensor, Unreadable]]:
    """(codes, unreadable images) of every batch of `blocks`, in order.

    On the CPU as many batches are encoded at a time as there are threads, one thread each: with several threads on one
    batch, sums are split, and so rounded, differently for each number of them.
    """
    threads = torch.get_num_threads()
    encoders = 1 if world.device.type == "cuda" else threads
    batches = [batch for block in blocks for batch in job.batches_of(block)]
    side = enlarged_size(job.meta.image_size, job.meta.crops, job.meta.crop_range or 1)
    squares = loaded(partial(load_squares, folder, job.batch_images, side), batches, workers, world)
    torch.set_num_threads(1)
    try:
        yield from work_ahead(
            lambda batch: (encode(batch[0]), batch[1]), squares, encoders + 1, encoders, encode.start_thread
        )
    finally:
        torch.set_num_threads(threads)


def refuse_bad_images(job: Job, folder: ImageFolder, skip: bool, world: World) -> None:
    """Report what could not be read; without `skip` that is the end, before anything final is written."""
    bad = job.bad_images() if world.is_main else None
    if bad and not skip:
        job.write_unreadable(bad)  # before the other ranks know: the first one to raise ends them all
    bad = world.broadcast(bad)
    if not bad:
        return
    example = f"{folder.path(bad[0][0])} ({bad[0][1]})"
    if len(bad) == job.meta.count:
        raise UserError(f"none of the {len(bad):,} images can be read, such as {example}; check --data-path.")
    if not skip:
        raise UserError(
            f"{len(bad):,} of {job.meta.count:,} images cannot be read, such as {example}; repair those "
            f"listed in {job.unreadable_path} or add --skip-bad-images to leave them out, then run the "
            "same command again: what is encoded stays."
        )


def join_shards(job: Job, world: World) -> list[dict]:
    """Join the finished blocks, each rank some of the shards; what meta.json says of all of them, in order."""
    mine = [(shard, job.join_shard(shard)) for shard in range(len(job.shards))[world.rank :: world.size]]
    return [entry for _, entry in sorted(sum(world.gather(mine), [])) if entry]


def report(asked: ExtractionSettings, info: TokenizerInfo, world: World) -> None:
    target, store = asked.target, open_store(asked.target)
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{store}, {store.meta.num_classes} classes, {size / 2**20:,.1f} MiB")
    if store.meta.unreadable:
        print(f"left out as unreadable: {len(store.meta.unreadable):,} images, listed in {target / META_FILE}")
    places = places_of(asked, info)
    verify = command(
        "autoregressive/verify_codes.sh",
        codes=target,
        vq_ckpt=Path(places["tokenizer"]),
        vq_model=places.get("vq_model"),
        data_path=asked.data_path,
    )
    train = command(
        "autoregressive/train_c2i.sh",
        code_path=asked.code_path,
        dataset=target.name.removesuffix(f"{asked.image_size}_codes") + "_code",
        image_size=asked.image_size,
        downsample_size=info.downsample_factor,
        vocab_size=info.codebook_size,
        num_classes=store.meta.num_classes,
        **first_settings(len(store), store.meta.grid, world),
    )
    print(f"look: {verify}\nnext: {train}")


def places_of(asked: ExtractionSettings, info: TokenizerInfo) -> dict[str, str]:
    """Where things lie, for commands printed later; no part of the store's description, so that stores can be equal."""
    own = asked.tokenizer.vq_model if is_component(asked.tokenizer.vq_model) else None
    places = {"tokenizer": os.path.realpath(info.checkpoint), "images": os.path.abspath(asked.data_path)}
    return places | ({"vq_model": absolute_component(own)} if own else {})


if __name__ == "__main__":
    run(main)
