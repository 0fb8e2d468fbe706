"""What a step is made of in every trainer: batch, optimizer, clipping, no update from gradients that are not finite."""

from collections.abc import Callable

import torch
from torch import nn

from utils.distributed import World
from utils.engine.state import Trained
from utils.precision import PRECISIONS
from utils.program import UserError
from utils.settings import MAX_SEED, option, recipe, settings


@settings("optimization")
class StepSettings:
    global_batch_size: int = recipe(256, "images per step, over all processes", at_least=1)
    gradient_accumulation_steps: int = option(1, "micro-batches per step and process", at_least=1)
    weight_decay: float = recipe(0.05, "AdamW weight decay, on matrices only", at_least=0)
    beta1: float = recipe(0.9, "AdamW beta1", at_least=0, below=1)
    beta2: float = recipe(0.95, "AdamW beta2", at_least=0, below=1)
    max_grad_norm: float = recipe(1.0, "gradients are clipped to this norm; 0: no clipping", at_least=0)
    mixed_precision: str = recipe("bf16", "number format of matrix products", choices=PRECISIONS)
    global_seed: int = recipe(0, "seed of initial weights, data order, crops and dropout", at_least=0, at_most=MAX_SEED)

    def micro_batch(self, world: World) -> int:
        """Images that one process computes at once. Raises `UserError` if the batch does not divide."""
        parts = world.size * self.gradient_accumulation_steps
        if self.global_batch_size % parts:
            raise UserError(
                f"--global-batch-size {self.global_batch_size} does not divide by {world.size} processes times "
                f"--gradient-accumulation-steps {self.gradient_accumulation_steps}."
            )
        return self.global_batch_size // parts

    def scaler(self, world: World) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(world.device.type, enabled=self.mixed_precision == "fp16")


def make_adamw(
    module: nn.Module,
    settings: StepSettings,
    lr: float,
    decayed: Callable[[nn.Parameter], bool],
    lr_share: Callable[[nn.Parameter], float] = lambda parameter: 1.0,
) -> torch.optim.Optimizer:
    """Fused AdamW on the parameters that are not frozen; weight decay on those that `decayed` says.

    `lr_share`: which share of the learning rate a parameter gets.
    """
    groups: dict[tuple[bool, float], dict] = {}
    for parameter in filter(lambda parameter: parameter.requires_grad, module.parameters()):
        key = decayed(parameter), lr_share(parameter)
        new = {"params": [], "weight_decay": settings.weight_decay if key[0] else 0.0}
        new |= {"lr_share": key[1]} if key[1] != 1 else {}  # older checkpoints do not name it
        groups.setdefault(key, new)["params"].append(parameter)
    return torch.optim.AdamW(
        sorted(groups.values(), key=lambda group: -group["weight_decay"]),
        lr=lr,
        betas=(settings.beta1, settings.beta2),
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_share", 1.0)


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
