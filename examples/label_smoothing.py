"""A loss of your own: the patch loss with label smoothing (Szegedy et al., arXiv 1512.00567, section 7).

bash scripts/autoregressive/train_c2i.sh … --loss 'examples/label_smoothing.py:label_smoothing(smoothing=0.1)'
"""

import torch
import torch.nn.functional as F


def label_smoothing(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.1
) -> torch.Tensor:
    """Cross-entropy of `(1 - smoothing)` times the patch's codes and `smoothing` times the uniform distribution.

    `hidden` `(B, N, D)` are the last hidden states, `weight` `(V, D)` is the head, `targets` `(B, N, k)` are the codes
    of every patch. Validation goes on measuring the plain patch loss, so that runs stay comparable.
    """
    log_p = F.log_softmax(F.linear(hidden, weight).float(), dim=-1)  # (B, N, V)
    of_codes = log_p.gather(-1, targets).mean()
    return -((1 - smoothing) * of_codes + smoothing * log_p.mean())
