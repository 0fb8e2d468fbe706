"""Decoding images token by token with a key-value cache, classifier-free guidance, top-k and top-p.

models/parallel.py draws the same codes several at a time.

On the CPU each token runs eagerly over the part of the cache that is filled. On a GPU every shape is static:
the cache is read in `LENGTHS` growing lengths, and the whole step of each (transformer, guidance, filtering, draw) is
one CUDA graph, so that nothing between two tokens waits for Python or allocates.

Letters in shapes: B images, R rows (2B while guided: conditional, then unconditional), D width, V codes, N tokens,
C positions of the condition.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from autoregressive.models.gpt import Transformer, TransformerBlock
from autoregressive.models.sampling import (
    Sampling,
    draw_codes,
    draw_gumbel,
    filter_logits,
    guidance_scales,
    guided_tokens,
    gumbel_noise,
)

LENGTHS = 8  # of the cache on a GPU: shorter reads against more graphs to capture
# On the CPU the cache is read to a multiple of this: an attention kernel that sums in vectors of up to 16 numbers then
# rounds the same however far it reads.
LENGTH_STEP = 16
NOISE_AHEAD = 2**25  # Gumbel numbers made before the first token, on a CPU: at most this many (128 MiB)
NOISE_AT_ONCE = 2**16
SHAPES_COMPILED = 64  # of one function: a pipeline in use meets many numbers of images

Draw = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def compile_repeatably(function: Callable) -> Callable:
    """Compile for fixed shapes with kernels that are not chosen by timing: every rank and every start rounds alike."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, SHAPES_COMPILED)  # beyond it, a further shape is an error
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
    """Codes `(B, max_new_tokens)` int64 for class labels `cond` `(B,)`, or what the model's conditioning takes.

    `uniforms` `(B, max_new_tokens)` float64 in [0, 1) decides every draw; by default it comes from PyTorch's generator
    of the model's device. Raises `ValueError` for settings out of range and for labels the model has no class for,
    `FloatingPointError` if the model's logits are not finite.
    """
    sampling = Sampling(
        cfg_scale=cfg_scale,
        cfg_interval=cfg_interval,
        cfg_schedule=cfg_schedule,
        cfg_power=cfg_power,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        sample_logits=sample_logits,
    )
    generator = CodeGenerator(model, len(cond), max_new_tokens, sampling)
    model.cls_embedding.check(cond)
    if uniforms is None:
        uniforms = torch.rand(len(cond), max_new_tokens, dtype=torch.float64, device=generator.device)
    codes = generator(cond, uniforms)
    generator.check_finite()
    return codes


class CodeGenerator:
    """Generates `length` codes for batches of one size; caches, compiled kernels and CUDA graphs are made once.

    `draw` turns guided and filtered logits `(B, V)`, uniform numbers `(B,)` and the tokens' places, `(1, 1)` or
    `(B, 1)`, into codes `(B,)`, as `draw_codes` does; by default `sampling.draw` says which.
    """

    def __init__(
        self,
        model: Transformer,
        batch_size: int,
        length: int,
        sampling: Sampling,
        compile: bool = False,
        draw: Draw | None = None,
    ) -> None:
        args = model.args
        if not 0 < length <= args.block_size:
            raise ValueError(f"this model generates 1 to {args.block_size} tokens, not {length}")
        self.guided = guided_tokens(sampling.cfg_scale, sampling.cfg_interval, length)
        if self.guided and not args.class_dropout_prob:
            raise ValueError("this model has no null class (class_dropout_prob is 0) and cannot be guided")
        self.model, self.sampling = model, sampling
        self.draw = draw or {"inverse-cdf": draw_codes, "gumbel": draw_gumbel}[sampling.draw]
        self.batch_size, self.length = batch_size, length
        weight = model.tok_embeddings.weight
        self.device, dtype = weight.device, weight.dtype
        self.on_gpu = self.device.type == "cuda"
        self.before = args.cls_token_num - 1  # positions that are filled before the first code is drawn
        positions = self.before + args.block_size
        # masks on a GPU are aligned to 8 elements
        self.length_step = -(-positions // (8 * LENGTHS)) * 8 if self.on_gpu else LENGTH_STEP

        self._make_room(-(-positions // self.length_step) * self.length_step, dtype)
        scales = guidance_scales(sampling.cfg_schedule, sampling.cfg_scale, length, sampling.cfg_power)
        self.scales = scales.to(self.device)

        compiled = compile_repeatably if compile else lambda function: function
        self._before_attention = compiled(self._project_and_store)
        self._after_attention = compiled(TransformerBlock.after_attention)
        self._pick_codes = compiled(CodeGenerator._next_codes)  # unbound: a bound method would keep `self` alive
        self._graphs: dict[tuple, Callable[[], None]] = {}
        self._graph_memory = torch.cuda.graph_pool_handle() if self.on_gpu else None

    def _make_room(self, capacity: int, dtype: torch.dtype) -> None:
        """The cache, for `capacity` positions, and whatever else a pass reads and writes, at addresses that stay."""
        args, rows = self.model.args, 2 * self.batch_size if self.guided else self.batch_size
        shape = (args.n_layer, rows, args.n_kv_head, capacity, args.head_dim)
        with self.device:
            self.keys, self.values = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
            self.x = torch.zeros(rows, args.dim, dtype=dtype)  # embeddings of the last codes
            self.token = torch.zeros(1, dtype=torch.int64)  # number of the code to draw
            self.positions = torch.arange(capacity)
            self.causal = torch.full((capacity, capacity), -torch.inf, dtype=dtype).triu(1)  # what scores are added to
            self.randomness = self._room_for_randomness()
            self.codes = torch.zeros(self.batch_size, self.length, dtype=torch.int64)
            self.known = torch.full((self.batch_size, self.length), -1)
            self.finite = torch.ones((), dtype=torch.bool)

    def _room_for_randomness(self) -> torch.Tensor:
        """`(B, N)` for uniform numbers, or on the CPU, if not too large, `(B, N, V)` for the noise made from them."""
        shape, vocab_size = (self.batch_size, self.length), self.model.args.vocab_size
        if self.draw is draw_gumbel and not self.on_gpu and self.batch_size * self.length * vocab_size <= NOISE_AHEAD:
            return torch.zeros(*shape, vocab_size)
        return torch.zeros(shape, dtype=torch.float64)

    @torch.no_grad()
    def __call__(self, cond: torch.Tensor, uniforms: torch.Tensor, known: torch.Tensor | None = None) -> torch.Tensor:
        """Codes `(B, N)` for `cond` `(B, …)` and `uniforms` `(B, N)` float64; on a GPU returns before they are done.

        `known` `(B, N)` int64: codes that are given and kept, -1 where one is to be drawn.
        """
        training = self.model.training
        self.model.eval()
        try:
            with torch.autocast(self.device.type, enabled=False):
                for _ in self.passes(cond, uniforms, known):
                    pass
        finally:
            self.model.train(training)
        return self.codes.clone()

    @torch.no_grad()
    def passes(self, cond: torch.Tensor, uniforms: torch.Tensor, known: torch.Tensor | None = None) -> Iterator[int]:
        """`__call__` a pass of the model at a time, the model being in eval mode and without autocast.

        Each gives the number of codes, from the first, that are then final in `codes` for all images. Consecutive
        codes that are known of all images take one pass together, at the end of the image none.
        """
        self.start(cond, uniforms, known)
        token = 0
        while token < self.length:
            if self.known_until[token] > token:
                token = self._take_known(token)
                self._go_on_from(token)
            else:
                self.step(token)
                token += 1
            yield token

    def check_finite(self) -> None:
        """Raise `FloatingPointError` if any logits so far were not finite; waits for the device."""
        if not self.finite:
            raise FloatingPointError("the model's logits are not finite")

    def start(self, cond: torch.Tensor, uniforms: torch.Tensor, known: torch.Tensor | None = None) -> None:
        """Begin a batch; `step` is then called for each token, from 0. `passes` is both."""
        cond, dropped = cond.to(self.device, non_blocking=True), None
        if self.guided:
            cond = torch.cat([cond, cond])
            dropped = torch.arange(len(cond), device=self.device) >= self.batch_size
        condition = self.model.cls_embedding(cond, dropped).to(self.x.dtype)  # (R, C, D)
        self.model.check_condition(condition)
        if self.before:
            self._prefill(condition[:, :-1], 0)
        self.x.copy_(condition[:, -1])
        if self.randomness.dim() == 2:
            self.randomness.copy_(uniforms, non_blocking=True)
        else:
            some = max(1, NOISE_AT_ONCE // self.randomness.shape[-1])
            parts = zip(uniforms.flatten().split(some), self.randomness.flatten(0, 1).split(some), strict=True)
            for part, room in parts:
                room.copy_(gumbel_noise(part, room.shape[-1]))
        self.some_known = known is not None
        self.known_until = list(range(self.length))  # for each token the first from there on that is to be drawn
        if self.some_known:
            self.known.copy_(known, non_blocking=True)
            known_of_all, end = (known >= 0).all(0).tolist(), self.length
            for token in reversed(range(self.length)):
                end = end if known_of_all[token] else token
                self.known_until[token] = end
        self.token.zero_()

    def _take_known(self, first: int) -> int:
        """Take over the codes from `first` on that are known of all images; returns the first that is not."""
        end = self.known_until[first]
        self.codes[:, first:end] = self.known[:, first:end]
        if end < self.length:
            guided = first < self.guided
            inputs = self.model.tok_embeddings(self.codes[:, max(0, first - 1) : end - 1])  # (B, end - first, D)
            inputs = torch.cat([inputs, inputs]) if guided else inputs
            if first == 0:
                inputs = torch.cat([self.x[: len(inputs)].unsqueeze(1), inputs], dim=1)
            self._prefill(inputs, self.before + first)
        return end

    def _go_on_from(self, token: int) -> None:
        """Make `token` the next to be drawn."""
        self.x.unflatten(0, (-1, self.batch_size)).copy_(self.model.tok_embeddings(self.codes[:, token - 1]))
        self.token.fill_(token)

    def _prefill(self, x: torch.Tensor, first: int) -> None:
        """Fill the cache with inputs `x` `(R, T, D)` at the positions from `first` on, all at once."""
        rows, positions = len(x), self.positions[first : first + x.shape[1]]
        length = self._read_length(first + x.shape[1])
        rope, mask = self.model.rope_1[positions], self._spread(self.causal[positions, :length].unsqueeze(0))
        for i, layer in enumerate(self.model.layers):
            keys, values = self.keys[i, :rows], self.values[i, :rows]
            query = CodeGenerator._project_and_store(layer, x, rope, keys, values, positions)
            attended = self._attend_several(query, keys[:, :, :length], values[:, :, :length], mask)
            x = layer.after_attention(x, attended)

    def step(self, token: int) -> None:
        self._run(self.before + token + 1, token < self.guided)

    def _run(self, filled: int, guided: bool) -> None:
        """One pass of the model over at least `filled` positions; on a GPU as a graph, captured at its first use."""
        length = self._read_length(filled)
        settings = (length, guided, self.some_known)
        if replay := self._graphs.get(settings):
            replay()
            return
        if not self.on_gpu:
            self._decode(*settings)
            return
        with torch.cuda.device(self.x.get_device()):  # a thread begins on the first one, whichever holds the model
            self._decode(*settings)  # does this pass's work and loads its kernels; capturing executes nothing
            self._graphs[settings] = self._capture(*settings)

    def _read_length(self, filled: int) -> int:
        return -(-filled // self.length_step) * self.length_step

    def _capture(self, *settings) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # "thread_local": the thread that decodes images meanwhile may allocate and wait
        with torch.cuda.graph(graph, pool=self._graph_memory, capture_error_mode="thread_local"):
            self._decode(*settings)
        return graph.replay

    def _decode(self, length: int, guided: bool, some_known: bool) -> None:
        """One token of every image, from `self.x` to `self.codes` and the next `self.x`, reading `length` positions."""
        rows = 2 * self.batch_size if guided else self.batch_size
        x = self.x[:rows].unsqueeze(1)
        position = self.token + self.before
        mask = self.causal[:, :length].index_select(0, position)
        x = self._through_layers(x, self.model.rope_1.index_select(0, position), position, mask, rows)
        randomness = self.randomness.index_select(1, self.token).squeeze(1)
        codes, finite = self._pick_codes(self, x.squeeze(1), guided, self.token.unsqueeze(1), randomness)
        self.finite.logical_and_(finite)
        if some_known:
            known = self.known.index_select(1, self.token).squeeze(1)
            codes = torch.where(known < 0, codes, known)
        self.codes.index_copy_(1, self.token, codes.unsqueeze(1))
        self.x[:rows].unflatten(0, (-1, self.batch_size)).copy_(self.model.tok_embeddings(codes))
        self.token += 1

    def _through_layers(
        self, x: torch.Tensor, rope: torch.Tensor, places, mask: torch.Tensor, rows: int
    ) -> torch.Tensor:
        """Output of the last layer for `x`, whose keys and values go into the first `rows` of the cache at `places`."""
        length = mask.shape[-1]
        for i, layer in enumerate(self.model.layers):
            keys, values = self.keys[i, :rows], self.values[i, :rows]
            query = self._before_attention(layer, x, rope, keys, values, places)
            attended = self._attend(query, keys[:, :, :length], values[:, :, :length], mask)
            x = self._after_attention(layer, x, attended)
        return x

    def _next_codes(
        self, x: torch.Tensor, guided: bool, tokens: torch.Tensor, randomness: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes `(K,)` after the last layer's output `x` `(K or 2K, D)`, and whether all logits are finite.

        `tokens` `(1, 1)` or `(K, 1)` are the codes' places, `randomness` `(K, …)` is what they are drawn from.
        """
        logits = self.model.logits(x)
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + (conditional - unconditional) * self.scales.take(tokens)
            if len(tokens) > 1:  # where guidance ends within them
                logits = torch.where(tokens < self.guided, logits, conditional)
        finite = logits.amax(-1).isfinite().all()
        if not self.sampling.sample_logits:
            return logits.argmax(-1), finite
        logits = filter_logits(logits, self.sampling.temperature, self.sampling.top_k, self.sampling.top_p)
        return self.draw(logits, randomness, tokens), finite

    @staticmethod
    def _project_and_store(layer: TransformerBlock, x, rope, keys, values, positions) -> torch.Tensor:
        """Queries of `x` `(R, T, D)`; keys and values go into the cache `(R, heads, S, head_dim)` at `positions`."""
        query, key, value = layer.before_attention(x, rope)
        keys.index_copy_(2, positions, key)
        values.index_copy_(2, positions, value)
        return query

    @staticmethod
    def _attend(query, keys, values, mask) -> torch.Tensor:
        """Queries `(R, n_head, 1, head_dim)` over `(R, n_kv_head, S, head_dim)`; `mask` is added to the scores."""
        grouped = query.shape[1] != keys.shape[1]
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=grouped)

    def _spread(self, mask: torch.Tensor) -> torch.Tensor:
        """`mask` `(R, T, S)`, or `(1, T, S)` for all rows, in the shape that `_attend_several` takes."""
        if self.on_gpu:
            return mask.unsqueeze(1)
        kv_heads = 1 if len(mask) == 1 else self.model.args.n_kv_head  # of one that all rows share, all heads do too
        groups = self.model.args.n_head // self.model.args.n_kv_head
        mask = mask[:, None, None].expand(-1, kv_heads, groups, -1, -1)
        return mask.reshape(mask.shape[0] * kv_heads, -1, 1, mask.shape[-1])

    def _attend_several(self, query, keys, values, mask) -> torch.Tensor:
        """Queries `(R, n_head, T, head_dim)` over `(R, n_kv_head, S, head_dim)`; `mask` is added to the scores.

        On the CPU each query is a batch entry of its own, over the same keys: a matrix product of several queries
        rounds otherwise than that of one.
        """
        if self.on_gpu:
            return CodeGenerator._attend(query, keys, values, mask)
        rows, kv_heads, _, size = keys.shape
        each = query.reshape(rows * kv_heads, -1, 1, size)  # (R * n_kv_head, groups * T, 1, head_dim)
        keys, values = (part.flatten(0, 1).unsqueeze(1).expand(-1, each.shape[1], -1, -1) for part in (keys, values))
        return F.scaled_dot_product_attention(each, keys, values, attn_mask=mask).view(query.shape)
