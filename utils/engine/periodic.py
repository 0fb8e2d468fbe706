"""Work that a run does every so many steps: validation, sample grids."""

from collections.abc import Callable
from dataclasses import dataclass

from utils.distributed import World


@dataclass(frozen=True)
class Periodic:
    """Does `work(steps_done)` every `every` steps and at the end, and makes up for it after a kill that prevented it.

    `is_done(steps_done)` says on the main rank whether that work has left its result.
    """

    every: int
    total_steps: int
    work: Callable[[int], None]
    is_done: Callable[[int], bool]
    world: World

    def after_step(self, steps_done: int) -> None:
        if self._is_due(steps_done):
            self.work(steps_done)

    def catch_up(self, steps_done: int) -> None:
        """Call after resuming: a run may have been killed between its checkpoint and the work that follows it."""
        if self._is_due(steps_done) and not self.world.broadcast(self.world.is_main and self.is_done(steps_done)):
            self.work(steps_done)

    def _is_due(self, steps_done: int) -> bool:
        return steps_done > 0 and (steps_done % self.every == 0 or steps_done == self.total_steps)
