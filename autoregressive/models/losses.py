"""The patch loss (Next Patch Prediction, arXiv 2412.15321): its definition, and the fast one that equals it.

A loss is a function of the last hidden states `(B, N, D)`, the head's weight `(V, D)` and the patches' codes
`(B, N, k)` that returns a scalar; one of your own (docs/extending.md) looks like `plain_patch_loss`.
"""

import torch
import torch.nn.functional as F

# Logits held at once by the fast loss, in elements: large enough for full-speed matrix products.
CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}


def plain_patch_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean over patches of the mean over their codes `t` of `-log softmax(hidden @ weight.T)[t]`."""
    log_p = F.log_softmax(F.linear(hidden, weight).float(), dim=-1)  # (B, N, V)
    return -log_p.gather(-1, targets).mean()


def patch_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`plain_patch_loss` in float32, without holding all logits.

    Logits exist only a chunk of rows at a time, and are turned into their gradient where they are made (cf. Liger
    Kernel, arXiv 2410.10989): memory does not grow with the batch and no product is computed twice.
    """
    hidden, targets = hidden.flatten(0, 1), targets.flatten(0, 1)
    autocast = torch.is_autocast_enabled(hidden.device.type)
    dtype = torch.get_autocast_dtype(hidden.device.type) if autocast else hidden.dtype
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _PatchLoss.apply(hidden, weight, targets, dtype)
    return _loss_and_gradients(hidden, weight, targets, dtype, with_gradients=False)[0]


class _PatchLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype):
        loss, d_hidden, d_weight = _loss_and_gradients(hidden, weight, targets, dtype, with_gradients=True)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        d_hidden, d_weight = ctx.saved_tensors  # of the sum over rows: in 16 bits their mean would vanish
        scale = d_loss / d_hidden.shape[0]
        return (d_hidden.float() * scale).to(ctx.dtypes[0]), (d_weight * scale).to(ctx.dtypes[1]), None, None


def _loss_and_gradients(hidden, weight, targets, dtype, with_gradients):
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    rows, vocab = hidden.shape[0], weight.shape[0]
    chunks = -(-rows * vocab // CHUNK_ELEMENTS.get(hidden.device.type, 2**27))
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    d_hidden, d_weight = [], None
    with torch.autocast(hidden.device.type, enabled=False):
        for h, t in zip(hidden.chunk(chunks), targets.chunk(chunks), strict=True):
            log_p = F.log_softmax(h @ weight.T, dim=-1, dtype=torch.float32)  # (rows in the chunk, V)
            loss = loss - log_p.gather(1, t).mean(1).sum() / rows  # in place, torch 2.11 compiles to zero gradients
            if not with_gradients:
                continue
            # d loss / d logits, times rows: softmax - 1/k at each of the k targets
            d_logits = log_p.exp_().scatter_add_(1, t, log_p.new_full((1, 1), -1 / t.shape[1]).expand_as(t)).to(dtype)
            d_hidden.append(d_logits @ weight)
            part = (d_logits.T @ h).float()
            d_weight = part if d_weight is None else d_weight.add_(part)
    if not with_gradients:
        return loss, None, None
    return loss, torch.cat(d_hidden), d_weight
