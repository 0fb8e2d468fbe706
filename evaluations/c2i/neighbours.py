"""Metrics of nearest neighbours as pure functions of features: Precision and Recall, Density and Coverage.

All four ask which features lie in the balls around others that reach to their k-th nearest neighbour. Distances come
block by block, so that memory does not grow with the square of the number of images.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

NEIGHBOURS = 3  # of Precision and Recall
DENSITY_NEIGHBOURS = 5  # of Density and Coverage
HALF_BLOCK = 10_000  # features per side; ADM decides about half precision once per such block of distances
BLOCK_ROWS = 1_024  # rows of distances in memory at a time


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


def density_coverage(reference: Tensor, sample: Tensor, neighbours: int = DENSITY_NEIGHBOURS) -> tuple[float, float]:
    """Density and Coverage (Naeem et al. 2020, arXiv 2002.09797) of features (N, D) and (M, D), in float64.

    Around each reference feature lies a ball that reaches to its k-th nearest neighbour among the references. Density
    is the number of balls that a sample lies in, on average and divided by k (it may exceed 1); Coverage the share of
    balls that hold a sample. What lies on a ball's surface is outside, as in the authors' code.
    """
    radii = _radii(reference, exact_blocks, neighbours)
    samples_inside = torch.zeros(len(reference), dtype=torch.int64, device=reference.device)
    for row, _, squared in exact_blocks(reference, sample):
        samples_inside[row] += (squared < radii[row, None]).sum(1)
    density = samples_inside.sum().item() / (neighbours * len(sample))
    return density, (samples_inside > 0).double().mean().item()


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
