"""Sampling speed: this program against the published loop, in one run, alternating.

    python -m benchmarks.sampling                                   GPT-B, batch 8, guided, on this machine's device
    python -m benchmarks.sampling --models GPT-B GPT-L --batch-sizes 32 8 128     on a GPU

Published: benchmarks/published_gpt.py, on GPUs compiled as the public sampler compiles it (reduce-overhead, whole
graph). Weights are random: speed does not depend on them. The floor is the time that this device, at the bandwidth and
matrix-product speed measured here, needs to move the bytes and do the operations of every token (whichever is longer),
and nothing else.
"""

import gc
from collections.abc import Iterator
from itertools import islice

import torch

from autoregressive.models.generate import CodeGenerator
from autoregressive.models.gpt import GPT_SIZES, Transformer, model_args
from autoregressive.models.packed_linear import pack_linears
from autoregressive.models.sampling import Sampling
from benchmarks.machine import chosen_device, describe, first_line, measured_speed, seconds, steady_clock
from benchmarks.published_gpt import PublishedTransformer, published_tokens
from benchmarks.report import MeasurementSettings, Rows
from utils.precision import DTYPES, PRECISIONS, forbid_tf32
from utils.program import UserError, run
from utils.settings import option, parse, recipe, settings

CFG_SCALE = 2.0
TOKENS_PER_TURN = 16  # on a CPU; on a GPU, whose speed is steadier, a whole batch without waiting in between


@settings("sampling benchmark")
class BenchmarkSettings:
    measurement: MeasurementSettings
    models: tuple[str, ...] = recipe(("GPT-B",), "sizes of the GPT", choices=GPT_SIZES)
    batch_sizes: tuple[int, ...] = recipe((8,), "images at once", at_least=1)
    image_size: int = recipe(256, "pixels per side", at_least=16)
    precision: str | None = recipe(None, "number format (default: bf16 on GPUs, none on CPUs)", choices=PRECISIONS)
    compile: bool | None = recipe(None, "compile both (default: on GPUs)")
    published: bool = recipe(True, "measure the published loop, too")
    rounds: int = option(1, "batches of each kind, of which the fastest counts", at_least=1)

    def compiled_on(self, device: torch.device) -> bool:
        return device.type == "cuda" if self.compile is None else self.compile

    def dtype_on(self, device: torch.device) -> torch.dtype:
        return DTYPES[self.precision or ("bf16" if device.type == "cuda" else "none")]


def own_tokens(generator: CodeGenerator, labels: torch.Tensor, uniforms: torch.Tensor) -> Iterator[int]:
    with torch.no_grad():
        yield from generator.passes(labels, uniforms)


def alternating_seconds(ways: list[Iterator], tokens_per_turn: int, device: torch.device) -> list[float]:
    """Time of each, run in turns of a few tokens, so that a change in the machine's load meets all."""
    totals, unfinished = [0.0] * len(ways), True
    while unfinished:
        unfinished = False
        for which, tokens in enumerate(ways):
            part = []
            taken = lambda: part.extend(islice(tokens, tokens_per_turn))  # noqa: E731, B023
            totals[which] += seconds(taken, device, steady_clock(device))
            unfinished |= bool(part)
    return totals


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


class Pair:
    """Both programs with the same random weights, ready to sample batches of one size."""

    def __init__(self, name: str, batch: int, options: BenchmarkSettings, device: torch.device):
        side = options.image_size // 16
        self.batch, self.length, self.device = batch, side * side, device
        compiled, dtype = options.compiled_on(device), options.dtype_on(device)
        model = random_gpt(Transformer, name, side, dtype, device)
        self.published = random_gpt(PublishedTransformer, name, side, dtype, device)
        self.published.load_state_dict(model.state_dict())
        if device.type == "cpu":
            pack_linears(model)
        self.own = CodeGenerator(model, batch, self.length, Sampling(CFG_SCALE), compile=compiled)
        reduced = {"mode": "reduce-overhead", "fullgraph": True}
        self.call = torch.compile(self.published, **reduced) if compiled else self.published
        self.labels = torch.arange(batch, device=device) % 1000
        self.uniforms = torch.rand(batch, self.length, dtype=torch.float64)

    def ways(self) -> list[Iterator]:
        theirs = published_tokens(self.call, self.published, self.labels, self.length, CFG_SCALE)
        return [own_tokens(self.own, self.labels, self.uniforms), theirs]


def random_gpt(kind: type[Transformer], name: str, side: int, dtype: torch.dtype, device: torch.device) -> Transformer:
    """A GPT of `side * side` codes per image with random weights, as loading makes it: only its tables in float32."""
    torch.manual_seed(0)
    with device:
        model = kind(model_args(name, block_size=side * side, grid=(side, side)))
        torch.nn.init.normal_(model.output.weight, std=0.02)
        model.to(dtype).eval().set_rope_tables()
    return model


def measure(name: str, batch: int, options: BenchmarkSettings, device: torch.device, speed: tuple, rows: Rows) -> None:
    pair = Pair(name, batch, options, device)
    per_turn = TOKENS_PER_TURN if device.type == "cpu" else pair.length
    if options.compiled_on(device) or device.type == "cuda":  # compile, capture, warm up: a batch of each, and one more
        for _ in range(2):
            alternating_seconds(pair.ways()[: 1 + options.published], per_turn, device)
    times = []
    for _ in range(options.rounds):
        times.append(alternating_seconds(pair.ways()[: 1 + options.published], per_turn, device))
    here, *published = (batch / min(column) for column in zip(*times, strict=True))
    least = floor_seconds(pair.published, batch, pair.length, *speed)
    kind = str(options.dtype_on(device)).removeprefix("torch.")
    rows.add(f"sampling {name}, batch {batch}, {kind}", here, "images/s", next(iter(published), None), batch / least)


def main() -> None:
    options = parse(BenchmarkSettings, __doc__.split("\n")[0])
    if options.image_size % 16:
        raise UserError(f"--image-size {options.image_size} is not a multiple of 16.")
    device = chosen_device(options.measurement.device)
    forbid_tf32()  # as the samplers
    dtype, how = options.dtype_on(device), "compiled" if options.compiled_on(device) else "eager"
    speed = measured_speed(device, dtype)
    measured = f"{speed[0] / 1e9:.0f} GB/s, {speed[1] / 1e12:.2f} TFLOP/s"
    rows = Rows(options.measurement.json, f"guided, {how}, {describe(device)}: {measured}")
    for name in options.models:
        for batch in options.batch_sizes:
            torch.compiler.reset()  # every batch size compiles anew, and there is a limit to that
            try:
                measure(name, batch, options, device, speed, rows)
            except torch.OutOfMemoryError as error:
                rows.add(f"sampling {name}, batch {batch}", None, "images/s", why=first_line(error))
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    run(main)
