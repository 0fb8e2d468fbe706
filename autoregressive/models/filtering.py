"""From logits to codes: temperature, top-k, top-p, and drawing by inverse CDF from given uniform numbers.

Nothing here waits for the device, so that it can be captured in a CUDA graph.
"""

import torch

# Probabilities are rounded down to multiples of 1/PARTS before they are summed: sums of integers are exact in any
# order, and int64 holds the sum for every codebook.
PARTS = 2.0**40


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


def draw_codes(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Codes `(B,)` distributed as `softmax(logits)`, from `uniforms` `(B,)` float64 in [0, 1): inverse CDF.

    The code is the first whose cumulative probability exceeds the uniform number. A code of probability 0 is never
    drawn, and the result does not depend on the order in which a device sums.
    """
    cumulative = (logits.softmax(-1) * PARTS).long().cumsum(-1)
    total = cumulative[:, -1:]
    target = torch.minimum((uniforms.unsqueeze(1) * total).long(), total - 1)
    codes = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return codes.clamp(max=logits.shape[-1] - 1)  # logits that are not finite must not become an index out of range
