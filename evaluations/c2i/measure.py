"""Streams an image set through a feature network and keeps what the metrics need of it."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evaluations.c2i.features import FeatureNetwork, Features
from evaluations.c2i.metrics import Gaussian, GaussianAccumulator, InceptionScoreAccumulator
from evaluations.c2i.npz import ImageSet, prefetched
from utils.program import UserError
from utils.progress import progress


@dataclass
class Measured:
    """What one image set came to; only `pool` grows with the number of images."""

    pool: Tensor  # (N, D) float32, for Precision and Recall
    pool_gaussian: Gaussian
    spatial_gaussian: Gaussian
    inception_score: float | None = None
    recognised: float | None = None  # share of images whose largest logit is their label's


def measure(
    network: FeatureNetwork,
    images: ImageSet,
    batch_size: int,
    known: tuple[Gaussian | None, Gaussian | None] = (None, None),
    score: bool = True,
    labels: np.ndarray | None = None,
) -> Measured:
    """Features of all images; the Gaussians of pool and spatial features that are `known` are not computed again."""
    pool = torch.empty(images.count, network.dimensions(images.height, images.width)[0], device=network.device)
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
    pool_gaussian, spatial_gaussian = (
        g or accumulator.finish() for g, accumulator in zip(known, gaussians, strict=True)
    )
    return Measured(
        pool,
        pool_gaussian,
        spatial_gaussian,
        inception_score.finish() if score else None,
        recognised / images.count if labels is not None else None,
    )


def _features(network: FeatureNetwork, batch: Tensor) -> Features:
    try:
        return network(batch)
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU's memory does not hold {len(batch)} images at a time; "
                        "use a smaller --batch-size.") from error  # fmt: skip


def _check_labels(labels: np.ndarray, logits: Tensor, images: ImageSet) -> None:
    if not 0 <= labels.min() <= labels.max() < logits.shape[1]:
        raise UserError(f"{images.path} has labels from {labels.min()} to {labels.max()}, but the feature network "
                        f"knows {logits.shape[1]} classes; use the network trained on the same classes.")  # fmt: skip
