"""The evaluator's metrics written out plainly in NumPy and SciPy, as its tests compare against them."""

import numpy as np
import scipy.linalg


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    """Fréchet distance of two feature sets (N, D) by a general matrix square root in float64."""
    means = [features.astype(np.float64).mean(0) for features in (first, second)]
    covariances = [np.cov(features.astype(np.float64), rowvar=False) for features in (first, second)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    difference = means[0] - means[1]
    return float(difference @ difference + np.trace(covariances[0] + covariances[1]) - 2 * np.trace(root).real)


def frechet_any_rank(first: np.ndarray, second: np.ndarray) -> float:
    """The same for any rank: with Σ = XᵀX, the trace of (Σ₁Σ₂)^½ is the sum of the singular values of X₁X₂ᵀ."""
    centred = [(x - x.mean(0)).astype(np.float64) / np.sqrt(len(x) - 1) for x in (first, second)]
    difference = first.astype(np.float64).mean(0) - second.astype(np.float64).mean(0)
    traces = sum((x**2).sum() for x in centred)
    return float(
        difference @ difference + traces - 2 * np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    )


def inception_score(probabilities: np.ndarray, split: int = 5_000) -> float:
    scores = []
    for start in range(0, len(probabilities), split):
        part = probabilities[start : start + split].astype(np.float64)
        divergence = (part * (np.log(part) - np.log(part.mean(0)))).sum(1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


def squared_distances(first: np.ndarray, second: np.ndarray, dtype: type) -> np.ndarray:
    """|u|² - 2 u·v + |v|² with every step rounded to `dtype` (dot products and norms summed in at least float32)."""
    first, second = first.astype(dtype), second.astype(dtype)
    wide = np.float32 if dtype == np.float16 else dtype
    with np.errstate(over="ignore", invalid="ignore"):
        norms = [(x * x).astype(wide).sum(1).astype(dtype) for x in (first, second)]
        products = (first.astype(wide) @ second.T.astype(wide)).astype(dtype)
        return np.maximum((norms[0][:, None] - dtype(2) * products) + norms[1], dtype(0))


def precision_recall(reference: np.ndarray, sample: np.ndarray, dtype: type = np.float64) -> tuple[float, float]:
    def radii(features: np.ndarray) -> np.ndarray:
        return np.partition(squared_distances(features, features, dtype), 3, axis=1)[:, 3]

    between = squared_distances(reference, sample, dtype)
    precision = (between <= radii(reference)[:, None]).any(0).mean()
    recall = (between <= radii(sample)[None]).any(1).mean()
    return float(precision), float(recall)


def squared_mmd(first: np.ndarray, second: np.ndarray) -> float:
    """Unbiased MMD² of features (m, D) and (n, D) with the kernel (x·y/D + 1)³ (arXiv 1801.01401)."""
    kernel = lambda x, y: (float(x.astype(np.float64) @ y.astype(np.float64)) / len(x) + 1) ** 3  # noqa: E731
    within = [
        np.mean([kernel(x, y) for i, x in enumerate(features) for j, y in enumerate(features) if i != j])
        for features in (first, second)
    ]
    return float(within[0] + within[1] - 2 * np.mean([kernel(x, y) for x in first for y in second]))


def density_coverage(reference: np.ndarray, sample: np.ndarray, k: int = 5) -> tuple[float, float]:
    """Density and Coverage (arXiv 2002.09797), with the open balls of the authors' code."""
    distances = lambda x, others: np.linalg.norm(others.astype(np.float64) - x.astype(np.float64), axis=1)  # noqa: E731
    counts = [
        (distances(real, sample) < np.sort(distances(real, np.delete(reference, i, axis=0)))[k - 1]).sum()
        for i, real in enumerate(reference)
    ]
    return float(np.sum(counts) / (k * len(sample))), float(np.mean(np.array(counts) > 0))
