"""Flags of the tokenizer's trainer: the published names and defaults of what it offers, and a few of its own."""

import argparse

from tokenizer.tokenizer_image.vq_loss import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES, RECONSTRUCTION_LOSSES
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils.engine.parallel import PRECISIONS
from utils.engine.run import add_run_arguments


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a VQ tokenizer on a folder of images (VQGAN losses).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_model_arguments(parser.add_argument_group("model"))
    _add_data_arguments(parser.add_argument_group("data"))
    _add_loss_arguments(parser.add_argument_group("loss"))
    _add_recipe_arguments(parser.add_argument_group("recipe"))
    _add_machine_arguments(parser.add_argument_group("machine"))
    add_run_arguments(parser, ckpt_every=5000)
    parser.set_defaults(results_dir="results_tokenizer_image")
    args = parser.parse_args(arguments)
    if args.vq_ckpt is not None:
        if args.resume != "auto" or args.init_from:
            parser.error("--vq-ckpt stands for --resume, or with --finetune for --init-from; give one of them")
        if args.finetune:
            args.init_from = args.vq_ckpt
        else:
            args.resume = args.vq_ckpt
    elif args.finetune:
        parser.error("--finetune needs --vq-ckpt, the weights to start from")
    return args


def _add_model_arguments(group) -> None:
    group.add_argument("--vq-model", choices=VQ_models, default="VQ-16", help="architecture; the number is the pixels "
                       "a side that one code covers (VQ-Tiny: 4)")  # fmt: skip
    group.add_argument("--codebook-size", type=int, default=16384, help="number of codes")
    group.add_argument("--codebook-embed-dim", type=int, default=8, help="length of a code's vector")
    group.add_argument("--dropout-p", type=float, default=0.0, help="dropout inside the residual blocks")
    group.add_argument("--vq-ckpt", help="training checkpoint to continue from (the same as --resume PATH)")
    group.add_argument("--finetune", action="store_true", help="take only the weights of --vq-ckpt")
    group.add_argument("--init-from", "--finetune-from", help="start from these weights alone: a published file or any "
                       "checkpoint (its averaged weights, where it has them)")  # fmt: skip
    group.add_argument("--ema", action="store_true", help="keep an exponential moving average of the weights")
    group.add_argument("--ema-decay", type=float, default=0.9999, help="of --ema, a step")


def _add_data_arguments(group) -> None:
    group.add_argument("--data-path", required=True, help="image folder: one folder per class")
    group.add_argument("--dataset", choices=["imagenet"], default="imagenet", help="accepted as published: any folder "
                       "of classes")  # fmt: skip
    group.add_argument("--val-data-path", help="image folder of held-out images: PSNR and SSIM while training")
    group.add_argument("--val-every", type=int, default=5000, help="steps between validations")
    group.add_argument("--image-size", type=int, default=256, help="pixels a side of the random crops")
    group.add_argument("--mirror", action=argparse.BooleanOptionalAction, default=True, help="mirror half of the "
                       "crops; not for digits or text")  # fmt: skip
    group.add_argument("--num-workers", type=int, default=16, help="decoding processes a rank, at most its share of "
                       "the cores; 0: none")  # fmt: skip


def _add_loss_arguments(group) -> None:
    add = group.add_argument
    add("--reconstruction-loss", choices=RECONSTRUCTION_LOSSES, default="l2", help="on pixels in [-1, 1]")
    add("--reconstruction-weight", type=float, default=1.0, help="its weight")
    add("--perceptual-weight", type=float, default=1.0, help="weight of LPIPS; 0 needs none of its weights")
    add("--lpips-vgg-path", help="torchvision's VGG-16 weights; default: fetched once, 528 MB")
    add("--lpips-linear-path", help="LPIPS 0.1's linear layers for VGG; default: fetched once, 7 KB")
    add("--codebook-weight", type=float, default=1.0, help="weight of the codebook loss")
    add("--commit-loss-beta", type=float, default=0.25, help="weight of the commitment loss")
    add("--entropy-loss-ratio", type=float, default=0.0, help="weight of the entropy term; not computed at 0")
    add("--disc-weight", type=float, default=0.5, help="weight of the adversarial loss; 0: no discriminator")
    add("--disc-start", type=int, default=20000, help="step at which the discriminator starts, to judge and to learn")
    add("--disc-type", choices=["patchgan"], default="patchgan", help="the discriminator")
    add("--disc-dim", type=int, default=64, help="its channels after the first layer, a multiple of 16")
    add("--disc-num-layers", type=int, default=3, help="its layers that widen; each more doubles the patches judged")
    add("--disc-loss", choices=DISCRIMINATOR_LOSSES, default="hinge", help="the discriminator's loss")
    add("--gen-loss", choices=GENERATOR_LOSSES, default="hinge", help="the tokenizer's adversarial loss")
    add("--disc-adaptive-weight", action="store_true", help="scale the adversarial loss so that its gradient at the "
        "last layer is as large as the others'")  # fmt: skip
    add("--revive-dead-codes", type=int, metavar="STEPS", default=0, help="every STEPS steps, move codes unused since "
        "onto vectors of the current batch; 0: never")  # fmt: skip


def _add_recipe_arguments(group) -> None:
    add = group.add_argument
    add("--epochs", type=int, default=40, help="passes over the images")
    add("--global-batch-size", type=int, default=128, help="images a step, over all processes")
    add("--gradient-accumulation-steps", type=int, default=1, help="micro-batches a step and process")
    add("--lr", type=float, default=1e-4, help="learning rate, of tokenizer and discriminator")
    add("--scheduler", action="store_true", help="warm-up, constant part, linear decay; else the rate is constant")
    add("--warmup-epochs", type=float, default=1, help="linear warm-up")
    add("--decay-ratio", type=float, default=0.2, help="share of training that decays to --end-lr")
    add("--end-lr", type=float, default=1e-5, help="learning rate at the end")
    add("--weight-decay", type=float, default=0.0, help="AdamW's, on convolutions (the published recipe's 0.05 was "
        "never applied)")  # fmt: skip
    add("--beta1", type=float, default=0.9, help="AdamW's")
    add("--beta2", type=float, default=0.95, help="AdamW's")
    add("--max-grad-norm", type=float, default=1.0, help="gradients are clipped to it; 0: not clipped")
    add("--mixed-precision", choices=PRECISIONS, default="bf16", help="of convolutions")
    add("--global-seed", type=int, default=0, help="seed of initial weights, order and crops")


def _add_machine_arguments(group) -> None:
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="compile encoder, "
                       "decoder, discriminator and LPIPS; default: on GPUs only")  # fmt: skip
