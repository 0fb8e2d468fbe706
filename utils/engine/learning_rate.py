"""Learning rates as pure functions of the step: nothing to save, nothing to restore."""

from collections.abc import Sequence
from dataclasses import dataclass

from utils.settings import recipe, settings

MOST_STEPS = 10**8  # a patch schedule keeps a number for each: 0.8 GB


@settings("learning rate")
class LearningRateSettings:
    lr: float = recipe(1e-4, "learning rate", at_least=0)
    scheduler: bool = recipe(
        False,
        "linear warm-up, constant part and linear decay in each stage of training; otherwise the rate is constant",
    )
    warmup_epochs: float = recipe(1.0, "epochs of linear warm-up in each stage", at_least=0)
    decay_ratio: float = recipe(0.2, "share of each stage that decays to --end-lr", at_least=0, at_most=1)
    end_lr: float = recipe(1e-5, "learning rate at the end of each stage", at_least=0)


def check_length(epochs: int, steps_per_epoch: int) -> None:
    """Raise `ValueError`, naming the flag, for no step at all, and for more than any training has."""
    if steps_per_epoch < 1:
        raise ValueError("the data must hold at least one batch; lower --global-batch-size")
    if epochs * steps_per_epoch > MOST_STEPS:
        raise ValueError(f"--epochs {epochs} are {epochs * steps_per_epoch:,} steps, above {MOST_STEPS:,}; lower it")


def warmup_constant_decay(
    step: float, steps: int, peak: float, end: float, warmup_steps: float, decay_ratio: float
) -> float:
    """A linear rise from 0 over `warmup_steps`, `peak`, and a linear fall to `end` over the last `decay_ratio`."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    decay_steps = steps * decay_ratio
    decayed = step - (steps - decay_steps)
    return peak if decayed <= 0 else peak + (end - peak) * decayed / decay_steps


@dataclass(frozen=True)
class LearningRate:
    """The rate at every step of a training of consecutive `stages`, each of so many steps, with its own warm-up."""

    settings: LearningRateSettings
    stages: Sequence[int]
    steps_per_epoch: int

    def __post_init__(self):
        """Raises `ValueError`, naming the flags, if a stage is shorter than its warm-up and decay."""
        chosen = self.settings
        for number, steps in enumerate(self.stages, 1):
            if chosen.scheduler and self._warmup_steps + chosen.decay_ratio * steps > steps + 1e-9:
                raise ValueError(
                    f"level {number} of {len(self.stages)} has {steps / self.steps_per_epoch:g} epochs, less than "
                    f"--warmup-epochs {chosen.warmup_epochs:g} plus --decay-ratio {chosen.decay_ratio:g} of it; "
                    "lower one of them (fractions of an epoch are allowed)"
                )

    @property
    def _warmup_steps(self) -> float:
        return self.settings.warmup_epochs * self.steps_per_epoch

    def at(self, step: int) -> float:
        """The rate of a step, counted from 0; any step after the end has the end's rate."""
        chosen = self.settings
        if not chosen.scheduler:
            return chosen.lr
        for stage in self.stages[:-1]:
            if step < stage:
                break
            step -= stage
        else:
            stage = self.stages[-1]
        return warmup_constant_decay(
            min(step, stage), stage, chosen.lr, chosen.end_lr, self._warmup_steps, chosen.decay_ratio
        )
