"""Samples images for FID into one `.npz`, on one process or many; continues where an interrupted run stopped.

    bash scripts/autoregressive/sample_c2i.sh --gpt-model GPT-B --gpt-ckpt npp/c2i_B_256.pt --vq-ckpt vq_ds16_c2i.pt \\
        --image-size 256 --cfg-scale 2.0
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from autoregressive.models.generate import CodeGenerator, Sampling
from autoregressive.sample.batch_size import fitting_batch_size
from autoregressive.sample.options import add_model_options, add_sampling_options, check_options, sampling_of
from autoregressive.sample.pictures import image_grid
from autoregressive.sample.pipeline import IMAGES_DECODED_AT_ONCE, Pipeline
from autoregressive.sample.seeds import image_labels, image_uniforms
from dataset.image_store import ImageStore
from utils.distributed import World, init_world
from utils.files import atomic_file, sha256
from utils.program import UserError, run
from utils.progress import progress

PREVIEW_IMAGES = 64
PATIENCE = timedelta(hours=12)  # ranks without work wait for those that sample, and for the `.npz`


def main() -> None:
    args = parse_arguments()
    sampling = sampling_of(args)
    world = init_world(PATIENCE)
    pipeline = Pipeline(args, world.device, args.image_size_eval)
    store = ImageStore(
        Path(args.sample_dir), result_name(args), image_settings(args, sampling, pipeline) if world.is_main else {},
        args.num_fid_samples, args.image_size_eval,
    )  # fmt: skip
    if world.is_main:
        print(pipeline.describe(), flush=True)
    if not world.broadcast(world.is_main and store.is_complete()):
        batch_size = agree_on_batch_size(args, sampling, pipeline, store, world)
        started = time.time()
        sample(args, sampling, pipeline, store, world, batch_size)
        if world.is_main:
            finish(args, store, {"batch_size": batch_size, "processes": world.size, "device": device_name(world),
                                 "seconds": round(time.time() - started, 1)})  # fmt: skip
    world.barrier()
    if world.is_main:
        store.remove_partial()
        if args.png:
            store.write_pngs()
        print(f"samples: {store.result}\nnext: python3 evaluations/c2i/evaluator.py REFERENCE.npz {store.result}")
    world.close()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    add_model_options(parser)
    add_sampling_options(parser, cfg_scale=1.5, top_k=0)
    group = parser.add_argument_group("images")
    group.add_argument("--num-fid-samples", type=int, default=50000, help="images to sample")
    group.add_argument("--image-size-eval", type=int, default=256, help="pixels a side that images are resized to")
    group.add_argument("--random-labels", action="store_true",
                       help="labels at random, as published, instead of the same number of each class")  # fmt: skip
    group.add_argument("--global-seed", dest="seed", type=int, default=0,
                       help="image i of a seed is the same in any run")  # fmt: skip
    group.add_argument("--per-proc-batch-size", type=int, default=None,
                       help="images at once in each process; unset: as many as free memory holds")  # fmt: skip
    group.add_argument("--sample-dir", default="samples", help="folder of the result")
    group.add_argument("--png", action="store_true", help="write the images as PNG files too")
    args = parser.parse_args()
    check_options(args)
    for option in ("num_fid_samples", "image_size_eval", "per_proc_batch_size"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            raise UserError(f"--{option.replace('_', '-')} {getattr(args, option)} must be at least 1.")
    return args


def result_name(args: argparse.Namespace) -> str:
    """The published name."""
    path = Path(args.gpt_ckpt)
    checkpoint = path.absolute().parent.name if args.from_fsdp else path.name.removesuffix(".pth").removesuffix(".pt")
    return (
        f"{args.gpt_model}-{checkpoint}-size-{args.image_size}-size-{args.image_size_eval}-{args.vq_model}-"
        f"topk-{args.top_k}-topp-{args.top_p}-temperature-{args.temperature}-cfg-{args.cfg_scale}-seed-{args.seed}"
    )


def image_settings(args: argparse.Namespace, sampling: Sampling, pipeline: Pipeline) -> dict:
    """Everything that decides the images; two runs that differ here are different runs."""
    return {
        "gpt_model": args.gpt_model, "gpt_sha256": sha256(pipeline.gpt_info.checkpoint),
        "gpt_weights": pipeline.gpt_info.weights, "gpt_steps": pipeline.gpt_info.steps,
        "tokenizer": args.vq_model, "tokenizer_sha256": pipeline.tokenizer_info.sha256,
        "tokenizer_weights": pipeline.tokenizer_info.weights, "image_size": args.image_size,
        "image_size_eval": args.image_size_eval, "num_classes": args.num_classes, "precision": args.precision,
        "labels": "random" if args.random_labels else "balanced", "seed": args.seed, "images": args.num_fid_samples,
    } | asdict(sampling)  # fmt: skip


def agree_on_batch_size(args, sampling: Sampling, pipeline: Pipeline, store: ImageStore, world: World) -> int:
    """The batch size given, or that of the run being continued, or what fits on the fullest device."""
    recorded = world.broadcast(store.recorded_batch_size() if world.is_main else None)
    batch_size = args.per_proc_batch_size or recorded
    if batch_size is None:
        pixels = IMAGES_DECODED_AT_ONCE[world.device.type] * args.image_size**2
        guided = sampling.cfg_scale != 1
        fitting = fitting_batch_size(pipeline.gpt.args, guided, pipeline.dtype, world.device, pixels)
        batch_size = min(*world.gather(fitting), -(-args.num_fid_samples // world.size))
    if world.is_main:
        store.open(batch_size)
    world.barrier()
    return batch_size


def sample(args, sampling: Sampling, pipeline: Pipeline, store: ImageStore, world: World, batch_size: int) -> None:
    """Generate every image that is not yet in the store. Batches start at multiples of the batch size, on any rank."""
    starts = world.broadcast(missing_batches(store.done(), batch_size) if world.is_main else None)
    generator = pipeline.generator(batch_size, sampling)
    decoder = BackgroundDecoder(pipeline, generator, store)
    missing = sum(min(batch_size, args.num_fid_samples - start) for start in starts)
    bar = progress(description="sample", total=args.num_fid_samples, unit="image", show=world.is_main,
                   done=args.num_fid_samples - missing)  # fmt: skip
    with decoder, bar:
        for turn, start in enumerate(starts):
            if turn % world.size == world.rank:
                indices = np.arange(start, start + batch_size)  # the last batch is full too: one shape, one rounding
                labels = image_labels(indices, args.num_classes, args.seed, not args.random_labels)
                uniforms = image_uniforms(indices, generator.length, args.seed)
                decoder.submit(start, generator(torch.from_numpy(labels), torch.from_numpy(uniforms)))
            bar.update(min(batch_size, args.num_fid_samples - start))
    world.barrier()


def missing_batches(done: np.ndarray, batch_size: int) -> list[int]:
    """First images of the batches that are not wholly `done` `(images,)`."""
    return [start for start in range(0, len(done), batch_size) if not done[start : start + batch_size].all()]


class BackgroundDecoder:
    """Decodes and stores batches; on a GPU in a thread and a stream of their own, while the next codes are drawn."""

    def __init__(self, pipeline: Pipeline, generator: CodeGenerator, store: ImageStore):
        self.pipeline, self.generator, self.store = pipeline, generator, store
        self.on_gpu = pipeline.device.type == "cuda"
        if self.on_gpu:
            self.thread, self.stream, self.pending = ThreadPoolExecutor(1), torch.cuda.Stream(), None

    def submit(self, start: int, codes: torch.Tensor) -> None:
        """Take a batch of `codes`, once the one before is stored; raises what went wrong with that one."""
        if not self.on_gpu:
            self._store(start, codes)
            return
        drawn = torch.cuda.current_stream().record_event()
        self._wait()
        self.pending = self.thread.submit(self._store_on_stream, start, codes, drawn)

    def __enter__(self) -> "BackgroundDecoder":
        return self

    def __exit__(self, error_type, *_) -> None:
        if self.on_gpu:
            if error_type is None:
                self._wait()
            self.thread.shutdown()

    def _wait(self) -> None:
        if self.pending is not None:
            self.pending.result()

    def _store_on_stream(self, start: int, codes: torch.Tensor, drawn: torch.cuda.Event) -> None:
        torch.cuda.set_device(self.pipeline.device)
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(drawn)
            self._store(start, codes)

    def _store(self, start: int, codes: torch.Tensor) -> None:
        images = self.pipeline.decode(codes)
        try:
            self.generator.check_finite()
        except FloatingPointError as error:
            raise UserError(f"{error}; give --precision bf16 or none, or another checkpoint.") from error
        self.store.write(start, images)


def finish(args: argparse.Namespace, store: ImageStore, report: dict) -> None:
    """The preview, and last the `.npz`."""
    labels = image_labels(np.arange(args.num_fid_samples), args.num_classes, args.seed, not args.random_labels)
    spread = np.linspace(0, args.num_fid_samples - 1, min(PREVIEW_IMAGES, args.num_fid_samples)).astype(int)
    with atomic_file(store.preview) as file:
        Image.fromarray(image_grid(store.images(spread), columns=8)).save(file, format="png")
    store.finish(labels, report | {"torch": torch.__version__, "gpt_ckpt": args.gpt_ckpt, "vq_ckpt": args.vq_ckpt})


def device_name(world: World) -> str:
    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"


if __name__ == "__main__":
    run(main)
