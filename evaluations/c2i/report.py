"""What an evaluation tells: warnings in plain words, the numbers on screen, the published .txt and a .json."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluations.c2i.image_sets import ImageSet
from utils.files import atomic_file, write_json
from utils.program import UserError

PUBLISHED_SAMPLES, PUBLISHED_REFERENCES = 50_000, 10_000
TITLES = {
    "inception_score": "Inception Score",
    "fid": "FID",
    "sfid": "sFID",
    "precision": "Precision",
    "recall": "Recall",
    "recognised": "Recognised",
    "kid": "KID",
    "kid_std": "KID (standard deviation of its subsets)",
    "density": "Density",
    "coverage": "Coverage",
}


@dataclass
class Report:
    """The contents of the .json, filled as the evaluation goes on."""

    metrics: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # by stage
    details: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)

    def warn(self, sentence: str) -> None:
        self.warnings.append(sentence)
        print(f"warning: {sentence}", file=sys.stderr)

    def refuse_infinite(self) -> None:
        """Raise `UserError` if a metric is no number: statistics and features so large overflow."""
        for name, value in self.metrics.items():
            if not math.isfinite(value):
                raise UserError(
                    f"{TITLES[name]} comes out as {value}, because statistics or features are astronomically large; "
                    "get or make the reference and the feature network again."
                )

    def publish(self, path: Path) -> None:
        """Print the numbers, then write `path`.txt and `path`.json."""
        lines = [f"{TITLES[name]}: {value}" for name, value in self.metrics.items()]
        print("\n".join(lines))
        text, json = (path.with_name(path.name + suffix) for suffix in (".txt", ".json"))
        with atomic_file(text, "w") as file:
            file.write("\n".join(lines) + "\n")
        contents = asdict(self)
        write_json(json, contents | contents.pop("details"))
        print(f"written to {text} and {json}")


def report_path(sample: Path) -> Path:
    """SAMPLE for SAMPLE.npz and for the folder SAMPLE: reports lie beside the images."""
    return sample.with_suffix("") if sample.suffix == ".npz" else sample.resolve()


def describe_images(images: ImageSet) -> dict[str, Any]:
    description = {"name": images.path.name, "path": str(images.path.resolve()), "count": images.count}
    description |= {"height": images.height, "width": images.width}
    if images.labels is not None:
        counts = np.unique(images.labels, return_counts=True)[1]
        description |= {"classes": len(counts), "images_per_class": [int(counts.min()), int(counts.max())]}
    return description


def warn_about_sets(report: Report, reference: ImageSet, sample: ImageSet, precomputed: bool) -> None:
    """Say in what respects the numbers will not be comparable with published ones."""
    if sample.count != PUBLISHED_SAMPLES:
        report.warn(
            f"{sample.path.name} holds {sample.count:,} images; published numbers use {PUBLISHED_SAMPLES:,}, "
            "and FID rises when there are fewer."
        )
    if reference.count != PUBLISHED_REFERENCES:
        report.warn(
            f"the reference {reference.path.name} holds {reference.count:,} images; Precision and Recall are "
            f"published with {PUBLISHED_REFERENCES:,}."
        )
    if not precomputed:
        report.warn(
            f"the reference {reference.path.name} has no precomputed statistics, so FID and sFID compare with "
            f"its {reference.count:,} images only; published references carry the training set's."
        )
    if (reference.height, reference.width) != (sample.height, sample.width):
        report.warn(
            f"the reference has images of {reference.height} x {reference.width} pixels and the sample of "
            f"{sample.height} x {sample.width}; both are resized to 299 x 299 by the Inception graph, which "
            "does not make them comparable."
        )
    if sample.labels is not None:
        classes = 1 + max(images.labels.max() for images in (sample, reference) if images.labels is not None)
        counts = np.bincount(sample.labels, minlength=classes)
        if counts.max() - counts.min() > 1:
            fewest, most = (f"{counts[i]} images (class {i})" for i in (counts.argmin(), counts.argmax()))
            report.warn(f"the classes of {sample.path.name} are unbalanced: from {fewest} to {most}.")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
