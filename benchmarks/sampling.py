"""Sampling speed: this program against a plain loop written as the published samplers are, in one run, alternating.

    python -m benchmarks.sampling                                   GPT-B, batch 8, guided, on this machine's device
    python -m benchmarks.sampling --models GPT-B GPT-L GPT-XL GPT-XXL --batch-sizes 8 32 128 256 512     on a GPU

Weights are random: speed does not depend on them. Each line shows images/s of both, their ratio, and the floor: the
time that this device, at the bandwidth and matrix-product speed measured here, needs to move the bytes and do the
FLOPs of every token (whichever is longer), and nothing else.
"""

import copy
import time
from collections.abc import Iterator
from itertools import islice

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoregressive.models.generate import CodeGenerator
from autoregressive.models.gpt import GPT_models, Transformer, apply_rope
from autoregressive.models.packed_linear import pack_linears
from autoregressive.models.sampling import Sampling
from utils.precision import DTYPES, PRECISIONS
from utils.program import UserError, run
from utils.settings import option, parse, recipe, settings

TOKENS_PER_TURN = 16


@settings("sampling benchmark")
class BenchmarkSettings:
    models: tuple[str, ...] = recipe(("GPT-B",), "sizes of the GPT", choices=GPT_models)
    batch_sizes: tuple[int, ...] = recipe((8,), "images at once", at_least=1)
    image_size: int = recipe(256, "pixels per side", at_least=16)
    precision: str | None = recipe(None, "number format (default: bf16 on GPUs, none on CPUs)", choices=PRECISIONS)
    rounds: int = option(1, "batches of each kind, of which the fastest counts", at_least=1)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision or ("bf16" if torch.cuda.is_available() else "none")]


class PlainLoop:
    """The published loop: eager, attention by explicit matrix products over the whole cache under a mask made for
    every image, caches and masks rebuilt for every batch, every token's probabilities kept.
    """

    def __init__(self, model: Transformer, sampling: Sampling):
        self.model, self.sampling = model, sampling

    @torch.no_grad()
    def tokens(self, labels: torch.Tensor, length: int) -> Iterator[torch.Tensor]:
        args, batch = self.model.args, len(labels)
        guided = self.sampling.cfg_scale > 1
        rows = 2 * batch if guided else batch
        weight = self.model.output.weight
        shape = (rows, args.n_kv_head, args.block_size, args.head_dim)
        self.caches = [[weight.new_zeros(shape) for _ in range(2)] for _ in self.model.layers]
        self.mask = torch.ones(args.block_size, args.block_size, dtype=torch.bool, device=weight.device).tril()
        self.mask = self.mask.expand(rows, -1, -1).clone()
        labels = torch.cat([labels, torch.full_like(labels, args.num_classes)]) if guided else labels
        x = self.model.cls_embedding.embedding_table(labels)
        probabilities = []
        for t in range(length):
            code, probs = self.sample(self.token_logits(x, torch.tensor([t], device=weight.device)), guided)
            probabilities.append(probs.clone())
            x = self.model.tok_embeddings(torch.cat([code, code]) if guided else code)
            yield code

    def token_logits(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        x, rope = x.unsqueeze(1), self.model.rope_1[position]
        mask = self.mask[:, None, position]
        for layer, (keys, values) in zip(self.model.layers, self.caches, strict=True):
            attention = layer.attention
            heads = attention.wqkv(layer.attention_norm(x)).unflatten(-1, (-1, attention.head_dim))
            q, k, v = heads.split([attention.n_head, attention.n_kv_head, attention.n_kv_head], 2)
            keys[:, :, position] = apply_rope(k, rope).transpose(1, 2)
            values[:, :, position] = v.transpose(1, 2)
            groups = attention.n_head // attention.n_kv_head
            with sdpa_kernel(SDPBackend.MATH):
                attended = F.scaled_dot_product_attention(
                    apply_rope(q, rope).transpose(1, 2),
                    keys.repeat_interleave(groups, 1),
                    values.repeat_interleave(groups, 1),
                    mask,
                )
            x = x + attention.wo(attended.transpose(1, 2).flatten(2))
            x = x + layer.feed_forward(layer.ffn_norm(x))
        return self.model.output(self.model.norm(x)).squeeze(1).float()

    def sample(self, logits: torch.Tensor, guided: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + (conditional - unconditional) * self.sampling.cfg_scale
        probs = (logits / self.sampling.temperature).softmax(-1)
        return torch.multinomial(probs, 1).squeeze(1), probs


def fast_tokens(generator: CodeGenerator, labels: torch.Tensor, uniforms: torch.Tensor) -> Iterator[None]:
    generator.start(labels, uniforms)
    for token in range(generator.length):
        yield generator.step(token)


def seconds(function, device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def alternating_seconds(first: Iterator, second: Iterator, device: torch.device) -> tuple[float, float]:
    """Time of both, run in turns of a few tokens, so that a change in the machine's load meets both."""
    totals = [0.0, 0.0]
    unfinished = True
    while unfinished:
        unfinished = False
        for which, tokens in enumerate((first, second)):
            part = []
            totals[which] += seconds(lambda: part.extend(islice(tokens, TOKENS_PER_TURN)), device)  # noqa: B023
            unfinished |= bool(part)
    return totals[0], totals[1]


def device_speed(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes/s of a large copy (read and written) and FLOP/s of a large matrix product, best of 5."""
    side, count = (8192, 2**30) if device.type == "cuda" else (1024, 2**27)
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    source, target = torch.zeros(2, count, dtype=torch.uint8, device=device)
    copy = min(seconds(lambda: target.copy_(source), device) for _ in range(6))
    product = min(seconds(lambda: a @ b, device) for _ in range(6))
    return 2 * count / copy, 2 * side**3 / product


def floor_seconds(model: Transformer, batch: int, length: int, bandwidth: float, flops: float) -> float:
    """The least time for one guided batch of `length` tokens each."""
    args, size = model.args, model.output.weight.element_size()
    weights = sum(p.numel() for p in [*model.layers.parameters(), model.output.weight])
    cached = 2 * batch * args.n_layer * 2 * args.n_kv_head * args.head_dim  # elements of one position, keys and values
    total = 0.0
    for t in range(1, length + 1):
        moved = size * (weights + cached * (t + 1)) + 4 * 2 * batch * args.vocab_size
        work = 2 * batch * (2 * weights + 4 * args.n_layer * args.dim * t)
        total += max(moved / bandwidth, work / flops)
    return total


def measure(
    name: str, batch: int, options: BenchmarkSettings, device: torch.device, speed: tuple[float, float]
) -> None:
    grid = (options.image_size // 16, options.image_size // 16)
    length = grid[0] * grid[1]
    with device:
        model = GPT_models[name](block_size=length, grid=grid).to(options.dtype).eval()
        torch.nn.init.normal_(model.output.weight, std=0.02)
        labels = torch.arange(batch) % 1000
    model.set_rope_tables()
    model.rope_1 = model.rope_1.to(device)
    sampling = Sampling(cfg_scale=2.0)
    packed = copy.deepcopy(model)
    if device.type == "cpu":
        pack_linears(packed)
    fast = CodeGenerator(packed, batch, length, sampling, compile=device.type == "cuda")
    uniforms = torch.rand(batch, length, dtype=torch.float64)
    plain = PlainLoop(model, sampling)
    if device.type == "cuda":  # compile, capture, warm up
        fast(labels, uniforms)
        list(plain.tokens(labels, 4))
    with torch.no_grad():
        times = [
            alternating_seconds(fast_tokens(fast, labels, uniforms), plain.tokens(labels, length), device)
            for _ in range(options.rounds)
        ]
    ours, theirs = (min(column) for column in zip(*times, strict=True))
    least = floor_seconds(model, batch, length, *speed)
    print(
        f"{name:8} batch {batch:4}: {batch / ours:8.2f} images/s, plain loop {batch / theirs:8.2f}, "
        f"ratio {theirs / ours:5.2f}, floor {batch / least:8.2f} ({100 * least / ours:.0f} % reached)",
        flush=True,
    )


def main() -> None:
    options = parse(BenchmarkSettings, __doc__.split("\n")[0])
    if options.image_size % 16:
        raise UserError(f"--image-size {options.image_size} is not a multiple of 16.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    speed = device_speed(device, options.dtype)
    print(f"{device}, {options.dtype}: {speed[0] / 1e9:.0f} GB/s, {speed[1] / 1e12:.2f} TFLOP/s", flush=True)
    for name in options.models:
        for batch in options.batch_sizes:
            torch.compiler.reset()  # every batch size compiles anew, and there is a limit to that
            try:
                measure(name, batch, options, device, speed)
            except torch.OutOfMemoryError:
                print(f"{name:8} batch {batch:4}: does not fit in memory", flush=True)


if __name__ == "__main__":
    run(main)
