"""Training steps against the published ones: images/s, their ratio, and how near the device's arithmetic comes.

    python -m benchmarks.training --gpt-model GPT-B --batch-size 8                          on this machine's device
    python -m benchmarks.training --gpt-model GPT-L --batch-size 32 --sides 1 2             on a GPU

Here: the trainer's own step. Published: the public trainer's (benchmarks/published_gpt.py), on GPUs compiled as there.
Both take turns in one process; with one thread on a CPU its processor time counts, which other programs do not
lengthen. The floor is what the model's operations alone would take at the peak of the device's
data sheet (the share of it is the MFU), or where that is not known at the speed of a large matrix product measured in
the same run. Every side starts with models of its own, so that each is compiled for its shapes alone.
"""

import gc
import statistics

import torch

from autoregressive.models.gpt import GPT_SIZES, model_args
from autoregressive.train.config import TrainSettings
from autoregressive.train.cost import peak_flops, train_flops
from autoregressive.train.train_c2i import build, train_step
from benchmarks.machine import alternate, chosen_device, describe, device_name, measured_speed, steady_clock
from benchmarks.published_gpt import PublishedStep
from benchmarks.report import MeasurementSettings, Rows
from utils.distributed import World
from utils.precision import DTYPES, PRECISIONS
from utils.program import run
from utils.settings import option, parse, recipe, settings

STEPS_PER_TURN = {"cpu": 1, "cuda": 10}  # without waiting in between, where the step itself does not


@settings("training benchmark")
class BenchmarkSettings:
    measurement: MeasurementSettings
    gpt_model: str = recipe("GPT-B", "size of the transformer", choices=GPT_SIZES)
    batch_size: int = recipe(8, "images per step", at_least=1)
    mixed_precision: str = recipe("bf16", "number format of both", choices=PRECISIONS)
    compile: bool | None = recipe(None, "compile both (default: on GPUs)")
    sides: tuple[int, ...] = recipe((1, 2, 4), "patch sides", at_least=1)
    published: bool = recipe(True, "measure the published step, too")
    turns: int = option(3, "measurements of each, of which the median counts, after one to warm up", at_least=1)

    def compiled_on(self, device: torch.device) -> bool:
        return device.type == "cuda" if self.compile is None else self.compile


class OwnStep:
    """The trainer's own step, with everything that `train_c2i` sets up."""

    def __init__(self, options: BenchmarkSettings, device: torch.device):
        flags = ["--dry-run", "--gpt-model", options.gpt_model, "--global-batch-size", str(options.batch_size)]
        flags += ["--mixed-precision", options.mixed_precision]
        flags += ["--compile" if options.compiled_on(device) else "--no-compile"]
        self.chosen, self.world = parse(TrainSettings, "as trained", flags), World(0, 1, 0, device)
        self.trained = build(self.chosen, [], self.world)
        self.scaler = self.chosen.step.scaler(self.world)
        self.trained.module.train()

    def __call__(self, codes: torch.Tensor, labels: torch.Tensor, side: int) -> torch.Tensor:
        return train_step(self.chosen, self.trained, self.scaler, codes, labels, side, self.world)[0]


class Turns:
    """A step taken a few times in a row, and the device memory that its model, optimizer and activations need."""

    def __init__(self, make, batch: tuple[torch.Tensor, torch.Tensor, int], device: torch.device):
        self.device, self.batch, self.peak = device, batch, 0
        before = self._allocated()
        self.step = make()
        self.step(*batch)  # the optimizer's moments, compiled code
        self.own = self._allocated() - before

    def __call__(self) -> None:
        others = self._allocated() - self.own
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(STEPS_PER_TURN[self.device.type]):
            self.step(*self.batch)
        if self.device.type == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - others)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    @property
    def gib(self) -> float | None:
        return self.peak / 2**30 if self.peak else None


def measure(side: int, options: BenchmarkSettings, device: torch.device, peak: float) -> dict[str, Turns]:
    args, batch_size = model_args(options.gpt_model), options.batch_size
    torch.manual_seed(0)
    with device:
        codes = torch.randint(args.vocab_size, (batch_size, args.block_size))
        labels = torch.randint(args.num_classes, (batch_size,))
    ways = {"here": Turns(lambda: OwnStep(options, device), (codes, labels, side), device)}
    if options.published:
        compiled = options.compiled_on(device)
        published = lambda: PublishedStep(args, device, options.mixed_precision, compiled)  # noqa: E731
        ways["published"] = Turns(published, (codes, labels, side), device)
    times = alternate(ways, device, options.turns, clock=steady_clock(device))
    images = STEPS_PER_TURN[device.type] * batch_size
    rates = {name: images / statistics.median(values) for name, values in times.items()}
    return {
        "here": rates["here"],
        "published": rates.get("published"),
        "floor": peak / train_flops(args, side),
        "GiB": ways["here"].gib,
        "published_GiB": ways["published"].gib if options.published else None,
    }


def peak_speed(device: torch.device, precision: str) -> tuple[float, str]:
    """FLOP/s of the device, and where the figure is from."""
    known = peak_flops(device_name(device)) if precision != "none" else None
    return (known, "data sheet") if known else (measured_speed(device, DTYPES[precision])[1], "measured product")


def main() -> None:
    options = parse(BenchmarkSettings, __doc__.split("\n")[0])
    device = chosen_device(options.measurement.device)
    how = "compiled" if options.compiled_on(device) else "eager"
    precision = options.mixed_precision
    torch.set_float32_matmul_precision("high")  # as both trainers do
    peak, of = peak_speed(device, precision)
    rows = Rows(
        options.measurement.json,
        f"{options.gpt_model}, batch {options.batch_size}, {precision}, {how}, {describe(device)}; "
        f"floor: {peak / 1e12:.2f} TFLOP/s ({of})",
    )
    for side in options.sides:
        measured = measure(side, options, device, peak)
        name = f"training {options.gpt_model}, batch {options.batch_size}, {precision}, side {side}"
        rows.add(name, unit="images/s", floor_of=of, **measured)
        gc.collect()  # compiled models are held in cycles
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    run(main)
