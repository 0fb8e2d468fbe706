"""What a person watches while a tokenizer trains: how well it reconstructs held-out images, and a picture of it."""

import json

import torch
from torchvision.utils import save_image

from dataset.crops import to_model_range
from dataset.image_batches import center_crop_batches
from dataset.image_folder import list_image_folder
from tokenizer.tokenizer_image.metrics import ReconstructionScores
from tokenizer.tokenizer_image.vq_model import VQModel, to_uint8
from utils.distributed import World
from utils.engine.run import TrainingRun
from utils.engine.state import Trained
from utils.files import atomic_file

PICTURE_IMAGES = 8


class Validation:
    """Scores of the averaged weights where they are kept, of the raw ones elsewhere; training is not changed."""

    def __init__(self, args, tokenizer: Trained, model: VQModel, training: TrainingRun, world: World):
        self.args, self.tokenizer, self.model = args, tokenizer, model
        self.training, self.world = training, world
        self.folder = list_image_folder(args.val_data_path)

    def catch_up(self, steps_done: int, total_steps: int) -> None:
        """Validate now what a run killed right after its checkpoint of `steps_done` steps did not."""
        path = self.training.folder.path / "metrics.jsonl"
        rows = path.read_text().splitlines() if self.world.is_main and path.exists() else []
        done = any(row["step"] == steps_done and "val_psnr" in row for row in map(json.loads, rows))
        if steps_done and not self.world.broadcast(done):
            self.after_step(steps_done - 1, total_steps)

    def after_step(self, step: int, total_steps: int) -> None:
        if (step + 1) % self.args.val_every and step + 1 < total_steps:
            return
        if self.tokenizer.ema is not None:
            self.tokenizer.ema.swap()
        scores = self._scores(step + 1)
        if self.tokenizer.ema is not None:
            self.tokenizer.ema.swap()
        self.training.metrics.write(step + 1, {f"val_{name}": value for name, value in scores.items()})
        self.training.metrics.say(f"step {step + 1:,}: PSNR {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.4f} on "
                                  f"{len(self.folder):,} held-out images")  # fmt: skip
        self.training.metrics.restart_clock()

    @torch.no_grad()
    def _scores(self, steps_done: int) -> dict[str, float]:
        model, world = self.model.eval(), self.world
        scores = ReconstructionScores(self.args.codebook_size, world.device)
        batch_size = max(1, self.args.global_batch_size // world.size // self.args.gradient_accumulation_steps)
        batches = center_crop_batches(self.folder, self.args.image_size, batch_size, self.args.num_workers, world)
        for first, pixels in batches:
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
        rows = torch.cat([images[:PICTURE_IMAGES], reconstructions[:PICTURE_IMAGES]]).float() / 255
        with atomic_file(self.training.folder.path / "samples" / f"{steps_done:07d}.png") as file:
            save_image(rows, file, "png", nrow=len(rows) // 2)
