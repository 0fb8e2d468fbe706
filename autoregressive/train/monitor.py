"""What a person watches while a GPT trains: speed, validation loss, sample grids."""

from collections.abc import Callable

import numpy as np
import torch

from autoregressive.models.generate import generate
from autoregressive.models.load import check_tokenizer
from autoregressive.models.losses import patch_loss
from autoregressive.train.config import TrainSettings
from autoregressive.train.cost import peak_flops, schedule_flops
from autoregressive.train.schedule import PatchSchedule
from dataset.code_check import refuse_unsound
from dataset.code_dataset import CodeDataset
from dataset.code_store import find_stores
from dataset.conditions import open_conditions, rows_of
from tokenizer.tokenizer_image.load import TokenizerSettings, build_tokenizer
from utils.component import is_component
from utils.distributed import World
from utils.engine.learning_rate import LearningRate
from utils.engine.parallel import autocast, bare
from utils.engine.periodic import Periodic
from utils.engine.run import TrainingRun
from utils.engine.state import Trained, full_model_state, seed_step
from utils.program import UserError
from utils.settings import refuse_differences

GRID_IMAGES, GRID_CLASSES = 64, 8


class Monitor:
    """Rows of the log, validation losses and sample grids; none of them changes the training."""

    def __init__(
        self,
        chosen: TrainSettings,
        schedule: PatchSchedule,
        rate: LearningRate,
        trained: Trained,
        training: TrainingRun,
        world: World,
    ):
        self.chosen, self.schedule, self.rate = chosen, schedule, rate
        self.trained, self.training, self.world = trained, training, world
        self.model_args = chosen.model_args
        self.peak = peak_flops(torch.cuda.get_device_name()) if world.device.type == "cuda" else None
        self.validation, self.tokenizer = self._open_validation(), self._open_tokenizer()
        self._watched = []
        total = schedule.total_steps
        if self.validation is not None:
            written = lambda step: training.metrics.has(step, "val_loss")  # noqa: E731
            self._watched += [Periodic(chosen.monitor.val_every, total, self._validate, written, world)]
        if self.tokenizer is not None:
            drawn = lambda step: training.picture(step).exists()  # noqa: E731
            self._watched += [Periodic(chosen.monitor.sample_every, total, self._sample_grid, drawn, world)]

    def row_after(self, step: int) -> Callable[[dict], dict]:
        """Completes a row of mean values with where training stands, and shows it on the progress bar."""

        def complete(row: dict) -> dict:
            images = self.chosen.step.global_batch_size
            steps_per_second, side = row.pop("steps_per_second"), self.schedule.side_at(step)
            row |= {
                "level": self.schedule.stage_at(step) + 1,
                "side": side,
                "lr": self.rate.at(step),
                "epoch": (step + 1) / self.schedule.steps_per_epoch,
                "images_per_second": steps_per_second * images,
                "flops": images * self._flops(range(step + 1)),
            }
            logged = range(max(0, step + 1 - self.chosen.run.log_every), step + 1)
            flops_per_second = images * self._flops(logged) / len(logged) * steps_per_second
            if self.peak:
                row["mfu"] = flops_per_second / (self.peak * self.world.size)
            self.training.metrics.show(self._bar_text(step, row, flops_per_second / images))
            return row

        return complete

    def after_step(self, steps_done: int) -> None:
        """Validation loss and sample grid when they are due."""
        for watched in self._watched:
            watched.after_step(steps_done)

    def catch_up(self, steps_done: int) -> None:
        """Validation loss and sample grid that a killed run did not come to."""
        for watched in self._watched:
            watched.catch_up(steps_done)

    def _flops(self, steps: range) -> int:
        return schedule_flops(self.model_args, self.schedule, steps)

    def _bar_text(self, step: int, row: dict, image_flops_per_second: float) -> str:
        stage = self.schedule.stages[row["level"] - 1]
        in_level = self._flops(range(step + 1, stage.stop)) / image_flops_per_second
        in_all = self._flops(range(step + 1, self.schedule.total_steps)) / image_flops_per_second
        name = f"{row['side']}x{row['side']}"
        return (
            f"level {row['level']}/{len(self.schedule.stages)} {name} loss {row[f'loss_{name}']:.4f} "
            f"{row['images_per_second']:.0f} images/s, left {_clock(in_level)} in level, {_clock(in_all)} in all"
        )

    def _open_validation(self) -> CodeDataset | None:
        chosen = self.chosen
        if not chosen.monitor.val_code_path:
            return None
        store = find_stores(chosen.monitor.val_code_path, chosen.data.dataset, chosen.data.image_size)[0]
        held_out = {
            "grid": store.meta.grid,
            "codebook size": store.meta.codebook_size,
            "number of classes": store.meta.num_classes,
            "tokenizer": store.meta.tokenizer.get("hash"),
        }
        ours = {
            "grid": self.model_args.grid,
            "codebook size": self.model_args.vocab_size,
            "number of classes": self.model_args.num_classes,
            "tokenizer": self.training.config["tokenizer"].get("hash"),
        }
        known = {name: value for name, value in held_out.items() if value is not None and ours[name] is not None}
        refuse_differences(
            f"{store.path} was extracted", known, ours, "extract held-out images the same way as the training images"
        )
        classes = None if chosen.monitor.val_conditions else self.model_args.num_classes
        refuse_unsound(store, self.model_args.vocab_size, classes, self.world)
        return CodeDataset([store], augment=False, conditions=self._open_val_conditions(len(store)))

    def _open_val_conditions(self, images: int) -> np.ndarray | None:
        ours, theirs = self.chosen.data.conditions, self.chosen.monitor.val_conditions
        if theirs is None:
            return None
        held_out, expected = open_conditions(theirs, images), open_conditions(ours)
        if held_out.shape[1:] != expected.shape[1:]:
            raise UserError(
                f"{theirs} has {held_out.shape[1:]} values per image, {ours} has {expected.shape[1:]}; make both alike."
            )
        return held_out

    def _open_tokenizer(self):
        monitor, trained_on = self.chosen.monitor, self.training.config["tokenizer"]
        if not monitor.vq_ckpt:
            return None
        if self.model_args.class_dropout_prob == 0 and monitor.sample_cfg_scale != 1:
            raise UserError("without --class-dropout-p there is no null class to guide with; use --sample-cfg-scale 1.")
        name = trained_on.get("name")
        given = TokenizerSettings(
            vq_model=monitor.vq_model or (None if is_component(name) else name),
            vq_ckpt=monitor.vq_ckpt,
            codebook_size=self.model_args.vocab_size,
            codebook_embed_dim=monitor.codebook_embed_dim,
            vq_weights=trained_on.get("weights") or "auto",
        )
        tokenizer, info = build_tokenizer(given, device=self.world.device)
        check_tokenizer(trained_on, info, "this GPT")
        return tokenizer

    def _validate(self, steps_done: int) -> None:
        """The patch loss at the side being trained and at side 1, whatever loss is trained with: losses that compare.

        Of the averaged weights where they are kept, as sampling takes them.
        """
        losses = {}
        for side in sorted({self.schedule.side_at(steps_done - 1), 1}, reverse=True):
            with self.trained.averaged():
                losses[f"val_loss_{side}x{side}"] = self._validation_loss(side)
        metrics = self.training.metrics
        metrics.write(steps_done, losses)
        told = ", ".join(f"{loss:.4f} at {name.removeprefix('val_loss_')}" for name, loss in losses.items())
        metrics.say(f"step {steps_done:,}: validation loss {told}")
        metrics.restart_clock()

    @torch.no_grad()
    def _validation_loss(self, side: int) -> float:
        """Mean patch loss of the held-out images' centre crops at `side`, every image once over all ranks."""
        module, total = self.trained.module.eval(), torch.zeros(2, device=self.world.device)
        model = bare(module)
        trained_loss, model.loss = model.loss, patch_loss
        images = self.chosen.step.micro_batch(self.world)
        # Ranks may hold one batch more or less than others; wrapped modules must run equally often on all of them.
        batches = -(-len(self.validation) // (images * self.world.size))
        iterator = self.validation.sequential_batches(images, self.world.rank, self.world.size, self.world.device)
        spare = [part.to(self.world.device) for part in self.validation.batch(0, np.zeros(images, np.int64))]
        for _ in range(batches):
            codes, cond = batch = next(iterator, spare)
            with autocast(module, self.world, self.chosen.step.mixed_precision):
                _, loss = module(codes, cond, codes, side)
            if batch is not spare:
                total += torch.stack([loss * len(codes), torch.tensor(float(len(codes)), device=self.world.device)])
        model.loss = trained_loss
        module.train()
        loss_sum, count = self.world.sum(total).tolist()
        return loss_sum / count

    def _conditions_to_draw(self) -> torch.Tensor:
        """Eight classes, or rows of the conditions, spread over all; each as often as a row of the grid is long."""
        path = self.chosen.data.conditions
        rows = open_conditions(path) if path else np.arange(self.model_args.num_classes)
        chosen = np.arange(GRID_CLASSES) * len(rows) // GRID_CLASSES
        return torch.from_numpy(rows_of(rows, chosen.repeat(GRID_IMAGES // GRID_CLASSES)))

    @torch.no_grad()
    def _sample_grid(self, steps_done: int) -> None:
        """`samples/{step}.png`: a row per class, from the averaged weights where they are kept."""
        from torchvision.utils import save_image  # which training alone does not need

        state = full_model_state(self.trained, self.world)
        if self.world.is_main:
            args, cond = self.model_args, self._conditions_to_draw().to(self.world.device)
            model = self.chosen.build_model().to(self.world.device).eval()
            model.load_state_dict(state)
            seed_step(self.chosen.step.global_seed, 0, 0)  # the same noise each time, so that grids show the training
            codes = generate(model, cond, args.block_size, self.chosen.monitor.sample_cfg_scale)
            images = torch.cat([self.tokenizer.decode_indices(c.view(-1, *args.grid)) for c in codes.split(8)])
            layout = {"nrow": GRID_IMAGES // GRID_CLASSES, "normalize": True, "value_range": (-1, 1)}
            self.training.save_picture(steps_done, lambda file: save_image(images, file, "png", **layout))
        self.world.barrier()
        self.training.metrics.restart_clock()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
