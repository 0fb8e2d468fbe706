"""Compiling a GPT for training: layer by layer, and every patch side before its level starts."""

import torch

from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.train.schedule import Plan
from utils.distributed import World
from utils.engine.parallel import autocast, sync_gradients
from utils.engine.state import Trained


def compile_model(model: Transformer) -> None:
    """Compile layer by layer, in place: one small graph a patch side, gradients leave for other ranks as they come."""
    # A graph for each patch side, batch shape and mode (training, validation), shared by all layers.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for layer in model.layers:
        layer.compile(dynamic=False, fullgraph=not model.args.activation_checkpointing)
    model.head_loss = torch.compile(model.head_loss, dynamic=False)


def compile_levels(args, plan: Plan, gpt_args: ModelArgs, trained: Trained, scaler, world: World, start: int) -> None:
    """Compile every patch side still to come before the clock runs: one forward and backward pass each, no update."""
    images = args.global_batch_size // world.size // args.gradient_accumulation_steps
    codes = torch.zeros(images, gpt_args.block_size, dtype=torch.int64, device=world.device)
    for level in plan.levels:
        if start < level.first_step + level.steps:
            sync_gradients(trained.module, True)  # unsynchronised, FSDP would keep them for the first real step
            with autocast(trained.module, world, args.mixed_precision):
                _, loss = trained.module(codes, codes[:, 0], codes, level.side)
            scaler.scale(loss).backward()
            trained.optimizer.zero_grad(set_to_none=True)
