"""Parallel decoding against decoding one by one: passes and seconds per image, alternating in one run.

    python -m benchmarks.parallel --gpt-ckpt quickstart/gpt/digits/checkpoints/last.pt    a trained GPT: passes, seconds
    python -m benchmarks.parallel --models GPT-B --batch-sizes 1 8                         shapes: seconds per pass

How many passes an image takes depends on what the GPT has learned, so that a GPT with random weights only shows what a
pass costs: a window pays where images take a smaller share of a pass per code than the share printed.
"""

import itertools
import time

import torch

from autoregressive.models.generate import CodeGenerator
from autoregressive.models.gpt import GPT_SIZES, Transformer
from autoregressive.models.load import GPTSettings, build_gpt
from autoregressive.models.packed_linear import pack_linears
from autoregressive.models.parallel import make_generator
from autoregressive.models.sampling import Sampling
from autoregressive.sample.seeds import image_uniforms
from benchmarks.machine import chosen_device, describe, synchronizer
from benchmarks.report import MeasurementSettings, Rows
from benchmarks.sampling import random_gpt
from utils.precision import DTYPES, PRECISIONS
from utils.program import run
from utils.settings import option, parse, recipe, settings

COMPARED = {"compared_with": "decoding one by one"}  # in the column "published"


@settings("parallel decoding benchmark")
class BenchmarkSettings:
    measurement: MeasurementSettings
    gpt_ckpt: str | None = recipe(None, "checkpoint of a trained GPT; it takes the place of --models")
    models: tuple[str, ...] = recipe(("GPT-B",), "sizes of GPTs with random weights", choices=GPT_SIZES)
    windows: tuple[int, ...] = recipe((8, 16, 32), "codes drawn in one pass", at_least=2)
    batch_sizes: tuple[int, ...] = recipe((1, 2, 4, 8, 32), "images at once", at_least=1)
    draws: tuple[str, ...] = recipe(("gumbel", "inverse-cdf"), "how codes are drawn", choices=("gumbel", "inverse-cdf"))
    image_size: int = recipe(256, "pixels per side of --models, 16 for a code", at_least=16)
    cfg_scale: float = recipe(2.0, "scale of classifier-free guidance", at_least=1)
    images: int = recipe(16, "images of a trained GPT, at least one batch", at_least=1)
    passes: int = recipe(12, "passes to time of a GPT with random weights", at_least=1)
    precision: str | None = recipe(None, "number format (default: bf16 on GPUs, none on CPUs)", choices=PRECISIONS)
    rounds: int = option(3, "runs of each kind, of which the fastest counts", at_least=1)

    def dtype_on(self, device: torch.device) -> torch.dtype:
        return DTYPES[self.precision or ("bf16" if device.type == "cuda" else "none")]


def timed(generator: CodeGenerator, batches: list, most: int | None) -> tuple[int, float, torch.Tensor]:
    """Passes, seconds and codes of all `batches` of labels and uniform numbers, or of their first `most` passes."""
    passes, codes = 0, []
    synchronize = synchronizer(generator.device)
    synchronize()
    started = time.perf_counter()
    for labels, uniforms in batches:
        passes += sum(1 for _ in itertools.islice(generator.passes(labels, uniforms), most))
        codes.append(generator.codes.clone())
    synchronize()
    return passes, time.perf_counter() - started, torch.cat(codes)


def measure(name: str, model: Transformer, trained: bool, batch: int, options: BenchmarkSettings, rows: Rows) -> None:
    device, length = model.tok_embeddings.weight.device, model.args.block_size
    count = max(1, options.images // batch) if trained else 1
    images = torch.arange(count * batch)
    labels = (images % model.args.num_classes).to(device)
    uniforms = torch.from_numpy(image_uniforms(images.numpy(), length, 0)).to(device)
    batches = list(zip(labels.split(batch), uniforms.split(batch), strict=True))
    kinds = list(itertools.product(options.draws, (1, *options.windows)))
    generators = [
        make_generator(model, batch, length, Sampling(options.cfg_scale, draw=draw), window, device.type == "cuda")
        for draw, window in kinds
    ]
    runs = []
    for _ in range(options.rounds + 1):  # the first compiles, captures and warms up
        runs.append([timed(each, batches, None if trained else options.passes) for each in generators])
    seconds = [min(run[kind][1] for run in runs[1:]) for kind in range(len(kinds))]
    for kind, (draw, window) in enumerate(kinds):
        one_by_one = kinds.index((draw, 1))
        passes, _, codes = runs[0][kind]
        what = f"{name}, batch {batch}, {draw}, window {window}"
        if trained:
            changed = (codes != runs[0][one_by_one][2]).double().mean().item()
            more = {"passes_per_batch": passes / count, "passes_per_code": passes / count / length}
            per_image = [seconds[each] / len(images) for each in (kind, one_by_one)]
            more |= {"other_codes": f"{changed:.2%}"} | COMPARED
            rows.add(f"image of {what}", per_image[0], "s", per_image[1], **more)
        else:
            per_pass = [1e3 * seconds[each] / runs[0][each][0] for each in (kind, one_by_one)]
            pays = per_pass[1] / per_pass[0]
            rows.add(f"pass of {what}", per_pass[0], "ms", per_pass[1], pays_below_passes_per_code=pays, **COMPARED)


def main() -> None:
    options = parse(BenchmarkSettings, __doc__.split("\n")[0])
    device = chosen_device(options.measurement.device)
    title = f"{describe(device)}, {options.dtype_on(device)}; published: one by one"
    rows = Rows(options.measurement.json, title)
    for name in (options.gpt_ckpt,) if options.gpt_ckpt else options.models:
        if options.gpt_ckpt:
            model, info = build_gpt(GPTSettings(gpt_ckpt=name), dtype=options.dtype_on(device), device=device)
            name = info.name
        else:
            side = options.image_size // 16
            model = random_gpt(Transformer, name, side, options.dtype_on(device), device)
        if device.type == "cpu":
            pack_linears(model)
        for batch in options.batch_sizes:
            torch.compiler.reset()
            measure(name, model, options.gpt_ckpt is not None, batch, options, rows)


if __name__ == "__main__":
    run(main)
