"""Decoding images token by token with a key-value cache, classifier-free guidance, top-k and top-p.

On the CPU each token runs eagerly over exactly the part of the cache that is filled. On a GPU every shape is static:
the cache is read in `LENGTHS` growing lengths, and the whole step of each (transformer, guidance, filtering, draw) is
one CUDA graph, so that nothing between two tokens waits for Python or allocates.

Letters in shapes: B images, R rows (2B while guided: conditional, then unconditional), D width, V codes, N tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from autoregressive.models.filtering import draw_codes, filter_logits
from autoregressive.models.gpt import Transformer, TransformerBlock
from autoregressive.models.guidance import guidance_scales, guided_tokens

LENGTHS = 8  # of the cache on a GPU: shorter reads against more graphs to capture


@dataclass(frozen=True)
class Sampling:
    """How codes are drawn; raises `ValueError` for values out of range."""

    cfg_scale: float = 1.0  # 1: no guidance
    cfg_interval: int = -1  # n > -1: tokens after the first n + 2 are unguided
    cfg_schedule: str = "constant"
    cfg_power: float = 1.0  # of the power-cosine schedule
    temperature: float = 1.0
    top_k: int = 0  # 0: all codes
    top_p: float = 1.0
    sample_logits: bool = True  # False: the likeliest code

    def __post_init__(self):
        for name, value, valid, expected in (
            ("cfg_scale", self.cfg_scale, self.cfg_scale >= 1, "at least 1 (1: no guidance)"),
            ("cfg_interval", self.cfg_interval, self.cfg_interval >= -1, "-1 (guide all tokens) or more"),
            ("cfg_power", self.cfg_power, self.cfg_power > 0, "above 0"),
            ("temperature", self.temperature, self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all codes) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not valid:
                raise ValueError(f"{name} is {value}; it must be {expected}")
        guidance_scales(self.cfg_schedule, self.cfg_scale, 1, self.cfg_power)


def compile_repeatably(function: Callable) -> Callable:
    """Compile for fixed shapes with kernels that are not chosen by timing: every rank and every start rounds alike."""
    return torch.compile(function, fullgraph=True, dynamic=False, options={"deterministic": True})


@torch.no_grad()
def generate(
    model: Transformer,
    cond: torch.Tensor,
    max_new_tokens: int,
    cfg_scale: float = 1.0,
    cfg_interval: int = -1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    sample_logits: bool = True,
    *,
    cfg_schedule: str = "constant",
    cfg_power: float = 1.0,
    uniforms: torch.Tensor | None = None,
) -> torch.Tensor:
    """Codes `(B, max_new_tokens)` int64 for class labels `cond` `(B,)`.

    `uniforms` `(B, max_new_tokens)` float64 in [0, 1) decides every draw; by default it comes from PyTorch's generator
    of the model's device. Raises `ValueError` for settings out of range and for labels the model has no class for,
    `FloatingPointError` if the model's logits are not finite.
    """
    sampling = Sampling(cfg_scale, cfg_interval, cfg_schedule, cfg_power, temperature, top_k, top_p, sample_logits)
    generator = CodeGenerator(model, len(cond), max_new_tokens, sampling)
    if cond.min() < 0 or cond.max() >= model.cls_embedding.embedding_table.num_embeddings:
        raise ValueError(f"labels must lie in 0..{model.args.num_classes - 1}")
    if uniforms is None:
        uniforms = torch.rand(len(cond), max_new_tokens, dtype=torch.float64, device=generator.device)
    codes = generator(cond, uniforms)
    generator.check_finite()
    return codes


class CodeGenerator:
    """Generates `length` codes for batches of one size; caches, compiled kernels and CUDA graphs are made once."""

    def __init__(
        self, model: Transformer, batch_size: int, length: int, sampling: Sampling, compile: bool = False
    ) -> None:
        args = model.args
        if not 0 < length <= args.block_size:
            raise ValueError(f"this model generates 1 to {args.block_size} tokens, not {length}")
        self.guided = guided_tokens(sampling.cfg_scale, sampling.cfg_interval, length)
        if self.guided and not args.class_dropout_prob:
            raise ValueError("this model has no null class (class_dropout_prob is 0) and cannot be guided")
        self.model, self.sampling = model, sampling
        self.batch_size, self.length = batch_size, length
        weight = model.tok_embeddings.weight
        self.device, dtype = weight.device, weight.dtype
        self.on_gpu = self.device.type == "cuda"
        self.length_step = -(-args.block_size // (8 * LENGTHS)) * 8  # masks are aligned to 8 elements

        rows = 2 * batch_size if self.guided else batch_size
        capacity = -(-args.block_size // self.length_step) * self.length_step
        shape = (args.n_layer, rows, args.n_kv_head, capacity, args.head_dim)
        with self.device:
            self.keys, self.values = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
            self.x = torch.zeros(rows, args.dim, dtype=dtype)  # embeddings of the last codes, at first of the classes
            self.position = torch.zeros(1, dtype=torch.int64)
            self.positions = torch.arange(capacity)
            self.uniforms = torch.zeros(batch_size, length, dtype=torch.float64)
            self.codes = torch.zeros(batch_size, length, dtype=torch.int64)
            self.finite = torch.ones((), dtype=torch.bool)
        scales = guidance_scales(sampling.cfg_schedule, sampling.cfg_scale, length, sampling.cfg_power)
        self.scales = scales.to(self.device)

        compiled = compile_repeatably if compile else lambda function: function
        self._before_attention = compiled(TransformerBlock.before_attention)
        self._after_attention = compiled(TransformerBlock.after_attention)
        self._pick_codes = compiled(CodeGenerator._next_codes)  # unbound: a bound method would keep `self` alive
        self._graphs: dict[tuple[int, bool], Callable[[], None]] = {}
        self._graph_memory = torch.cuda.graph_pool_handle() if self.on_gpu else None

    @torch.no_grad()
    def __call__(self, labels: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        """Codes `(B, N)` for `labels` `(B,)` and `uniforms` `(B, N)` float64; on a GPU returns before they are done."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.autocast(self.device.type, enabled=False):
                self.start(labels, uniforms)
                for token in range(self.length):
                    self.step(token)
        finally:
            self.model.train(training)
        return self.codes.clone()

    def check_finite(self) -> None:
        """Raise `FloatingPointError` if any logits so far were not finite; waits for the device."""
        if not self.finite:
            raise FloatingPointError("the model's logits are not finite")

    def start(self, labels: torch.Tensor, uniforms: torch.Tensor) -> None:
        """Begin a batch; `step` is then called for each token, from 0. `__call__` is both."""
        labels = labels.to(self.device, non_blocking=True)
        if self.guided:
            labels = torch.cat([labels, torch.full_like(labels, self.model.args.num_classes)])
        self.x.copy_(self.model.cls_embedding.embedding_table(labels))
        self.uniforms.copy_(uniforms, non_blocking=True)
        self.position.zero_()

    def step(self, token: int) -> None:
        guided = token < self.guided
        if not self.on_gpu:
            self._decode_token(token + 1, guided)
            return
        length = (token // self.length_step + 1) * self.length_step
        if replay := self._graphs.get((length, guided)):
            replay()
            return
        self._decode_token(length, guided)  # does this token's work and loads its kernels; capturing executes nothing
        self._graphs[length, guided] = self._capture(length, guided)

    def _capture(self, length: int, guided: bool) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # "thread_local": the thread that decodes images meanwhile may allocate and wait
        with torch.cuda.graph(graph, pool=self._graph_memory, capture_error_mode="thread_local"):
            self._decode_token(length, guided)
        return graph.replay

    def _decode_token(self, length: int, guided: bool) -> None:
        """One token of every image, from `self.x` to `self.codes` and the next `self.x`, reading `length` positions."""
        rows = 2 * self.batch_size if guided else self.batch_size
        x = self.x[:rows].unsqueeze(1)
        rope = self.model.rope_1[self.position]
        mask = None  # on the CPU the length is exactly what is filled
        if self.on_gpu:
            future = self.positions[:length] > self.position
            mask = torch.zeros(1, 1, 1, length, dtype=x.dtype, device=self.device).masked_fill_(future, -torch.inf)
        for i, layer in enumerate(self.model.layers):
            keys, values = self.keys[i, :rows], self.values[i, :rows]
            query = self._before_attention(layer, x, rope, keys, values, self.position)
            attended = layer.attention.attend(query, keys[:, :, :length], values[:, :, :length], mask)
            x = self._after_attention(layer, x, attended)
        codes, finite = self._pick_codes(self, x, guided)
        self.finite.logical_and_(finite)
        self.codes.index_copy_(1, self.position, codes.unsqueeze(1))
        embedded = self.model.tok_embeddings(codes)
        self.x[:rows] = torch.cat([embedded, embedded]) if guided else embedded
        self.position += 1

    def _next_codes(self, x: torch.Tensor, guided: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes `(B,)` after the last layer's output `x` `(R, 1, D)`, and whether all logits are finite."""
        logits = self.model.output(self.model.norm(x)).squeeze(1).float()
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + (conditional - unconditional) * self.scales[self.position]
        finite = logits.amax(-1).isfinite().all()
        if not self.sampling.sample_logits:
            return logits.argmax(-1), finite
        logits = filter_logits(logits, self.sampling.temperature, self.sampling.top_k, self.sampling.top_p)
        return draw_codes(logits, self.uniforms.index_select(1, self.position).squeeze(1)), finite
