"""Train a VQ tokenizer on a folder of images, as VQGAN does (arXiv 2012.09841).

bash scripts/tokenizer/train_vq.sh --data-path IMAGES --image-size 256 --vq-model VQ-16
"""

import torch
from torch import nn
from torch.nn import functional as F

from autoregressive.train.schedule import Plan
from dataset.code_dataset import BatchOrder
from dataset.crops import to_model_range
from dataset.image_batches import RandomViews, random_view_batches
from dataset.image_folder import ImageFolder, list_image_folder
from tokenizer.tokenizer_image.metrics import code_counts, code_usage
from tokenizer.tokenizer_image.vq_arguments import parse_args
from tokenizer.tokenizer_image.vq_loss import DISCRIMINATOR_LOSSES, VQLoss
from tokenizer.tokenizer_image.vq_setup import (
    check_flags,
    config_of,
    make_discriminator,
    make_loss,
    make_tokenizer,
    recipe_of,
    schedule_of,
)
from tokenizer.tokenizer_image.vq_validation import Validation
from utils.distributed import World, init_world
from utils.engine.parallel import autocast, sync_gradients
from utils.engine.run import TrainingRun
from utils.engine.state import Trained, seed_step
from utils.engine.step import apply_gradients
from utils.program import run


def main() -> None:
    args = parse_args()
    world = init_world()
    folder = list_image_folder(args.data_path)
    check_flags(args, world)
    plan = schedule_of(args, folder)
    if args.compile is None:
        args.compile = world.device.type == "cuda"
    tokenizer = make_tokenizer(args, world)
    discriminator = make_discriminator(args, plan, world)
    loss = make_loss(args, world)
    parts = [tokenizer] if discriminator is None else [tokenizer, discriminator]
    milestones = [plan.total_steps] if discriminator is None else [args.disc_start, plan.total_steps]
    training = TrainingRun(
        args, world, args.vq_model, recipe_of(args, folder), config_of(args), parts, milestones=milestones,
        scaler=torch.amp.GradScaler(world.device.type, enabled=args.mixed_precision == "fp16"),
    )  # fmt: skip
    train(args, plan, folder, tokenizer, discriminator, loss, training, world)
    checkpoint = training.finish()
    if world.is_main:
        _print_next_commands(args, checkpoint)
    world.close()


def train(
    args,
    plan: Plan,
    folder: ImageFolder,
    tokenizer: Trained,
    discriminator: Trained | None,
    loss: VQLoss,
    training: TrainingRun,
    world: World,
) -> None:
    """The method: reconstruct, compare, update; from `--disc-start` on, then let the discriminator learn, too."""
    start = training.start()
    scaler = training.scaler
    views = RandomViews(folder, args.image_size, args.global_seed, args.mirror)
    order = BatchOrder(len(folder), args.global_batch_size, world.rank, world.size, args.global_seed)
    batches = random_view_batches(views, order, start, args.num_workers, world)
    validation = Validation(args, tokenizer, bare(tokenizer), training, world) if args.val_data_path else None
    if validation is not None:
        validation.catch_up(start, plan.total_steps)
    tokenizer.module.train()
    for step, pixels in zip(range(start, plan.total_steps), training.metrics.timed(batches), strict=False):
        images = to_model_range(pixels.to(world.device, non_blocking=True))
        seed_step(args.global_seed, step, world.rank)
        judge = discriminator if discriminator is not None and step >= args.disc_start else None
        for part in (tokenizer, judge):
            for group in part.optimizer.param_groups if part else ():
                group["lr"] = plan.lr_at(step)
        terms, found_inf = train_step(args, tokenizer, judge, loss, scaler, images, world)
        if args.revive_dead_codes:
            count_codes(tokenizer, terms["codes"], world)
            if (step + 1) % args.revive_dead_codes == 0:
                revive_dead_codes(tokenizer, images, world)
        training.metrics.add(**terms)
        training.end_step(step + 1, _row_after(step, plan, args, training), found_inf)
        if validation is not None:
            validation.after_step(step, plan.total_steps)


def train_step(
    args, tokenizer: Trained, discriminator: Trained | None, loss: VQLoss, scaler, images: torch.Tensor, world: World
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One update of the tokenizer from (B, 3, H, W) images in [-1, 1], then, if given, one of the discriminator.

    Returns the losses' terms and the counts of the codes, to log, and 1.0 if an update was skipped.
    """
    last_weight = bare(tokenizer).decoder.conv_out.weight
    micro_batches = images.chunk(args.gradient_accumulation_steps)
    if discriminator is not None:
        discriminator.module.requires_grad_(False)
    totals, reconstructions = {}, []
    for number, batch in enumerate(micro_batches, 1):
        sync_gradients(tokenizer.module, number == len(micro_batches))
        with autocast(tokenizer.module, world, args.mixed_precision):
            reconstruction, quantizer, codes = tokenizer.module(batch)
            judge = bare(discriminator) if discriminator is not None else None
            total, terms = loss(batch, reconstruction, quantizer, judge, last_weight)
        scaler.scale(total / len(micro_batches)).backward()
        reconstructions.append(reconstruction.detach())
        terms = {name: term.detach() / len(micro_batches) for name, term in terms.items()}
        terms["codes"] = code_counts(codes, args.codebook_size)
        totals = {name: totals.get(name, 0) + term for name, term in terms.items()}
    totals["grad_norm"], found_inf = apply_gradients(tokenizer, scaler, args.max_grad_norm)
    if discriminator is not None:
        discriminator.module.requires_grad_(True)
        totals["discriminator"], disc_inf = _discriminator_step(
            args, discriminator, scaler, micro_batches, reconstructions, world
        )
        found_inf = torch.maximum(found_inf, disc_inf)
    return totals, found_inf


def _discriminator_step(args, discriminator: Trained, scaler, images, reconstructions, world: World):
    """One update from micro-batches of real images and their reconstructions; returns the loss and 1.0 if skipped."""
    mean = torch.zeros((), device=world.device)
    for number, (real, fake) in enumerate(zip(images, reconstructions, strict=True), 1):
        sync_gradients(discriminator.module, number == len(images))
        with autocast(discriminator.module, world, args.mixed_precision):
            logits = discriminator.module(torch.cat([real, fake.to(real.dtype)])).float()
        loss = DISCRIMINATOR_LOSSES[args.disc_loss](*logits.chunk(2)) / len(images)
        scaler.scale(loss).backward()
        mean += loss.detach()
    _, found_inf = apply_gradients(discriminator, scaler, args.max_grad_norm)
    return mean, found_inf


@torch.no_grad()
def count_codes(tokenizer: Trained, codes: torch.Tensor, world: World) -> None:
    """Add a step's counts, over all ranks, to the record of codes used since the last revival."""
    quantizer = bare(tokenizer).quantize
    quantizer.codebook_used[: len(codes)] += world.sum(codes.clone())


@torch.no_grad()
def revive_dead_codes(tokenizer: Trained, images: torch.Tensor, world: World) -> None:
    """Move codes that no image used since the last time onto encoder outputs of the main rank's `images`.

    Nothing waits for the device. Their moments start anew, and the average of the weights moves with them.
    """
    model = bare(tokenizer)
    weight = model.quantize.embedding.weight
    vectors = F.normalize(model.latent(images).float(), dim=1).permute(0, 2, 3, 1).flatten(0, 2)
    places = torch.arange(len(weight), device=vectors.device) % len(vectors)
    chosen = torch.randperm(len(vectors), device=vectors.device)[places]
    replacement = vectors[chosen]
    if world.size > 1:
        torch.distributed.broadcast(replacement, src=0)
    used = model.quantize.codebook_used[: len(weight)]
    dead = (used == 0).unsqueeze(1)
    weight.copy_(torch.where(dead, replacement, weight))
    for moment in ("exp_avg", "exp_avg_sq"):
        tokenizer.optimizer.state[weight][moment].masked_fill_(dead, 0)
    if tokenizer.ema is not None:
        place = next(i for i, parameter in enumerate(tokenizer.ema.parameters) if parameter is weight)
        average = tokenizer.ema.averages[place]
        average.copy_(torch.where(dead, replacement, average))
    used.zero_()


def bare(part: Trained) -> nn.Module:
    """The module without DDP around it."""
    return part.module.module if isinstance(part.module, nn.parallel.DistributedDataParallel) else part.module


def _row_after(step: int, plan: Plan, args, training: TrainingRun):
    """Completes a row of mean terms with where training stands, and shows it on the progress bar."""

    def complete(row: dict) -> dict:
        usage, perplexity = code_usage(training.metrics.totals["codes"])
        images_per_second = row.pop("steps_per_second") * args.global_batch_size
        row |= {
            "code_usage": usage, "perplexity": perplexity, "lr": plan.lr_at(step),
            "epoch": (step + 1) / plan.steps_per_epoch, "images_per_second": images_per_second,
        }  # fmt: skip
        seconds_left = (plan.total_steps - step - 1) * args.global_batch_size / images_per_second
        training.metrics.show(
            f"reconstruction {row['reconstruction']:.4f}, {usage:.0%} of the codes used, "
            f"{images_per_second:.0f} images/s, {seconds_left / 60:.1f} minutes left"
        )
        return row

    return complete


def _print_next_commands(args, checkpoint) -> None:
    flags = (f"--vq-ckpt {checkpoint} --vq-model {args.vq_model} --codebook-size {args.codebook_size} "
             f"--codebook-embed-dim {args.codebook_embed_dim} --image-size {args.image_size}")  # fmt: skip
    held_out = args.val_data_path or "HELD_OUT_IMAGES"
    print(f"trained: {checkpoint}\n"
          f"look: bash scripts/tokenizer/reconstruction_vq.sh --data-path {held_out} {flags}\n"
          f"next: bash scripts/autoregressive/extract_codes_c2i.sh --data-path {args.data_path} --code-path CODES "
          f"{flags}")  # fmt: skip


if __name__ == "__main__":
    run(main)
