"""How many codes stay the same when the encoder computes less exactly than float32, one image at a time.

    python -m benchmarks.code_precision --data-path IMAGES --vq-ckpt vq_ds16_c2i.pt --image-size 256

Rows: many images a batch (float32), TF32 and bf16, each with the share of codes equal to the reference's, and, where
they differ, how much further the chosen code is from the latent (cosine). Without --vq-ckpt the weights are random.
On a CPU, which has no TF32, it is imitated by rounding what enters each convolution to TF32's 10 bits of mantissa.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from dataset.crops import center_crop, cut_crops, enlarged_size, to_model_range
from dataset.image_folder import list_image_folder, load_rgb
from tokenizer.tokenizer_image.load import (
    DEFAULT_TOKENIZER,
    TokenizerSettings,
    build_tokenizer,
    given_sizes,
    new_tokenizer,
)
from tokenizer.tokenizer_image.vq_model import VQModel
from utils.distributed import init_world
from utils.program import run
from utils.settings import REQUIRED, parse, recipe, settings, with_defaults


@settings("benchmark")
class BenchmarkSettings:
    tokenizer: with_defaults(TokenizerSettings, vq_ckpt=None)
    data_path: str = recipe(REQUIRED, "image folder")
    image_size: int = recipe(128, "pixels per side of a crop", at_least=16)
    images: int = recipe(8, "images, of which two crops each are encoded", at_least=1)


@torch.no_grad()
def main() -> None:
    chosen = parse(BenchmarkSettings, __doc__.split("\n")[0])
    device = init_world().device
    torch.manual_seed(0)
    if chosen.tokenizer.vq_ckpt:
        model, _ = build_tokenizer(chosen.tokenizer, device)
    else:
        name = chosen.tokenizer.vq_model or DEFAULT_TOKENIZER
        model = new_tokenizer(name, **given_sizes(chosen.tokenizer))[0].eval().to(device)
    views = load_views(chosen, device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    reference = torch.cat([model.latent(one) for one in views.split(1)])
    used = len(model.quantize.nearest(reference).unique())
    print(f"{len(views)} crops, {reference[0, 0].numel()} codes each, {used:,} different codes")
    model = model.to(memory_format=torch.channels_last)
    views = views.contiguous(memory_format=torch.channels_last)
    report("float32, batched", model, reference, model.latent(views))
    with tf32_convolutions(model, device):
        report("TF32, batched", model, reference, model.latent(views))
    with torch.autocast(device.type, torch.bfloat16):
        report("bf16, batched", model, reference, model.latent(views))


def load_views(chosen: BenchmarkSettings, device: torch.device) -> torch.Tensor:
    """(N, 3, S, S): the upright and mirrored centre crops of the ten, of images spread over the folder."""
    folder = list_image_folder(chosen.data_path)
    side = enlarged_size(chosen.image_size, 10, 1.1)
    images = np.unique(np.linspace(0, len(folder) - 1, chosen.images).astype(int))
    squares = np.stack([center_crop(load_rgb(folder.path(image)), side) for image in images])
    crops = cut_crops(torch.from_numpy(squares).to(device), chosen.image_size, 10)
    return to_model_range(crops[:, [4, 9]].flatten(0, 1))


def report(name: str, model: VQModel, reference: torch.Tensor, latent: torch.Tensor) -> None:
    expected, codes = model.quantize.nearest(reference), model.quantize.nearest(latent)
    different = expected != codes
    unit = F.normalize(reference.float(), dim=1).permute(0, 2, 3, 1)[different]
    codebook = model.quantize.codebook
    loss = ((unit * codebook[expected[different]]).sum(-1) - (unit * codebook[codes[different]]).sum(-1)).float()
    further = f", those that differ are further by {loss.mean():.1e} (cosine)" if len(loss) else ""
    print(f"{name:>17}: {1 - different.float().mean().item():9.4%} of the codes are equal{further}")


@contextmanager
def tf32_convolutions(model: VQModel, device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = True
        yield
        torch.backends.cudnn.allow_tf32 = False
        return
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    exact = [convolution.weight.clone() for convolution in convolutions]
    rounded = lambda _, inputs: (round_to_tf32(inputs[0]),)  # noqa: E731
    hooks = [convolution.register_forward_pre_hook(rounded) for convolution in convolutions]
    for convolution in convolutions:
        convolution.weight.data.copy_(round_to_tf32(convolution.weight))
    yield
    for hook, convolution, weight in zip(hooks, convolutions, exact, strict=True):
        hook.remove()
        convolution.weight.data.copy_(weight)


def round_to_tf32(values: torch.Tensor) -> torch.Tensor:
    """Round float32 to nearest with 10 bits of mantissa: drop the lowest 13 of its 23, after adding half of that."""
    bits = values.detach().clone().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


if __name__ == "__main__":
    run(main)
