"""Classifier-free guidance (arXiv 2207.12598) over an image: how strong it is at each token, and where it ends."""

import math

import torch

SCHEDULES = ("constant", "linear", "power-cosine")


def guidance_scales(schedule: str, scale: float, length: int, power: float = 1.0) -> torch.Tensor:
    """The scale at each of `length` tokens, `(length,)` float32; logits are `uncond + (cond - uncond) * scale`.

    `linear` rises from 1 to `scale` (VAR, arXiv 2404.02905); `power-cosine` does so as
    `(1 - cos(pi * (t / length)**power)) / 2` at token `t` (RAR, arXiv 2411.00776).
    """
    if schedule == "constant":
        return torch.full((length,), float(scale))
    if schedule == "linear":
        share = torch.linspace(0, 1, length, dtype=torch.float64) if length > 1 else torch.ones(1, dtype=torch.float64)
    elif schedule == "power-cosine":
        step = torch.arange(length, dtype=torch.float64) / length
        share = (1 - torch.cos(math.pi * step**power)) / 2
    else:
        raise ValueError(f"there is no guidance schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    return (1 + (scale - 1) * share).float()


def guided_tokens(scale: float, interval: int, length: int) -> int:
    """How many tokens, from the first, are guided: all for `interval` -1, else `interval + 2`; none at scale 1.

    The published samplers count `interval` from the first token after the one that the class itself predicts.
    """
    if scale == 1.0:
        return 0
    return length if interval < 0 else min(interval + 2, length)
