"""The published GPT's training step and sampling loop in plain form, on this program's weights: what others run today.

What the public code of NPP (commit e333f2c) and LlamaGen (ce98ec4) computes, in the same order and number formats, and
with its optimizer, compilation and waiting for the device. Left out: DDP around one process, which only costs time.
Targets are grouped by a reshape, as the public `unfold` of integers exists only where it is compiled.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoregressive.models.gpt import ModelArgs, Transformer, TransformerBlock, rope_table
from utils.precision import autocast

# What `sdp_kernel(enable_flash=False, enable_mem_efficient=False, enable_math=True)` leaves, in the public loop.
BACKENDS = [SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION]


class Cache(nn.Module):
    """Keys and values `(R, n_head, S, head_dim)` of one layer."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        super().__init__()
        self.register_buffer("keys", torch.zeros(shape, dtype=dtype))
        self.register_buffer("values", torch.zeros(shape, dtype=dtype))


class PublishedBlock(TransformerBlock):
    """Attention in the type that autocast gives it; keys and values copied for the heads, were it once for one."""

    cache: Cache | None  # while decoding

    def forward(self, x: torch.Tensor, rope: torch.Tensor, position=None, mask=None) -> torch.Tensor:
        query, keys, values = self.before_attention(x, rope)
        if self.cache is not None:
            self.cache.keys[:, :, position], self.cache.values[:, :, position] = keys, values
            keys, values = self.cache.keys, self.cache.values
        times = self.attention.n_head // self.attention.n_kv_head
        keys, values = keys.repeat_interleave(times, 1), values.repeat_interleave(times, 1)
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=mask is None)
        return self.after_attention(x, attended)


class PublishedTransformer(Transformer):
    """The same weights; `forward` is the published one for training, for the class and for one token."""

    def __init__(self, args: ModelArgs):
        super().__init__(args)
        for layer in self.layers:
            layer.__class__ = PublishedBlock
            layer.cache = None

    def forward(
        self, idx=None, cond_idx=None, position=None, targets=None, patch_side: int = 1, rope=None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Training: codes, labels, codes again and the rotary table. Decoding: codes or labels, and a position."""
        if position is not None:
            x = self.tok_embeddings(idx) if cond_idx is None else self.cls_embedding(cond_idx)
            rope, mask = self.decoding_rope[position], self.causal_mask[: len(x), None, position]
        else:
            x = self._training_input(idx, cond_idx, patch_side)
            rope, mask = rope.to(x.device)[: x.shape[1]], None
        x = self.tok_dropout(x)
        for layer in self.layers:
            x = layer(x, rope, position, mask)
        logits = self.output(self.norm(x)).float()
        if targets is None:
            return logits, None
        if patch_side == 1:
            return logits, F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))
        logits = logits.view(-1, logits.shape[-1]).unsqueeze(1).repeat(1, patch_side**2, 1)
        return logits, F.cross_entropy(logits.view(-1, logits.shape[-1]), self._grouped(targets, patch_side))

    def _training_input(self, idx: torch.Tensor, labels: torch.Tensor, side: int) -> torch.Tensor:
        """The class and all patches but the last, `(B, N, D)`; patches are averaged after an unfold."""
        (height, width), x = self.args.grid, self.tok_embeddings(idx)
        if side > 1:
            batch, _, dim = x.shape
            image = x.reshape(batch, height, width, dim).permute(0, 3, 1, 2)
            columns = F.unfold(image, (side, side), stride=(side, side)).transpose(1, 2)  # (B, N, D*k)
            x = columns.view(batch, -1, dim, side**2).permute(0, 1, 3, 2).mean(2)
        return torch.cat([self.cls_embedding(labels, self._dropped_conditions(idx)), x[:, :-1]], 1)

    def _grouped(self, codes: torch.Tensor, side: int) -> torch.Tensor:
        height, width = self.args.grid
        blocks = codes.view(len(codes), height // side, side, width // side, side)
        return blocks.transpose(2, 3).reshape(-1)

    def set_caches(self, rows: int, length: int) -> None:
        """New caches, masks and table, as before every batch of the public loop; on the current `torch.device`."""
        args, length = self.args, -(-length // 8) * 8
        for layer in self.layers:
            shape = (rows, args.n_head, length, args.head_dim)
            layer.cache = Cache(shape, self.tok_embeddings.weight.dtype)
        mask = torch.tril(torch.ones(length, length, dtype=torch.bool))
        self.causal_mask = mask.unsqueeze(0).repeat(rows, 1, 1)
        self.decoding_rope = rope_table(*args.grid, args.head_dim, args.rope_base)


class PublishedStep:
    """One training step of the public trainer on the same batch; compiled as a whole, as there, if asked for."""

    def __init__(self, args: ModelArgs, device: torch.device, precision: str, compiled: bool):
        self.device, self.precision = device, precision
        torch.manual_seed(0)
        self.model = PublishedTransformer(args).to(device)
        self.call = torch.compile(self.model) if compiled else self.model
        decayed = [parameter for parameter in self.model.parameters() if parameter.dim() >= 2]
        others = [parameter for parameter in self.model.parameters() if parameter.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
        self.ropes: dict[int, torch.Tensor] = {}

    def __call__(self, codes: torch.Tensor, labels: torch.Tensor, side: int) -> float:
        args = self.model.args
        if side not in self.ropes:  # made once an epoch there, and moved at every step
            self.ropes[side] = rope_table(*(size // side for size in args.grid), args.head_dim, args.rope_base)
        with autocast(self.device, self.precision):
            _, loss = self.call(codes, labels, targets=codes, patch_side=side, rope=self.ropes[side])
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


@torch.no_grad()
def published_tokens(
    call: Callable, model: PublishedTransformer, labels: torch.Tensor, length: int, cfg_scale: float, greedy=False
) -> Iterator[torch.Tensor]:
    """The public loop: codes `(B, 1)` one by one. `call` is `model`, or what compiling it gave."""
    guided, device = cfg_scale > 1.0, labels.device
    conditions = torch.cat([labels, torch.ones_like(labels) * model.args.num_classes]) if guided else labels
    with device:
        model.set_caches(len(conditions), length + 1)
    logits, _ = call(None, conditions, torch.arange(0, 1, device=device))
    code = sample(logits, cfg_scale, greedy)[0]
    yield code
    position, kept = torch.tensor([1], device=device, dtype=torch.int), []
    for _ in range(length - 1):
        with sdpa_kernel(BACKENDS):
            logits, _ = call(torch.cat([code, code]) if guided else code, None, position)
            code, probabilities = sample(logits, cfg_scale, greedy)
            position += 1
            kept.append((code.clone(), probabilities.clone()))
        yield code


def sample(logits: torch.Tensor, cfg_scale: float, greedy: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes `(B, 1)` and all probabilities, at temperature 1 without filters."""
    if cfg_scale > 1.0:
        conditional, unconditional = logits.split(len(logits) // 2)
        logits = unconditional + (conditional - unconditional) * cfg_scale
    probabilities = F.softmax(logits[:, -1, :] / 1.0, dim=-1)
    drawn = torch.topk(probabilities, 1, dim=-1)[1] if greedy else torch.multinomial(probabilities, num_samples=1)
    return drawn, probabilities
