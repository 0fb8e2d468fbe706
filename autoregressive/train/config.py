"""Flags of the GPT trainer: the published names and defaults, and a few of its own."""

import argparse

from autoregressive.models.gpt import GPT_SIZES
from autoregressive.train.monitor import add_watch_arguments
from utils.engine.parallel import PRECISIONS
from utils.engine.run import add_run_arguments
from utils.program import UserError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a GPT on image codes, coarse to fine (Next Patch Prediction).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_model_arguments(parser.add_argument_group("model"))
    _add_data_arguments(parser.add_argument_group("data"))
    _add_recipe_arguments(parser.add_argument_group("recipe"))
    _add_machine_arguments(parser.add_argument_group("machine"))
    add_watch_arguments(parser)
    add_run_arguments(parser, ckpt_every=250_000)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and its cost, and stop (without "
                        "--code-path: for ImageNet's images)")  # fmt: skip
    args = parser.parse_args()
    if args.code_path is None and not args.dry_run:
        parser.error("the following arguments are required: --code-path")
    _check_ranges(args)
    if args.gpt_ckpt is not None:
        if args.resume != "auto":
            parser.error("--gpt-ckpt and --resume mean the same; give one of them")
        args.resume = args.gpt_ckpt
    return args


def _add_model_arguments(group) -> None:
    group.add_argument("--gpt-model", choices=GPT_SIZES, default="GPT-B", help="size of the transformer")
    group.add_argument("--gpt-ckpt", help="training checkpoint to continue from (the same as --resume PATH)")
    group.add_argument("--init-from", help="start from these weights alone: a published file or any checkpoint")
    group.add_argument("--gpt-type", choices=["c2i"], default="c2i", help="class-conditional")
    group.add_argument("--vocab-size", type=int, default=16384, help="size of the tokenizer's codebook")
    group.add_argument("--cls-token-num", type=int, choices=[1], default=1, help="class tokens before the codes")
    group.add_argument("--dropout-p", type=float, default=0.1, help="dropout of attention's and feed-forward's outputs")
    group.add_argument("--token-dropout-p", type=float, default=0.1, help="dropout of the embeddings")
    group.add_argument("--drop-path-rate", type=float, default=0.0, help="stochastic depth of the last layer")
    group.add_argument("--class-dropout-p", type=float, default=0.1, help="share of labels replaced by the null class; "
                       "0 leaves a model without classifier-free guidance")  # fmt: skip
    group.add_argument("--ema", action="store_true", help="keep an exponential moving average of the weights")
    group.add_argument("--ema-decay", type=float, default=0.9999, help="of --ema, a step")


def _add_data_arguments(group) -> None:
    group.add_argument("--code-path", help="folder given to extract_codes_c2i.sh")
    group.add_argument("--code-path-105", help="folder of the same images at crop range 1.05, mixed in half and half; "
                       "default: --code-path with ten_crop replaced by ten_crop_105, if that exists")  # fmt: skip
    group.add_argument("--dataset", default="imagenet_code", help="name given at extraction; _code at its end is cut")
    group.add_argument("--image-size", type=int, default=256, help="pixels a side, as at extraction")
    group.add_argument("--downsample-size", type=int, default=16, help="pixels a side of one code")
    group.add_argument("--num-classes", type=int, default=1000, help="classes of the data")
    group.add_argument("--num-workers", type=int, default=24, help="accepted for published commands; codes come from a "
                       "memory map, one thread a process is enough")  # fmt: skip
    group.add_argument(
        "--codes-on-device", action="store_true", help="keep all codes in device memory (ImageNet: 6.6 GB)"
    )


def _add_recipe_arguments(group) -> None:
    group.add_argument("--epochs", type=int, default=300, help="passes over the images, all levels together")
    group.add_argument("--patch-level", type=int, default=2, help="levels of patch sides 2^(L-1) … 2, 1")
    group.add_argument(
        "--epoch-rate", type=float, default=0.5, help="each level ends at this share of the next one's end"
    )
    group.add_argument("--global-batch-size", type=int, default=256, help="images a step, over all processes")
    group.add_argument("--gradient-accumulation-steps", type=int, default=1, help="micro-batches a step and process")
    group.add_argument("--lr", type=float, default=1e-4, help="learning rate")
    group.add_argument("--scheduler", action="store_true", help="warm-up, constant part, linear decay in each level; "
                       "without it the rate is constant")  # fmt: skip
    group.add_argument("--warmup-epochs", type=float, default=1, help="linear warm-up of each level")
    group.add_argument("--decay-ratio", type=float, default=0.2, help="share of each level that decays to --end-lr")
    group.add_argument("--end-lr", type=float, default=1e-5, help="learning rate at each level's end")
    group.add_argument("--weight-decay", type=float, default=5e-2, help="AdamW's, on matrices only")
    group.add_argument("--beta1", type=float, default=0.9, help="AdamW's")
    group.add_argument("--beta2", type=float, default=0.95, help="AdamW's")
    group.add_argument("--max-grad-norm", type=float, default=1.0, help="gradients are clipped to it; 0: not clipped")
    group.add_argument("--mixed-precision", choices=PRECISIONS, default="bf16", help="of matrix products")
    group.add_argument("--global-seed", type=int, default=0, help="seed of initial weights, order, crops and dropout")


def _add_machine_arguments(group) -> None:
    group.add_argument(
        "--parallel", choices=["ddp", "fsdp"], default="ddp", help="replicas, or weights sharded over all"
    )
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="compile each layer; "
                       "default: on GPUs only")  # fmt: skip
    group.add_argument("--activation-checkpointing", action="store_true", help="recompute layers in backward: less "
                       "memory, about a third more compute")  # fmt: skip


def _check_ranges(args: argparse.Namespace) -> None:
    at_least_one = ("vocab_size", "image_size", "downsample_size", "num_classes", "global_batch_size",
                    "gradient_accumulation_steps", "val_every", "sample_every")  # fmt: skip
    probabilities = ("dropout_p", "token_dropout_p", "drop_path_rate", "class_dropout_p", "beta1", "beta2", "ema_decay")
    not_negative = ("lr", "end_lr", "weight_decay", "max_grad_norm")
    for names, right, range_ in (
        (at_least_one, lambda value: value >= 1, "at least 1"),
        (probabilities, lambda value: 0 <= value < 1, "in [0, 1)"),
        (not_negative, lambda value: value >= 0, "0 or more"),
    ):
        for name in names:
            if not right(getattr(args, name)):
                raise UserError(f"--{name.replace('_', '-')} must be {range_}, got {getattr(args, name)}.")
