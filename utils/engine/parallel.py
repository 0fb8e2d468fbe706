"""One model on many processes: DDP or FSDP2."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch._dynamo
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from utils import precision as formats
from utils.distributed import World


def distribute(model: nn.Module, world: World, mode: str, precision: str) -> nn.Module:
    """Wrap `model` (equal on all ranks) for `world`: `mode` is "ddp" or "fsdp" (layer by layer: `model.layers`).

    Alone in the world it stays bare.
    """
    return model if world.size == 1 else wrap(model, world, mode, precision)


def wrap(model: nn.Module, world: World, mode: str, precision: str) -> nn.Module:
    """As `distribute`, whatever the number of processes; there must be a process group."""
    if mode == "ddp":
        # Models are compiled piece by piece, and gradients leave with each; DDP would cut the pieces smaller.
        torch._dynamo.config.optimize_ddp = False
        device_ids = [world.device] if world.device.type == "cuda" else None
        wrapped = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
        wrapped.broadcast_buffers = False  # as an argument it warns
        return wrapped
    mesh = init_device_mesh(world.device.type, (world.size,))
    # Inputs are not cast: the rotary table must stay float32, and the embeddings are already in the precision.
    policy = MixedPrecisionPolicy(
        param_dtype=formats.DTYPES[precision], reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def autocast(module: nn.Module, world: World, precision: str) -> AbstractContextManager:
    """Mixed precision of a forward pass; FSDP casts its parameters itself."""
    return nullcontext() if isinstance(module, FSDPModule) else formats.autocast(world.device, precision)


def bare(module: nn.Module) -> nn.Module:
    """The module without DDP around it."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def sync_gradients(module: nn.Module, sync: bool) -> None:
    """Whether the next backward pass averages gradients over ranks (the last micro-batch of a step does)."""
    if isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = sync
    elif isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(sync)
