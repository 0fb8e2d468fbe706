"""What keeping memory between steps brings on the CPU: a small convolutional training step, and a GPT step.

python -m benchmarks.allocator

Each measurement runs in a process of its own, with glibc's defaults and with the project's settings, alternately.
"""

import multiprocessing
import statistics
import time

import torch
from torch import nn

from autoregressive.models.gpt import GPT_models
from utils.program import keep_memory_between_steps, run
from utils.settings import option, parse, settings


@settings("allocator benchmark")
class BenchmarkSettings:
    repeats: int = option(10, "timed steps of each process", at_least=1)
    rounds: int = option(3, "processes of each kind", at_least=1)


def convolution_step():
    wide = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*wide, nn.Conv2d(64, 3, 1)).to(memory_format=torch.channels_last)
    images = torch.rand(16, 3, 64, 64).to(memory_format=torch.channels_last)
    return lambda: (model(images) - images).square().mean().backward()


def gpt_step():
    model = GPT_models["GPT-Tiny"](vocab_size=256, block_size=64, num_classes=10)
    codes, labels = torch.randint(256, (64, 64)), torch.randint(10, (64,))
    return lambda: model(codes, labels, codes)[1].backward()


STEPS = {"convolutions, 16 images of 64×64": convolution_step, "GPT-Tiny, 64 images": gpt_step}


def milliseconds(name: str, keep: bool, repeats: int) -> float:
    if keep:
        keep_memory_between_steps()
    step = STEPS[name]()
    for _ in range(3):
        step()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def main() -> None:
    options = parse(BenchmarkSettings, __doc__.split("\n")[0])
    print(f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| step | glibc's defaults, ms | kept memory, ms | ratio |\n|---|---|---|---|")
    spawn = multiprocessing.get_context("spawn")
    for name in STEPS:
        measured = {False: [], True: []}
        for _ in range(options.rounds):
            for keep, times in measured.items():
                with spawn.Pool(1) as pool:
                    times.append(pool.apply(milliseconds, (name, keep, options.repeats)))
        default, kept = (statistics.median(measured[keep]) for keep in (False, True))
        print(f"| {name} | {default:.0f} | {kept:.0f} | {default / kept:.2f} |")


if __name__ == "__main__":
    run(main)
