"""The transformer: LlamaGen's class-conditional GPT (arXiv 2406.06525), with its weight names.

Letters in shapes: B images, T positions, D width, V codes in the codebook, S positions in the
key-value cache (models/generate.py).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from autoregressive.models.patch import check_patch_side, patch_codes, patch_loss
from autoregressive.models.rope import apply_rope, rope_table


@dataclass
class ModelArgs:
    dim: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None  # fewer key/value heads than heads: grouped-query attention
    multiple_of: int = 256  # the feed-forward width is rounded up to it
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    initializer_range: float = 0.02

    token_dropout_p: float = 0.1
    attn_dropout_p: float = 0.0
    resid_dropout_p: float = 0.1
    ffn_dropout_p: float = 0.1
    drop_path_rate: float = 0.0  # of the last layer; grows linearly from 0 at the first

    num_classes: int = 1000
    class_dropout_prob: float = 0.1  # above 0 adds the null class, index num_classes
    vocab_size: int = 16384
    block_size: int = 256  # codes an image
    grid: tuple[int, int] | None = None  # rows and columns of codes; default: the square of block_size
    model_type: str = "c2i"
    cls_token_num: int = 1
    activation_checkpointing: bool = False  # recompute each layer in backward

    def __post_init__(self):
        if self.grid is None:
            side = math.isqrt(self.block_size)
            self.grid = (side, side)
        self.grid = tuple(self.grid)
        if math.prod(self.grid) != self.block_size:
            raise ValueError(f"a grid of {self.grid[0]}x{self.grid[1]} codes does not hold {self.block_size} codes")
        if self.model_type != "c2i" or self.cls_token_num != 1:
            raise ValueError("only class-conditional models (model_type='c2i', cls_token_num=1) exist here")
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.dim % self.n_head or self.n_head % self.n_kv_head:
            raise ValueError(
                f"width {self.dim}, {self.n_head} heads and {self.n_kv_head} key/value heads do not divide"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_head

    @property
    def ffn_dim(self) -> int:
        return -(-int(2 * 4 * self.dim / 3) // self.multiple_of) * self.multiple_of


class LabelEmbedder(nn.Module):
    """Class labels to vectors; in training a label becomes the null class with probability `dropout_prob`."""

    def __init__(self, num_classes: int, dim: int, dropout_prob: float):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), dim)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def forward(self, labels: torch.Tensor) -> torch.Tensor:  # (B,) -> (B, D)
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.dropout_prob
            labels = torch.where(dropped, self.num_classes, labels)
        return self.embedding_table(labels)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


class FeedForward(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.ffn_dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.ffn_dim, bias=False)
        self.w2 = nn.Linear(args.ffn_dim, args.dim, bias=False)
        self.ffn_dropout = nn.Dropout(args.ffn_dropout_p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ffn_dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.head_dim = args.head_dim
        self.n_head = args.n_head
        self.n_kv_head = args.n_kv_head
        self.wqkv = nn.Linear(args.dim, (args.n_head + 2 * args.n_kv_head) * args.head_dim, bias=False)
        self.wo = nn.Linear(args.dim, args.dim, bias=False)
        self.attn_dropout_p = args.attn_dropout_p
        self.resid_dropout = nn.Dropout(args.resid_dropout_p)

    def forward(self, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        """Causal attention over `x` `(B, T, D)`."""
        q, k, v = self._project(x, rope)
        out = causal_attention(q, k, v, self.attn_dropout_p if self.training else 0.0)
        return self.resid_dropout(self.wo(out.transpose(1, 2).flatten(2)))

    def store(self, x, rope, keys, values, position):
        """Write the key and value of one position `x` `(B, 1, D)` into the cache; return its query."""
        q, k, v = self._project(x, rope)
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        return q

    def attend(self, q, keys, values, mask):
        """Queries `(B, n_head, 1, head_dim)` over `(B, n_kv_head, S, head_dim)`; `mask` is added to the scores."""
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=self._grouped)
        return out.transpose(1, 2).flatten(2)

    @property
    def _grouped(self) -> bool:
        return self.n_kv_head != self.n_head

    def _project(self, x, rope):  # -> q (B, n_head, T, head_dim), k and v (B, n_kv_head, T, head_dim)
        q, k, v = (
            self.wqkv(x).unflatten(-1, (-1, self.head_dim)).split([self.n_head, self.n_kv_head, self.n_kv_head], 2)
        )
        return apply_rope(q, rope).transpose(1, 2), apply_rope(k, rope).transpose(1, 2), v.transpose(1, 2)


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """Queries `(B, n_head, T, head_dim)` over keys and values `(B, n_kv_head, T, head_dim)` up to their position."""
    grouped = q.shape[1] != k.shape[1]
    if q.device.type != "cpu" or q.dtype not in (torch.bfloat16, torch.float16):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True, enable_gqa=grouped)
    with torch.autocast("cpu", enabled=False):  # its backward pass in 16 bits takes 2.5 to 12 times as long as in 32
        return causal_attention(q.float(), k.float(), v.float(), dropout_p).to(q.dtype)


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, zeroes the whole branch of an image with probability `p`."""

    def __init__(self, p: float):
        super().__init__()
        self.active = p > 0
        self.register_buffer("p", torch.tensor(p), persistent=False)  # a tensor: layers share one compiled graph

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.active or not self.training:
            return x
        keep = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.p
        return x * (keep / (1 - self.p)).type_as(x)


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs, drop_path: float):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.attention(self.attention_norm(x), rope))
        return x + self.drop_path(self.feed_forward(self.ffn_norm(x)))

    # Decoding one position is split around the attention, whose length grows: the parts on both sides have one
    # shape for a whole image, so that each is compiled once for all layers and all positions.
    def before_attention(self, x, rope, keys, values, position):
        return self.attention.store(self.attention_norm(x), rope, keys, values, position)

    def after_attention(self, x, attended):
        x = x + self.attention.wo(attended)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """Predicts image codes in raster order from a class label, as patches of any side that tiles the grid."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = self.config = args
        self.cls_embedding = LabelEmbedder(args.num_classes, args.dim, args.class_dropout_prob)
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.tok_dropout = nn.Dropout(args.token_dropout_p)
        drop_path_step = args.drop_path_rate / max(1, args.n_layer - 1)
        self.layers = nn.ModuleList(TransformerBlock(args, i * drop_path_step) for i in range(args.n_layer))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.set_rope_tables()
        self.apply(self._init_weights)
        nn.init.zeros_(self.output.weight)

    def set_rope_tables(self) -> None:
        """(Re)compute the rotary tables, on the CPU or the current `torch.device`: they are not in the state dict."""
        height, width = self.args.grid
        for side in (s for s in range(1, min(self.args.grid) + 1) if height % s == 0 and width % s == 0):
            table = rope_table(height // side, width // side, self.args.head_dim, self.args.rope_base)
            self.register_buffer(f"rope_{side}", table, persistent=False)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.args.initializer_range)

    def forward(
        self, idx: torch.Tensor, cond_idx: torch.Tensor, targets: torch.Tensor | None = None, patch_side: int = 1
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Teacher-forced pass over whole images, the same in train and eval mode but for dropout.

        `idx` `(B, H*W)` codes, `cond_idx` `(B,)` labels. Position `i` sees the class and the patches before `i`.
        Returns `(logits, None)`, logits `(B, H*W/patch_side**2, V)` in float32; with `targets` `(B, H*W)` (the codes
        again) `(None, loss)`, the loss of `patch_loss`. Raises `ValueError` if patches do not tile the grid.
        """
        check_patch_side(self.args.grid, patch_side)
        if idx.shape[1] != self.args.block_size:
            raise ValueError(f"expected {self.args.block_size} codes an image, got {idx.shape[1]}")
        patches = self.tok_embeddings(patch_codes(idx, self.args.grid, patch_side)).mean(2)  # (B, H*W/side**2, D)
        x = torch.cat([self.cls_embedding(cond_idx).unsqueeze(1), patches[:, :-1]], dim=1)
        x = self.tok_dropout(x)
        rope = getattr(self, f"rope_{patch_side}")[: x.shape[1]]
        for layer in self.layers:
            if self.args.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, use_reentrant=False)
            else:
                x = layer(x, rope)
        if targets is None:
            return self.output(self.norm(x)).float(), None
        return None, self.head_loss(x, patch_codes(targets, self.args.grid, patch_side))

    def head_loss(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Loss of `targets` `(B, N, k)` from the last layer's output `(B, N, D)`."""
        return patch_loss(self.norm(x), self.output.weight, targets)


GPT_SIZES = {  # name: (layers, heads, width)
    "GPT-Tiny": (4, 4, 128),  # tests and the quickstart
    "GPT-B": (12, 12, 768),
    "GPT-L": (24, 16, 1024),
    "GPT-XL": (36, 20, 1280),
    "GPT-XXL": (48, 24, 1536),
    "GPT-XXXL": (48, 40, 2560),
    "GPT-1B": (22, 32, 2048),
    "GPT-3B": (24, 32, 3200),
    "GPT-7B": (32, 32, 4096),
}


def model_args(name: str, **settings) -> ModelArgs:
    """Settings of the published size `name`."""
    n_layer, n_head, dim = GPT_SIZES[name]
    return ModelArgs(n_layer=n_layer, n_head=n_head, dim=dim, **settings)


def _constructor(name: str):
    return lambda **settings: Transformer(model_args(name, **settings))


GPT_models = {name: _constructor(name) for name in GPT_SIZES}
