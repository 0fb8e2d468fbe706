"""Metrics of whole distributions as pure functions of features: FID and sFID, Inception Score, KID.

FID, sFID and Inception Score are those of OpenAI's evaluator (Dhariwal and Nichol 2021, arXiv 2105.05233), with float64
statistics; KID is that of Bińkowski et al. 2018 (arXiv 1801.01401).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

INCEPTION_SCORE_SPLIT = 5_000  # images
KID_SUBSETS, KID_SEED = 100, 0
KERNEL_ROWS = 1_024  # of kernel values in memory at a time


@dataclass
class Gaussian:
    """Mean (D,) and covariance (D, D) of features, float64; `count` is None if they were read from a file."""

    mean: Tensor
    covariance: Tensor
    count: int | None = None


class GaussianAccumulator:
    """Mean and covariance of features that arrive in batches, in float64 and in memory that does not grow."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, features: Tensor) -> None:
        """(N, D) features of any float type."""
        features = features.double()
        if self.count == 0:
            self.origin = features.mean(0)  # sums of deviations from a point near the mean keep all digits
            self.total = torch.zeros_like(self.origin)
            self.scatter = features.new_zeros(len(self.origin), len(self.origin))
        features = features - self.origin
        self.count += len(features)
        self.total += features.sum(0)
        self.scatter.addmm_(features.T, features)

    def finish(self) -> Gaussian:
        """The mean and the unbiased covariance; at least two features are needed."""
        if self.count < 2:
            raise ValueError("a covariance needs at least two features")
        deviation = self.total / self.count
        covariance = (self.scatter - torch.outer(self.total, deviation)) / (self.count - 1)
        return Gaussian(self.origin + deviation, covariance, self.count)


def is_covariance(matrix: Tensor) -> bool:
    """Whether (D, D) `matrix` is symmetric and has no negative eigenvalue, as far as float32 can tell."""
    scale = matrix.diagonal().abs().max()
    rounding = len(matrix) * torch.finfo(torch.float32).eps * scale
    if (matrix - matrix.T).abs().max() > rounding:
        return False
    intact = not torch.linalg.cholesky_ex(matrix)[1]  # quick, but fails for singular matrices, too
    return intact or bool(torch.linalg.eigvalsh(matrix).min() >= -rounding)


def frechet_distance(first: Gaussian, second: Gaussian) -> tuple[float, bool]:
    """Fréchet distance |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½) (Dowson and Landau 1982) and whether it was singular.

    With Σ₁ = L Lᵀ, the product Σ₁ Σ₂ has the eigenvalues of the symmetric Lᵀ Σ₂ L, so the trace of its root is the sum
    of their roots. A singular product (fewer images than dimensions, or constant features) has zero eigenvalues, which
    rounding may turn negative: they count as zero, the exact limit; no multiple of the identity is added.
    """
    factor, failure = torch.linalg.cholesky_ex(first.covariance)
    if failure:
        values, vectors = torch.linalg.eigh(first.covariance)
        factor = vectors * values.clamp(min=0).sqrt()
    eigenvalues = torch.linalg.eigvalsh(factor.T @ second.covariance @ factor)
    rounding = len(eigenvalues) * torch.finfo(torch.float64).eps * eigenvalues.abs().max()
    few = any(gaussian.count is not None and gaussian.count <= len(gaussian.mean) for gaussian in (first, second))
    singular = bool(failure) or few or bool((eigenvalues <= rounding).any())
    traces = first.covariance.trace() + second.covariance.trace()
    distance = (first.mean - second.mean).square().sum() + traces - 2 * eigenvalues.clamp(min=0).sqrt().sum()
    return distance.item(), singular


class InceptionScoreAccumulator:
    """Inception Score (Salimans et al. 2016, arXiv 1606.03498) of logits that arrive in batches.

    The mean over splits of exp(mean KL(p(y|x) ‖ p(y))); the last split may be smaller and counts the same, as in ADM.
    Log-probabilities are taken from the logits in float64, so an underflowing probability contributes 0 and not NaN.
    """

    def __init__(self, split: int = INCEPTION_SCORE_SPLIT) -> None:
        self.split = split
        self.scores: list[float] = []
        self._count = 0

    def add(self, logits: Tensor) -> None:
        """(N, C) logits."""
        while len(logits):
            part = logits[: self.split - self._count]
            self._add_part(part)
            logits = logits[len(part) :]

    def finish(self) -> float:
        scores = self.scores + ([self._score()] if self._count else [])
        return sum(scores) / len(scores)

    def _add_part(self, logits: Tensor) -> None:
        log_probabilities = logits.double().log_softmax(1)
        probabilities = log_probabilities.exp()
        if self._count == 0:
            self._marginal = torch.zeros_like(probabilities[0])
            self._negative_entropy = torch.zeros_like(probabilities[0, 0])
        self._count += len(logits)
        self._marginal += probabilities.sum(0)
        self._negative_entropy += (probabilities * log_probabilities).sum()
        if self._count == self.split:
            self.scores.append(self._score())
            self._count = 0

    def _score(self) -> float:
        marginal = self._marginal / self._count
        return torch.exp(self._negative_entropy / self._count - torch.special.xlogy(marginal, marginal).sum()).item()


def kernel_distance(reference: Tensor, sample: Tensor, size: int, subsets: int = KID_SUBSETS) -> tuple[float, float]:
    """KID of features (N, D) and (M, D): mean and standard deviation of MMD² over pairs of subsets of `size` each.

    MMD² is the unbiased estimate with the kernel (x·y/D + 1)³, so its mean does not depend on the number of images;
    the standard deviation (of the population of subsets) does. Everything is computed in float64.
    """
    distances = []
    for real_indices, generated_indices in kid_subsets(len(reference), len(sample), size, subsets):
        real = reference[real_indices.to(reference.device)].double()
        generated = sample[generated_indices.to(sample.device)].double()
        within = _mean_kernel_of_pairs(real) + _mean_kernel_of_pairs(generated)
        distances.append(within - 2 * _kernel_sum(real, generated) / size**2)
    values = torch.stack(distances)
    return values.mean().item(), values.std(correction=0).item()


def kid_subsets(references: int, samples: int, size: int, subsets: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices of `size` references and as many samples, drawn without replacement; the same ones every time."""
    random = torch.Generator().manual_seed(KID_SEED)
    for _ in range(subsets):
        yield tuple(torch.randperm(count, generator=random)[:size] for count in (references, samples))


def _mean_kernel_of_pairs(features: Tensor) -> Tensor:
    """The mean of the kernel over all pairs of two different features."""
    of_itself = (features.square().mean(1) + 1).pow(3).sum()
    return (_kernel_sum(features, features) - of_itself) / (len(features) * (len(features) - 1))


def _kernel_sum(first: Tensor, second: Tensor) -> Tensor:
    """The sum of (x·y/D + 1)³ over all x of (N, D) and y of (M, D)."""
    width = first.shape[1]
    return sum((rows @ second.T / width + 1).pow(3).sum() for rows in first.split(KERNEL_ROWS))
