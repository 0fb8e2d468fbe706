"""Where a training step's time goes on this device, and what else could be chosen: each alternative's time.

    python -m benchmarks.training_choices --gpt-model GPT-B --batch-size 32 --side 1           on a GPU

First the step as it is, with the share of each kind of work (by PyTorch's profiler; on a GPU the rest is launch gaps);
then the alternatives, each in place of what the trainer does now, which is what "published" stands for in the rows:
compilation of the whole model instead of its layers (autoregressive/train/compilation.py), the loss's chunk of logits
(CHUNK_ELEMENTS in models/losses.py), the plain loss, and other kinds of AdamW (`make_adamw` in utils/engine/step.py).
"""

import gc
import statistics
from collections.abc import Callable

import torch

from autoregressive.models import losses
from autoregressive.models.gpt import GPT_SIZES, model_args
from autoregressive.train.cost import train_flops
from benchmarks.machine import chosen_device, describe, first_line, seconds
from benchmarks.report import MeasurementSettings, Rows
from benchmarks.training import BenchmarkSettings, OwnStep, peak_speed
from utils.engine.parallel import autocast
from utils.precision import PRECISIONS
from utils.program import run
from utils.settings import option, parse, recipe, settings

KINDS = {  # of work, by parts of the names of kernels (GPU) or operators (CPU); the first that fits counts
    "attention": ("flash", "fmha", "attention", "sdp"),
    "optimizer": ("adam", "multi_tensor", "foreach", "lerp"),
    "matrix products": ("gemm", "cutlass", "nvjet", "xmma", "matmul", "cublas", "aten::mm", "addmm", "mkldnn", "bmm"),
    "loss": ("log_softmax", "scatter", "gather", "nll"),
    "copies and casts": ("memcpy", "copy", "memset", "aten::to", "fill"),
    "element by element": ("triton", "elementwise", "reduce", "aten::"),
}


@settings("training alternatives")
class ChoiceSettings:
    measurement: MeasurementSettings
    gpt_model: str = recipe("GPT-B", "size of the transformer", choices=GPT_SIZES)
    batch_size: int = recipe(8, "images per step", at_least=1)
    side: int = recipe(1, "patch side", at_least=1)
    mixed_precision: str = recipe("bf16", "number format", choices=PRECISIONS)
    compile: bool | None = recipe(None, "compile (default: on GPUs)")
    turns: int = option(5, "measurements of ten steps (on a CPU: of one), of which the median counts", at_least=1)

    @property
    def as_benchmark(self) -> BenchmarkSettings:
        return BenchmarkSettings(
            self.measurement, self.gpt_model, self.batch_size, self.mixed_precision, self.compile, (self.side,)
        )


class Choices:
    def __init__(self, options: ChoiceSettings, device: torch.device, rows: Rows):
        self.options, self.device, self.rows, self.now = options, device, rows, None
        args = model_args(options.gpt_model)
        torch.manual_seed(0)
        with device:
            codes = torch.randint(args.vocab_size, (options.batch_size, args.block_size))
            self.batch = codes, torch.randint(args.num_classes, (options.batch_size,)), options.side
        self.name = f"step {options.gpt_model}, batch {options.batch_size}, side {options.side}"
        self.flops = options.batch_size * train_flops(args, options.side)
        self.floor = 1e3 * self.flops / peak_speed(device, options.mixed_precision)[0]

    def try_out(
        self, name: str, prepare: Callable[[OwnStep], object] = lambda step: None, explain: bool = False
    ) -> None:
        """Time of a step after `prepare` has changed it."""
        torch.compiler.reset()
        gc.collect()  # compiled models are held in cycles
        try:
            step = OwnStep(self.options.as_benchmark, self.device)
            prepare(step)
            steps = 10 if self.device.type == "cuda" else 1
            work = lambda: [step(*self.batch) for _ in range(steps)]  # noqa: E731
            work()
            times = [seconds(work, self.device) / steps for _ in range(self.options.turns)]
        except Exception as error:  # memory, or something that this device or version lacks
            self.rows.add(f"{self.name}: {name}", None, "ms", why=first_line(error))
            return
        time = 1e3 * statistics.median(times)
        self.now = self.now or time
        more = {"TFLOP_per_s": self.flops / time / 1e9, "compared_with": "what is done now"}
        more |= shares(work, steps * time, self.device) if explain else {}
        self.rows.add(f"{self.name}: {name}", time, "ms", self.now, self.floor, **more)


def shares(work: Callable[[], object], milliseconds: float, device: torch.device) -> dict[str, str]:
    """The share of each kind of work in a time of so many milliseconds."""
    on_gpu = device.type == "cuda"
    activities = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activities.CUDA if on_gpu else activities.CPU]) as profile:
        seconds(work, device)
    totals = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in profile.key_averages():
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        totals[kind_of(event.key.lower())] += time / 1e3
    if not sum(totals.values()):  # containers may forbid it
        return {"shares": "unknown: the profiler saw no kernels"}
    whole = milliseconds if on_gpu else sum(totals.values())
    found = {kind: f"{total / whole:.0%}" for kind, total in totals.items() if total / whole >= 0.005}
    return found | ({"gaps": f"{max(0.0, 1 - sum(totals.values()) / whole):.0%}"} if on_gpu else {})


def kind_of(name: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def whole_model(step: OwnStep) -> None:
    """Compiled as one, in place of layer by layer."""
    model = step.trained.module
    for layer in model.layers:
        layer._compiled_call_impl = None
    model.head_loss = type(model).head_loss.__get__(model)
    model.compile(dynamic=False)


def other_adamw(**changes) -> Callable[[OwnStep], None]:
    def prepare(step: OwnStep) -> None:
        for group in step.trained.optimizer.param_groups:
            group |= changes
        step.__class__ = PlainUpdate

    return prepare


class PlainUpdate(OwnStep):
    """With PyTorch's own clipping, as optimizers need that do not clip as they read the gradients."""

    def __call__(self, codes, labels, side):
        with autocast(self.trained.module, self.world, self.chosen.step.mixed_precision):
            _, loss = self.trained.module(codes, labels, codes, side)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.module.parameters(), 1.0)
        self.trained.optimizer.step()
        self.trained.optimizer.zero_grad(set_to_none=True)
        return loss


def main() -> None:
    options = parse(ChoiceSettings, __doc__.split("\n")[0])
    device = chosen_device(options.measurement.device)
    compiled = options.as_benchmark.compiled_on(device)
    rows = Rows(options.measurement.json, f"{describe(device)}; published: what is done now")
    choices, usual = Choices(options, device, rows), dict(losses.CHUNK_ELEMENTS)
    choices.try_out("as now", explain=True)
    if compiled:
        choices.try_out("the whole model compiled", whole_model)
    for exponent in (-2, 2) if device.type == "cuda" else (-2,):
        losses.CHUNK_ELEMENTS[device.type] = int(usual[device.type] * 2.0**exponent)
        choices.try_out(f"loss by chunks of {losses.CHUNK_ELEMENTS[device.type]:,} logits")
    losses.CHUNK_ELEMENTS.update(usual)
    choices.try_out("plain loss", lambda step: setattr(step.trained.module, "loss", losses.plain_patch_loss))
    choices.try_out("fused AdamW after PyTorch's clipping", other_adamw())
    choices.try_out("AdamW by groups of tensors", other_adamw(fused=False, foreach=True))


if __name__ == "__main__":
    run(main)
