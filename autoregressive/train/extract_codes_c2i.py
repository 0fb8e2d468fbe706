"""Turn every image of a folder, and its crops, into codes of a frozen VQ tokenizer: the code store, written once.

Workers decode and scale images; the device cuts the crops and encodes many at a time; a thread writes finished blocks.
The same command continues an interrupted run, on any number of ranks, to the same store bit for bit: what is encoded
together is fixed by the plan (dataset/extraction_job.py), and on the CPU each batch is computed by one thread.
"""

import argparse
import shutil
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import IO

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dataset.code_store import META_FILE, PACKED, PUBLISHED, StoreMeta, open_store, store_folder
from dataset.code_writer import check_published_place, codes_dtype, software_versions, write_published
from dataset.crops import center_crop, crop_count, cut_crops, enlarged_size, to_model_range
from dataset.extraction_job import Job, list_hash, open_job
from dataset.image_batches import worker_count
from dataset.image_folder import ImageFolder, UnreadableImage, file_sizes, list_image_folder, load_rgb
from tokenizer.tokenizer_image.load import TokenizerInfo, build_tokenizer
from tokenizer.tokenizer_image.vq_model import VQModel
from utils.checkpoint import WEIGHTS_CHOICES
from utils.distributed import World, init_world
from utils.program import UserError, run
from utils.progress import progress

DEBUG_IMAGES = 8  # of each class with --debug
BATCH_PIXELS = {"cuda": 64 << 16, "cpu": 2 << 16}  # default batch: 64 or 2 crops of 256×256, or as many pixels
PRECISIONS = ("fp32", "tf32", "bf16")


def main() -> None:
    args = parse_args()
    world = init_world(timeout=timedelta(hours=12))  # ranks wait while the first one lists a million files
    model, tokenizer = build_tokenizer(
        args.vq_model, args.codebook_size, args.codebook_embed_dim, args.vq_ckpt, args.weights, world.device
    )
    target = store_folder(args.code_path, args.dataset + ("_debug" if args.debug else ""), args.image_size)
    job, held_lock, pending = begin(args, target, tokenizer, world.device) if world.is_main else (None, None, None)
    job, pending = world.broadcast((job, pending))
    if pending is not None:
        folder = job.image_folder(args.data_path)
        encode = Encoder(model, job.meta, args.precision, world.device)
        extract(job, folder, pending, encode, args.num_workers, world)
        refuse_bad_images(job, folder, args.skip_bad_images, world)
        for shard in range(world.rank, job.shards, world.size):
            job.join_shard(shard)
        world.barrier()
        if world.is_main:
            job.finish(folder.labels)
    if world.is_main:
        if args.layout == PUBLISHED:
            if not target.exists():
                write_published(target, open_store(job.folder))
            shutil.rmtree(job.folder, ignore_errors=True)
        report(target, args, tokenizer.downsample_factor)
        if held_lock:
            held_lock.close()
    world.barrier()
    world.close()


def begin(
    args: argparse.Namespace, target: Path, tokenizer: TokenizerInfo, device: torch.device
) -> tuple[Job, IO | None, list[int] | None]:
    """The job, the lock that keeps others out of it, and the blocks to encode (None: all are in the store)."""
    check_arguments(args, tokenizer.downsample_factor)
    folder = list_images(args)
    sources = file_sizes(folder)
    job = plan_job(args, target, folder, list_hash(sources), tokenizer, device)
    held_lock, pending = open_job(job, target, args.data_path, sources)
    if target.exists() and open_store(target).meta.layout != args.layout:
        raise UserError(f"{target} is there already, in the other layout than {args.layout}; convert it with "
                        "convert_codes.sh or choose another --code-path.")  # fmt: skip
    if args.layout == PUBLISHED and pending is not None:
        check_published_place(target, folder.labels)  # not hours later
    return job, held_lock, pending


def list_images(args: argparse.Namespace) -> ImageFolder:
    folder = list_image_folder(args.data_path)
    if args.debug:
        by_class = (torch.from_numpy(folder.labels == label).nonzero()[:DEBUG_IMAGES, 0]
                    for label in range(len(folder.class_names)))  # fmt: skip
        folder = folder.subset(torch.cat(list(by_class)).numpy())
    return folder


def plan_job(
    args: argparse.Namespace,
    target: Path,
    folder: ImageFolder,
    image_list: str,
    tokenizer: TokenizerInfo,
    device: torch.device,
) -> Job:
    crops = crop_count(args.ten_crop, args.mirror)
    batch_size = args.batch_size or min(1024, max(1, BATCH_PIXELS[device.type] // args.image_size**2))
    settings = {  # a run that continues another must share all of these
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.sha256,
        "weights": tokenizer.weights,
        "image_size": args.image_size,
        "crops": crops,
        "crop_range": args.crop_range if args.ten_crop else None,
        "precision": args.precision,
        "compile": device.type == "cuda" if args.compile is None else args.compile,
        "batch_size": batch_size,
        "device": device.type,
        "images": len(folder),
        "image_list": image_list,
    }
    grid = args.image_size // tokenizer.downsample_factor
    meta = StoreMeta(
        image_size=args.image_size,
        grid=(grid, grid),
        crops=crops,
        count=len(folder),
        dtype=codes_dtype(args.codebook_size),
        crop_range=settings["crop_range"],
        codebook_size=args.codebook_size,
        num_classes=len(folder.class_names),
        class_names=folder.class_names,
        tokenizer={
            "name": tokenizer.name,
            "hash": tokenizer.sha256,
            "weights": tokenizer.weights,
            "codebook_embed_dim": tokenizer.codebook_embed_dim,
            "downsample_factor": tokenizer.downsample_factor,
        },
        settings=settings,
        software=software_versions(),
    )
    packed = target if args.layout == PACKED else target.with_name(target.name + ".packed")
    return Job(packed, meta, batch_images=max(1, batch_size // crops))


class Squares(Dataset):
    """Batches of images, each scaled and cut to the square that the crops come from."""

    def __init__(self, folder: ImageFolder, batches: list[range], batch_images: int, side: int):
        self.folder, self.batches, self.batch_images, self.side = folder, batches, batch_images, side

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, list[tuple[int, str]]]:
        """(batch_images, side, side, 3) uint8, black where there is none; and (image, reason) of the unreadable."""
        squares = torch.zeros(self.batch_images, self.side, self.side, 3, dtype=torch.uint8)
        bad = []
        for row, image in enumerate(self.batches[number]):
            try:
                squares[row] = torch.from_numpy(center_crop(load_rgb(self.folder.path(image)), self.side).copy())
            except UnreadableImage as error:
                bad.append((image, error.reason))
        return squares, bad


class Encoder:
    """(n, side, side, 3) uint8 squares -> (n, crops, H·W) int32 codes on the device, without waiting for it."""

    def __init__(self, model: VQModel, meta: StoreMeta, precision: str, device: torch.device):
        self.model, self.meta, self.device = model.to(memory_format=torch.channels_last), meta, device
        self.bf16 = precision == "bf16"
        self.latent = model.latent
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = False  # attention, and the search for the nearest code
        if meta.settings["compile"]:
            self.latent = torch.compile(model.latent, dynamic=False, options={"deterministic": True})

    def prepare_thread(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # each thread has its own current device

    @torch.no_grad()
    def __call__(self, squares: torch.Tensor) -> torch.Tensor:
        squares = squares.to(self.device, non_blocking=True)
        views = to_model_range(cut_crops(squares, self.meta.image_size, self.meta.crops).flatten(0, 1))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            latent = self.latent(views)
        codes = self.model.quantize.nearest(latent)
        return codes.to(torch.int32).view(len(squares), self.meta.crops, self.meta.tokens)


def extract(job: Job, folder: ImageFolder, pending: list[int], encode: Encoder, workers: int, world: World) -> None:
    """Encode and write this rank's share of the `pending` blocks; returns when every rank has done so."""
    done = job.meta.count - sum(len(job.images_of(block)) for block in pending)
    if done and world.is_main:
        print(f"continuing: {done:,} of {job.meta.count:,} images are encoded")
    blocks = pending[world.rank :: world.size]
    results = encoded_batches(job, folder, blocks, encode, workers)
    total = sum(len(job.images_of(block)) for block in blocks)
    with BlockWriter(job) as writer, progress(
        description="extract", total=total, unit="images", show=world.is_main
    ) as bar:  # fmt: skip
        for block in blocks:
            codes, bad = [], []
            for images in job.batches_of(block):
                batch_codes, batch_bad = next_batch(results, job)
                codes.append(batch_codes[: len(images)])
                bad += batch_bad
                bar.update(len(images))
            for image, reason in bad:
                tqdm.write(f"unreadable: {folder.path(image)} ({reason})", file=sys.stderr)
            writer.put(block, codes, bad)
    world.barrier()


def next_batch(results: Iterator, job: Job) -> tuple[torch.Tensor, list[tuple[int, str]]]:
    try:
        return next(results)
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU's memory does not hold {job.meta.settings['batch_size']} crops of "
                        f"{job.meta.image_size} px at a time; use a smaller --batch-size.") from error  # fmt: skip


def encoded_batches(
    job: Job, folder: ImageFolder, blocks: list[int], encode: Encoder, workers: int
) -> Iterator[tuple[torch.Tensor, list[tuple[int, str]]]]:
    """(codes, unreadable images) of every batch of `blocks`, in order.

    On the CPU as many batches are encoded at a time as there are threads, one thread each: with several threads on one
    batch, sums are split, and so rounded, differently for each number of them.
    """
    on_gpu = encode.device.type == "cuda"
    threads = 1 if on_gpu else torch.get_num_threads()
    batches = [batch for block in blocks for batch in job.batches_of(block)]
    side = enlarged_size(job.meta.image_size, job.meta.crops, job.meta.crop_range or 1)
    loader = DataLoader(
        Squares(folder, batches, job.batch_images, side),
        batch_size=None,
        num_workers=worker_count(workers),
        pin_memory=on_gpu,
    )
    in_flight: deque[tuple[Future, list]] = deque()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=encode.prepare_thread) as pool:
            for squares, bad in loader:
                in_flight.append((pool.submit(encode, squares), bad))
                if len(in_flight) > threads + 1:
                    future, bad = in_flight.popleft()
                    yield future.result(), bad
            for future, bad in in_flight:
                yield future.result(), bad
    finally:
        torch.set_num_threads(threads)


class BlockWriter:
    """Writes blocks in a thread of its own, a few at most behind; a failure is raised at the next block or the end."""

    MOST_WAITING = 4

    def __init__(self, job: Job):
        self.job, self._waiting = job, deque()
        self._thread = ThreadPoolExecutor(1)

    def put(self, block: int, codes: list[torch.Tensor], bad: list[tuple[int, str]]) -> None:
        self._waiting.append(self._thread.submit(self._write, block, codes, bad))
        while len(self._waiting) > self.MOST_WAITING or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()

    def _write(self, block: int, codes: list[torch.Tensor], bad: list[tuple[int, str]]) -> None:
        unreadable = {image for image, _ in bad}
        rows = [row for row, image in enumerate(self.job.images_of(block)) if image not in unreadable]
        self.job.write_block(block, torch.cat(codes).cpu().numpy()[rows], bad)

    def __enter__(self) -> "BlockWriter":
        return self

    def __exit__(self, error_type: type | None, *_) -> None:
        self._thread.shutdown(cancel_futures=error_type is not None)
        while self._waiting and error_type is None:
            self._waiting.popleft().result()


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
        raise UserError(f"{len(bad):,} of {job.meta.count:,} images cannot be read, such as {example}; repair those "
                        f"listed in {job.unreadable_path} or add --skip-bad-images to leave them out, then run the "
                        "same command again: what is encoded stays.")  # fmt: skip


def report(target: Path, args: argparse.Namespace, downsample_factor: int) -> None:
    store = open_store(target)
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{store}, {store.meta.num_classes} classes, {size / 2**20:,.1f} MiB")
    if store.meta.unreadable:
        print(f"left out as unreadable: {len(store.meta.unreadable):,} images, listed in {target / META_FILE}")
    dataset = target.name.removesuffix(f"{args.image_size}_codes") + "_code"
    print(f"look: bash scripts/autoregressive/verify_codes.sh --codes {target} --vq-ckpt {args.vq_ckpt} "
          f"--data-path {args.data_path}")  # fmt: skip
    print(f"next: bash scripts/autoregressive/train_c2i.sh --code-path {args.code_path} --dataset {dataset} "
          f"--image-size {args.image_size} --downsample-size {downsample_factor} --vocab-size {args.codebook_size} "
          f"--num-classes {store.meta.num_classes}")  # fmt: skip


def check_arguments(args: argparse.Namespace, downsample_factor: int) -> None:
    size = args.image_size
    if size < downsample_factor or size % downsample_factor:
        near = max(1, round(size / downsample_factor)) * downsample_factor
        raise UserError(f"--image-size {size} is not a multiple of {downsample_factor}, the pixels a code of "
                        f"{args.vq_model} covers; use {near}.")  # fmt: skip
    if args.crop_range < 1:
        raise UserError(f"--crop-range {args.crop_range:g} is less than 1, the image size itself; use 1.1 or 1.05.")
    for flag in ("batch_size", "num_workers"):
        if getattr(args, flag) is not None and getattr(args, flag) < (flag == "batch_size"):
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} is too small.")


def parse_args(command: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data-path", type=Path, required=True, help="image folder: one folder per class")
    add("--code-path", type=Path, required=True, help="the store becomes CODE_PATH/{dataset}{image size}_codes")
    add("--vq-model", default="VQ-16", help="tokenizer: VQ-16, VQ-8 or VQ-Tiny")
    add("--vq-ckpt", type=Path, required=True, help="the tokenizer's checkpoint")
    add("--codebook-size", type=int, default=16384, help="number of codes")
    add("--codebook-embed-dim", type=int, default=8, help="width of a code's vector")
    add("--weights", choices=WEIGHTS_CHOICES, default="auto", help="which weights of the checkpoint; auto: EMA if kept")
    add("--dataset", default="imagenet", help="name of the data set, part of the store's name")
    add("--image-size", type=int, default=256, help="pixels of a crop's side; any multiple of the downsample factor")
    add("--ten-crop", action="store_true", help="ten crops an image; else the centre crop and its mirror image")
    add("--crop-range", type=float, default=1.1, help="ten crops are cut from a square this many times --image-size")
    add("--mirror", action=argparse.BooleanOptionalAction, default=True,
        help="store mirror images, too; not for digits or text")  # fmt: skip
    add("--global-seed", type=int, default=0, help="accepted as published; extraction draws no random numbers")
    add("--num-workers", type=int, default=24, help="decoding processes a rank, at most its share of the cores")
    add(
        "--batch-size",
        type=int,
        default=None,
        help="crops encoded at a time; default: as many as hold the pixels of 64 (CPU: 2) at 256 px",
    )
    add("--precision", choices=PRECISIONS, default="tf32", help="of the encoder's convolutions; tf32 as published")
    add("--compile", action=argparse.BooleanOptionalAction, default=None, help="compile the encoder; default: on GPUs")
    add("--layout", choices=(PACKED, PUBLISHED), default=PACKED, help="packed, or two small files an image")
    add("--skip-bad-images", action="store_true", help="leave unreadable images out instead of stopping in the end")
    add("--debug", action="store_true",
        help=f"only the first {DEBUG_IMAGES} images of each class, into the store of {{dataset}}_debug")  # fmt: skip
    return parser.parse_args(command)


if __name__ == "__main__":
    run(main)
