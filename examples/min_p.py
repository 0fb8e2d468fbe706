"""A sampler of your own: min-p (arXiv 2407.01082), with a temperature that falls over the image.

bash scripts/autoregressive/sample_c2i.sh … --sampler 'examples/min_p.py:min_p(threshold=0.05)'
"""

import torch

from autoregressive.models.sampling import draw_codes


def min_p(
    logits: torch.Tensor, uniforms: torch.Tensor, position: torch.Tensor, threshold: float = 0.05, cooling: float = 0.0
) -> torch.Tensor:
    """Codes `(B,)` from guided logits `(B, V)`, leaving out those less likely than `threshold` times the likeliest.

    `uniforms` `(B,)` in [0, 1) is the randomness that belongs to each image at this place; whatever else is random
    would make images depend on the batch. `position` is the place of the code in the image, `(1, 1)` or `(B, 1)`: the
    function is part of a CUDA graph and must not wait for it.
    """
    logits = logits * (1 + cooling * position)
    probabilities = logits.softmax(-1)
    unlikely = probabilities < threshold * probabilities.amax(-1, keepdim=True)
    return draw_codes(logits.masked_fill(unlikely, -torch.inf), uniforms)
