"""Training steps of the tokenizer: images/s here, eager and compiled, and by the published trainer's step.

    python -m benchmarks.tokenizer                                                          VQ-16 at 64 px, on a CPU
    python -m benchmarks.tokenizer --image-size 256 --batch-size 16                         a GPU

Published: benchmarks/published_tokenizer.py, eager as there by default, before the discriminator's start. All have
random weights, LPIPS's included, and take turns. The floor is what the step's products and convolutions alone would
take at the device's peak, as in benchmarks.training.
"""

import statistics
from collections.abc import Callable
from importlib.util import find_spec

import torch

from autoregressive.train.cost import peak_flops
from benchmarks.machine import alternate, chosen_device, counted_flops, describe, device_name, measured_speed
from benchmarks.published_tokenizer import PublishedLPIPS, PublishedVQStep
from benchmarks.report import MeasurementSettings, Rows
from tokenizer.tokenizer_image.lpips import LPIPS
from tokenizer.tokenizer_image.vq_loss import VQLoss
from tokenizer.tokenizer_image.vq_model import VQ_models
from tokenizer.tokenizer_image.vq_setup import VQTrainSettings, make_tokenizer
from tokenizer.tokenizer_image.vq_train import train_step
from utils.distributed import World
from utils.precision import DTYPES, PRECISIONS
from utils.program import run
from utils.settings import option, parse, recipe, settings


@settings("tokenizer benchmark")
class BenchmarkSettings:
    measurement: MeasurementSettings
    vq_model: str = recipe("VQ-16", "tokenizer", choices=VQ_models)
    image_size: int = recipe(64, "pixels per side", at_least=32)
    batch_size: int = recipe(2, "images per step", at_least=1)
    mixed_precision: str = recipe("bf16", "number format of both", choices=PRECISIONS)
    compile: bool | None = recipe(None, "also compiled (default: on GPUs)")
    turns: int = option(3, "steps of each after the first, of which the median counts", at_least=1)


def main() -> None:
    chosen = parse(BenchmarkSettings, __doc__.split("\n")[0])
    device = chosen_device(chosen.measurement.device)
    if find_spec("torchvision") is None:
        print("left out: LPIPS, which the tokenizer is trained with, needs torchvision")
        return
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True  # as both trainers have it
    precision, size = chosen.mixed_precision, chosen.image_size
    images = torch.rand(chosen.batch_size, 3, size, size, device=device) * 2 - 1
    published = PublishedVQStep(VQ_models[chosen.vq_model](), random_lpips(PublishedLPIPS, device), device, precision)
    ways = {"published": lambda: published(images), "eager": step_here(chosen, images, device, False)}
    if device.type == "cuda" if chosen.compile is None else chosen.compile:
        ways["compiled"] = step_here(chosen, images, device, True)
    work = counted_flops(ways["eager"])
    peak = peak_flops(device_name(device)) if precision != "none" else None
    peak = peak or measured_speed(device, DTYPES[precision])[1]
    times = alternate(ways, device, chosen.turns)
    rates = {name: chosen.batch_size / statistics.median(values) for name, values in times.items()}
    rows = Rows(chosen.measurement.json, f"{describe(device)}; floor: {peak / 1e12:.2f} TFLOP/s")
    for name in list(ways)[1:]:
        what = f"tokenizer training {chosen.vq_model}, {size} px, batch {chosen.batch_size}, {precision}, {name}"
        rows.add(what, rates[name], "images/s", rates["published"], chosen.batch_size * peak / work)


def step_here(
    chosen: BenchmarkSettings, images: torch.Tensor, device: torch.device, compiled: bool
) -> Callable[[], object]:
    flags = ["--data-path", "", "--vq-model", chosen.vq_model, "--image-size", str(chosen.image_size)]
    flags += ["--mixed-precision", chosen.mixed_precision, "--compile" if compiled else "--no-compile"]
    training, world = parse(VQTrainSettings, "as trained", flags), World(0, 1, 0, device)
    tokenizer, _ = make_tokenizer(training, world)
    lpips = random_lpips(LPIPS, device).to(memory_format=torch.channels_last)
    if compiled:
        lpips.compile(dynamic=False)
    loss, scaler = VQLoss(training.loss, lpips, world), training.step.scaler(world)
    tokenizer.module.train()
    images = images.contiguous(memory_format=torch.channels_last)
    return lambda: train_step(training, tokenizer, None, loss, scaler, images, world)


def random_lpips(kind: type[LPIPS], device: torch.device) -> LPIPS:
    torch.manual_seed(1)
    return kind().to(device)


if __name__ == "__main__":
    run(main)
