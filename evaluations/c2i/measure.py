"""What the metrics need of an image set: measured by a feature network, read from a reference file, written to one.

A reference file holds images with the statistics of a (usually larger) set, as ADM publishes or made from own data.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluations.c2i.features import FeatureNetwork, Features
from evaluations.c2i.image_sets import ImageSet, prefetched
from evaluations.c2i.metrics import Gaussian, GaussianAccumulator, InceptionScoreAccumulator, is_covariance
from utils.files import atomic_file
from utils.memory import require_memory
from utils.program import UserError
from utils.progress import progress

STATISTICS = (("mu", "sigma"), ("mu_s", "sigma_s"))  # names in reference files: pool features, spatial features
NETWORK_NAME = "feature_network"  # SHA-256 of the network's file, in references written here

Statistics = tuple[Gaussian | None, Gaussian | None]  # of pool and spatial features; None where unknown


@dataclass
class Measured:
    """What one image set came to; only `pool` grows with the number of images."""

    pool: Tensor  # (N, D) float32, for the metrics that compare single features
    pool_gaussian: Gaussian
    spatial_gaussian: Gaussian
    inception_score: float | None = None
    recognised: float | None = None  # share of images whose largest logit is their label's


def measure(
    network: FeatureNetwork,
    images: ImageSet,
    batch_size: int,
    known: Statistics = (None, None),
    score: bool = True,
    labels: np.ndarray | None = None,
) -> Measured:
    """Features of all images; the Gaussians of pool and spatial features that are `known` are not computed again."""
    width = network.dimensions(images.height, images.width)[0]
    if network.device.type == "cpu":
        require_memory(images.count * width * 4, f"the features of {images.count:,} images", "evaluate fewer images")
    pool = torch.empty(images.count, width, device=network.device)
    gaussians = [GaussianAccumulator(), GaussianAccumulator()]
    inception_score = InceptionScoreAccumulator()
    finite = torch.ones((), dtype=torch.bool, device=network.device)
    recognised = done = 0
    with progress(description=f"features of {images.path.name}", total=images.count, unit=" images") as bar:
        for batch in prefetched(images.batches(batch_size)):
            batch = torch.from_numpy(batch)
            features = _features(network, batch.pin_memory() if network.device.type == "cuda" else batch)
            now = slice(done, done + len(batch))
            pool[now] = features.pool
            for gaussian, given, values in zip(gaussians, known, features[:2], strict=True):
                finite &= values.isfinite().all()
                if given is None:
                    gaussian.add(values)
            if score:
                inception_score.add(features.logits)
            if labels is not None:
                _check_labels(labels[now], features.logits, images)
                recognised += (features.logits.argmax(1).cpu() == torch.from_numpy(labels[now])).sum().item()
            done = now.stop
            bar.update(len(batch))
    if not finite:
        raise UserError(f"the feature network gives NaN or infinite features for {images.path}; is its file intact?")
    return Measured(
        pool,
        *(given or accumulator.finish() for given, accumulator in zip(known, gaussians, strict=True)),
        inception_score.finish() if score else None,
        recognised / images.count if labels is not None else None,
    )


def read_statistics(images: ImageSet, network: FeatureNetwork, network_hash: str) -> Statistics:
    """The statistics in a reference file, None where it has none.

    `UserError` if they have another width than the network's features, are not finite, or were written for another
    network than that with the hash `network_hash`.
    """
    made_with = images.array(NETWORK_NAME)
    if made_with is not None and str(made_with) != network_hash:
        raise UserError(
            f"the statistics in {images.path} were made with another feature network; use that one, or "
            "make new ones with --save-stats."
        )
    widths = network.dimensions(images.height, images.width)
    return tuple(
        _gaussian(images, *names, width, network.device) for names, width in zip(STATISTICS, widths, strict=True)
    )


def write_reference(path: Path, images: ImageSet, keep: int, measured: Measured, network_hash: str) -> None:
    """Write `keep` evenly spaced images as arr_0, with the statistics of pool and spatial features of all."""
    keep = min(keep, images.count)
    wanted = np.linspace(0, images.count - 1, keep).round().astype(np.int64)
    header = {"descr": "|u1", "fortran_order": False, "shape": (keep, images.height, images.width, 3)}
    arrays = {NETWORK_NAME: np.array(network_hash)}
    for names, gaussian in zip(STATISTICS, (measured.pool_gaussian, measured.spatial_gaussian), strict=True):
        arrays |= {names[0]: gaussian.mean.cpu().numpy(), names[1]: gaussian.covariance.cpu().numpy()}
    with atomic_file(path) as target, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_2_0(file, header)
            start = 0
            for batch in images.batches(256):
                inside = wanted[(wanted >= start) & (wanted < start + len(batch))] - start
                file.write(batch[inside].tobytes())
                start += len(batch)
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def _gaussian(images: ImageSet, mean: str, covariance: str, width: int, device: torch.device) -> Gaussian | None:
    moments = {mean: (width,), covariance: (width, width)}
    arrays = {name: images.array(name) for name in moments}
    if any(array is None for array in arrays.values()):
        return None
    for name, array in arrays.items():
        if array.dtype.kind != "f" or array.shape != moments[name]:
            raise UserError(
                f"{name} of {images.path} is {array.dtype} {array.shape}, but the feature network needs "
                f"floats of shape {moments[name]}; the reference belongs to another network."
            )
        if not np.isfinite(array).all():
            raise UserError(f"{name} of {images.path} holds NaN or infinite numbers; get or make the file again.")
    found = Gaussian(*(torch.from_numpy(array.astype(np.float64)).to(device) for array in arrays.values()))
    if not is_covariance(found.covariance):
        raise UserError(
            f"{covariance} of {images.path} is no covariance: it is not symmetric, or has a negative eigenvalue; get "
            "or make the file again."
        )
    return found


def _features(network: FeatureNetwork, batch: Tensor) -> Features:
    try:
        return network(batch)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU's memory does not hold {len(batch)} images at a time; use a smaller --batch-size."
        ) from error


def _check_labels(labels: np.ndarray, logits: Tensor, images: ImageSet) -> None:
    if not 0 <= labels.min() <= labels.max() < logits.shape[1]:
        raise UserError(
            f"{images.path} has labels from {labels.min()} to {labels.max()}, but the feature network "
            f"knows {logits.shape[1]} classes; use the network trained on the same classes."
        )
