"""What a measurement was made on: the device, what it multiplies with, versions, clocks.

python -m benchmarks.machine [--device cpu]            prints it as JSON
"""

import importlib.util
import json
import platform
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from benchmarks.clocks import nvidia_smi
from utils.program import UserError, run
from utils.settings import option, parse, settings

MATRIX_INSTRUCTIONS = ("amx_bf16", "amx_fp16", "avx512_bf16", "avx512_fp16", "avx512f", "avx2", "sve", "bf16", "asimd")
OPTIONAL_PACKAGES = ("torchvision", "scipy", "tensorflow", "huggingface_hub", "triton")
DEVICES = ("cpu", "cuda")


@settings("machine")
class MachineSettings:
    device: str | None = option(None, "cpu or cuda (default: a GPU if there is one)", choices=DEVICES)


def chosen_device(name: str | None) -> torch.device:
    """Raises `UserError` if a GPU is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU; check the driver and CUDA_VISIBLE_DEVICES.")
    kind = name or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(kind, 0) if kind == "cuda" else torch.device(kind)  # threads need its number


def facts(device: torch.device) -> dict:
    """All of it as JSON values; `name` is the device's."""
    found = {"device": device.type, "name": device_name(device), "processor": processor()}
    found |= {"matrix_instructions": matrix_instructions(), "threads": torch.get_num_threads()}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    found["missing_packages"] = [name for name in OPTIONAL_PACKAGES if importlib.util.find_spec(name) is None]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "clocks": nvidia_smi(),
        }
        versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        versions |= {"driver": nvidia_smi("driver_version")}
    return found | {"versions": versions}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def describe(device: torch.device) -> str:
    """One line for the head of a benchmark's output."""
    if device.type == "cuda":
        return f"{device_name(device)}, torch {torch.__version__}"
    instructions = ", ".join(matrix_instructions()) or "no vector instructions known here"
    return f"{processor()} ({instructions}), {torch.get_num_threads()} threads, torch {torch.__version__}"


def processor() -> str:
    return next(iter(_cpuinfo("model name")), platform.processor() or platform.machine())


def matrix_instructions() -> list[str]:
    """Those of the processor's instructions that decide how fast it multiplies matrices."""
    flags = set(" ".join([*_cpuinfo("flags"), *_cpuinfo("Features")]).split())
    return [name for name in MATRIX_INSTRUCTIONS if name in flags]


def _cpuinfo(field: str) -> list[str]:
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    return re.findall(rf"^{field}\s*: (.*)$", text, re.MULTILINE)[:1]


def synchronizer(device: torch.device) -> Callable[[], None]:
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def steady_clock(device: torch.device) -> Callable[[], float]:
    """Where one thread of this process does all the work, its processor time: other programs do not lengthen it."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def seconds(work: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    synchronize = synchronizer(device)
    synchronize()
    start = clock()
    work()
    synchronize()
    return clock() - start


def alternate(
    ways: dict[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each way, `repeats` times in turns, so that what disturbs the machine meets all of them."""
    times = {name: [] for name in ways}
    for repeat in range(warm_up + repeats):
        for name, way in ways.items():
            elapsed = seconds(way, device, clock)
            times[name] += [elapsed] if repeat >= warm_up else []
    return times


def measured_speed(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes/s of a large copy (read and written) and FLOP/s of a large matrix product, best of 5.

    Float32 products are those of the `allow_tf32` that is set.
    """
    side, count = (8192, 2**30) if device.type == "cuda" else (1024, 2**26)
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    source, target = torch.zeros(2, count, dtype=torch.uint8, device=device)
    clock = steady_clock(device)
    copy = min(seconds(lambda: target.copy_(source), device, clock) for _ in range(6))
    product = min(seconds(lambda: a @ b, device, clock) for _ in range(6))
    return 2 * count / copy, 2 * side**3 / product


def counted_flops(work: Callable[[], object]) -> int:
    """Operations of the matrix products, convolutions and attentions in `work`, as PyTorch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def first_line(error: BaseException) -> str:
    lines: Iterable[str] = (line for line in str(error).splitlines() if line.strip())
    return f"{type(error).__name__}: {next(iter(lines), '')}"[:200]


def main() -> None:
    chosen = parse(MachineSettings, "What a measurement is made on, as JSON.")
    print(json.dumps(facts(chosen_device(chosen.device))))


if __name__ == "__main__":
    run(main)
