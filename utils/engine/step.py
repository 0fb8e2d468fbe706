"""The end of a training step, the same for every trainer: clip, and update unless a gradient is not finite."""

import argparse

import torch
from torch import nn

from utils.distributed import World
from utils.engine.state import Trained
from utils.program import UserError


def check_batch_size(args: argparse.Namespace, world: World) -> None:
    parts = world.size * args.gradient_accumulation_steps
    if args.gradient_accumulation_steps < 1 or args.global_batch_size < 1 or args.global_batch_size % parts:
        raise UserError(f"--global-batch-size {args.global_batch_size} does not divide by {world.size} processes times "
                        f"--gradient-accumulation-steps {args.gradient_accumulation_steps}.")  # fmt: skip


def apply_gradients(
    trained: Trained, scaler: torch.amp.GradScaler, max_norm: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Update from the gradients at hand and forget them; returns their norm, and 1.0 if the update was skipped.

    `max_norm` 0 does not clip. The optimizer must be a fused one.
    """
    optimizer = trained.optimizer
    scaler.unscale_(optimizer)
    grad_norm = _norm(trained.module)
    found_inf = (~grad_norm.isfinite()).float()
    # A fused optimizer divides the gradients by grad_scale as it reads them, and leaves everything as it is where
    # found_inf is 1, without the host knowing.
    optimizer.grad_scale = ((grad_norm + 1e-6) / max_norm).clamp(min=1.0) if max_norm else None
    optimizer.found_inf = found_inf
    if scaler.is_enabled():  # it goes by its own flag, which single elements raise, but not an overflow of their norm
        for flag in scaler._found_inf_per_device(optimizer).values():
            flag.copy_(found_inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if trained.ema is not None:
        trained.ema.update()
    return grad_norm, found_inf


def _norm(module: nn.Module) -> torch.Tensor:
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients, foreach=True)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # sharded: sum over ranks
