"""What the tokenizer's trainer starts from: checked flags, schedule, models, optimizers, and what a run records."""

import torch
from torch import nn

from autoregressive.train.schedule import Plan, make_plan
from dataset.image_folder import ImageFolder
from pretrained_models.catalogue import load_initial
from tokenizer.tokenizer_image import lpips
from tokenizer.tokenizer_image.discriminator import PatchDiscriminator, smallest_image
from tokenizer.tokenizer_image.load import check_image_size
from tokenizer.tokenizer_image.lpips import load_lpips
from tokenizer.tokenizer_image.metrics import SSIM_WINDOW
from tokenizer.tokenizer_image.vq_loss import LossWeights, VQLoss
from tokenizer.tokenizer_image.vq_model import VQ_models, VQModel
from utils.distributed import World
from utils.engine.parallel import distribute
from utils.engine.state import EMA, Trained
from utils.engine.step import check_batch_size
from utils.program import UserError


def schedule_of(args, folder: ImageFolder) -> Plan:
    """The GPT trainer's schedule with a single level."""
    try:
        return make_plan(
            args.epochs, len(folder) // args.global_batch_size, patch_level=1, epoch_rate=0.5, grid=(1, 1), lr=args.lr,
            end_lr=args.end_lr, warmup_epochs=args.warmup_epochs, decay_ratio=args.decay_ratio,
            scheduler=args.scheduler,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"{error}.") from error


def check_flags(args, world: World) -> None:
    check_batch_size(args, world)
    for used, pixels, what, remedy in (
        (args.disc_weight > 0, smallest_image(args.disc_num_layers), "the discriminator judges", "--disc-weight 0"),
        (args.perceptual_weight > 0, lpips.SMALLEST_IMAGE, "LPIPS compares", "--perceptual-weight 0"),
        (args.val_data_path, SSIM_WINDOW, "SSIM compares", "no --val-data-path"),
    ):
        if used and args.image_size < pixels:
            raise UserError(f"{what} images of at least {pixels} pixels a side, not {args.image_size}; use {remedy}.")
    if not 0 <= args.dropout_p < 1:
        raise UserError(f"--dropout-p must be at least 0 and below 1, got {args.dropout_p}.")
    if args.disc_dim < 16 or args.disc_dim % 16:
        raise UserError(f"--disc-dim must be a multiple of 16, got {args.disc_dim}.")
    for name in ("codebook_size", "codebook_embed_dim", "val_every", "disc_num_layers"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}.")
    for name in ("disc_start", "disc_weight", "perceptual_weight", "revive_dead_codes"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} must not be negative, got {getattr(args, name)}.")


def make_tokenizer(args, world: World) -> Trained:
    torch.manual_seed(args.global_seed)
    model: VQModel = VQ_models[args.vq_model](
        codebook_size=args.codebook_size,
        codebook_embed_dim=args.codebook_embed_dim,
        commit_loss_beta=args.commit_loss_beta,
        entropy_loss_ratio=args.entropy_loss_ratio,
        dropout_p=args.dropout_p,
    )
    check_image_size(args.image_size, args.vq_model, model)
    if args.init_from:
        kind = load_initial(model, args.init_from, "check --vq-model, --codebook-size and --codebook-embed-dim.")
        if world.is_main:
            print(f"starting from the {kind} weights of {args.init_from}")
    model.quantize.codebook_used.zero_()
    model.to(world.device, memory_format=torch.channels_last)
    if args.compile:
        model.encoder.compile(dynamic=False)
        # The last layer stays out of the graph: the adaptive weight asks for its gradient alone.
        model.decoder.features = torch.compile(model.decoder.features, dynamic=False)
    module = distribute(model, world, "ddp", args.mixed_precision)
    return Trained(module, _adamw(args, module), EMA(module, args.ema_decay) if args.ema else None)


def make_discriminator(args, plan: Plan, world: World) -> Trained | None:
    if args.disc_weight == 0:
        return None
    if args.disc_start >= plan.total_steps:
        if world.is_main:
            print(f"no adversarial loss: --disc-start {args.disc_start:,} lies beyond the {plan.total_steps:,} steps")
        return None
    torch.manual_seed(args.global_seed + 1)
    model = PatchDiscriminator(args.disc_dim, args.disc_num_layers).to(world.device, memory_format=torch.channels_last)
    if args.compile:
        model.compile(dynamic=False)
    module = distribute(model, world, "ddp", args.mixed_precision)
    optimizer = _adamw(args, module)
    # A checkpoint taken before its start must restore what a run without that checkpoint has: nothing learned yet.
    for parameter in module.parameters():
        zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=world.device), **zeros}
    return Trained(module, optimizer, names=("discriminator", "optimizer_disc", "ema_disc"))


def make_loss(args, world: World) -> VQLoss:
    perceptual = None
    if args.perceptual_weight > 0:
        perceptual = load_lpips(args.lpips_vgg_path, args.lpips_linear_path, world)
        perceptual.to(memory_format=torch.channels_last)
        if args.compile:
            perceptual.compile(dynamic=False)
    weights = LossWeights(
        reconstruction=args.reconstruction_weight,
        perceptual=args.perceptual_weight,
        adversarial=args.disc_weight,
        codebook=args.codebook_weight,
        adaptive=args.disc_adaptive_weight,
    )
    return VQLoss(weights, args.reconstruction_loss, args.gen_loss, perceptual, world)


def _adamw(args, module: nn.Module) -> torch.optim.Optimizer:
    convolutions = [parameter for parameter in module.parameters() if parameter.dim() == 4]
    others = [parameter for parameter in module.parameters() if parameter.dim() != 4]  # norms, biases, the codebook
    groups = [{"params": convolutions, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), fused=True)


def recipe_of(args, folder: ImageFolder) -> dict:
    """Every setting that changes what is learned (the number of processes and how they share work do not)."""
    names = """vq_model codebook_size codebook_embed_dim dropout_p init_from ema ema_decay image_size mirror
        reconstruction_loss reconstruction_weight perceptual_weight codebook_weight commit_loss_beta entropy_loss_ratio
        disc_weight disc_start disc_dim disc_num_layers disc_loss gen_loss disc_adaptive_weight revive_dead_codes epochs
        global_batch_size lr scheduler warmup_epochs decay_ratio end_lr weight_decay beta1 beta2 max_grad_norm
        mixed_precision global_seed"""
    return {name: getattr(args, name) for name in names.split()} | {"images": len(folder)}


def config_of(args) -> dict:
    """What extraction and sampling check against their flags."""
    return {name: getattr(args, name) for name in ("vq_model", "codebook_size", "codebook_embed_dim", "image_size")}
