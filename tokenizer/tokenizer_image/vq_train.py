"""Train a VQ tokenizer on a folder of images, as VQGAN does (arXiv 2012.09841).

bash scripts/tokenizer/train_vq.sh --data-path IMAGES --image-size 256 --vq-model VQ-16
"""

import re
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from dataset.crops import to_model_range
from dataset.image_batches import RandomViews, center_crop_batches, random_view_batches
from dataset.image_folder import ImageFolder, list_image_folder
from dataset.order import BatchOrder
from tokenizer.tokenizer_image.metrics import ReconstructionScores, code_counts, code_usage
from tokenizer.tokenizer_image.vq_loss import DISCRIMINATOR_LOSSES, VQLoss
from tokenizer.tokenizer_image.vq_model import to_uint8
from tokenizer.tokenizer_image.vq_setup import (
    VQTrainSettings,
    config_of,
    content_of,
    data_of,
    make_discriminator,
    make_loss,
    make_tokenizer,
)
from utils.commands import absolute_component, command
from utils.component import is_component, short_name
from utils.distributed import World, init_world
from utils.engine.learning_rate import LearningRate
from utils.engine.parallel import autocast, bare, sync_gradients
from utils.engine.periodic import Periodic
from utils.engine.run import TrainingRun
from utils.engine.state import Trained, seed_step
from utils.engine.step import apply_gradients, set_learning_rate
from utils.program import run
from utils.settings import parse

PICTURE_IMAGES = 8


def main() -> None:
    settings = parse(VQTrainSettings, "Train a VQ tokenizer on a folder of images (VQGAN losses).")
    world = init_world()
    settings.step.micro_batch(world)  # refuse one that does not divide before anything is made
    folder = list_image_folder(settings.data.data_path)
    rate = settings.schedule(folder)
    (total_steps,) = rate.stages
    tokenizer, identity = make_tokenizer(settings, world)
    discriminator = make_discriminator(settings, total_steps, world)
    loss = make_loss(settings, world)
    training = TrainingRun(
        settings.continued_run,
        program=settings,
        world=world,
        model_name=short_name(settings.model.vq_model),
        data=data_of(settings, tokenizer, identity, folder),
        content=content_of(settings, folder),
        config=config_of(settings, tokenizer, identity),
        parts=[tokenizer] if discriminator is None else [tokenizer, discriminator],
        milestones=[total_steps] if discriminator is None else [settings.loss.disc_start, total_steps],
        scaler=settings.step.scaler(world),
    )
    train(settings, rate, folder, tokenizer, discriminator, loss, training, world)
    checkpoint = training.finish()
    if world.is_main:
        _print_next_commands(settings, checkpoint)
    world.close()


def train(
    settings: VQTrainSettings,
    rate: LearningRate,
    folder: ImageFolder,
    tokenizer: Trained,
    discriminator: Trained | None,
    loss: VQLoss,
    training: TrainingRun,
    world: World,
) -> None:
    """The method: reconstruct, compare, update; from `--disc-start` on, then let the discriminator learn, too."""
    data, seed, revive_every = settings.data, settings.step.global_seed, settings.model.revive_dead_codes
    held_out = list_image_folder(data.val_data_path) if data.val_data_path else None
    start = training.start()
    views = RandomViews(folder, data.image_size, seed, data.mirror)
    order = BatchOrder(len(folder), settings.step.global_batch_size, world.rank, world.size, seed)
    batches = random_view_batches(views, order, start, data.num_workers, world)
    validation = None
    if held_out is not None:
        work = Validation(settings, held_out, tokenizer, training, world)
        validation = Periodic(data.val_every, training.total_steps, work.validate, work.is_done, world)
        validation.catch_up(start)
    tokenizer.module.train()
    for step, pixels in zip(range(start, training.total_steps), training.metrics.timed(batches), strict=False):
        images = to_model_range(pixels.to(world.device, non_blocking=True))
        seed_step(seed, step, world.rank)
        judge = discriminator if discriminator is not None and step >= settings.loss.disc_start else None
        for part in (tokenizer, judge):
            if part is not None:
                set_learning_rate(part.optimizer, rate.at(step))
        terms, found_inf = train_step(settings, tokenizer, judge, loss, training.scaler, images, world)
        if revive_every:
            count_codes(tokenizer, terms["codes"], world)
            if (step + 1) % revive_every == 0:
                revive_dead_codes(tokenizer, images, world)
        training.metrics.add(**terms)
        training.end_step(step + 1, partial(complete_row, step, rate, settings, training), found_inf)
        if validation is not None:
            validation.after_step(step + 1)


def train_step(
    settings: VQTrainSettings,
    tokenizer: Trained,
    discriminator: Trained | None,
    loss: VQLoss,
    scaler: torch.amp.GradScaler,
    images: torch.Tensor,
    world: World,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One update of the tokenizer from (B, 3, H, W) images in [-1, 1], then, if given, one of the discriminator.

    Returns the losses' terms and the counts of the codes, to log, and 1.0 if an update was skipped.
    """
    model = bare(tokenizer.module)
    judge = bare(discriminator.module) if discriminator is not None else None
    micro_batches = images.chunk(settings.step.gradient_accumulation_steps)
    if judge is not None:
        judge.requires_grad_(False)
    totals, reconstructions = {}, []
    for number, batch in enumerate(micro_batches, 1):
        sync_gradients(tokenizer.module, number == len(micro_batches))
        with autocast(tokenizer.module, world, settings.step.mixed_precision):
            reconstruction, quantizer, codes = tokenizer.module(batch)
            total, terms = loss(batch, reconstruction, quantizer, judge, model.last_layer)
        scaler.scale(total / len(micro_batches)).backward()
        reconstructions.append(reconstruction.detach())
        terms = {name: term.detach() / len(micro_batches) for name, term in terms.items()}
        terms["codes"] = code_counts(codes, model.codebook_size)
        totals = {name: totals.get(name, 0) + term for name, term in terms.items()}
    totals["grad_norm"], found_inf = apply_gradients(tokenizer, scaler, settings.step.max_grad_norm)
    if discriminator is not None:
        judge.requires_grad_(True)
        totals["discriminator"], disc_inf = _discriminator_step(
            settings, discriminator, scaler, micro_batches, reconstructions, world
        )
        found_inf = torch.maximum(found_inf, disc_inf)
    return totals, found_inf


def _discriminator_step(
    settings: VQTrainSettings,
    discriminator: Trained,
    scaler: torch.amp.GradScaler,
    images,
    reconstructions,
    world: World,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One update from micro-batches of real images and their reconstructions; returns the loss and 1.0 if skipped."""
    mean = torch.zeros((), device=world.device)
    for number, (real, fake) in enumerate(zip(images, reconstructions, strict=True), 1):
        sync_gradients(discriminator.module, number == len(images))
        with autocast(discriminator.module, world, settings.step.mixed_precision):
            logits = discriminator.module(torch.cat([real, fake.to(real.dtype)])).float()
        loss = DISCRIMINATOR_LOSSES[settings.loss.disc_loss](*logits.chunk(2)) / len(images)
        scaler.scale(loss).backward()
        mean += loss.detach()
    _, found_inf = apply_gradients(discriminator, scaler, settings.step.max_grad_norm)
    return mean, found_inf


@torch.no_grad()
def count_codes(tokenizer: Trained, codes: torch.Tensor, world: World) -> None:
    """Add a step's counts, over all ranks, to the record of codes used since the last revival."""
    quantizer = bare(tokenizer.module).quantize
    quantizer.codebook_used[: len(codes)] += world.sum(codes.clone())


@torch.no_grad()
def revive_dead_codes(tokenizer: Trained, images: torch.Tensor, world: World) -> None:
    """Move codes that no image used since the last time onto encoder outputs of the main rank's `images`.

    Nothing waits for the device. Their moments start anew, and the average of the weights moves with them.
    """
    model = bare(tokenizer.module)
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


def complete_row(
    step: int, rate: LearningRate, settings: VQTrainSettings, training: TrainingRun, row: dict[str, float]
) -> dict[str, float]:
    """`row`, mean terms, and where training stands after `step`; shown on the progress bar."""
    usage, perplexity = code_usage(training.metrics.totals["codes"])
    images_per_second = row.pop("steps_per_second") * settings.step.global_batch_size
    row |= {
        "code_usage": usage,
        "perplexity": perplexity,
        "lr": rate.at(step),
        "epoch": (step + 1) / rate.steps_per_epoch,
        "images_per_second": images_per_second,
    }
    seconds_left = (training.total_steps - step - 1) * settings.step.global_batch_size / images_per_second
    training.metrics.show(
        f"reconstruction {row['reconstruction']:.4f}, {usage:.0%} of the codes used, "
        f"{images_per_second:.0f} images/s, {seconds_left / 60:.1f} minutes left"
    )
    return row


class Validation:
    """How well held-out images are reconstructed by the averaged weights, where they are kept; or by the raw ones."""

    def __init__(
        self, settings: VQTrainSettings, folder: ImageFolder, tokenizer: Trained, training: TrainingRun, world: World
    ):
        self.settings, self.folder, self.tokenizer = settings, folder, tokenizer
        self.training, self.world = training, world

    def is_done(self, steps_done: int) -> bool:
        return self.training.metrics.has(steps_done, "val_")

    def validate(self, steps_done: int) -> None:
        if self.tokenizer.ema is not None:
            self.tokenizer.ema.swap()
        scores = self._scores(steps_done)
        if self.tokenizer.ema is not None:
            self.tokenizer.ema.swap()
        metrics = self.training.metrics
        metrics.write(steps_done, {f"val_{name}": value for name, value in scores.items()})
        metrics.say(
            f"step {steps_done:,}: PSNR {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.4f} on "
            f"{len(self.folder):,} held-out images"
        )
        metrics.restart_clock()

    @torch.no_grad()
    def _scores(self, steps_done: int) -> dict[str, float]:
        data, world = self.settings.data, self.world
        model = bare(self.tokenizer.module).eval()
        scores = ReconstructionScores(model.codebook_size, world.device)
        batch_size = self.settings.step.micro_batch(world)
        for first, pixels in center_crop_batches(self.folder, data.image_size, batch_size, data.num_workers, world):
            pixels = pixels.to(world.device)
            reconstruction, _, codes = model(to_model_range(pixels))
            images = pixels.permute(0, 3, 1, 2)
            scores.add(images, to_uint8(reconstruction), codes)
            if first == 0:
                self._save_picture(images, to_uint8(reconstruction), steps_done)
        model.train()
        return scores.result(world)

    def _save_picture(self, images: torch.Tensor, reconstructions: torch.Tensor, steps_done: int) -> None:
        """`samples/{step}.png`: images above, reconstructions below."""
        from torchvision.utils import save_image  # which training alone does not need

        rows = torch.cat([images[:PICTURE_IMAGES], reconstructions[:PICTURE_IMAGES]]).float() / 255
        self.training.save_picture(steps_done, lambda file: save_image(rows, file, "png", nrow=len(rows) // 2))


def _print_next_commands(settings: VQTrainSettings, checkpoint: Path) -> None:
    data, name = settings.data, settings.model.vq_model
    own = {"vq_model": absolute_component(name)} if is_component(name) else {}
    tokenizer = {"vq_ckpt": checkpoint, "image_size": data.image_size, **own}
    folder = Path(data.data_path)
    look = command("tokenizer/reconstruction_vq.sh", data_path=Path(data.val_data_path or folder), **tokenizer)
    extract = command(
        "autoregressive/extract_codes_c2i.sh",
        data_path=folder,
        code_path=Path(settings.run.results_dir).absolute().with_name("codes"),
        dataset=_name_of(folder.absolute()),
        **tokenizer,
        ten_crop=True,
        no_mirror=not data.mirror,
    )
    print(f"trained: {checkpoint}\nlook: {look}\nnext: {extract}")


def _name_of(folder: Path) -> str:
    """A data set's name: that of its folder, or of the one around train."""
    name = folder.parent.name if folder.stem in ("train", "training") else folder.stem
    return re.sub(r"\W+", "_", name).strip("_") or "images"


if __name__ == "__main__":
    run(main)
