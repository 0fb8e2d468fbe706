"""The ADM metrics as pure functions of features: FID and sFID, Inception Score, Precision and Recall.

The definitions are those of OpenAI's evaluator (Dhariwal and Nichol 2021, arXiv 2105.05233), with float64 statistics.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

NEIGHBOURS = 3
INCEPTION_SCORE_SPLIT = 5_000  # images
HALF_BLOCK = 10_000  # features a side; ADM decides about half precision once per such block of distances
BLOCK_ROWS = 1_024  # rows of distances in memory at a time


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


@dataclass
class PrecisionRecall:
    precision: float
    recall: float
    overflowed: bool  # half precision was not enough somewhere, and float32 was used there


def precision_recall(
    reference: Tensor, sample: Tensor, distances: str = "half", neighbours: int = NEIGHBOURS
) -> PrecisionRecall:
    """Improved Precision and Recall (Kynkäänniemi et al. 2019, arXiv 1904.06991) of features (N, D) and (M, D).

    Precision is the share of samples that lie within the ball around some reference feature that reaches to its third
    nearest neighbour among the references; Recall swaps the roles. `distances` are squared: "half" computes them from
    features rounded to half precision and rounds every result likewise, as ADM does; "exact" in float64.
    """
    blocks = exact_blocks if distances == "exact" else HalfBlocks()
    reference_radii = _radii(reference, blocks, neighbours)
    sample_radii = _radii(sample, blocks, neighbours)
    reference_covered = reference.new_zeros(len(reference), dtype=torch.bool)
    sample_covered = sample.new_zeros(len(sample), dtype=torch.bool)
    for row, column, squared in blocks(reference, sample):
        reference_covered[row] |= (squared <= sample_radii[column].to(squared.dtype)).any(1)
        sample_covered[column] |= (squared <= reference_radii[row, None].to(squared.dtype)).any(0)
    overflowed = isinstance(blocks, HalfBlocks) and blocks.overflowed
    return PrecisionRecall(sample_covered.double().mean().item(), reference_covered.double().mean().item(), overflowed)


def _radii(features: Tensor, blocks: "Blocks", neighbours: int) -> Tensor:
    """Squared distance (N,) of each feature to its k-th nearest neighbour; itself is the nearest and does not count."""
    nearest = features.new_full((len(features), neighbours + 1), torch.inf, dtype=torch.float64)
    for row, _, squared in blocks(features, features):
        smallest = squared.topk(min(neighbours + 1, squared.shape[1]), largest=False, sorted=False).values
        candidates = torch.cat([nearest[row], smallest], 1)
        nearest[row] = candidates.topk(neighbours + 1, largest=False).values
    return nearest.amax(1)


Blocks = Callable[[Tensor, Tensor], Iterator[tuple[slice, slice, Tensor]]]  # rows, columns, squared distances


def exact_blocks(first: Tensor, second: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Squared distances in float64, block by block."""
    for rows, columns in _large_blocks(first, second):
        yield from _blocks(first, rows, second, columns, torch.float64)


class HalfBlocks:
    """Squared distances in half precision, block by block; in float32 for a 10,000² block in which a half overflows."""

    def __init__(self) -> None:
        self.overflowed = False

    def __call__(self, first: Tensor, second: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        for rows, columns in _large_blocks(first, second):
            blocks = partial(_blocks, first, rows, second, columns)
            fits = self._cannot_overflow(first[rows], second[columns]) or all(
                squared.isfinite().all() for _, _, squared in blocks(torch.float16)
            )
            self.overflowed |= not fits
            for row, column, squared in blocks(torch.float16 if fits else torch.float32):
                yield row, column, squared.float()

    @staticmethod
    def _cannot_overflow(first: Tensor, second: Tensor) -> bool:
        """Whether (|u| + |v|)², the largest that a result on the way can become, stays well inside half precision."""
        longest = first.norm(dim=1).max() + second.norm(dim=1).max()
        return bool(longest.square() < 0.9 * torch.finfo(torch.float16).max)


def _large_blocks(first: Tensor, second: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of 10,000² blocks; among the distances of a set to itself those on and right of the diagonal."""
    for rows in _slices(0, len(first), HALF_BLOCK):
        for columns in _slices(rows.start if second is first else 0, len(second), HALF_BLOCK):
            yield rows, columns


def _blocks(
    first: Tensor, rows: slice, second: Tensor, columns: slice, dtype: torch.dtype
) -> Iterator[tuple[slice, slice, Tensor]]:
    """One large block in strips of rows. The products of a set with itself serve both sides of the diagonal."""
    left, right = _Operand.of(first[rows], dtype), _Operand.of(second[columns], dtype)
    for row in _slices(rows.start, rows.stop, BLOCK_ROWS):
        column = slice(row.start, columns.stop) if second is first and columns == rows else columns
        u, v = left.part(row, rows), right.part(column, columns)
        products = u.values @ v.values.T
        yield row, column, _squared_distances(products, u, v)
        if second is first:
            below = slice(max(row.stop, column.start), column.stop)  # not the square on the diagonal again
            mirrored = products[:, below.start - column.start :].T.contiguous()
            yield below, row, _squared_distances(mirrored, v.part(below, column), u)


@dataclass
class _Operand:
    """Features (N, D) rounded to a type and their squared norms (N,) in it; sums are taken in float32 at least."""

    values: Tensor
    norms: Tensor

    @classmethod
    def of(cls, features: Tensor, dtype: torch.dtype) -> "_Operand":
        values = features.to(dtype)
        wide = torch.float32 if dtype == torch.float16 else dtype
        norms = values.square().sum(1, dtype=wide).to(dtype)
        if not features.is_cuda:  # CPUs multiply halves slowly; the products of halves are exact in float32
            values = values.to(wide)
        return cls(values, norms)

    def part(self, wanted: slice, held: slice) -> "_Operand":
        """The features `wanted` of those `held`, as positions in the whole set."""
        here = slice(wanted.start - held.start, wanted.stop - held.start)
        return _Operand(self.values[here], self.norms[here])


def _squared_distances(products: Tensor, first: _Operand, second: _Operand) -> Tensor:
    """|u|² - 2 u·v + |v|² (N, M) from the products u·v, every result rounded to the operands' type."""
    return products.to(first.norms.dtype).mul(-2).add_(first.norms[:, None]).add_(second.norms).clamp_(min=0)


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    return (slice(begin, min(begin + step, stop)) for begin in range(start, stop, step))
