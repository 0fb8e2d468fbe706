"""One vocabulary of number formats for every program, and what they mean for matrix products and convolutions."""

from contextlib import AbstractContextManager, nullcontext

import torch

# Names on command lines. `none` is float32 as it is, `tf32` float32 with products rounded to 10 bits on GPUs.
DTYPES = {"none": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("none", "bf16", "fp16")  # where TF32 is not offered by name


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Mixed precision of a forward pass on `device`; nothing for the two float32 formats."""
    dtype = DTYPES[precision]
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def forbid_tf32() -> None:
    """Multiply float32 numbers as such on GPUs, and add up the products of halves in float32.

    (The newer `fp32_precision` makes torch.export fail afterwards.)
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
