"""Linear layers on the CPU whose weights lie in the order that oneDNN's kernels read them.

An ordinary linear layer brings its weights into that order at every call, which for the few rows of one decoding step
takes about as long as the product itself. `torch.compile` packs with the same operators, but needs a C++ compiler.
And in float32 a row's result is the same whatever rows are beside it and whatever the number of threads, which
ordinary products do not promise; tests/unit/test_packed_linear.py holds this. That is what `--parallel` is exact by.
"""

import torch
from torch import nn

from autoregressive.models.gpt import FeedForward

ROWS_EXPECTED = 16  # a hint for the order; it does not change results


class PackedLinear(nn.Module):
    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.out_features = linear.out_features
        self.bias = linear.bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS_EXPECTED)

    def forward(self, x: torch.Tensor, then: str = "none") -> torch.Tensor:
        rows = x.flatten(0, -2)
        single = len(rows) == 1  # one row alone is multiplied by another kernel, which rounds differently
        rows = rows.expand(2, -1).contiguous() if single else rows
        product = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, then, [], "")
        return (product[:1] if single else product).view(*x.shape[:-1], self.out_features)


class PackedFeedForward(nn.Module):
    """`FeedForward` whose SiLU is part of the product before it.

    By itself it rounds differently where a thread's share of the elements ends within a vector register.
    """

    def __init__(self, feed_forward: FeedForward):
        super().__init__()
        self.w1, self.w3, self.w2 = map(PackedLinear, (feed_forward.w1, feed_forward.w3, feed_forward.w2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.w1(x, then="swish") * self.w3(x))


def pack_linears(model: nn.Module) -> None:
    """Replace every linear layer of `model` on the CPU, which must have no biases; without oneDNN do nothing.

    The model can then no longer be trained, moved or saved.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return
    dtype = next(model.parameters()).dtype
    in_bf16 = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not (dtype == torch.float32 or in_bf16):
        return
    _pack_children(model)


def _pack_children(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, FeedForward):
            setattr(module, name, PackedFeedForward(child))
        elif isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child))
        else:
            _pack_children(child)
