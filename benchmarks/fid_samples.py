"""How long 50,000 images take, from labels to the .npz: the sampler's own loop, decoding and files included.

    python -m benchmarks.fid_samples --gpt-model GPT-B --images 4096             on a GPU
    python -m benchmarks.fid_samples --gpt-model GPT-Tiny --image-size 64 --images 4

Measures `--images` of them after one batch to warm up, and says what that comes to for 50,000, with the time to start
(models read, compiled and captured) that this run took. Weights are random. The floor is that of benchmarks.sampling,
for the codes alone: decoding runs beside them.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from autoregressive.models.generate import CodeGenerator
from autoregressive.models.gpt import GPT_SIZES, GPT_models
from autoregressive.models.load import GPTSettings
from autoregressive.models.sampling import Sampling
from autoregressive.sample.batch_size import fitting_batch_size
from autoregressive.sample.pipeline import IMAGES_DECODED_AT_ONCE, ComputeSettings, Pipeline
from autoregressive.sample.sample_c2i_ddp import BackgroundDecoder
from autoregressive.sample.seeds import image_labels, image_uniforms
from benchmarks.machine import chosen_device, describe, measured_speed, seconds
from benchmarks.report import MeasurementSettings, Rows
from benchmarks.sampling import floor_seconds
from dataset.image_store import ImageStore
from tokenizer.tokenizer_image.load import TokenizerSettings
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils.precision import PRECISIONS
from utils.program import run
from utils.settings import option, parse, recipe, settings

ALL_IMAGES, SEED = 50_000, 0


@settings("50,000 images")
class BenchmarkSettings:
    measurement: MeasurementSettings
    gpt_model: str = recipe("GPT-B", "size of the GPT", choices=GPT_SIZES)
    vq_model: str = recipe("VQ-16", "tokenizer", choices=VQ_models)
    image_size: int = recipe(256, "pixels per side", at_least=4)
    images: int = option(2048, "images measured, at least one batch", at_least=1)
    batch_size: int | None = option(None, "images at once (default: as the sampler chooses)", at_least=1)
    precision: str | None = recipe(None, "number format (default: bf16 on GPUs, none on CPUs)", choices=PRECISIONS)


def main() -> None:
    options = parse(BenchmarkSettings, __doc__.split("\n")[0])
    device = chosen_device(options.measurement.device)
    rows = Rows(options.measurement.json, describe(device))
    with tempfile.TemporaryDirectory() as name:
        measure(options, Path(name), device, rows)


def measure(options: BenchmarkSettings, folder: Path, device: torch.device, rows: Rows) -> None:
    started, sampling = time.perf_counter(), Sampling(cfg_scale=2.0)
    pipeline = random_pipeline(options, folder, device)
    pixels = IMAGES_DECODED_AT_ONCE[device.type] * pipeline.image_size**2
    fitting = fitting_batch_size(pipeline.gpt.args, True, pipeline.dtype, device, pixels)
    batch = options.batch_size or min(fitting, options.images)
    generator, batches = pipeline.generator(batch, sampling), max(1, options.images // batch)
    weights, length = pipeline.gpt, generator.length
    count = (1 + batches) * batch
    store = ImageStore(folder, "samples", {}, count, options.image_size)
    store.open(batch)
    draw(pipeline, generator, store, [0])
    ready = time.perf_counter() - started
    elapsed = seconds(lambda: draw(pipeline, generator, store, range(batch, count, batch)), device)
    finishing = seconds(lambda: store.finish(np.zeros(count, np.int64), {}), device)
    rate, share = batches * batch / elapsed, ALL_IMAGES / count
    floor = None
    if device.type == "cuda":  # packed weights of a CPU are no parameters
        floor = batch / floor_seconds(weights, batch, length, *measured_speed(device, pipeline.dtype))
    whole = ready + ALL_IMAGES / rate + share * finishing
    what = f"{options.gpt_model}, {options.vq_model}, {options.image_size} px, batch {batch}, {pipeline.precision}"
    rows.add(f"samples with decoding, {what}", rate, "images/s", None, floor, images_measured=batches * batch)
    more = {"to_start_s": ready, "to_write_npz_s": share * finishing}
    rows.add(f"{ALL_IMAGES:,} images, {what}", whole, "s", None, floor and ALL_IMAGES / floor, **more)


def draw(pipeline: Pipeline, generator: CodeGenerator, store: ImageStore, starts) -> None:
    """As `sample` of the program does."""
    with BackgroundDecoder(pipeline, generator, store) as decoder:
        for start in starts:
            indices = np.arange(start, start + generator.batch_size)
            cond = pipeline.condition(image_labels(indices, pipeline.num_classes, SEED))
            uniforms = image_uniforms(indices, generator.length, SEED)
            decoder.submit(start, generator(cond, torch.from_numpy(uniforms)))


def random_pipeline(options: BenchmarkSettings, folder: Path, device: torch.device) -> Pipeline:
    """A pipeline of models with random weights, written as checkpoints and read as the sampler reads them."""
    torch.manual_seed(0)
    tokenizer = VQ_models[options.vq_model]()
    side = options.image_size // tokenizer.downsample_factor
    gpt = GPT_models[options.gpt_model](block_size=side * side, grid=(side, side))
    torch.nn.init.normal_(gpt.output.weight, std=0.02)
    torch.save({"model": gpt.state_dict()}, folder / "gpt.pt")
    torch.save({"model": tokenizer.state_dict()}, folder / "vq.pt")
    sizes = {"gpt_model": options.gpt_model, "image_size": options.image_size}
    return Pipeline(
        GPTSettings(str(folder / "gpt.pt"), downsample_size=tokenizer.downsample_factor, **sizes),
        TokenizerSettings(str(folder / "vq.pt"), options.vq_model),
        ComputeSettings(options.precision),
        device,
        options.image_size,
    )


if __name__ == "__main__":
    run(main)
