"""How fast the evaluator is against TensorFlow, SciPy and NumPy, in one run, alternating; prints a markdown table.

    python -m benchmarks.evaluator                          # on the CPU, a few minutes
    python -m benchmarks.evaluator --device cuda --whole 50000
    python -m benchmarks.evaluator --images 64 --dimensions 512 --features 2000     # a quick look

The graph has the widths of the published one and random weights unless --graph names another. `--whole N` times the
entire evaluation of N random images against N, at most 10,000, from .npz to report, and gives its peak of host memory.
"""

import argparse
import resource
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import scipy.linalg
import torch

from evaluations.c2i.features import InceptionFeatures, TensorFlowFeatures
from evaluations.c2i.metrics import Gaussian, frechet_distance, precision_recall
from tests.inception_graph import InceptionGraph
from utils.program import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graph", type=Path, help="classify_image_graph_def.pb; random weights without it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=256, help="per timing of the features; 0 leaves them out")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, help="default: 64 on the CPU, 256 on a GPU, as the evaluator's own")
    parser.add_argument("--dimensions", type=int, default=2048, help="of the Fréchet distance; 0 leaves it out")
    parser.add_argument("--features", type=int, default=10_000, help="a side, Precision and Recall; 0 leaves them out")
    parser.add_argument("--repeats", type=int, default=3, help="the best of so many is reported")
    parser.add_argument("--no-tensorflow", action="store_true")
    parser.add_argument("--whole", type=int, default=0, help="also evaluate so many random images from .npz to report")
    args = parser.parse_args()
    device = torch.device(args.device)
    args.batch_size = args.batch_size or (64 if device.type == "cpu" else 256)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"device: {name}; PyTorch {torch.__version__}\n")
    print("| what | how | time (s) | rate | ratio |\n|---|---|---|---|---|", flush=True)
    with TemporaryDirectory() as folder:
        graph = args.graph or InceptionGraph().save(Path(folder) / "graph.pb")
        if args.whole:  # first: the peak of memory is that of all processes so far
            time_whole(args, graph, Path(folder))
        if args.images:
            compare_features(args, graph, device)
        if args.dimensions:
            compare_frechet(args, device)
        if args.features:
            compare_precision_recall(args, device)


def compare_features(args: argparse.Namespace, graph: Path, device: torch.device) -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (args.images, args.image_size, args.image_size, 3), dtype=np.uint8)
    batches = torch.from_numpy(images).split(args.batch_size)
    networks = {
        "PyTorch, folded": InceptionFeatures(graph, device),
        "PyTorch, folded, compiled, frozen": InceptionFeatures(graph, device, compiled=True),
    }
    if not args.no_tensorflow and find_spec("tensorflow"):
        networks = {"TensorFlow": TensorFlowFeatures(graph, device)} | networks

    def all_batches(network: Callable) -> Callable[[], None]:
        return lambda: [network(batch).pool.cpu() for batch in batches]

    for network in networks.values():
        network(batches[0])  # allocation, autotuning, compilation
    times = alternate({key: all_batches(network) for key, network in networks.items()}, args.repeats)
    print_rows(f"features of {args.images} images", times, args.images, "images/s")
    for network in networks.values():
        network.close()


def compare_frechet(args: argparse.Namespace, device: torch.device) -> None:
    random = np.random.default_rng(0)
    mixing = random.normal(size=(args.dimensions, args.dimensions)) * np.geomspace(1, 1e-2, args.dimensions)
    sets = [random.normal(size=(args.dimensions * 2, args.dimensions)) @ mixing.T for _ in range(2)]
    moments = [(features.mean(0), np.cov(features, rowvar=False)) for features in sets]
    gaussians = [Gaussian(*(torch.from_numpy(moment).to(device) for moment in pair)) for pair in moments]

    def scipy_distance() -> float:
        (mean, covariance), (other_mean, other_covariance) = moments
        root = scipy.linalg.sqrtm(covariance @ other_covariance).real
        return ((mean - other_mean) ** 2).sum() + np.trace(covariance + other_covariance - 2 * root)

    difference = abs(frechet_distance(*gaussians)[0] / scipy_distance() - 1)
    ways = {"scipy.linalg.sqrtm": scipy_distance, "ours": lambda: frechet_distance(*gaussians)}
    times = alternate(ways, args.repeats)
    print_rows(f"Fréchet distance, {args.dimensions} dimensions (agree to {difference:.0e})", times)


def compare_precision_recall(args: argparse.Namespace, device: torch.device) -> None:
    random = np.random.default_rng(0)
    sets = [random.random((args.features, 2048), dtype=np.float32) * (1 + 0.02 * index) for index in range(2)]
    tensors = [torch.from_numpy(features).to(device) for features in sets]
    ways = {
        "NumPy, blocks of rows, float32": lambda: numpy_precision_recall(*sets),
        "ours, half": lambda: precision_recall(*tensors),
        "ours, exact (float64)": lambda: precision_recall(*tensors, "exact"),
    }
    for way in ways.values():  # kernels are loaded
        way()
    times = alternate(ways, max(1, args.repeats - 2))
    print_rows(f"Precision and Recall, {args.features:,} x {args.features:,}", times)


def numpy_precision_recall(reference: np.ndarray, sample: np.ndarray, rows: int = 1_000) -> tuple[float, float]:
    """The plain baseline: blocks of rows, float32."""

    def blocks(first: np.ndarray, second: np.ndarray):
        norms = (second**2).sum(1)
        for start in range(0, len(first), rows):
            part = first[start : start + rows]
            yield start, np.maximum((part**2).sum(1)[:, None] - 2 * part @ second.T + norms, 0)

    def radii(features: np.ndarray) -> np.ndarray:
        return np.concatenate([np.partition(squared, 3, axis=1)[:, 3] for _, squared in blocks(features, features)])

    reference_radii, sample_radii = radii(reference), radii(sample)
    covered, recalled = np.zeros(len(sample), bool), []
    for start, squared in blocks(reference, sample):
        covered |= (squared <= reference_radii[start : start + rows, None]).any(0)
        recalled.append((squared <= sample_radii).any(1))
    return float(covered.mean()), float(np.concatenate(recalled).mean())


def time_whole(args: argparse.Namespace, graph: Path, folder: Path) -> None:
    """The evaluator's own process on random images, reading and reporting included."""
    for name, count in (("reference", min(args.whole, 10_000)), ("sample", args.whole)):
        write_random_images(folder / f"{name}.npz", count, args.image_size)
    command = [sys.executable, "-m", "evaluations.c2i.evaluator", folder / "reference.npz", folder / "sample.npz",
               "--graph", graph, "--device", args.device, "--batch-size", str(args.batch_size)]  # fmt: skip
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # of the largest process
    how = f"ours, peak memory {peak:.2f} GiB"
    print_rows(f"whole evaluation of {args.whole:,} images", {how: seconds}, args.whole, "images/s")


def write_random_images(path: Path, count: int, size: int) -> None:
    """An .npz written in blocks, so that memory stays small."""
    random = np.random.default_rng(count)
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_2_0(file, header)
        for start in range(0, count, 500):
            file.write(random.integers(0, 256, (min(500, count - start), size, size, 3), dtype=np.uint8).tobytes())


def alternate(ways: dict[str, Callable], repeats: int) -> dict[str, float]:
    """The best time of each way, taken in turns so that all meet the same disturbances."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def print_rows(what: str, times: dict[str, float], count: int = 0, unit: str = "") -> None:
    """Ratios are speed-ups over the first row."""
    first = next(iter(times.values()))
    for how, seconds in times.items():
        rate = f"{count / seconds:,.1f} {unit}" if count else ""
        print(f"| {what} | {how} | {seconds:.2f} | {rate} | {first / seconds:.2f} |", flush=True)


if __name__ == "__main__":
    run(main)
