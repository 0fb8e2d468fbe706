"""Which patch side at which step: coarse to fine (Next Patch Prediction, arXiv 2412.15321), or a schedule of your own.

Learning rates are another matter (utils/engine/learning_rate.py); they only share the stages.
"""

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from autoregressive.models.patch import check_patch_side
from utils.engine.learning_rate import check_length
from utils.settings import recipe, settings


@settings("patch schedule")
class PatchScheduleSettings:
    epochs: int = recipe(300, "passes over the images, all levels together", at_least=1)
    patch_level: int = recipe(2, "levels of patch sides 2^(L-1) … 2, 1; 1: plain next-token prediction", at_least=1)
    epoch_rate: float = recipe(
        0.5, "each level ends at this share of the epoch at which the next one ends", above=0, at_most=1
    )
    patch_schedule: str | None = recipe(
        None, "a function of your own from step to patch side, as FILE.py:NAME, in place of levels (docs/extending.md)"
    )


@dataclass(frozen=True, eq=False)
class PatchSchedule:
    """The patch side of every step, and the stages of training: each has its own learning-rate schedule."""

    sides: np.ndarray  # (total steps,) int64
    stage_ends: tuple[int, ...]  # in steps; a checkpoint of each is kept
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        return len(self.sides)

    @property
    def stages(self) -> list[range]:
        """The steps of each stage."""
        return [range(start, end) for start, end in zip((0, *self.stage_ends), self.stage_ends, strict=False)]

    def side_at(self, step: int) -> int:
        """The patch side of a step, counted from 0; of any step after the end, that of the last one."""
        return int(self.sides[min(step, self.total_steps - 1)])

    def stage_at(self, step: int) -> int:
        """The number, from 0, of the stage that a step belongs to."""
        return next((i for i, end in enumerate(self.stage_ends) if step < end), len(self.stage_ends) - 1)

    def steps_by_side(self, steps: range | None = None) -> dict[int, int]:
        """How many of `steps` (default: all) are trained at each side, coarsest first."""
        part = self.sides if steps is None else self.sides[steps.start : steps.stop]
        sides, counts = np.unique(part, return_counts=True)
        return dict(zip(sides[::-1].tolist(), counts[::-1].tolist(), strict=True))


def coarse_to_fine(
    epochs: int, steps_per_epoch: int, patch_level: int, epoch_rate: float, grid: tuple[int, int]
) -> PatchSchedule:
    """Levels of patch sides `2**(patch_level-1), …, 2, 1`, each a stage.

    Level `j` (0 is the coarsest) ends after epoch `int(epochs * epoch_rate**(patch_level-1-j))` (arXiv 2412.15321).
    Raises `ValueError`, naming the flag, for a level without a single epoch and for a side that does not tile the
    `(height, width)` grid.
    """
    if patch_level > 1 and epoch_rate >= 1:
        raise ValueError(f"--epoch-rate must lie between 0 and 1, got {epoch_rate:g}")
    check_length(epochs, steps_per_epoch)
    if patch_level > _most_levels(grid):
        side = 2 ** (patch_level - 1) if patch_level < 20 else f"2^{patch_level - 1}"  # a mistyped one is a long number
        raise ValueError(
            f"--patch-level {patch_level} needs {side}x{side} patches, which do not tile the grid of "
            f"{grid[0]}x{grid[1]} codes; use --patch-level {_most_levels(grid)} or less, or another --image-size"
        )
    sides = [2 ** (patch_level - 1 - level) for level in range(patch_level)]
    ends = [int(epochs * epoch_rate ** (patch_level - 1 - level)) for level in range(patch_level)]
    for level, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if end <= start:
            raise ValueError(
                f"level {level + 1} of {patch_level} ({sides[level]}x{sides[level]} patches) would get no epoch: "
                f"levels end at epochs {ends}; raise --epochs, lower --patch-level or change --epoch-rate"
            )
    steps = np.diff([0, *ends]) * steps_per_epoch
    return PatchSchedule(np.repeat(sides, steps), tuple(end * steps_per_epoch for end in ends), steps_per_epoch)


def own_schedule(
    side_at: Callable[[int, int], int], epochs: int, steps_per_epoch: int, grid: tuple[int, int]
) -> PatchSchedule:
    """The schedule of a user's function of the step and the number of all steps, as a single stage.

    Raises `ValueError` for a side that is no whole number or does not tile the `(height, width)` grid.
    """
    check_length(epochs, steps_per_epoch)
    total = epochs * steps_per_epoch
    chosen = [side_at(step, total) for step in range(total)]
    for step, side in enumerate(chosen):
        if not isinstance(side, numbers.Integral) or isinstance(side, bool):
            raise ValueError(f"--patch-schedule gives {side!r} at step {step}; a patch side is a whole number")
    sides = np.array(chosen, dtype=np.int64)
    for side in np.unique(sides):
        check_patch_side(grid, int(side))
    return PatchSchedule(sides, (total,), steps_per_epoch)


def _most_levels(grid: tuple[int, int]) -> int:
    common = math.gcd(*grid)
    return (common & -common).bit_length()
