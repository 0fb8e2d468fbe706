"""What a training checkpoint holds: full, unsharded state that any number of processes, DDP or FSDP, can load."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from utils.distributed import World
from utils.settings import recipe, settings


@dataclass
class Trained:
    """A module that learns, under the names its parts have in a checkpoint."""

    module: nn.Module  # bare, or wrapped by DDP or FSDP
    optimizer: torch.optim.Optimizer
    ema: "EMA | None" = None
    names: tuple[str, str, str] = ("model", "optimizer", "ema")

    def averaged(self) -> AbstractContextManager:
        """The weights that later programs will take, in place: the averages where they are kept, else the raw ones."""
        return self.ema.in_place() if self.ema is not None else nullcontext()


@settings("averaged weights")
class EMASettings:
    ema: bool = recipe(False, "keep an exponential moving average (EMA) of the weights")
    ema_decay: float = recipe(
        0.9999, "EMA decay per step n, after a warm-up: min(decay, (1 + n) / (10 + n))", at_least=0, below=1
    )

    def of(self, module: nn.Module) -> "EMA | None":
        return EMA(module, self.ema_decay) if self.ema else None


class EMA:
    """Exponential moving average of a module's parameters: one fused operation per step, sharded where they are."""

    def __init__(self, module: nn.Module, decay: float):
        self.module, self.decay, self.updates = module, decay, 0
        self.parameters = list(module.parameters())
        self.averages = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - self._decay_at(self.updates))
        self.updates += 1

    def _decay_at(self, update: int) -> float:
        """Without a warm-up a short training would leave the average at its random beginning."""
        return min(self.decay, (1 + update) / (10 + update))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The averages as the module's parameters, to validate or save them."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @property
    def record(self) -> dict[str, float | str]:
        """How the average was taken, for a checkpoint to say."""
        return {"decay": self.decay, "warm_up": "(1 + n) / (10 + n)"}

    @property
    def share_of_beginning(self) -> float:
        """How much of the average is still what the weights were before the first step."""
        return math.prod(self._decay_at(update) for update in range(self.updates))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averages and parameters in place: once to evaluate or save the averages, again to go on."""
        if isinstance(self.module, FSDPModule):
            self.module.reshard()  # after a pass without gradients the root would go on with what it had gathered
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)


def averages_record(parts: Iterable[Trained]) -> dict[str, dict]:
    """How each average was taken, under its name in a checkpoint."""
    return {part.names[2]: part.ema.record for part in parts if part.ema is not None}


def own_weights(module: nn.Module) -> Iterator[torch.Tensor]:
    """The weights on this rank: of sharded ones its share."""
    for parameter in module.parameters():
        yield parameter.to_local() if isinstance(parameter, DTensor) else parameter


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed every generator for one step of one rank.

    All random numbers of training (dropout, dropped labels) follow from these three, so that a resumed run needs no
    saved generator state and repeats exactly.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def capture_state(parts: Iterable[Trained], world: World) -> dict:
    """Copies on the CPU of everything that learns; every rank must call it, the main rank gets the values."""
    state = {}
    for part in parts:
        model_name, optimizer_name, ema_name = part.names
        options = _full(part.module)
        state[model_name] = _copied(get_model_state_dict(part.module, options=options), world)
        state[optimizer_name] = _copied(get_optimizer_state_dict(part.module, part.optimizer, options=options), world)
        if part.ema is not None:
            state[ema_name] = full_model_state(part, world)
    return state if world.is_main else {}


def full_model_state(part: Trained, world: World) -> dict[str, torch.Tensor]:
    """A copy on the CPU of the averaged weights, or of the raw ones where no average is kept; as `capture_state`."""
    with part.averaged():
        return _copied(get_model_state_dict(part.module, options=_full(part.module)), world)


def restore_state(parts: Iterable[Trained], state: dict, world: World) -> None:
    """Load what `capture_state` returned; only the main rank needs it, the others receive their share."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=world.size > 1)
    for part in parts:
        model_name, optimizer_name, ema_name = part.names
        if part.ema is not None:
            set_model_state_dict(part.module, state.get(ema_name, {}), options=options)
            part.ema.swap()
        set_model_state_dict(part.module, state.get(model_name, {}), options=options)
        set_optimizer_state_dict(part.module, part.optimizer, state.get(optimizer_name, {}), options=options)
        _lay_out_like_parameters(part.optimizer)


def _lay_out_like_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give moments their parameters' strides: saved ones are contiguous, and fused updates ignore strides."""
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if type(value) is torch.Tensor and value.shape == parameter.shape and value.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _full(module: nn.Module) -> StateDictOptions:
    """Sharded weights are gathered on the CPU (and copied once more there); others are taken there by `_copied`."""
    return StateDictOptions(full_state_dict=True, cpu_offload=isinstance(module, FSDPModule))


def _copied(state: dict, world: World) -> dict:
    """On the main rank `state` with its tensors copied on the CPU: training goes on while the copy is written.

    Contiguous, because restoring broadcasts bytes: a channels-last tensor would arrive permuted on the other ranks.
    """
    return _on_cpu(state) if world.is_main else {}


def _on_cpu(value):
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(item) for item in value)
    return value
