"""Training steps against a plain version of the published one: time and peak memory at patch sides 1, 2, 4.

    python -m benchmarks.training --gpt-model GPT-B --batch-size 8

The plain step averages by unfold, builds the rotary table on the CPU and moves it at every step, repeats the logits
once for each code of a patch, leaves the type of the attention to autocast, and reads the loss at every step. Both
variants run alternately in one process; peak memory is that of a process of its own on the CPU, and of the allocator
on a GPU.
"""

import gc
import multiprocessing
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from autoregressive.models.gpt import GPT_SIZES, Transformer, TransformerBlock, model_args, rope_table
from autoregressive.train.compilation import compile_model
from autoregressive.train.cost import peak_flops, train_flops
from utils.distributed import World
from utils.engine.parallel import autocast
from utils.engine.state import Trained
from utils.engine.step import apply_gradients
from utils.precision import PRECISIONS
from utils.program import keep_memory_between_steps, run
from utils.settings import option, parse, recipe, settings


@settings("training benchmark")
class BenchmarkSettings:
    gpt_model: str = recipe("GPT-B", "size of the transformer", choices=GPT_SIZES)
    batch_size: int = recipe(8, "images per step", at_least=1)
    mixed_precision: str = recipe("bf16", "number format of both variants", choices=PRECISIONS)
    compile: bool | None = recipe(None, "compile both variants (default: on GPUs)")
    sides: tuple[int, ...] = recipe((1, 2, 4), "patch sides", at_least=1)
    repeats: int = option(3, "timed steps of each variant, after one to warm up", at_least=1)
    no_memory: bool = option(False, "leave peak memory out")

    @property
    def compiled(self) -> bool:
        return torch.cuda.is_available() if self.compile is None else self.compile


class PlainBlock(TransformerBlock):
    def forward(self, x, rope):
        attended = F.scaled_dot_product_attention(*self.before_attention(x, rope), is_causal=True)
        return self.after_attention(x, attended)


class PlainTransformer(Transformer):
    """The published step's arithmetic on the same weights."""

    def __init__(self, args):
        super().__init__(args)
        for layer in self.layers:
            layer.__class__ = PlainBlock

    def forward(self, idx, cond_idx, targets, patch_side=1):
        height, width = self.args.grid
        embeddings = self.tok_embeddings(idx)  # (B, H*W, D)
        batch, _, dim = embeddings.shape
        patches = F.unfold(embeddings.mT.reshape(batch, dim, height, width), patch_side, stride=patch_side)
        patches = patches.view(batch, dim, patch_side**2, -1).mean(2).mT
        x = self.tok_dropout(
            torch.cat([self.cls_embedding(cond_idx, self._dropped_conditions(idx)), patches[:, :-1]], 1)
        )
        rope = rope_table(height // patch_side, width // patch_side, self.args.head_dim)  # on the CPU
        rope = rope.to(x.device)[: x.shape[1]]
        for layer in self.layers:
            x = layer(x, rope)
        logits = self.output(self.norm(x)).float().repeat_interleave(patch_side**2, 1)
        codes = targets.view(batch, height // patch_side, patch_side, width // patch_side, patch_side)
        codes = codes.transpose(2, 3).reshape(-1)
        return None, F.cross_entropy(logits.flatten(0, 1), codes)


class Step:
    """One variant's model and optimizer; calling it trains on one batch of random codes."""

    def __init__(self, plain: bool, options: BenchmarkSettings, device: torch.device):
        self.args = model_args(options.gpt_model)
        self.plain, self.world = plain, World(0, 1, 0, device)
        self.precision = options.mixed_precision
        torch.manual_seed(0)
        with device:
            model = (PlainTransformer if plain else Transformer)(self.args)
            self.codes = torch.randint(self.args.vocab_size, (options.batch_size, self.args.block_size))
            self.labels = torch.randint(self.args.num_classes, (options.batch_size,))
        self.call = model
        if options.compiled and plain:
            self.call = torch.compile(model)
        elif options.compiled:
            compile_model(model)
        self.trained = Trained(model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True))
        self.scaler = torch.amp.GradScaler(device.type, enabled=False)

    def __call__(self, side: int) -> None:
        with autocast(self.trained.module, self.world, self.precision):
            _, loss = self.call(self.codes, self.labels, self.codes, side)
        loss.backward()
        if self.plain:
            torch.nn.utils.clip_grad_norm_(self.trained.module.parameters(), 1.0)
            self.trained.optimizer.step()
            self.trained.optimizer.zero_grad(set_to_none=True)
            loss.item()
        else:
            apply_gradients(self.trained, self.scaler, 1.0)


def seconds(step: Step, side: int) -> float:
    synchronize = torch.cuda.synchronize if step.world.device.type == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    step(side)
    synchronize()
    return time.perf_counter() - started


def peak_memory(plain: bool, side: int, options: BenchmarkSettings) -> float:
    """GiB at the peak of two steps; on the CPU in a new process, beyond what it holds before."""
    if torch.cuda.is_available():
        gc.collect()  # compiled models are held in cycles
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step = Step(plain, options, torch.device("cuda"))
        step(side), step(side)
        return torch.cuda.max_memory_allocated() / 2**30
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_cpu_peak, (plain, side, options))


def _cpu_peak(plain: bool, side: int, options: BenchmarkSettings) -> float:
    keep_memory_between_steps()
    before = _resident_peak(reset=True)
    step = Step(plain, options, torch.device("cpu"))
    step(side), step(side)
    return (_resident_peak() - before) / 2**20


def _resident_peak(reset: bool = False) -> int:
    """KiB at the process's peak; `reset` first lowers the mark to what it holds now (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])


def main() -> None:
    options = parse(BenchmarkSettings, __doc__.split("\n")[0])
    keep_memory_between_steps()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    peak = peak_flops(name)
    print(
        f"{options.gpt_model}, batch {options.batch_size}, {name}, torch {torch.__version__}, "
        f"{options.mixed_precision}, {'compiled' if options.compiled else 'eager'}\n"
    )
    print("| side | plain s/step | ours s/step | ratio | images/s | to side 1 | TFLOP/s | MFU | plain GiB | ours GiB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    steps = {True: Step(True, options, device), False: Step(False, options, device)}
    times = {}
    for side in options.sides:
        measured = {plain: [] for plain in steps}
        for repeat in range(options.repeats + 1):
            for plain, step in steps.items():
                elapsed = seconds(step, side)
                measured[plain] += [elapsed] if repeat else []
        times[side] = {plain: statistics.median(values) for plain, values in measured.items()}
    del steps, step
    for side in options.sides:
        ours = times[side][False]
        flops = options.batch_size * train_flops(model_args(options.gpt_model), side) / ours
        memory = ["-", "-"] if options.no_memory else [f"{peak_memory(p, side, options):.2f}" for p in (True, False)]
        cells = [
            str(side),
            f"{times[side][True]:.3f}",
            f"{ours:.3f}",
            f"{times[side][True] / ours:.2f}",
            f"{options.batch_size / ours:.2f}",
            f"{times[options.sides[0]][False] / ours:.2f}",
            f"{flops / 1e12:.3f}",
            f"{flops / peak:.1%}" if peak else "-",
            *memory,
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    run(main)
