"""Training steps of the tokenizer: images/s compiled, not compiled, and by the published procedure in plain form.

    python -m benchmarks.tokenizer                                          VQ-16 at 64 px, for two CPU cores
    python -m benchmarks.tokenizer --image-size 256 --batch-size 16 --compile --mixed-precision bf16          a GPU

The baseline does before the discriminator's start what the published trainer does: float32 (TF32 on GPUs) in the
default memory format, all distances between vectors and codes at once with an entropy term of weight 0, and a
discriminator that judges and learns with weight 0. All have the same random weights, LPIPS's included, and take turns.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from tokenizer.base import QuantizerLosses
from tokenizer.tokenizer_image.lpips import LPIPS
from tokenizer.tokenizer_image.vq_loss import PatchDiscriminator, VQLoss, hinge_discriminator_loss
from tokenizer.tokenizer_image.vq_model import VectorQuantizer, VQ_models
from tokenizer.tokenizer_image.vq_setup import VQTrainSettings, make_tokenizer
from tokenizer.tokenizer_image.vq_train import train_step
from utils.distributed import World, init_world
from utils.precision import PRECISIONS
from utils.program import run
from utils.settings import parse, recipe, settings


@settings("benchmark")
class BenchmarkSettings:
    vq_model: str = recipe("VQ-16", "tokenizer", choices=VQ_models)
    image_size: int = recipe(64, "pixels per side", at_least=32)
    batch_size: int = recipe(2, "images per step", at_least=1)
    mixed_precision: str = recipe("none", "number format of the steps here", choices=PRECISIONS)
    compile: bool = recipe(False, "also compiled")
    repeats: int = recipe(3, "steps of each after the first", at_least=1)


def main() -> None:
    chosen = parse(BenchmarkSettings, __doc__.split("\n")[0])
    world = init_world()
    images = torch.rand(chosen.batch_size, 3, chosen.image_size, chosen.image_size, device=world.device) * 2 - 1
    steps = {"published procedure": plain_step(chosen, images, world), "here": step_here(chosen, images, world, False)}
    if chosen.compile:
        steps["here, compiled"] = step_here(chosen, images, world, True)
    seconds = {name: [] for name in steps}
    for repeat in range(chosen.repeats + 1):
        for name, step in steps.items():
            elapsed = timed(step, world)
            if repeat:  # the first one warms up and compiles
                seconds[name].append(elapsed)
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    setup = f"{chosen.image_size} px, {chosen.batch_size} images per step, {chosen.mixed_precision}, {device}"
    print(f"{chosen.vq_model}, {setup}")
    baseline = np.median(seconds["published procedure"])
    for name, values in seconds.items():
        median = np.median(values)
        print(f"{name:20} {chosen.batch_size / median:8.2f} images/s   {baseline / median:5.2f} times the baseline")


def step_here(chosen: BenchmarkSettings, images: torch.Tensor, world: World, compiled: bool) -> Callable[[], None]:
    flags = ["--data-path", "", "--vq-model", chosen.vq_model, "--image-size", str(chosen.image_size)]
    flags += ["--mixed-precision", chosen.mixed_precision, "--compile" if compiled else "--no-compile"]
    training = parse(VQTrainSettings, "as trained", flags)
    tokenizer, _ = make_tokenizer(training, world)
    lpips = random_lpips(world).to(memory_format=torch.channels_last)
    if compiled:
        lpips.compile(dynamic=False)
    loss = VQLoss(training.loss, lpips, world)
    scaler = training.step.scaler(world)
    images = images.contiguous(memory_format=torch.channels_last)
    return lambda: train_step(training, tokenizer, None, loss, scaler, images, world)


def plain_step(chosen: BenchmarkSettings, images: torch.Tensor, world: World) -> Callable[[], None]:
    torch.manual_seed(0)
    model = VQ_models[chosen.vq_model]()
    model.quantize = PlainQuantizer(model.config)
    model.to(world.device)
    discriminator, lpips = PatchDiscriminator().to(world.device), random_lpips(world)
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-4, betas=(0.9, 0.95)) for m in (model, discriminator)]

    def step() -> None:
        reconstruction, quantizer, _ = model(images)
        loss = F.mse_loss(reconstruction, images) + lpips(reconstruction, images).mean() + sum(quantizer)
        (loss - 0.0 * discriminator(reconstruction).mean()).backward()
        discriminator.zero_grad()
        real, fake = discriminator(images), discriminator(reconstruction.detach())
        (0.0 * hinge_discriminator_loss(real, fake)).backward()
        for optimizer in optimizers:
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
            optimizer.step()
            optimizer.zero_grad()
        loss.item()

    return step


class PlainQuantizer(VectorQuantizer):
    """All squared distances at once, their softmax for the entropy whatever its weight."""

    def forward(self, latent: torch.Tensor):
        unit = F.normalize(latent, dim=1)
        vectors, codebook = unit.permute(0, 2, 3, 1).flatten(0, 2), self.codebook
        distances = vectors.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * vectors @ codebook.t()
        indices = distances.argmin(dim=1)
        quantized = self.lookup(indices.view(latent.shape[0], *latent.shape[2:]))
        losses = QuantizerLosses(
            codebook=F.mse_loss(quantized, unit.detach()),
            commitment=self.beta * F.mse_loss(unit, quantized.detach()),
            entropy=0.0 * self.entropy_loss(unit),
        )
        return unit + (quantized - unit).detach(), losses, indices


def random_lpips(world: World) -> LPIPS:
    torch.manual_seed(1)
    return LPIPS().to(world.device)


def timed(step: Callable[[], None], world: World) -> float:
    started = time.perf_counter()
    step()
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    run(main)
