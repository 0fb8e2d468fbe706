"""What else one decoding step could be made of: each alternative's time on this device, its error, and which wins.

    python -m benchmarks.decoding --gpt-model GPT-B --batch-size 32                on a GPU
    python -m benchmarks.decoding --gpt-model GPT-L --batch-size 128 --only attention draw

attention   one query over the filled part of the cache (`CodeGenerator._attend` and LENGTHS in models/generate.py)
draw        one code of the whole codebook from its logits (`draw_codes` and `draw_gumbel` in models/sampling.py)
step        how much of a whole step's time the device computes, and what graphs and compilation save
decoder     codes to pixels (`Pipeline._prepare_decoder` and IMAGES_DECODED_AT_ONCE in sample/pipeline.py)

The first alternative of each group is what the program does now: "published" in its table stands for that, which rows
repeat. On a GPU each runs in a CUDA graph, so that what is compared is the device's work, and every call of attention
reads another copy of the cache, as layers do, so that none is left in the GPU's own. An alternative that gives other
results than the first is measured, and never named as the winner.
"""

import math
import statistics
from collections.abc import Callable
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoregressive.models.generate import LENGTHS, CodeGenerator, compile_repeatably
from autoregressive.models.gpt import GPT_SIZES, Transformer, model_args
from autoregressive.models.sampling import PARTS, Sampling, draw_codes, draw_gumbel
from benchmarks.machine import chosen_device, counted_flops, describe, first_line, measured_speed, seconds
from benchmarks.report import MeasurementSettings, Rows
from benchmarks.sampling import floor_seconds, random_gpt
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils.precision import DTYPES, PRECISIONS, forbid_tf32
from utils.program import run
from utils.settings import option, parse, recipe, settings

GROUPS = ("attention", "draw", "step", "decoder")
CALLS = {"cpu": 3, "cuda": 50}  # in one measurement; on a GPU in one graph
READ_BYTES = 2**28  # by the calls of one measurement, before any is read again: more than a GPU's cache holds
Way = Callable[[], Tensor]
Caches = list[tuple[Tensor, Tensor]]  # equal ones, of keys and values


@settings("decoding alternatives")
class DecodingSettings:
    measurement: MeasurementSettings
    gpt_model: str = recipe("GPT-B", "size of the GPT", choices=GPT_SIZES)
    batch_size: int = recipe(32, "images at once; rows are twice as many, for guidance", at_least=1)
    codes: int = recipe(256, "codes per image, a square", at_least=16)
    filled: tuple[int, ...] = recipe((64, 256), "filled positions of the cache", at_least=1)
    vq_model: str = recipe("VQ-16", "tokenizer of the decoder", choices=VQ_models)
    decoded_at_once: tuple[int, ...] = recipe((8, 32, 64), "images that the decoder takes at once", at_least=1)
    precision: str | None = recipe(None, "number format (default: bf16 on GPUs, none on CPUs)", choices=PRECISIONS)
    compile: bool | None = recipe(None, "compile what is compiled on GPUs (default: on GPUs)")
    only: tuple[str, ...] = option(GROUPS, "groups", choices=GROUPS)
    repeats: int = option(5, "measurements, of which the median counts", at_least=1)

    def dtype_on(self, device: torch.device) -> torch.dtype:
        return DTYPES[self.precision or ("bf16" if device.type == "cuda" else "none")]

    def compiled_on(self, device: torch.device) -> bool:
        return device.type == "cuda" if self.compile is None else self.compile


class Contest:
    """Measures the ways of one group; the first is what is done now."""

    def __init__(self, name: str, options: DecodingSettings, device: torch.device, rows: Rows, place: str):
        self.name, self.options, self.device, self.rows, self.place = name, options, device, rows, place
        self.times: dict[str, float] = {}
        self.reference: Tensor | None = None
        self.now: str | None = None

    def enter(self, name: str, make: Callable[[], Way], tolerance: float | None, floor: float | None = None) -> None:
        """`make` prepares a way (and may fail, which is noted).

        It may win if its results equal the first's up to `tolerance`; with None it only shows what is possible.
        """
        try:
            way = make()
            result = way().float()
            calls = CALLS[self.device.type]
            measured = in_graph(way, calls, self.device)
            times = [seconds(measured, self.device) / calls for _ in range(self.options.repeats + 1)][1:]
        except Exception as error:  # an alternative that this device or version lacks
            self.rows.add(f"{self.name}: {name}", None, "us", why=first_line(error))
            return
        if self.reference is None:
            self.reference, self.now = result, name
        time, note = 1e6 * statistics.median(times), {"takes_part": "no"}
        if tolerance is not None:
            error = (result - self.reference).abs().max().item()
            note = {"largest_difference": error} | ({} if error <= tolerance else {"takes_part": "no, other results"})
            if error <= tolerance:
                self.times[name] = time
        now = self.times.get(self.now)
        note |= {"compared_with": "what is done now"} if now else {}
        self.rows.add(f"{self.name}: {name}", time, "us", now, floor and 1e6 * floor, **note)

    def finish(self) -> None:
        if self.times:
            winner = min(self.times, key=self.times.get)
            told = "what is done now" if winner == self.now else f"change {self.place}"
            gain = self.times[self.now] / self.times[winner] if self.now in self.times else 1.0
            print(f"{self.name}: {winner} wins, {gain:.2f} times as fast as now: {told}", flush=True)


def in_graph(way: Way, calls: int, device: torch.device) -> Callable[[], None]:
    """`way` so many times; on a GPU as one graph, if it can be captured."""
    if device.type != "cuda":
        return lambda: [way() for _ in range(calls)] and None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what initialises itself at the first call must not do so while it is captured
        torch.cuda.set_sync_debug_mode("error")  # what waits for the device cannot be captured either
        try:
            way()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            way()
    return graph.replay


def compare_attention(options: DecodingSettings, device: torch.device, rows: Rows, speed: tuple[float, float]) -> None:
    args, dtype = model_args(options.gpt_model), options.dtype_on(device)
    step = -(-options.codes // (8 * LENGTHS)) * 8
    for filled in options.filled:
        length = min(-(-filled // step) * step, options.codes)
        torch.manual_seed(0)
        with device:
            shape = (2 * options.batch_size, args.n_head, options.codes, args.head_dim)
            keys, values = torch.randn(2, *shape).to(dtype)
            query = torch.randn(*shape[:2], 1, shape[3]).to(dtype)
            causal = torch.full((options.codes,), -torch.inf, dtype=dtype)
            causal[:filled] = 0
        moved = 2 * math.prod(shape[:2]) * filled * args.head_dim * dtype.itemsize
        copies = min(CALLS[device.type], 1 + READ_BYTES // moved)
        caches = [(keys, values)] + [(keys.clone(), values.clone()) for _ in range(copies - 1)]
        contest = Contest(
            f"attention {options.gpt_model}, {shape[0]} rows, {filled} filled",
            options,
            device,
            rows,
            "CodeGenerator._attend (autoregressive/models/generate.py)",
        )
        tolerance = 1e-4 if dtype == torch.float32 else 0.03
        compiled = options.compiled_on(device)
        for name, make in attention_ways(query, caches, causal, filled, length, compiled).items():
            contest.enter(name, make, tolerance, moved / speed[0])
        contest.finish()


def attention_ways(
    query: Tensor, caches: Caches, causal: Tensor, filled: int, length: int, compiled: bool
) -> dict[str, Callable[[], Way]]:
    """Ways to attend from `query` (R, H, 1, d) to the first `filled` positions of keys and values (R, H, S, d).

    Every call takes the next of the equal `caches`.
    """
    padded, exact = ([tuple(part[:, :, :end] for part in cache) for cache in caches] for end in (length, filled))
    mask = causal[:length].view(1, 1, 1, -1)

    def sdpa(parts: Caches, mask: Tensor | None, *backends: SDPBackend) -> Callable[[], Way]:
        turns = cycle(parts)

        def way() -> Tensor:
            return F.scaled_dot_product_attention(query, *next(turns), attn_mask=mask)

        def only() -> Tensor:
            with sdpa_kernel(list(backends)):
                return way()

        return lambda: only if backends else way

    ways = {
        f"masked SDPA over {length}, as now": sdpa(padded, mask),
        "masked SDPA over the whole cache": sdpa(caches, causal.view(1, 1, 1, -1)),
        "SDPA over exactly the filled length": sdpa(exact, None),
    }
    if compiled:
        ways[f"two products over {length}, compiled"] = lambda: products_way(query, padded, mask)
    if query.device.type == "cpu":
        return ways
    return ways | {
        f"masked SDPA over {length}, memory-efficient": sdpa(padded, mask, SDPBackend.EFFICIENT_ATTENTION),
        f"masked SDPA over {length}, cuDNN": sdpa(padded, mask, SDPBackend.CUDNN_ATTENTION),
        f"masked SDPA over {length}, math": sdpa(padded, mask, SDPBackend.MATH),
        "flash over exactly the filled length": sdpa(exact, None, SDPBackend.FLASH_ATTENTION),
        "cuDNN over exactly the filled length": sdpa(exact, None, SDPBackend.CUDNN_ATTENTION),
        "flash, length on the device (varlen)": lambda: varlen_way(query, caches, filled),
        "flex attention, length on the device": lambda: flex_way(query, caches, filled),
    }


def products_way(query: Tensor, caches: Caches, mask: Tensor) -> Way:
    def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        scores = (query * keys.shape[-1] ** -0.5) @ keys.transpose(-1, -2) + mask
        return scores.float().softmax(-1).to(values.dtype) @ values

    compiled, turns = torch.compile(attend, dynamic=False), cycle(caches)
    return lambda: compiled(query, *next(turns))


def flex_way(query: Tensor, caches: Caches, filled: int) -> Way:
    """Flex attention's decoding kernel; how far it attends is a number on the device, so that one graph serves all."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    last = torch.tensor(filled - 1, device=query.device)
    capacity, turns = caches[0][0].shape[2], cycle(caches)
    visible = create_block_mask(lambda b, h, q, kv: kv <= last, None, None, 1, capacity, device=query.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(query, *next(turns), block_mask=visible)


def varlen_way(query: Tensor, caches: Caches, filled: int) -> Way:
    """The flash kernel with lengths on the device: rows of the cache one behind the other, each read to `seqused_k`.

    It wants the cache as (R, S, H, d), which is no more work to fill.
    """
    rows, heads, capacity, width = caches[0][0].shape
    turns = cycle([[part.transpose(1, 2).reshape(-1, heads, width) for part in cache] for cache in caches])
    numbers = {"dtype": torch.int32, "device": query.device}
    queries, starts = torch.arange(rows + 1, **numbers), torch.arange(rows + 1, **numbers) * capacity
    used, packed = torch.full((rows,), filled, **numbers), query.transpose(1, 2).reshape(rows, heads, width)
    flash = torch.ops.aten._flash_attention_forward
    more = {"seqused_k": used}

    def way() -> Tensor:
        out = flash(packed, *next(turns), queries, starts, 1, capacity, 0.0, False, False, **more)[0]
        return out.view(query.shape)

    return way


def compare_draws(options: DecodingSettings, device: torch.device, rows: Rows, speed: tuple[float, float]) -> None:
    batch, vocab = options.batch_size, model_args(options.gpt_model).vocab_size
    torch.manual_seed(0)
    with device:
        logits, uniforms = 3 * torch.randn(batch, vocab), torch.rand(batch, dtype=torch.float64)
    compiled = options.compiled_on(device)
    prepare = compile_repeatably if compiled else lambda function: function
    floor = logits.nbytes / speed[0]
    place = "draw_codes (autoregressive/models/sampling.py)"
    contest = Contest(f"draw of {vocab:,}, {batch} images", options, device, rows, place)
    same, other = 0.0, None
    for name, function, tolerance in (
        ("inverse CDF, as now", draw_codes, same),
        ("inverse CDF in two levels", draw_in_two_levels, same),
        ("inverse CDF in float64, which depends on the order of sums", draw_in_float64, other),
        ("Gumbel noise by Philox (--draw gumbel)", draw_gumbel, other),
        ("torch.multinomial", lambda logits, _: torch.multinomial(logits.softmax(-1), 1).squeeze(1), other),
    ):
        contest.enter(name, lambda function=function: _drawing(prepare(function), logits, uniforms), tolerance, floor)
    if compiled:
        contest.enter("inverse CDF, eager", lambda: _drawing(draw_codes, logits, uniforms), same, floor)
    contest.finish()


def _drawing(function: Callable, logits: Tensor, uniforms: Tensor) -> Way:
    return lambda: function(logits, uniforms)


def draw_in_two_levels(logits: Tensor, uniforms: Tensor, groups: int = 128) -> Tensor:
    """`draw_codes` by sums of groups first, then within one group: the same codes, for sums are of integers."""
    parts = (logits.softmax(-1) * PARTS).long().unflatten(-1, (groups, -1))  # (B, groups, V/groups)
    sums = parts.sum(-1).cumsum(-1)
    total = sums[:, -1:]
    target = torch.minimum((uniforms.unsqueeze(1) * total).long(), total - 1)
    group = (sums <= target).sum(-1, keepdim=True).clamp(max=groups - 1)  # (B, 1)
    before = torch.where(group > 0, sums.gather(1, (group - 1).clamp(min=0)), 0)
    inside = parts.gather(1, group.unsqueeze(-1).expand(-1, -1, parts.shape[-1])).squeeze(1).cumsum(-1)
    place = (inside + before <= target).sum(-1, keepdim=True).clamp(max=parts.shape[-1] - 1)
    return (group * parts.shape[-1] + place).squeeze(1)


def draw_in_float64(logits: Tensor, uniforms: Tensor) -> Tensor:
    cumulative = logits.softmax(-1).double().cumsum(-1)
    target = (uniforms * cumulative[:, -1]).unsqueeze(1)
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)


def compare_steps(options: DecodingSettings, device: torch.device, rows: Rows, speed: tuple[float, float]) -> None:
    """Whole steps: time between two tokens, and the part of it in which the device computes."""
    side, batch = math.isqrt(options.codes), options.batch_size
    model = random_gpt(Transformer, options.gpt_model, side, options.dtype_on(device), device)
    labels, uniforms = torch.arange(batch) % 10, torch.rand(batch, options.codes, dtype=torch.float64)
    name = f"step {options.gpt_model}, batch {batch}"
    floor = 1e6 * floor_seconds(model, batch, options.codes, *speed) / options.codes
    for compiled in (True, False) if options.compiled_on(device) else (False,):
        generator = CodeGenerator(model, batch, options.codes, Sampling(2.0), compile=compiled)
        generator(labels, uniforms)
        times = [seconds(lambda: generator(labels, uniforms), device) for _ in range(options.repeats)]  # noqa: B023
        how = ("compiled" if compiled else "eager") + (", CUDA graphs" if device.type == "cuda" else "")
        per_token = 1e6 * statistics.median(times) / options.codes
        busy = busy_share(lambda: generator(labels, uniforms), device)  # noqa: B023
        rows.add(f"{name}: {how}", per_token, "us", None, floor, device_busy=busy)


def busy_share(work: Callable[[], object], device: torch.device) -> str | None:
    """The share of a work's time in which kernels run on the GPU, by PyTorch's profiler; the rest is launch gaps."""
    if device.type != "cuda":
        return None
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            elapsed = seconds(work, device)
        kernels = sum(event.self_device_time_total for event in profile.key_averages())
    except RuntimeError as error:  # containers may forbid it
        return first_line(error)
    return f"{kernels / 1e6 / elapsed:.0%}" if kernels else "unknown: the profiler saw no kernels"


def compare_decoders(options: DecodingSettings, device: torch.device, rows: Rows, speed: tuple[float, float]) -> None:
    """Images of the tokenizer's decoder in a second, for number formats, memory layouts and batch sizes."""
    torch.manual_seed(0)
    tokenizer, side, rates = VQ_models[options.vq_model]().eval().requires_grad_(False), math.isqrt(options.codes), {}
    tokenizer.to(device)
    compiled = options.compiled_on(device)
    formats = (torch.bfloat16, torch.float16, torch.float32) if device.type == "cuda" else (torch.float32,)
    ways = [
        (dtype, layout, at_once) for dtype in formats[:1] for layout in LAYOUTS for at_once in options.decoded_at_once
    ]
    ways += [(dtype, torch.channels_last, options.decoded_at_once[-1]) for dtype in formats[1:]]
    peaks = {dtype: measured_speed(device, dtype)[1] for dtype in formats}
    for dtype, layout, at_once in ways:
        for part in (tokenizer.post_quant_conv, tokenizer.decoder):
            part.to(dtype=dtype, memory_format=layout)
        codes = torch.randint(tokenizer.codebook_size, (at_once, side, side), device=device)

        @torch.no_grad()
        def decode(codes=codes, dtype=dtype):
            return tokenizer.decode(tokenizer.quantize.lookup(codes).to(dtype))

        what = f"decoder {options.vq_model}: {str(dtype)[6:]}, {LAYOUTS[layout]}, {at_once} at once"
        try:
            floor = at_once * peaks[dtype] / counted_flops(decode)
            call = compile_repeatably(decode) if compiled else decode
            call(codes)
            times = [seconds(lambda: call(codes), device) for _ in range(options.repeats)]  # noqa: B023
        except Exception as error:  # memory, or a number format that this device lacks
            rows.add(what, None, "images/s", why=first_line(error))
            continue
        rates[what] = at_once / statistics.median(times)
        rows.add(what, rates[what], "images/s", None, floor)
        torch.compiler.reset()
    if rates:
        print(
            f"{max(rates, key=rates.get)} wins: Pipeline._prepare_decoder, IMAGES_DECODED_AT_ONCE (sample/pipeline.py)"
        )


LAYOUTS = {torch.channels_last: "channels last", torch.contiguous_format: "contiguous"}
COMPARE = dict(zip(GROUPS, (compare_attention, compare_draws, compare_steps, compare_decoders), strict=True))


@torch.no_grad()
def main() -> None:
    options = parse(DecodingSettings, __doc__.split("\n")[0])
    device = chosen_device(options.measurement.device)
    forbid_tf32()
    speed = measured_speed(device, options.dtype_on(device))
    rows = Rows(options.measurement.json, f"{describe(device)}: {speed[0] / 1e9:.0f} GB/s; published: what is done now")
    for group in options.only:
        COMPARE[group](options, device, rows, speed)


if __name__ == "__main__":
    run(main)
