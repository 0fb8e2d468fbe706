"""How many images to generate at once: as many as free memory holds, up to where more no longer helps."""

import os

import torch

from autoregressive.models.gpt import ModelArgs
from utils.memory import available_memory

# Weights are read once a token for all images: from a few hundred rows on, GPUs are no faster an image.
MOST = {"cuda": 512, "cpu": 32}
SHARE_OF_MEMORY = 0.8
LOGITS_COPIES = 16  # float32-sized copies of the logits that filtering and drawing hold, at most
DECODER_BYTES_PER_PIXEL = 2048  # activations of the tokenizer's decoder, in bf16


def fitting_batch_size(
    args: ModelArgs, guided: bool, dtype: torch.dtype, device: torch.device, pixels_decoded: int
) -> int:
    """The batch size for this device's free memory, once the models are on it; a multiple of 32 from 32 on."""
    free = SHARE_OF_MEMORY * _free_memory(device) - DECODER_BYTES_PER_PIXEL * pixels_decoded
    fitting = max(1, min(MOST[device.type], int(free // bytes_per_image(args, guided, dtype))))
    return fitting // 32 * 32 if fitting >= 32 else fitting


def bytes_per_image(args: ModelArgs, guided: bool, dtype: torch.dtype) -> int:
    """What generating one image takes: keys and values of all its codes, and copies of its logits."""
    rows = 2 if guided else 1
    cache = rows * 2 * args.n_layer * args.block_size * args.n_kv_head * args.head_dim * dtype.itemsize
    return cache + rows * LOGITS_COPIES * args.vocab_size * 4


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
