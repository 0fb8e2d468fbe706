"""How a code is drawn: classifier-free guidance, temperature, top-k, top-p, and the draw itself from given randomness.

Nothing here waits for the device, so that it can be captured in a CUDA graph. A sampler of your own takes the place of
`draw_codes` and `draw_gumbel` (docs/extending.md).
"""

import math

import torch

from utils.settings import recipe, settings

SCHEDULES = ("constant", "linear", "power-cosine")
# Probabilities are rounded down to multiples of 1/PARTS before they are summed: sums of integers are exact in any
# order, and int64 holds the sum for every codebook.
PARTS = 2.0**40
# Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")
PHILOX_MULTIPLIERS, PHILOX_KEY_STEPS, PHILOX_ROUNDS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 10
LOW_32_BITS = 0xFFFFFFFF


@settings("sampling")
class Sampling:
    """How codes are drawn. Raises `ValueError` for values out of range."""

    cfg_scale: float = recipe(1.0, "scale of classifier-free guidance; 1: no guidance", at_least=1)
    cfg_interval: int = recipe(-1, "n > -1: tokens after the first n + 2 are not guided; -1: all are", at_least=-1)
    cfg_schedule: str = recipe(
        "constant", "guidance over the tokens: constant, or rising to --cfg-scale", choices=SCHEDULES
    )
    cfg_power: float = recipe(1.0, "power of the power-cosine schedule", above=0)
    temperature: float = recipe(1.0, "logits are divided by it; 0: the likeliest code", at_least=0)
    top_k: int = recipe(0, "draw from the k likeliest codes; 0: from all", at_least=0)
    top_p: float = recipe(1.0, "draw from the likeliest codes up to this probability; 1: from all", above=0, at_most=1)
    draw: str = recipe(
        "inverse-cdf",
        "how a code is drawn: from one random number, or with Gumbel noise for every code, with which --parallel needs "
        "fewer passes; the distribution is the same, and --sampler takes the place of both",
        choices=("inverse-cdf", "gumbel"),
    )
    sampler: str | None = recipe(
        None, "a function of your own that draws the codes, as FILE.py:NAME (docs/extending.md)"
    )
    sample_logits: bool = recipe(True, "False: always the likeliest code", flag=None)


def guidance_scales(schedule: str, scale: float, length: int, power: float = 1.0) -> torch.Tensor:
    """The scale at each of `length` tokens, `(length,)` float32; logits are `uncond + (cond - uncond) * scale`.

    Classifier-free guidance: arXiv 2207.12598. `linear` rises from 1 to `scale` (VAR, arXiv 2404.02905);
    `power-cosine` does so as `(1 - cos(pi * (t / length)**power)) / 2` at token `t` (RAR, arXiv 2411.00776).
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


def filter_logits(logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """Logits `(B, V)` over `temperature`, with -inf for codes that top-k (0: all) and then top-p (1: all) exclude.

    Top-k keeps codes tied with the k-th. Top-p (nucleus sampling, arXiv 1904.09751) keeps the likeliest codes until
    their probability exceeds `top_p`, always at least one.
    """
    logits = logits / max(temperature, 1e-5)
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(descending=True, stable=True)
        excluded = ordered.softmax(-1).cumsum(-1) > top_p
        excluded = torch.cat([torch.zeros_like(excluded[:, :1]), excluded[:, :-1]], dim=-1)
        logits = logits.masked_fill(torch.zeros_like(excluded).scatter(1, order, excluded), -torch.inf)
    return logits


def draw_codes(logits: torch.Tensor, uniforms: torch.Tensor, position: torch.Tensor | None = None) -> torch.Tensor:
    """Codes `(B,)` distributed as `softmax(logits)`, from `uniforms` `(B,)` float64 in [0, 1): inverse CDF.

    `logits` `(B, V)` are guided and filtered; `position` `(1, 1)` or `(B, 1)` int64 is the token's place in the image,
    which this sampler does not look at. The code is the first whose cumulative probability exceeds the uniform number.
    A code of probability 0 is never drawn, and the result does not depend on the order in which a device sums.
    """
    cumulative = (logits.softmax(-1) * PARTS).long().cumsum(-1)
    total = cumulative[:, -1:]
    target = torch.minimum((uniforms.unsqueeze(1) * total).long(), total - 1)
    codes = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return codes.clamp(max=logits.shape[-1] - 1)  # logits that are not finite must not become an index out of range


def draw_gumbel(logits: torch.Tensor, randomness: torch.Tensor, position: torch.Tensor | None = None) -> torch.Tensor:
    """Codes `(B,)` distributed as `softmax(logits)`: the largest sum of logit and Gumbel noise.

    `randomness` is `uniforms` `(B,)` as `draw_codes` takes them, or their `gumbel_noise` `(B, V)`. Two distributions
    that nearly agree nearly always draw the same code from the same uniform number, wherever their codes lie.
    """
    noise = gumbel_noise(randomness, logits.shape[-1]) if randomness.dim() == 1 else randomness
    return (logits + noise).argmax(-1)


def gumbel_noise(uniforms: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Noise `(B, V)` float32, one number for each code, from `uniforms` `(B,)` float64 in [0, 1).

    The 53 bits of a uniform number are the key of Philox4x32-10, the number of the code is its counter. Float64 hides
    how a device rounds logarithms.
    """
    key = (uniforms * 2.0**53).long().unsqueeze(1)
    blocks = torch.arange(-(-vocab_size // 4), device=uniforms.device)
    words = torch.stack(philox(blocks, key), -1).flatten(1)[:, :vocab_size]
    return -torch.log(-torch.log((words.double() + 0.5) * 2.0**-32)).float()


def philox(counter: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10: four random words of 32 bits, each int64, for `counter` and `key` int64, broadcast together."""
    zero = torch.zeros_like(counter + key)
    words = (counter & LOW_32_BITS, (counter >> 32) & LOW_32_BITS, zero, zero)
    low_key, high_key = key & LOW_32_BITS, (key >> 32) & LOW_32_BITS
    for _ in range(PHILOX_ROUNDS):
        first, second = words[0] * PHILOX_MULTIPLIERS[0], words[2] * PHILOX_MULTIPLIERS[1]
        words = (
            ((second >> 32) & LOW_32_BITS) ^ words[1] ^ low_key,
            second & LOW_32_BITS,
            ((first >> 32) & LOW_32_BITS) ^ words[3] ^ high_key,
            first & LOW_32_BITS,
        )
        low_key, high_key = (
            (low_key + PHILOX_KEY_STEPS[0]) & LOW_32_BITS,
            (high_key + PHILOX_KEY_STEPS[1]) & LOW_32_BITS,
        )
    return words
