"""FID, sFID, Inception Score, Precision and Recall of generated images, as the ADM evaluation suite computes them.

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

import argparse
import platform

import numpy as np
import torch

from evaluations.c2i.download import GRAPH_URL, cache_folder, cached_graph
from evaluations.c2i.features import (
    ExportedFeatures,
    FeatureNetwork,
    InceptionFeatures,
    TensorFlowFeatures,
    can_compile,
    check_published_graph,
)
from evaluations.c2i.measure import Measured, measure
from evaluations.c2i.metrics import (
    INCEPTION_SCORE_SPLIT,
    NEIGHBOURS,
    PrecisionRecall,
    frechet_distance,
    precision_recall,
)
from evaluations.c2i.npz import ImageSet, open_images
from evaluations.c2i.reference import read_statistics, write_reference
from evaluations.c2i.report import (
    PUBLISHED_REFERENCES,
    Report,
    describe_images,
    device_name,
    report_path,
    warn_about_sets,
)
from utils.program import UserError, run

COMPILE_FROM = 4_000  # images; with fewer, compiling takes longer than it saves


def main() -> None:
    args = parse_arguments()
    sets = [open_images(path) for path in (args.reference, args.sample) if path]
    for images in sets:
        if images.count <= NEIGHBOURS:
            raise UserError(f"{images.path} holds {images.count} images; a covariance needs at least 2, Precision and "
                            f"Recall {NEIGHBOURS + 1}, and reliable numbers many thousands.")  # fmt: skip
    report = Report()
    with report.stage("network"):
        network = feature_network(args, sum(images.count for images in sets))
    try:
        if args.save_stats:
            save_statistics(network, sets[0], args)
        else:
            evaluate(network, *sets, args, report)
    finally:
        network.close()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="FID, sFID, Inception Score, Precision and Recall as the ADM evaluation suite computes them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("reference", help="reference .npz (arr_0, perhaps with statistics) or a folder of images")
    parser.add_argument("sample", nargs="?", help="generated images: .npz (arr_0, perhaps labels) or a folder")
    parser.add_argument("--features", default="inception", help="inception, or a PATH.pt2 made by torch.export.save")
    parser.add_argument(
        "--graph", type=Path, help=f"classify_image_graph_def.pb; by default downloaded to {cache_folder()}"
    )
    parser.add_argument("--backend", choices=["torch", "tensorflow"], default="torch", help="what runs the graph")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where features run")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="fp32 is what is compared")
    parser.add_argument("--distances", choices=["half", "exact"], default="half",
                        help="Precision and Recall with ADM's half precision, or in float64")  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=256 if torch.cuda.is_available() else 64,
                        help="images at a time")  # fmt: skip
    parser.add_argument("--compile", choices=["auto", "on", "off"], default="auto",
                        help=f"torch.compile; auto: on a CPU from {COMPILE_FROM} images")  # fmt: skip
    parser.add_argument("--report", type=Path, help="where to write .txt and .json; by default beside the sample file")
    parser.add_argument("--save-stats", type=Path, metavar="NPZ",
                        help="write a reference file with the statistics of the only image set given")  # fmt: skip
    parser.add_argument("--keep-images", type=int, default=PUBLISHED_REFERENCES,
                        help="how many images --save-stats keeps for Precision and Recall")  # fmt: skip
    args = parser.parse_args()
    if bool(args.sample) == bool(args.save_stats):
        parser.error("give REFERENCE and SAMPLE, or one image set with --save-stats")
    if args.batch_size < 1 or args.keep_images <= NEIGHBOURS:
        parser.error(f"--batch-size must be at least 1 and --keep-images at least {NEIGHBOURS + 1}")
    check_combination(parser, args)
    return args


def check_combination(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags that would have no effect, or a misleading one, beside the others."""
    if args.precision == "bf16" and (args.backend != "torch" or args.features != "inception"):
        parser.error("--precision bf16 works with the Inception graph and --backend torch only")
    if args.save_stats and args.precision == "bf16":
        parser.error("--save-stats takes --precision fp32 only: a reference does not say how it was computed")
    if args.save_stats and (args.report or args.distances != parser.get_default("distances")):
        parser.error("--report and --distances belong to a comparison, not to --save-stats")
    if not args.save_stats and args.keep_images != parser.get_default("keep_images"):
        parser.error("--keep-images belongs to --save-stats")
    if args.compile == "on" and (args.backend != "torch" or args.features != "inception"):
        parser.error("--compile on works with the Inception graph and --backend torch only")
    if args.features != "inception" and (args.graph or args.backend != "torch"):
        parser.error("--graph and --backend belong to --features inception")


def feature_network(args: argparse.Namespace, images: int) -> FeatureNetwork:
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device, dtype=torch.float64)  # which covariances need, and Apple's mps lacks
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UserError(
            f"--device {args.device} cannot be used ({str(error).splitlines()[0]}); try --device cpu."
        ) from None
    if args.features != "inception":
        return ExportedFeatures(Path(args.features), device)
    graph = args.graph or cached_graph(check_published_graph, GRAPH_URL)
    if args.backend == "tensorflow":
        return TensorFlowFeatures(graph, device)
    compiled = args.compile == "on" or (args.compile == "auto" and images >= COMPILE_FROM and can_compile(device))
    return InceptionFeatures(graph, device, args.precision, compiled)


def evaluate(
    network: FeatureNetwork, reference: ImageSet, sample: ImageSet, args: argparse.Namespace, report: Report
) -> None:
    """Measure both sets, compare them, print and write the report."""
    description = network.describe()
    statistics = read_statistics(
        reference, network.dimensions(reference.height, reference.width), description["sha256"], network.device
    )
    warn_about_sets(report, reference, sample, precomputed=all(statistics))
    with report.stage("reference features"):
        real = measure(network, reference, args.batch_size, known=statistics, score=False)
    with report.stage("sample features"):
        classifier = isinstance(network, ExportedFeatures)
        generated = measure(network, sample, args.batch_size, labels=sample.labels if classifier else None)
    singular, neighbours = compare(real, generated, args.distances, report)
    report.details = {
        "reference": describe_images(reference) | {"precomputed_statistics": all(statistics)},
        "sample": describe_images(sample),
        "network": description,
        "device": device_name(network.device),
        "distances": {"arithmetic": args.distances, "half_overflowed": neighbours.overflowed, "neighbours": NEIGHBOURS},
        "inception_score_split": INCEPTION_SCORE_SPLIT,
        "singular": singular,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }
    report.publish(args.report or report_path(sample.path))


def compare(
    real: Measured, generated: Measured, distances: str, report: Report
) -> tuple[dict[str, bool], PrecisionRecall]:
    """Fill in the report's numbers; which covariances were singular, and how the distances went."""
    with report.stage("fid and sfid"):
        fid, fid_singular = frechet_distance(generated.pool_gaussian, real.pool_gaussian)
        sfid, sfid_singular = frechet_distance(generated.spatial_gaussian, real.spatial_gaussian)
    with report.stage("precision and recall"):
        neighbours = precision_recall(real.pool, generated.pool, distances)
    report.metrics = {"inception_score": generated.inception_score, "fid": fid, "sfid": sfid,
                      "precision": neighbours.precision, "recall": neighbours.recall}  # fmt: skip
    if generated.recognised is not None:
        report.metrics["recognised"] = generated.recognised
    for name, singular in (("FID", fid_singular), ("sFID", sfid_singular)):
        if singular:
            report.warn(f"the covariances behind {name} are singular (fewer images than features, or constant "
                        "features): the value is the exact limit, but depends on the number of images.")  # fmt: skip
    if neighbours.overflowed:
        report.warn("half precision overflowed in some distances, which were computed in float32, as ADM does.")
    return {"fid": fid_singular, "sfid": sfid_singular}, neighbours


def save_statistics(network: FeatureNetwork, images: ImageSet, args: argparse.Namespace) -> None:
    """Write a reference file for own data."""
    measured = measure(network, images, args.batch_size, score=False)
    gaussians = [measured.pool_gaussian, measured.spatial_gaussian]
    write_reference(args.save_stats, images, args.keep_images, gaussians, network.describe()["sha256"])
    print(f"statistics of {images.count:,} images written to {args.save_stats}")
    print(f"next: python3 evaluations/c2i/evaluator.py {args.save_stats} SAMPLE.npz")


if __name__ == "__main__":
    run(main)
