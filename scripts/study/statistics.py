"""Means and differences over training seeds, with what they can and cannot tell."""

import math
from dataclasses import dataclass

from scipy.stats import t as student_t

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean of `count` values; `half_width` of its 95 % interval by Student's t (None for a single value), and how
    often a mean as far from zero would come about if the true one were zero.
    """

    value: float
    half_width: float | None
    chance: float | None
    count: int

    @property
    def excludes_zero(self) -> bool:
        return self.half_width is not None and abs(self.value) > self.half_width


def mean(values: list[float]) -> Mean:
    count, value = len(values), sum(values) / len(values)
    if count < 2:
        return Mean(value, None, None, count)
    error = math.sqrt(sum((v - value) ** 2 for v in values) / (count - 1) / count)
    half_width = error * float(student_t.ppf((1 + CONFIDENCE) / 2, count - 1))
    chance = 2 * float(student_t.sf(abs(value) / error, count - 1)) if error > 0 else float(value == 0)
    return Mean(value, half_width, chance, count)


def paired_difference(ours: dict[int, float], theirs: dict[int, float]) -> Mean | None:
    """Of two arms' values by training seed: mean of the differences at equal seeds; None without a common seed."""
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return mean(differences) if differences else None
