"""How fast the evaluator is against TensorFlow, SciPy and NumPy, in one run, alternating; prints a markdown table.

    python -m benchmarks.evaluator                          # on the CPU, a few minutes
    python -m benchmarks.evaluator --device cuda --whole 50000
    python -m benchmarks.evaluator --images 64 --dimensions 512 --features 2000     # a quick look

The graph has the widths of the published one and random weights unless --graph names another. `--whole N` times the
entire evaluation of N random images against N, at most 10,000, from .npz to report, and gives its peak of host memory.
"""

import resource
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import scipy.linalg
import torch

from evaluations.c2i.features import InceptionFeatures, TensorFlowFeatures
from evaluations.c2i.metrics import KID_SUBSETS, Gaussian, frechet_distance, kernel_distance
from evaluations.c2i.neighbours import density_coverage, precision_recall
from tests.inception_graph import InceptionGraph
from utils.program import run
from utils.settings import option, parse, recipe, settings


@settings("benchmark")
class BenchmarkSettings:
    graph: Path | None = option(None, "classify_image_graph_def.pb; random weights without it")
    device: str = recipe("cpu", "what computes")
    images: int = recipe(256, "images per timing of the features; 0 leaves them out", at_least=0)
    image_size: int = recipe(256, "pixels per side", at_least=1)
    batch_size: int | None = recipe(
        None, "images at a time; by default 64 on the CPU, 256 on a GPU, as in the evaluator", at_least=1
    )
    dimensions: int = recipe(2048, "dimensions of the Fréchet distance; 0 leaves it out", at_least=0)
    features: int = recipe(10_000, "features per side for the metrics of single images; 0 leaves them out", at_least=0)
    repeats: int = recipe(3, "the best of so many timings is reported", at_least=1)
    no_tensorflow: bool = recipe(False, "leave TensorFlow out")
    whole: int = recipe(0, "also evaluate so many random images from .npz to report", at_least=0)


def main() -> None:
    settings = parse(BenchmarkSettings, "How fast the evaluator is against TensorFlow, SciPy and NumPy; a table.")
    device = torch.device(settings.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"device: {name}; PyTorch {torch.__version__}\n")
    print("| what | how | time (s) | rate | ratio |\n|---|---|---|---|---|", flush=True)
    with TemporaryDirectory() as folder:
        graph = settings.graph or InceptionGraph().save(Path(folder) / "graph.pb")
        if settings.whole:  # first: the peak of memory is that of all processes so far
            time_whole(settings, graph, Path(folder))
        if settings.images:
            compare_features(settings, graph, device)
        if settings.dimensions:
            compare_frechet(settings, device)
        if settings.features:
            compare_single_features(settings, device)


def compare_features(settings: BenchmarkSettings, graph: Path, device: torch.device) -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (settings.images, settings.image_size, settings.image_size, 3), dtype=np.uint8)
    batches = torch.from_numpy(images).split(settings.batch_size or (64 if device.type == "cpu" else 256))
    networks = {
        "PyTorch, folded": InceptionFeatures(graph, device),
        "PyTorch, folded, compiled, frozen": InceptionFeatures(graph, device, compiled=True),
    }
    if not settings.no_tensorflow and find_spec("tensorflow"):
        networks = {"TensorFlow": TensorFlowFeatures(graph, device)} | networks

    def all_batches(network: Callable) -> Callable[[], None]:
        return lambda: [network(batch).pool.cpu() for batch in batches]

    for network in networks.values():
        network(batches[0])  # allocation, autotuning, compilation
    times = alternate({key: all_batches(network) for key, network in networks.items()}, settings.repeats)
    print_rows(f"features of {settings.images} images", times, settings.images, "images/s")
    for network in networks.values():
        network.close()


def compare_frechet(settings: BenchmarkSettings, device: torch.device) -> None:
    random = np.random.default_rng(0)
    mixing = random.normal(size=(settings.dimensions, settings.dimensions)) * np.geomspace(1, 1e-2, settings.dimensions)
    sets = [random.normal(size=(settings.dimensions * 2, settings.dimensions)) @ mixing.T for _ in range(2)]
    moments = [(features.mean(0), np.cov(features, rowvar=False)) for features in sets]
    gaussians = [Gaussian(*(torch.from_numpy(moment).to(device) for moment in pair)) for pair in moments]

    def scipy_distance() -> float:
        (mean, covariance), (other_mean, other_covariance) = moments
        root = scipy.linalg.sqrtm(covariance @ other_covariance).real
        return ((mean - other_mean) ** 2).sum() + np.trace(covariance + other_covariance - 2 * root)

    difference = abs(frechet_distance(*gaussians)[0] / scipy_distance() - 1)
    ways = {"scipy.linalg.sqrtm": scipy_distance, "ours": lambda: frechet_distance(*gaussians)}
    times = alternate(ways, settings.repeats)
    print_rows(f"Fréchet distance, {settings.dimensions} dimensions (agree to {difference:.0e})", times)


def compare_single_features(settings: BenchmarkSettings, device: torch.device) -> None:
    random = np.random.default_rng(0)
    sets = [random.random((settings.features, 2048), dtype=np.float32) * (1 + 0.02 * index) for index in range(2)]
    tensors = [torch.from_numpy(features).to(device) for features in sets]
    ways = {
        "NumPy, blocks of rows, float32": lambda: numpy_precision_recall(*sets),
        "ours, half": lambda: precision_recall(*tensors),
        "ours, exact (float64)": lambda: precision_recall(*tensors, "exact"),
    }
    for way in ways.values():  # kernels are loaded
        way()
    repeats = max(1, settings.repeats - 2)
    print_rows(f"Precision and Recall, {settings.features:,} x {settings.features:,}", alternate(ways, repeats))
    size = min(1_000, settings.features)
    subset = [features[:size].astype(np.float64) for features in sets]
    ways = {
        f"NumPy, one subset times {KID_SUBSETS}": lambda: numpy_squared_mmd(*subset),
        "ours": lambda: kernel_distance(*tensors, size),
    }
    times = alternate(ways, repeats)
    times[next(iter(ways))] *= KID_SUBSETS
    print_rows(f"KID, subsets of {size:,}", times)
    ways = {
        "NumPy, blocks of rows, float32": lambda: numpy_density_coverage(*sets),
        "ours, float64": lambda: density_coverage(*tensors),
    }
    print_rows(f"Density and Coverage, {settings.features:,} x {settings.features:,}", alternate(ways, repeats))


def numpy_precision_recall(reference: np.ndarray, sample: np.ndarray) -> tuple[float, float]:
    """The plain baseline: blocks of rows, float32."""
    reference_radii, sample_radii = numpy_radii(reference, 3), numpy_radii(sample, 3)
    covered, recalled = np.zeros(len(sample), bool), []
    for rows, squared in numpy_distances(reference, sample):
        covered |= (squared <= reference_radii[rows, None]).any(0)
        recalled.append((squared <= sample_radii).any(1))
    return float(covered.mean()), float(np.concatenate(recalled).mean())


def numpy_density_coverage(reference: np.ndarray, sample: np.ndarray) -> tuple[float, float]:
    radii = numpy_radii(reference, 5)
    inside = np.concatenate([(d < radii[rows, None]).sum(1) for rows, d in numpy_distances(reference, sample)])
    return float(inside.sum() / (5 * len(sample))), float((inside > 0).mean())


def numpy_radii(features: np.ndarray, neighbours: int) -> np.ndarray:
    blocks = numpy_distances(features, features)
    return np.concatenate([np.partition(squared, neighbours, axis=1)[:, neighbours] for _, squared in blocks])


def numpy_distances(first: np.ndarray, second: np.ndarray, rows: int = 1_000) -> Iterator[tuple[slice, np.ndarray]]:
    """Squared distances in blocks of rows, float32."""
    norms = (second**2).sum(1)
    for start in range(0, len(first), rows):
        part = first[start : start + rows]
        squared = (part**2).sum(1)[:, None] - 2 * part @ second.T + norms
        yield slice(start, start + rows), np.maximum(squared, 0)


def numpy_squared_mmd(first: np.ndarray, second: np.ndarray) -> float:
    """KID's estimate on one pair of subsets, float64."""
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3  # noqa: E731
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (kernel(first, first), kernel(second, second))]
    return within[0] + within[1] - 2 * kernel(first, second).mean()


def time_whole(settings: BenchmarkSettings, graph: Path, folder: Path) -> None:
    """The evaluator's own process on random images, reading and reporting included."""
    for name, count in (("reference", min(settings.whole, 10_000)), ("sample", settings.whole)):
        write_random_images(folder / f"{name}.npz", count, settings.image_size)
    command = [sys.executable, "-m", "evaluations.c2i.evaluator", folder / "reference.npz", folder / "sample.npz"]
    command += ["--graph", graph, "--device", settings.device]
    command += ["--batch-size", str(settings.batch_size)] if settings.batch_size else []
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # of the largest process
    how = f"ours, peak memory {peak:.2f} GiB"
    print_rows(f"whole evaluation of {settings.whole:,} images", {how: seconds}, settings.whole, "images/s")


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
