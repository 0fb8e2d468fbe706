"""How many codes stay the same when the encoder computes less exactly than float32, one image at a time.

    python -m benchmarks.code_precision --data-path IMAGES --vq-ckpt vq_ds16_c2i.pt --image-size 256

Rows: many images a batch (float32), TF32 and bf16, each with the share of codes equal to the reference's, and, where
they differ, how much further the chosen code is from the latent (cosine). Without --vq-ckpt the weights are random.
On a CPU, which has no TF32, it is imitated by rounding what enters each convolution to TF32's 10 bits of mantissa.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from dataset.crops import center_crop, cut_crops, enlarged_size, to_model_range
from dataset.image_folder import list_image_folder, load_rgb
from tokenizer.tokenizer_image.load import build_tokenizer
from tokenizer.tokenizer_image.vq_model import VQ_models, VQModel
from utils.distributed import init_world
from utils.program import keep_memory_between_steps


def main() -> None:
    args = parse_args()
    keep_memory_between_steps()
    device = init_world().device
    torch.manual_seed(0)
    settings = {"codebook_size": args.codebook_size, "codebook_embed_dim": args.codebook_embed_dim}
    if args.vq_ckpt:
        model, _ = build_tokenizer(args.vq_model, *settings.values(), args.vq_ckpt, device=device)
    else:
        model = VQ_models[args.vq_model](**settings).eval().requires_grad_(False).to(device)
    views = load_views(args, device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    reference = torch.cat([model.latent(one) for one in views.split(1)])
    print(f"{len(views)} crops, {reference[0, 0].numel()} codes each, "
          f"{len(model.quantize.nearest(reference).unique()):,} different codes")  # fmt: skip
    model = model.to(memory_format=torch.channels_last)
    views = views.contiguous(memory_format=torch.channels_last)
    report("float32, batched", model, reference, model.latent(views))
    with tf32_convolutions(model, device):
        report("TF32, batched", model, reference, model.latent(views))
    with torch.autocast(device.type, torch.bfloat16):
        report("bf16, batched", model, reference, model.latent(views))


def load_views(args: argparse.Namespace, device: torch.device) -> torch.Tensor:
    """(N, 3, S, S): the upright and mirrored centre crops of the ten, of images spread over the folder."""
    folder = list_image_folder(args.data_path)
    side = enlarged_size(args.image_size, 10, 1.1)
    images = np.unique(np.linspace(0, len(folder) - 1, args.images).astype(int))
    squares = np.stack([center_crop(load_rgb(folder.path(image)), side) for image in images])
    return to_model_range(cut_crops(torch.from_numpy(squares).to(device), args.image_size, 10)[:, [4, 9]].flatten(0, 1))


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
    hooks = [convolution.register_forward_pre_hook(lambda _, inputs: (round_to_tf32(inputs[0]),))
             for convolution in convolutions]  # fmt: skip
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


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data-path", type=Path, required=True, help="image folder")
    add("--vq-ckpt", type=Path, help="the tokenizer's checkpoint; random weights without")
    add("--vq-model", default="VQ-16", choices=VQ_models, help="tokenizer")
    add("--codebook-size", type=int, default=16384, help="number of codes")
    add("--codebook-embed-dim", type=int, default=8, help="width of a code's vector")
    add("--image-size", type=int, default=128, help="pixels of a crop's side")
    add("--images", type=int, default=8, help="images, of which two crops each are encoded")
    return parser.parse_args()


if __name__ == "__main__":
    with torch.no_grad():
        main()
