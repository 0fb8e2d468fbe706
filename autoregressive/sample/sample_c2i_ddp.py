"""Samples images for FID into one `.npz`, on one process or many; continues where an interrupted run stopped.

    bash scripts/autoregressive/sample_c2i.sh --gpt-model GPT-B --gpt-ckpt npp/c2i_B_256.pt --vq-ckpt vq_ds16_c2i.pt \\
        --image-size 256 --cfg-scale 2.0
"""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from autoregressive.models.generate import CodeGenerator
from autoregressive.models.load import GPTSettings
from autoregressive.models.sampling import Sampling
from autoregressive.sample.batch_size import bytes_per_image, fitting_batch_size
from autoregressive.sample.class_names import caption, class_names
from autoregressive.sample.pictures import captioned_rows, rows_of_classes
from autoregressive.sample.pipeline import (
    IMAGES_DECODED_AT_ONCE,
    ComputeSettings,
    Pipeline,
    SamplerTokenizerSettings,
    checkpoint_name,
)
from autoregressive.sample.seeds import image_labels, image_uniforms
from dataset.image_store import ImageStore
from utils.commands import command
from utils.component import identities
from utils.distributed import World, init_world
from utils.files import atomic_file
from utils.memory import require_memory
from utils.program import UserError, run
from utils.progress import progress
from utils.settings import MAX_SEED, identity, option, parse, recipe, settings, with_defaults

PATIENCE = timedelta(hours=12)  # ranks without work wait for those that sample, and for the `.npz`

LABEL_BYTES = 32  # per image in main memory: its number, its label, whether it is done


@settings("images")
class ImagesSettings:
    num_fid_samples: int = recipe(50000, "images to sample", at_least=1)
    image_size_eval: int = recipe(256, "pixels per side that images are resized to", at_least=1)
    random_labels: bool = recipe(False, "labels at random, as published, instead of the same number of each class")
    seed: int = recipe(
        0, "image i of a seed is the same in any run", at_least=0, at_most=MAX_SEED, flag="--global-seed"
    )
    per_proc_batch_size: int | None = option(
        None, "images at once in each process (default: as many as free memory holds)", at_least=1
    )
    sample_dir: str = option("samples", "folder of the result")
    png: bool = option(False, "write the images as PNG files too")

    def labels(self, indices: np.ndarray, num_classes: int) -> np.ndarray:
        return image_labels(indices, num_classes, self.seed, balanced=not self.random_labels)


@settings("sampling for FID")
class SampleSettings:
    gpt: GPTSettings
    tokenizer: SamplerTokenizerSettings
    compute: ComputeSettings
    sampling: with_defaults(Sampling, cfg_scale=1.5)
    images: ImagesSettings


def main() -> None:
    chosen = parse(SampleSettings, __doc__.split("\n")[0])
    images, sampling = chosen.images, chosen.sampling
    world = init_world(PATIENCE)
    remedy = "use fewer --num-fid-samples"
    require_memory(images.num_fid_samples * LABEL_BYTES, f"a list of {images.num_fid_samples:,} images", remedy)
    pipeline = Pipeline(chosen.gpt, chosen.tokenizer, chosen.compute, world.device, images.image_size_eval)
    decided_by = {}
    if world.is_main:
        decided_by = identity(sampling) | identity(images) | pipeline.identity() | identities(sampler=sampling.sampler)
    store = ImageStore(
        Path(images.sample_dir),
        result_name(chosen, pipeline),
        decided_by,
        images.num_fid_samples,
        images.image_size_eval,
    )
    if world.is_main:
        print(pipeline.describe(), flush=True)
    if not world.broadcast(world.is_main and store.is_complete()):
        batch_size = agree_on_batch_size(images, sampling, pipeline, store, world)
        started = time.time()
        sample(images, sampling, pipeline, store, world, batch_size)
        if world.is_main:
            report = {"batch_size": batch_size, "processes": world.size, "device": device_name(world)}
            report |= {"seconds": round(time.time() - started, 1), "torch": torch.__version__}
            report |= {"gpt_ckpt": chosen.gpt.gpt_ckpt, "vq_ckpt": pipeline.tokenizer_info.checkpoint}
            finish(images, pipeline, store, report)
    world.barrier()
    if world.is_main:
        store.remove_partial()
        if images.png:
            store.write_pngs()
        print(f"samples: {store.result}\nnext: {next_command(pipeline, images, store.result)}")
    world.close()


def result_name(chosen: SampleSettings, pipeline: Pipeline) -> str:
    """The published name."""
    sampling, images = chosen.sampling, chosen.images
    checkpoint = checkpoint_name(chosen.gpt.gpt_ckpt, chosen.gpt.from_fsdp)
    return (
        f"{pipeline.gpt_info.name}-{checkpoint}-size-{pipeline.image_size}-size-{images.image_size_eval}-"
        f"{pipeline.tokenizer_info.label}-topk-{sampling.top_k}-topp-{sampling.top_p}-"
        f"temperature-{sampling.temperature}-cfg-{sampling.cfg_scale}-seed-{images.seed}"
    )


def agree_on_batch_size(
    images: ImagesSettings, sampling: Sampling, pipeline: Pipeline, store: ImageStore, world: World
) -> int:
    """The batch size given, or that of the run being continued, or what fits on the fullest device."""
    recorded = world.broadcast(store.recorded_batch_size() if world.is_main else None)
    batch_size, guided = images.per_proc_batch_size or recorded, sampling.cfg_scale != 1
    if batch_size is None:
        pixels = IMAGES_DECODED_AT_ONCE[world.device.type] * pipeline.image_size**2
        fitting = fitting_batch_size(pipeline.gpt.args, guided, pipeline.dtype, world.device, pixels)
        batch_size = min(*world.gather(fitting), -(-images.num_fid_samples // world.size))
    refuse_too_many(batch_size, guided, images, pipeline)
    if world.is_main:
        store.open(batch_size)
    world.barrier()
    return batch_size


def refuse_too_many(batch_size: int, guided: bool, images: ImagesSettings, pipeline: Pipeline) -> None:
    """Raise `UserError` if so many images at once are more than the main memory holds (a GPU says so itself)."""
    per_image = images.image_size_eval**2 * 3  # as bytes
    if pipeline.device.type == "cpu":
        per_image = 5 * per_image + bytes_per_image(pipeline.gpt.args, guided, pipeline.dtype)
    what = f"a batch of {batch_size:,} images of {images.image_size_eval:,} px"
    require_memory(batch_size * per_image, what, "use a smaller --per-proc-batch-size or --image-size-eval")


def sample(
    images: ImagesSettings, sampling: Sampling, pipeline: Pipeline, store: ImageStore, world: World, batch_size: int
) -> None:
    """Generate every image that is not yet in the store. Batches start at multiples of the batch size, on any rank."""
    starts = world.broadcast(missing_batches(store.done(), batch_size) if world.is_main else None)
    generator = pipeline.generator(batch_size, sampling)
    decoder = BackgroundDecoder(pipeline, generator, store)
    count = images.num_fid_samples
    missing = sum(min(batch_size, count - start) for start in starts)
    bar = progress(description="sample", total=count, unit="image", show=world.is_main, done=count - missing)
    with decoder, bar:
        for turn, start in enumerate(starts):
            if turn % world.size == world.rank:
                indices = np.arange(start, start + batch_size)  # the last batch is full too: one shape, one rounding
                cond = pipeline.condition(images.labels(indices, pipeline.num_classes))
                uniforms = image_uniforms(indices, generator.length, images.seed)
                decoder.submit(start, generator(cond, torch.from_numpy(uniforms)))
            bar.update(min(batch_size, count - start))
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
        images = self.pipeline.pixels(codes)
        try:
            self.generator.check_finite()
        except FloatingPointError as error:
            raise UserError(f"{error}; give --precision bf16 or none, or another checkpoint.") from error
        self.store.write(start, images)


def finish(images: ImagesSettings, pipeline: Pipeline, store: ImageStore, report: dict) -> None:
    """The preview, with a row per class, and last the `.npz`."""
    labels = images.labels(np.arange(images.num_fid_samples), pipeline.num_classes)
    shown = rows_of_classes(labels)
    pixels = store.images(shown.flatten())
    names = class_names(pipeline.num_classes, pipeline.gpt_info.class_names)
    captions = [caption(labels[row[0]], names) for row in shown]
    with atomic_file(store.preview) as file:
        captioned_rows(pixels.reshape(*shown.shape, *pixels.shape[1:]), captions).save(file, format="png")
    store.finish(labels, report)


def next_command(pipeline: Pipeline, images: ImagesSettings, result: Path) -> str:
    """Scores against the images that the GPT was trained on, if they are where they were."""
    place = Path(pipeline.gpt_info.places.get("images", ""))
    known = place.is_absolute() and place.exists()
    reference, size = (place, images.image_size_eval) if known else ("REFERENCE.npz", None)
    told = "" if known else "   # REFERENCE.npz: see evaluations/c2i/README.md"
    return command("evaluate.sh", reference, result, image_size=size) + told


def device_name(world: World) -> str:
    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"


if __name__ == "__main__":
    run(main)
