"""What a person watches while a GPT trains: speed, validation loss, sample grids."""

import argparse
from collections.abc import Callable

import torch
from torchvision.utils import save_image

from autoregressive.models.generate import generate
from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.train.cost import peak_flops, train_flops
from autoregressive.train.schedule import Plan
from dataset.code_dataset import CodeDataset
from dataset.code_store import find_stores
from tokenizer.tokenizer_image.load import build_tokenizer
from utils.distributed import World
from utils.engine.parallel import autocast
from utils.engine.run import TrainingRun
from utils.engine.state import Trained, full_model_state, seed_step
from utils.files import atomic_file
from utils.program import UserError

GRID_IMAGES, GRID_CLASSES = 64, 8


def add_watch_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("validation and samples while training")
    group.add_argument("--val-code-path", help="folder of held-out codes, extracted with the same --dataset and size")
    group.add_argument("--val-every", type=int, default=5000, help="steps between validation losses")
    group.add_argument("--vq-ckpt", help="tokenizer: draw a sample grid now and then")
    group.add_argument("--vq-model", help="its model; default: what the codes were made with")
    group.add_argument("--codebook-embed-dim", type=int, default=8, help="its embedding size")
    group.add_argument("--sample-every", type=int, default=5000, help="steps between sample grids")
    group.add_argument("--sample-cfg-scale", type=float, default=2.0, help="classifier-free guidance of the grids")


class Watch:
    def __init__(self, args, plan: Plan, model_args: ModelArgs, trained: Trained, training: TrainingRun, world: World):
        self.args, self.plan, self.model_args = args, plan, model_args
        self.trained, self.training, self.world = trained, training, world
        self.peak = peak_flops(torch.cuda.get_device_name()) if world.device.type == "cuda" else None
        self.validation = self._open_validation()
        self.tokenizer = self._open_tokenizer()

    def row_after(self, step: int) -> Callable[[dict], dict]:
        """Completes a row of mean values with where training stands, and shows it on the progress bar."""

        def complete(row: dict) -> dict:
            level = self.plan.level_at(step)
            images = row.pop("steps_per_second") * self.args.global_batch_size
            row |= {
                "level": self.plan.levels.index(level) + 1, "side": level.side, "lr": self.plan.lr_at(step),
                "epoch": (step + 1) / self.plan.steps_per_epoch, "images_per_second": images,
            }  # fmt: skip
            if self.peak:
                row["mfu"] = images * train_flops(self.model_args, level.side) / (self.peak * self.world.size)
            self.training.metrics.show(self._bar_text(step, level, row))
            return row

        return complete

    def after_step(self, step: int) -> None:
        """Validation loss and sample grid when they are due; neither changes the training."""
        last = step + 1 == self.plan.total_steps
        side = self.plan.level_at(step).side
        if self.validation is not None and (last or (step + 1) % self.args.val_every == 0):
            loss = self._validation_loss(side)
            self.training.metrics.write(step + 1, {f"val_loss_{side}x{side}": loss})
            self.training.metrics.say(f"step {step + 1:,}: validation loss {loss:.4f} at {side}x{side}")
            self.training.metrics.restart_clock()
        if self.tokenizer is not None and (last or (step + 1) % self.args.sample_every == 0):
            self._sample_grid(step + 1)
            self.training.metrics.restart_clock()

    def _bar_text(self, step: int, level, row: dict) -> str:
        seconds = self.args.global_batch_size / row["images_per_second"]  # of one step in this level
        in_level = (level.first_step + level.steps - step - 1) * seconds
        later = [other for other in self.plan.levels if other.first_step > level.first_step]
        cost = train_flops(self.model_args, level.side)
        in_all = in_level + sum(o.steps * seconds * train_flops(self.model_args, o.side) / cost for o in later)
        name = f"{level.side}x{level.side}"
        return (
            f"level {row['level']}/{len(self.plan.levels)} {name} loss {row[f'loss_{name}']:.4f} "
            f"{row['images_per_second']:.0f} images/s, left {_clock(in_level)} in level, {_clock(in_all)} in all"
        )

    def _open_validation(self) -> CodeDataset | None:
        if not self.args.val_code_path:
            return None
        store = find_stores(self.args.val_code_path, self.args.dataset, self.args.image_size)[0]
        meta, trained_on = store.meta, self.training.config
        differing = [name for name, ours, theirs in (
            ("grid", meta.grid, self.model_args.grid), ("codebook size", meta.codebook_size, self.args.vocab_size),
            ("number of classes", meta.num_classes, self.args.num_classes),
            ("tokenizer", meta.tokenizer.get("hash"), trained_on["tokenizer"].get("hash")),
        ) if ours is not None and theirs is not None and ours != theirs]  # fmt: skip
        if differing:
            raise UserError(
                f"{store.path} has another {differing[0]} than the training codes; extract it the same way."
            )
        return CodeDataset([store], augment=False)

    def _open_tokenizer(self):
        if not self.args.vq_ckpt:
            return None
        if self.args.class_dropout_p == 0 and self.args.sample_cfg_scale != 1:
            raise UserError("without --class-dropout-p there is no null class to guide with; use --sample-cfg-scale 1.")
        name = self.args.vq_model or self.training.config["tokenizer"].get("name")
        if name is None:
            raise UserError("the codes do not say which tokenizer made them; give --vq-model.")
        sizes = (self.args.vocab_size, self.args.codebook_embed_dim)
        return build_tokenizer(name, *sizes, self.args.vq_ckpt, device=self.world.device)[0]

    @torch.no_grad()
    def _validation_loss(self, side: int) -> float:
        """Mean loss of the held-out images' centre crops at `side`, every image once over all ranks."""
        module, total = self.trained.module.eval(), torch.zeros(2, device=self.world.device)
        images = self.args.global_batch_size // self.world.size // self.args.gradient_accumulation_steps
        # Ranks may hold one batch more or less than others; wrapped modules must run equally often on all of them.
        batches = -(-len(self.validation) // (images * self.world.size))
        iterator = self.validation.sequential_batches(images, self.world.rank, self.world.size, self.world.device)
        spare = torch.zeros(images, self.model_args.block_size, dtype=torch.int64, device=self.world.device)
        for _ in range(batches):
            codes, labels = next(iterator, (spare, None))
            with autocast(module, self.world, self.args.mixed_precision):
                _, loss = module(codes, spare[:, 0] if labels is None else labels, codes, side)
            if labels is not None:
                total += torch.stack([loss * len(codes), torch.tensor(float(len(codes)), device=self.world.device)])
        module.train()
        loss_sum, count = self.world.sum(total).tolist()
        return loss_sum / count

    @torch.no_grad()
    def _sample_grid(self, steps_done: int) -> None:
        """`samples/{step}.png`: a row a class, from the averaged weights where they are kept."""
        state = full_model_state(self.trained, self.world)
        if self.world.is_main:
            model = Transformer(self.model_args).to(self.world.device).eval()
            model.load_state_dict(state)
            seed_step(self.args.global_seed, 0, 0)  # the same noise each time, so that grids show the training
            classes = torch.arange(GRID_CLASSES, device=self.world.device) * self.args.num_classes // GRID_CLASSES
            labels = classes.repeat_interleave(GRID_IMAGES // GRID_CLASSES)
            codes = generate(model, labels, self.model_args.block_size, self.args.sample_cfg_scale)
            shape = (self.args.codebook_embed_dim, *self.model_args.grid)
            images = torch.cat([self.tokenizer.decode_code(c, (len(c), *shape)) for c in codes.split(8)])
            with atomic_file(self.training.folder.path / "samples" / f"{steps_done:07d}.png") as file:
                save_image(images, file, "png", nrow=GRID_IMAGES // GRID_CLASSES, normalize=True, value_range=(-1, 1))
        self.world.barrier()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
