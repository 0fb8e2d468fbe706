"""The training plan: epochs to levels of patch sides, and every learning rate, as pure functions of the step."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Level:
    """A stretch of training at one patch side."""

    side: int
    first_epoch: int
    epochs: int
    first_step: int
    steps: int


@dataclass(frozen=True)
class Plan:
    levels: tuple[Level, ...]
    steps_per_epoch: int
    lr: float
    end_lr: float
    warmup_steps: float  # of each level
    decay_ratio: float  # share of each level's steps at its end
    scheduler: bool  # False: the learning rate is constant

    @property
    def total_steps(self) -> int:
        return self.levels[-1].first_step + self.levels[-1].steps

    def level_at(self, step: int) -> Level:
        """The level that step (counted from 0) belongs to; the last one for any step after the plan's end."""
        return next((level for level in self.levels if step < level.first_step + level.steps), self.levels[-1])

    def lr_at(self, step: int) -> float:
        """Learning rate of a step: in every level a linear rise from 0, `lr`, and a linear fall towards `end_lr`."""
        if not self.scheduler:
            return self.lr
        level = self.level_at(step)
        step_in_level = min(step - level.first_step, level.steps)
        if step_in_level < self.warmup_steps:
            return self.lr * step_in_level / self.warmup_steps
        decay_steps = level.steps * self.decay_ratio
        decayed = step_in_level - (level.steps - decay_steps)
        if decayed <= 0:
            return self.lr
        return self.lr + (self.end_lr - self.lr) * decayed / decay_steps


def make_plan(
    epochs: int,
    steps_per_epoch: int,
    patch_level: int,
    epoch_rate: float,
    grid: tuple[int, int],
    lr: float,
    end_lr: float = 0.0,
    warmup_epochs: float = 0.0,
    decay_ratio: float = 0.0,
    scheduler: bool = True,
) -> Plan:
    """Levels of patch sides `2**(patch_level-1), …, 2, 1`; level `j` (0 is the coarsest) ends after epoch
    `int(epochs * epoch_rate**(patch_level-1-j))` (arXiv 2412.15321).

    Raises `ValueError`, naming the flag, for a plan that would not do what it says: a level without a single epoch,
    a side that does not tile the `(height, width)` grid, a warm-up and decay longer than a level.
    """
    _check_ranges(epochs, steps_per_epoch, patch_level, epoch_rate, warmup_epochs, decay_ratio)
    ends = [int(epochs * epoch_rate ** (patch_level - 1 - j)) for j in range(patch_level)]
    warmup_steps = warmup_epochs * steps_per_epoch
    levels = []
    for j, (start, end) in enumerate(zip([0] + ends, ends, strict=False)):
        side = 2 ** (patch_level - 1 - j)
        if end <= start:
            raise ValueError(
                f"level {j + 1} of {patch_level} ({side}x{side} patches) would get no epoch: levels end at epochs "
                f"{ends}; raise --epochs, lower --patch-level or change --epoch-rate"
            )
        if grid[0] % side or grid[1] % side:
            raise ValueError(
                f"--patch-level {patch_level} needs {side}x{side} patches, which do not tile the grid of "
                f"{grid[0]}x{grid[1]} codes; use --patch-level {_most_levels(grid)} or less, or another --image-size"
            )
        steps = (end - start) * steps_per_epoch
        if scheduler and warmup_steps + decay_ratio * steps > steps + 1e-9:
            raise ValueError(
                f"level {j + 1} of {patch_level} has {end - start} epochs, less than --warmup-epochs {warmup_epochs:g} "
                f"plus --decay-ratio {decay_ratio:g} of it; lower one of them (fractions of an epoch are allowed)"
            )
        levels.append(Level(side, start, end - start, start * steps_per_epoch, steps))
    return Plan(tuple(levels), steps_per_epoch, lr, end_lr, warmup_steps, decay_ratio, scheduler)


def _check_ranges(epochs, steps_per_epoch, patch_level, epoch_rate, warmup_epochs, decay_ratio) -> None:
    if epochs < 1 or steps_per_epoch < 1:
        raise ValueError(
            f"--epochs must be at least 1 and a batch must fit the data, got {epochs} and {steps_per_epoch}"
        )
    if patch_level < 1:
        raise ValueError(f"--patch-level must be at least 1 (1: plain next-token prediction), got {patch_level}")
    if patch_level > 1 and not 0 < epoch_rate < 1:
        raise ValueError(f"--epoch-rate must lie between 0 and 1, got {epoch_rate:g}")
    if warmup_epochs < 0 or not 0 <= decay_ratio <= 1:
        raise ValueError(f"--warmup-epochs must not be negative and --decay-ratio must lie in [0, 1], "
                         f"got {warmup_epochs:g} and {decay_ratio:g}")  # fmt: skip


def _most_levels(grid: tuple[int, int]) -> int:
    common = math.gcd(*grid)
    return (common & -common).bit_length()
