"""How fast the evaluator is against TensorFlow, SciPy and NumPy, in one run, alternating.

    python -m benchmarks.evaluator                          # on the CPU, a few minutes
    python -m benchmarks.evaluator --device cuda --whole 50000
    python -m benchmarks.evaluator --images 64 --dimensions 512 --features 2000     # a quick look

"Published" is the column of what the public evaluator runs (its graph in TensorFlow, `scipy.linalg.sqrtm`), and where
it runs TensorFlow on blocks, NumPy on blocks of rows. What is not installed is left out. The graph has the widths of
the published one and random weights unless --graph names another. `--whole N` times the entire evaluation of N random
images against N, at most 10,000, from .npz to report, and gives its peak of host memory. The floor of the features is
their operations at the speed of a float32 matrix product measured in the same run.
"""

import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks import machine
from benchmarks.machine import chosen_device, counted_flops, describe, measured_speed
from benchmarks.report import MeasurementSettings, Rows
from evaluations.c2i.features import InceptionFeatures, TensorFlowFeatures
from evaluations.c2i.metrics import KID_SUBSETS, Gaussian, frechet_distance, kernel_distance
from evaluations.c2i.neighbours import density_coverage, precision_recall
from tests.inception_graph import InceptionGraph
from utils.precision import forbid_tf32
from utils.program import UserError, run
from utils.settings import option, parse, recipe, settings


@settings("benchmark")
class BenchmarkSettings:
    measurement: MeasurementSettings
    graph: Path | None = option(None, "classify_image_graph_def.pb; random weights without it")
    images: int = recipe(256, "images per timing of the features; 0 leaves them out", at_least=0)
    image_size: int = recipe(256, "pixels per side", at_least=1)
    batch_size: int | None = recipe(
        None, "images at a time; by default 64 on the CPU, 256 on a GPU, as in the evaluator", at_least=1
    )
    dimensions: int = recipe(2048, "dimensions of the Fréchet distance; 0 leaves it out", at_least=0)
    features: int = recipe(10_000, "features per side for the metrics of single images; 0 leaves them out", at_least=0)
    repeats: int = option(3, "timings, of which the best counts", at_least=1)
    no_tensorflow: bool = recipe(False, "leave TensorFlow out")
    compile: bool = recipe(True, "measure compiled and frozen convolutions, too")
    whole: int = recipe(0, "also evaluate so many random images from .npz to report", at_least=0)


def main() -> None:
    settings = parse(BenchmarkSettings, "How fast the evaluator is against TensorFlow, SciPy and NumPy; a table.")
    device = chosen_device(settings.measurement.device)
    forbid_tf32()  # as the evaluator
    rows = Rows(settings.measurement.json, describe(device))
    with TemporaryDirectory() as folder:
        graph = settings.graph or InceptionGraph().save(Path(folder) / "graph.pb")
        if settings.images:
            compare_features(settings, graph, device, rows)
        if settings.dimensions:
            compare_frechet(settings, device, rows)
        if settings.features:
            compare_single_features(settings, device, rows)
        if settings.whole:
            time_whole(settings, graph, Path(folder), device, rows)


def compare_features(settings: BenchmarkSettings, graph: Path, device: torch.device, rows: Rows) -> None:
    random, count = np.random.default_rng(0), settings.images
    images = random.integers(0, 256, (count, settings.image_size, settings.image_size, 3), dtype=np.uint8)
    batches = torch.from_numpy(images).split(settings.batch_size or (64 if device.type == "cpu" else 256))
    networks = {"eager": InceptionFeatures(graph, device)}
    work = counted_flops(lambda: networks["eager"](batches[0][:1]))
    if settings.compile:
        networks["compiled, frozen"] = InceptionFeatures(graph, device, compiled=True)
    if not settings.no_tensorflow and find_spec("tensorflow"):
        networks["published"] = TensorFlowFeatures(graph, device)

    def all_batches(network: Callable) -> Callable[[], None]:
        return lambda: [network(batch).pool.cpu() for batch in batches]

    for network in networks.values():
        network(batches[0])  # allocation, autotuning, compilation
    times = alternate({key: all_batches(network) for key, network in networks.items()}, settings.repeats, device)
    rates = {name: count / seconds for name, seconds in times.items()}
    floor = measured_speed(device, torch.float32)[1] / work
    for name in [name for name in networks if name != "published"]:
        rows.add(
            f"evaluator, features of {count} images, {name}", rates[name], "images/s", rates.get("published"), floor
        )
    for network in networks.values():
        network.close()


def compare_frechet(settings: BenchmarkSettings, device: torch.device, rows: Rows) -> None:
    random, size = np.random.default_rng(0), settings.dimensions
    mixing = random.normal(size=(size, size)) * np.geomspace(1, 1e-2, size)
    sets = [random.normal(size=(size * 2, size)) @ mixing.T for _ in range(2)]
    moments = [(features.mean(0), np.cov(features, rowvar=False)) for features in sets]
    gaussians = [Gaussian(*(torch.from_numpy(moment).to(device) for moment in pair)) for pair in moments]
    ways, more = {"here": lambda: frechet_distance(*gaussians)}, {}
    if find_spec("scipy"):
        ways["published"] = lambda: scipy_distance(*moments)
        more["difference"] = f"{abs(frechet_distance(*gaussians)[0] / scipy_distance(*moments) - 1):.0e}"
    times = alternate(ways, settings.repeats, device)
    rows.add(f"Fréchet distance, {size} dimensions", times["here"], "s", times.get("published"), **more)


def scipy_distance(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> float:
    import scipy.linalg

    (mean, covariance), (other_mean, other_covariance) = first, second
    root = scipy.linalg.sqrtm(covariance @ other_covariance).real
    return ((mean - other_mean) ** 2).sum() + np.trace(covariance + other_covariance - 2 * root)


def compare_single_features(settings: BenchmarkSettings, device: torch.device, rows: Rows) -> None:
    random, count = np.random.default_rng(0), settings.features
    sets = [random.random((count, 2048), dtype=np.float32) * (1 + 0.02 * index) for index in range(2)]
    tensors = [torch.from_numpy(features).to(device) for features in sets]
    size = min(1_000, count)
    subset = [features[:size].astype(np.float64) for features in sets]
    ways = {
        "half": lambda: precision_recall(*tensors),
        "exact": lambda: precision_recall(*tensors, "exact"),
        "KID": lambda: kernel_distance(*tensors, size),
        "density": lambda: density_coverage(*tensors),
        "NumPy half": lambda: numpy_precision_recall(*sets),
        "NumPy KID": lambda: numpy_squared_mmd(*subset),
        "NumPy density": lambda: numpy_density_coverage(*sets),
    }
    if device.type == "cuda":  # kernels are loaded, memory is taken; at most few repeats follow
        for name in ("half", "exact", "KID", "density"):
            ways[name]()
    times = alternate(ways, max(1, settings.repeats - 2), device)
    pairs = f"{count:,} x {count:,}"
    for kind in ("half", "exact"):
        rows.add(f"Precision and Recall, {pairs}, {kind}", times[kind], "s", times["NumPy half"])
    rows.add(f"KID, {KID_SUBSETS} subsets of {size:,}", times["KID"], "s", times["NumPy KID"] * KID_SUBSETS)
    rows.add(f"Density and Coverage, {pairs}", times["density"], "s", times["NumPy density"])


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


def time_whole(settings: BenchmarkSettings, graph: Path, folder: Path, device: torch.device, rows: Rows) -> None:
    """The evaluator's own process on random images, reading and reporting included."""
    for name, count in (("reference", min(settings.whole, 10_000)), ("sample", settings.whole)):
        write_random_images(folder / f"{name}.npz", count, settings.image_size)
    command = [sys.executable, "-m", "evaluations.c2i.evaluator", folder / "reference.npz", folder / "sample.npz"]
    command += ["--graph", graph, "--device", device.type]
    command += ["--batch-size", str(settings.batch_size)] if settings.batch_size else []
    start = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)  # the peak of this process alone, not of all before it
    elapsed = time.perf_counter() - start
    if status:
        raise UserError(f"the evaluator ended with status {os.waitstatus_to_exitcode(status)}; its message is above.")
    name = f"whole evaluation of {settings.whole:,} images"
    rows.add(name, elapsed, "s", peak_memory_gib=usage.ru_maxrss / 2**20, images_per_second=settings.whole / elapsed)


def write_random_images(path: Path, count: int, size: int) -> None:
    """An .npz written in blocks, so that memory stays small."""
    random = np.random.default_rng(count)
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_2_0(file, header)
        for start in range(0, count, 500):
            file.write(random.integers(0, 256, (min(500, count - start), size, size, 3), dtype=np.uint8).tobytes())


def alternate(ways: dict[str, Callable], repeats: int, device: torch.device) -> dict[str, float]:
    """The best time of each way, taken in turns so that all meet the same disturbances."""
    times = machine.alternate(ways, device, repeats, warm_up=0)
    return {name: min(values) for name, values in times.items()}


if __name__ == "__main__":
    run(main)
