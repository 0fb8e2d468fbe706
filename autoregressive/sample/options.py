"""The flags that both samplers share: the two models and how codes are drawn."""

import argparse

import torch

from autoregressive.models.generate import Sampling
from autoregressive.models.gpt import GPT_models
from autoregressive.models.guidance import SCHEDULES
from autoregressive.sample.seeds import MAX_SEED
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils.checkpoint import WEIGHTS_CHOICES
from utils.program import UserError

DTYPES = {"none": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("models")
    group.add_argument("--gpt-model", choices=list(GPT_models), default="GPT-B", help="size of the GPT")
    group.add_argument(
        "--gpt-ckpt", required=True, help="its checkpoint: a path, or a name of pretrained_models/README.md"
    )
    group.add_argument("--gpt-type", choices=["c2i"], default="c2i", help="class-conditional generation")
    group.add_argument("--from-fsdp", action="store_true",
                       help="insist that the GPT's file is a bare state dict (one is recognised without this flag); "
                            "names the result after the file's folder")  # fmt: skip
    group.add_argument("--cls-token-num", type=int, choices=[1], default=1, help="positions of the class embedding")
    group.add_argument(
        "--vq-model", choices=list(VQ_models), default="VQ-16", help="tokenizer that the GPT's codes are of"
    )
    group.add_argument(
        "--vq-ckpt", required=True, help="its checkpoint: a path, or a name of pretrained_models/README.md"
    )
    group.add_argument("--codebook-size", type=int, default=16384, help="codes in the tokenizer's codebook")
    group.add_argument("--codebook-embed-dim", type=int, default=8, help="dimension of the codebook's vectors")
    group.add_argument("--weights", choices=WEIGHTS_CHOICES, default="auto",
                       help="averaged or raw weights of the GPT; auto: ema where the file has them")  # fmt: skip
    group.add_argument("--vq-weights", choices=WEIGHTS_CHOICES, default="auto", help="the same for the tokenizer")
    group.add_argument("--image-size", type=int, default=384, help="pixels a side that the GPT was trained on")
    group.add_argument("--downsample-size", type=int, default=16, help="pixels a side of one code")
    group.add_argument("--num-classes", type=int, default=1000, help="classes that the GPT was trained on")
    group.add_argument("--precision", choices=list(DTYPES), default=None,
                       help="number format of both; none: float32; unset: bf16 on GPUs, none on CPUs")  # fmt: skip
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                       help="compile the models; unset: on GPUs (where CUDA graphs are used either way)")  # fmt: skip


def add_sampling_options(parser: argparse.ArgumentParser, cfg_scale: float, top_k: int) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--cfg-scale", type=float, default=cfg_scale, help="classifier-free guidance, 1: none")
    group.add_argument("--cfg-interval", type=int, default=-1,
                       help="n > -1: tokens after the first n + 2 are not guided")  # fmt: skip
    group.add_argument("--cfg-schedule", choices=SCHEDULES, default="constant",
                       help="guidance over the tokens: constant, or rising to --cfg-scale")  # fmt: skip
    group.add_argument("--cfg-power", type=float, default=1.0, help="power of the power-cosine schedule")
    group.add_argument("--temperature", type=float, default=1.0, help="logits are divided by it")
    group.add_argument("--top-k", type=int, default=top_k, help="draw from the k likeliest codes, 0: all")
    group.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest codes up to this probability")


def sampling_of(args: argparse.Namespace) -> Sampling:
    names = ("cfg_scale", "cfg_interval", "cfg_schedule", "cfg_power", "temperature", "top_k", "top_p")
    try:
        return Sampling(**{name: getattr(args, name) for name in names})
    except ValueError as error:
        name, rest = str(error).split(" ", 1)
        raise UserError(f"--{name.replace('_', '-')} {rest}.") from error


def check_options(args: argparse.Namespace) -> None:
    """Refuse what no model could satisfy, and settle the defaults that depend on the device."""
    if args.image_size < 1 or args.downsample_size < 1 or args.image_size % args.downsample_size:
        raise UserError(
            f"--image-size {args.image_size} is not a multiple of --downsample-size {args.downsample_size}."
        )
    if args.num_classes < 1:
        raise UserError(f"--num-classes {args.num_classes} must be at least 1.")
    if not 0 <= args.seed <= MAX_SEED:
        raise UserError(f"the seed {args.seed} must lie in 0..2**64-1.")
    on_gpu = torch.cuda.is_available()
    args.precision = args.precision or ("bf16" if on_gpu else "none")
    args.compile = on_gpu if args.compile is None else args.compile
