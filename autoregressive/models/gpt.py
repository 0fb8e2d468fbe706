"""The transformer: LlamaGen's GPT over image codes (arXiv 2406.06525), with its weight names.

Letters in shapes: B images, T positions, D width, V codes in the codebook, N patches, S positions in the key-value
cache (models/generate.py).
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from autoregressive.models.conditioning import Conditioning, LabelEmbedder
from autoregressive.models.losses import patch_loss
from autoregressive.models.patch import check_patch_side, patch_codes, patch_embeddings
from utils.settings import option, recipe, settings


def _size(default: int | None, help: str = "follows from --gpt-model"):
    return recipe(default, help, at_least=1, flag=None)


@settings("model")
class ModelArgs:
    """Everything that builds the model; a checkpoint records all of it. A field with a flag is a flag of the trainer.

    Raises `ValueError` for sizes that do not fit together.
    """

    dim: int = _size(768)
    n_layer: int = _size(12)
    n_head: int = _size(12)
    n_kv_head: int | None = _size(None, "fewer key/value heads than heads: grouped-query attention")
    multiple_of: int = _size(256, "the feed-forward width is rounded up to a multiple")
    rope_base: float = recipe(10000.0, "base of the rotary frequencies", above=0, flag=None)
    norm_eps: float = recipe(1e-5, "epsilon of RMSNorm", above=0, flag=None)
    initializer_range: float = recipe(0.02, "std of the initial weights", at_least=0, flag=None)

    token_dropout_p: float = recipe(0.1, "dropout of the embeddings", at_least=0, below=1)
    attn_dropout_p: float = recipe(0.0, "dropout of the attention weights", at_least=0, below=1, flag=None)
    resid_dropout_p: float = recipe(
        0.1, "dropout of the outputs of attention and feed-forward layers", at_least=0, below=1, flag="--dropout-p"
    )
    ffn_dropout_p: float = recipe(0.1, "set together with resid_dropout_p", at_least=0, below=1, flag="--dropout-p")
    drop_path_rate: float = recipe(
        0.0,
        "stochastic depth (arXiv 1603.09382) of the last layer, growing linearly from 0 at the first",
        at_least=0,
        below=1,
    )

    num_classes: int = recipe(1000, "classes of the data", at_least=1)
    class_dropout_prob: float = recipe(
        0.1,
        "share of images trained under the null class; 0 leaves a model without classifier-free guidance",
        at_least=0,
        at_most=1,
        flag="--class-dropout-p",
    )
    vocab_size: int = recipe(16384, "codes in the codebook of the tokenizer", at_least=1)
    block_size: int = _size(256, "codes per image")
    grid: tuple[int, int] | None = _size(None, "rows and columns of codes; default: the square of block_size")
    model_type: str = recipe("c2i", "class-conditional", choices=("c2i",), flag="--gpt-type")
    cls_token_num: int = recipe(1, "positions that stand before the codes: 1 for a class label", at_least=1)
    activation_checkpointing: bool = option(
        False, "recompute layers in the backward pass: less memory, about a third more compute"
    )

    def __post_init__(self):
        side = math.isqrt(self.block_size)
        object.__setattr__(self, "grid", tuple(self.grid or (side, side)))
        object.__setattr__(self, "n_kv_head", self.n_kv_head or self.n_head)
        if math.prod(self.grid) != self.block_size:
            raise ValueError(f"a grid of {self.grid[0]}x{self.grid[1]} codes does not hold {self.block_size} codes")
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

    def project(self, x: torch.Tensor, rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query `(B, n_head, T, head_dim)`, key and value `(B, n_kv_head, T, head_dim)` of `x` `(B, T, D)`."""
        heads = [self.n_head, self.n_kv_head, self.n_kv_head]
        q, k, v = self.wqkv(x).unflatten(-1, (-1, self.head_dim)).split(heads, 2)
        return apply_rope(q, rope).transpose(1, 2), apply_rope(k, rope).transpose(1, 2), v.transpose(1, 2)

    def combine(self, attended: torch.Tensor) -> torch.Tensor:
        """`(B, n_head, T, head_dim)` of all heads to `(B, T, D)`."""
        return self.resid_dropout(self.wo(attended.transpose(1, 2).flatten(2)))


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """Queries `(B, n_head, T, head_dim)` over keys and values `(B, n_kv_head, T, head_dim)` up to their position."""
    grouped = q.shape[1] != k.shape[1]
    if q.device.type != "cpu" or q.dtype not in (torch.bfloat16, torch.float16):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True, enable_gqa=grouped)
    # In 16 bits it takes 2 to 12 times as long to train; with AMX and 256 positions, though, 0.8 times.
    with torch.autocast("cpu", enabled=False):
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
        q, k, v = self.before_attention(x, rope)
        dropout_p = self.attention.attn_dropout_p if self.training else 0.0
        return self.after_attention(x, causal_attention(q, k, v, dropout_p))

    # Decoding (models/generate.py) puts its cache between these two. What grows with the position is the attention
    # alone, so that each of the two is compiled once for all layers and all positions.
    def before_attention(self, x: torch.Tensor, rope: torch.Tensor):
        return self.attention.project(self.attention_norm(x), rope)

    def after_attention(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.attention.combine(attended))
        return x + self.drop_path(self.feed_forward(self.ffn_norm(x)))


class Transformer(nn.Module):
    """Predicts image codes in raster order after a condition, as patches of any side that tiles the grid.

    `conditioning` makes the module that stands before the image, `loss` is what `targets` are compared by.
    """

    def __init__(
        self,
        args: ModelArgs,
        conditioning: Callable[[ModelArgs], Conditioning] = LabelEmbedder,
        loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = patch_loss,
    ):
        super().__init__()
        self.args = self.config = args
        self.loss = loss
        self.cls_embedding = conditioning(args)
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
            grid, before = (height // side, width // side), self.args.cls_token_num
            table = rope_table(*grid, self.args.head_dim, self.args.rope_base, before)
            self.register_buffer(f"rope_{side}", table, persistent=False)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.args.initializer_range)

    def forward(
        self, idx: torch.Tensor, cond_idx: torch.Tensor, targets: torch.Tensor | None = None, patch_side: int = 1
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Teacher-forced pass over whole images, the same in train and eval mode but for dropout.

        `idx` `(B, H*W)` codes, `cond_idx` `(B,)` labels, or what another conditioning takes. Patch `i` is predicted
        from the condition and the patches before `i`. Returns `(logits, None)`, logits `(B, H*W/patch_side**2, V)` in
        float32; with `targets` `(B, H*W)` (the codes again) `(None, loss)`. Raises `ValueError` if patches do not tile
        the grid.
        """
        check_patch_side(self.args.grid, patch_side)
        if idx.shape[1] != self.args.block_size:
            raise ValueError(f"expected {self.args.block_size} codes per image, got {idx.shape[1]}")
        condition = self.cls_embedding(cond_idx, self._dropped_conditions(idx))  # (B, cls_token_num, D)
        self.check_condition(condition)
        patches = patch_embeddings(self.tok_embeddings(patch_codes(idx, self.args.grid, patch_side)))  # (B, N, D)
        x = self.tok_dropout(torch.cat([condition, patches[:, :-1]], dim=1))
        rope = getattr(self, f"rope_{patch_side}")[: x.shape[1]]
        for layer in self.layers:
            if self.args.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, use_reentrant=False)
            else:
                x = layer(x, rope)
        x = x[:, condition.shape[1] - 1 :]  # (B, N, D): the last position of the condition predicts the first patch
        if targets is None:
            return self.logits(x), None
        return None, self.head_loss(x, patch_codes(targets, self.args.grid, patch_side))

    def head_input(self, x: torch.Tensor) -> torch.Tensor:
        """What the head's weight multiplies, of the last layer's output `(…, D)`: for the loss as for drawing."""
        return self.norm(x)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """`(…, V)` float32 of the last layer's output `(…, D)`."""
        return self.output(self.head_input(x)).float()

    def head_loss(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Loss of `targets` `(B, N, k)` from the last layer's output `(B, N, D)`."""
        return self.loss(self.head_input(x), self.output.weight, targets)

    def check_condition(self, condition: torch.Tensor) -> None:
        """Raise `ValueError` unless the conditioning gave as many vectors as the rotary tables have rows for."""
        if condition.shape[1] != self.args.cls_token_num:
            raise ValueError(
                f"the conditioning gives {condition.shape[1]} vectors per image, cls_token_num is "
                f"{self.args.cls_token_num}"
            )

    def _dropped_conditions(self, idx: torch.Tensor) -> torch.Tensor | None:
        """In training, `(B,)` bool: which images learn the null condition of classifier-free guidance."""
        if not self.training or self.args.class_dropout_prob == 0:
            return None
        return torch.rand(idx.shape[0], device=idx.device) < self.args.class_dropout_prob


def rope_table(height: int, width: int, head_dim: int, base: float = 10000.0, before: int = 1) -> torch.Tensor:
    """Cosines and sines for `before` positions of the condition and a raster-ordered grid, in float32.

    2-D rotary position embedding (RoFormer, arXiv 2104.09864, on rows and columns). Returns
    `(before + height*width, head_dim/2, 2)`. The first half of the frequencies turns with the row, the second with the
    column. The condition's rows are all zero, which zeroes its query and key: published weights were trained so.
    """
    if head_dim % 4:
        raise ValueError(f"a 2-D rotary table needs a head size divisible by 4, got {head_dim}")
    axis_dim = head_dim // 2
    frequencies = 1.0 / base ** (torch.arange(0, axis_dim, 2, dtype=torch.float32) / axis_dim)  # (head_dim/4,)
    rows = torch.arange(height, dtype=torch.float32)[:, None] * frequencies
    columns = torch.arange(width, dtype=torch.float32)[:, None] * frequencies
    angles = torch.cat(
        [rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=-1
    )  # (height, width, head_dim/2)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(0, 1)
    return torch.cat([torch.zeros_like(table[:1]).expand(before, -1, -1), table])


def apply_rope(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring channel pairs of `x` `(B, T, heads, head_dim)` by `table` `(T, head_dim/2, 2)`."""
    cos, sin = table[:, None].unbind(-1)  # (T, 1, head_dim/2)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, heads, head_dim/2)
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return rotated.flatten(-2).type_as(x)


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


def model_args(name: str, settings: ModelArgs | None = None, **changes) -> ModelArgs:
    """Settings of the published size `name`, the rest from `settings` (default: the published ones) and `changes`."""
    n_layer, n_head, dim = GPT_SIZES[name]
    sizes = {"n_layer": n_layer, "n_head": n_head, "n_kv_head": None, "dim": dim}
    if "block_size" in changes:
        sizes["grid"] = None  # its square, unless `changes` says otherwise
    return replace(settings or ModelArgs(), **(sizes | changes))


def _constructor(name: str):
    return lambda **settings: Transformer(model_args(name, **settings))


GPT_models = {name: _constructor(name) for name in GPT_SIZES}
