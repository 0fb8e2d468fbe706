"""Compiling a GPT for training: layer by layer, and every patch side before the clock runs."""

import numpy as np
import torch

from autoregressive.models.gpt import Transformer
from autoregressive.train.schedule import PatchSchedule
from dataset.code_dataset import CodeDataset
from utils.distributed import World
from utils.engine.parallel import autocast, sync_gradients
from utils.engine.state import Trained
from utils.engine.step import StepSettings


def compile_model(model: Transformer) -> None:
    """Compile layer by layer, in place: one small graph per side, and gradients leave for other ranks as they come."""
    # A graph for each patch side, batch shape and mode (training, validation), shared by all layers.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for layer in model.layers:
        layer.compile(dynamic=False, fullgraph=not model.args.activation_checkpointing)
    model.head_loss = torch.compile(model.head_loss, dynamic=False)


def compile_sides(
    settings: StepSettings,
    schedule: PatchSchedule,
    dataset: CodeDataset,
    trained: Trained,
    scaler: torch.amp.GradScaler,
    world: World,
    start: int,
) -> None:
    """Compile every patch side still to come: one forward and backward pass each, no update."""
    first_images = np.zeros(settings.micro_batch(world), np.int64)
    codes, cond = (part.to(world.device) for part in dataset.batch(0, first_images))
    for side in schedule.steps_by_side(range(start, schedule.total_steps)):
        sync_gradients(trained.module, True)  # unsynchronised, FSDP would keep them for the first real step
        with autocast(trained.module, world, settings.mixed_precision):
            _, loss = trained.module(codes, cond, codes, side)
        scaler.scale(loss).backward()
        trained.optimizer.zero_grad(set_to_none=True)
