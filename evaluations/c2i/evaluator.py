"""FID, sFID, Inception Score, Precision and Recall as the ADM suite computes them; KID, Density and Coverage.

    python3 evaluations/c2i/evaluator.py REFERENCE.npz SAMPLE.npz
    python3 evaluations/c2i/evaluator.py IMAGES --save-stats REFERENCE.npz

Prints the numbers and writes them beside the sample file: SAMPLE.txt as published, SAMPLE.json with all that is needed
to trust them. evaluations/c2i/README.md explains references, own data and own feature networks.
"""

import os
import sys
from pathlib import Path

if not __package__:  # started as a plain file: begin again as a module, which finds the rest of the repository
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ.update(PYTHONPATH=os.pathsep.join(paths))
    starter = os.path.join(root, "scripts", "run_module.py")  # unlike -m, never imports from the current folder
    os.execv(sys.executable, [sys.executable, starter, "evaluations.c2i.evaluator", *sys.argv[1:]])

import platform
from dataclasses import fields

import numpy as np
import torch

from dataset.image_archives import archives_at
from evaluations.c2i.download import GRAPH_URL, cache_folder, cached_graph
from evaluations.c2i.features import (
    ExportedFeatures,
    FeatureNetwork,
    InceptionFeatures,
    TensorFlowFeatures,
    can_compile,
    check_published_graph,
)
from evaluations.c2i.image_sets import ImageSet, open_images
from evaluations.c2i.measure import Measured, measure, read_statistics, write_reference
from evaluations.c2i.metrics import INCEPTION_SCORE_SPLIT, KID_SEED, KID_SUBSETS, frechet_distance, kernel_distance
from evaluations.c2i.neighbours import DENSITY_NEIGHBOURS, NEIGHBOURS, density_coverage, precision_recall
from evaluations.c2i.report import (
    PUBLISHED_REFERENCES,
    Report,
    describe_images,
    device_name,
    report_path,
    warn_about_sets,
)
from utils.commands import command
from utils.files import refuse_overwriting
from utils.program import UserError, run
from utils.settings import REQUIRED, option, parse, recipe, settings

DESCRIPTION = "FID, sFID, Inception Score, Precision and Recall as the ADM suite computes them; KID, Density, Coverage."
COMPILE_FROM = 4_000  # images; with fewer, compiling takes longer than it saves


@settings("evaluation")
class EvaluatorSettings:
    reference: Path = recipe(
        REQUIRED, "reference .npz (arr_0, perhaps with statistics) or a folder of images", flag="reference"
    )
    sample: Path | None = recipe(None, "generated images: .npz (arr_0, perhaps labels) or a folder", flag="sample")
    features: str = recipe("inception", "inception, or a PATH.pt2 made by torch.export.save")
    graph: Path | None = recipe(None, f"classify_image_graph_def.pb; by default downloaded to {cache_folder()}")
    backend: str = option("torch", "what runs the Inception graph", choices=("torch", "tensorflow"))
    device: str | None = option(None, "where features run; by default cuda if there is a GPU")
    precision: str = recipe(
        "none",
        "number format of the features; none, also called fp32, is float32, which is what is compared",
        choices=("none", "fp32", "bf16"),
    )
    distances: str = recipe(
        "half", "arithmetic of Precision and Recall: ADM's half precision, or float64", choices=("half", "exact")
    )
    image_size: int | None = recipe(
        None,
        "cut the images of folders and archives to centre crops of so many pixels, as the tokenizer sees them "
        "(default: all of a folder must have one size)",
        at_least=1,
    )
    kid_subset_size: int = recipe(1_000, "images per subset of KID; with fewer images KID is left out", at_least=2)
    batch_size: int | None = option(None, "images at a time; by default 256 on a GPU, 64 on a CPU", at_least=1)
    compile: str = option(
        "auto", f"torch.compile; auto: on a CPU from {COMPILE_FROM} images", choices=("auto", "on", "off")
    )
    report: Path | None = option(None, "where to write .txt and .json; by default beside the sample file")
    save_stats: Path | None = option(None, "write a reference .npz with the statistics of the only image set given")
    keep_images: int = recipe(
        PUBLISHED_REFERENCES,
        "how many images --save-stats keeps for the metrics other than FID and sFID",
        at_least=NEIGHBOURS + 1,
    )

    def __post_init__(self) -> None:
        """Refuse flags that would have no effect, or a misleading one, beside the others."""
        changed = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
        elsewhere = "works with the Inception graph and --backend torch only"
        runs_graph = self.features == "inception" and self.backend == "torch"
        if bool(self.sample) == bool(self.save_stats):
            raise UserError("give REFERENCE and SAMPLE, or one image set with --save-stats.")
        if self.precision == "bf16" and not runs_graph:
            raise UserError(f"--precision bf16 {elsewhere}.")
        if self.compile == "on" and not runs_graph:
            raise UserError(f"--compile on {elsewhere}.")
        if self.save_stats and self.precision == "bf16":
            raise UserError("--save-stats takes --precision none only: a reference does not say how it was computed.")
        if self.save_stats and changed & {"report", "distances", "kid_subset_size"}:
            raise UserError("--report, --distances and --kid-subset-size belong to a comparison, not to --save-stats.")
        if not self.save_stats and "keep_images" in changed:
            raise UserError("--keep-images belongs to --save-stats.")
        if self.features != "inception" and changed & {"graph", "backend"}:
            raise UserError("--graph and --backend belong to --features inception.")


def main() -> None:
    settings = parse(EvaluatorSettings, DESCRIPTION)
    if settings.save_stats:
        read = (settings.reference, *archives_at(settings.reference), settings.graph, Path(settings.features))
        refuse_overwriting(settings.save_stats, *read)
    sets = [open_images(path, settings.image_size) for path in (settings.reference, settings.sample) if path]
    for images in sets:
        if images.count <= NEIGHBOURS:
            raise UserError(
                f"{images.path} holds {images.count} images; a covariance needs at least 2, Precision and "
                f"Recall {NEIGHBOURS + 1}, and reliable numbers many thousands."
            )
    report = Report()
    with report.stage("network"):
        network = feature_network(settings, sum(images.count for images in sets))
    try:
        if settings.save_stats:
            save_statistics(network, sets[0], settings)
        else:
            evaluate(network, *sets, settings, report)
    finally:
        network.close()


def feature_network(settings: EvaluatorSettings, images: int) -> FeatureNetwork:
    name = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device, dtype=torch.float64)  # which covariances need, and Apple's mps lacks
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used ({reason}); try --device cpu.") from error
    if settings.features != "inception":
        return ExportedFeatures(Path(settings.features), device)
    graph = settings.graph or cached_graph(check_published_graph, GRAPH_URL)
    if settings.backend == "tensorflow":
        return TensorFlowFeatures(graph, device)
    pays = images >= COMPILE_FROM and can_compile(device)
    compiled = settings.compile == "on" or (settings.compile == "auto" and pays)
    return InceptionFeatures(graph, device, settings.precision, compiled)


def batch_size(settings: EvaluatorSettings, network: FeatureNetwork) -> int:
    return settings.batch_size or (64 if network.device.type == "cpu" else 256)


def evaluate(
    network: FeatureNetwork, reference: ImageSet, sample: ImageSet, settings: EvaluatorSettings, report: Report
) -> None:
    """Measure both sets, compare them, print and write the report."""
    description, size = network.describe(), batch_size(settings, network)
    statistics = read_statistics(reference, network, description["sha256"])
    warn_about_sets(report, reference, sample, precomputed=all(statistics))
    with report.stage("reference features"):
        real = measure(network, reference, size, known=statistics, score=False)
    with report.stage("sample features"):
        classifier = isinstance(network, ExportedFeatures)
        generated = measure(network, sample, size, labels=sample.labels if classifier else None)
    report.details = {
        "reference": describe_images(reference) | {"precomputed_statistics": all(statistics)},
        "sample": describe_images(sample),
        "network": description,
        "device": device_name(network.device),
        "inception_score_split": INCEPTION_SCORE_SPLIT,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }
    compare(real, generated, settings.distances, report)
    compare_further(real, generated, settings.kid_subset_size, report)
    report.refuse_infinite()
    report.publish(settings.report or report_path(sample.path))


def compare(real: Measured, generated: Measured, distances: str, report: Report) -> None:
    """Fill in the ADM suite's numbers, and the share of samples recognised as their class."""
    with report.stage("fid and sfid"):
        fid, fid_singular = frechet_distance(generated.pool_gaussian, real.pool_gaussian)
        sfid, sfid_singular = frechet_distance(generated.spatial_gaussian, real.spatial_gaussian)
    with report.stage("precision and recall"):
        neighbours = precision_recall(real.pool, generated.pool, distances)
    report.metrics |= {"inception_score": generated.inception_score, "fid": fid, "sfid": sfid}
    report.metrics |= {"precision": neighbours.precision, "recall": neighbours.recall}
    if generated.recognised is not None:
        report.metrics["recognised"] = generated.recognised
    report.details["singular"] = {"fid": fid_singular, "sfid": sfid_singular}
    report.details["distances"] = {
        "arithmetic": distances,
        "half_overflowed": neighbours.overflowed,
        "neighbours": NEIGHBOURS,
    }
    for name, singular in (("FID", fid_singular), ("sFID", sfid_singular)):
        if singular:
            report.warn(
                f"the covariances behind {name} are singular (fewer images than features, or constant "
                "features): the value is the exact limit, but depends on the number of images."
            )
    if neighbours.overflowed:
        report.warn("half precision overflowed in some distances, which were computed in float32, as ADM does.")


def compare_further(real: Measured, generated: Measured, kid_subset_size: int, report: Report) -> None:
    """Fill in the numbers that the ADM suite does not have; a warning where there are too few images for one."""
    fewest, references = min(len(real.pool), len(generated.pool)), len(real.pool)
    if fewest < kid_subset_size:
        report.warn(
            f"KID is left out: one of the sets holds {fewest:,} images, fewer than a subset of {kid_subset_size:,}; "
            "--kid-subset-size makes subsets smaller."
        )
    else:
        with report.stage("kid"):
            mean, deviation = kernel_distance(real.pool, generated.pool, kid_subset_size)
        report.metrics |= {"kid": mean, "kid_std": deviation}
        report.details["kid"] = {"subset_size": kid_subset_size, "subsets": KID_SUBSETS, "seed": KID_SEED}
    if references <= DENSITY_NEIGHBOURS:
        report.warn(f"Density and Coverage are left out: they need {DENSITY_NEIGHBOURS + 1} reference images.")
    else:
        with report.stage("density and coverage"):
            density, coverage = density_coverage(real.pool, generated.pool)
        report.metrics |= {"density": density, "coverage": coverage}
        report.details["density_neighbours"] = DENSITY_NEIGHBOURS


def save_statistics(network: FeatureNetwork, images: ImageSet, settings: EvaluatorSettings) -> None:
    """Write a reference file for own data."""
    measured = measure(network, images, batch_size(settings, network), score=False)
    write_reference(settings.save_stats, images, settings.keep_images, measured, network.describe()["sha256"])
    print(f"statistics of {images.count:,} images written to {settings.save_stats}")
    features = None if settings.features == "inception" else Path(settings.features)
    print(f"next: {command('evaluate.sh', settings.save_stats, 'SAMPLE.npz', features=features, graph=settings.graph)}")


if __name__ == "__main__":
    run(main)
