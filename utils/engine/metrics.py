"""What a person watches: a progress bar, `metrics.jsonl`, and TensorBoard when asked for."""

import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from utils.distributed import World
from utils.progress import progress

INFINITY = float("inf")  # not a JSON number, nor is NaN: both are written as null


class Metrics:
    """Means over the steps since the last row, kept on the device until they are read: one host sync a row."""

    def __init__(self, path: Path, world: World, total_steps: int, tensorboard: bool = False):
        self.path, self.world = Path(path), world
        self._sums: dict[str, torch.Tensor] = {}
        self.totals: dict[str, torch.Tensor] = {}  # of the last row: what was added as vectors, summed over all ranks
        self._steps = 0
        self._started = time.perf_counter()
        self._timed_steps = 0
        self._waited = 0.0
        self._bar = progress(
            description="training", total=total_steps, unit="step", show=world.is_main, own_time_left=True
        )
        self._board = _summary_writer(self.path.parent) if tensorboard and world.is_main else None

    def resume(self, step: int, state: dict | None) -> None:
        """Continue after `step`: forget rows that will be written again, take up the sums since the last one."""
        self._bar.update(step - self._bar.n)
        if state:
            self._sums = {name: value.to(self.world.device) for name, value in state["sums"][self.world.rank].items()}
            self._steps = state["steps"]
        if self.world.is_main and self.path.exists():
            rows = [line for line in self.path.read_text().splitlines(keepends=True) if _step_of(line) <= step]
            with open(self.path.with_suffix(".tmp"), "w") as file:
                file.writelines(rows)
            os.replace(self.path.with_suffix(".tmp"), self.path)

    def state(self) -> dict:
        """For a checkpoint: every rank must call it."""
        sums = {name: value.cpu() for name, value in self._sums.items()}
        return {"sums": dict(enumerate(self.world.gather(sums))), "steps": self._steps}

    def add(self, **values: torch.Tensor) -> None:
        """Add one step's values on the device; nothing waits for them. Not-finite values count as they are.

        Scalars become the row's means; vectors (counts) are summed, and stand in `totals` once a row is made.
        """
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += 1
        self._timed_steps += 1
        self._bar.update()

    def timed(self, batches: Iterable) -> Iterator:
        """The batches; the time spent waiting for them becomes the row's `data_wait`."""
        iterator = iter(batches)
        while True:
            started = time.perf_counter()
            batch = next(iterator)
            self._waited += time.perf_counter() - started
            yield batch

    def row(self) -> dict[str, float]:
        """Means over ranks and over the steps since the last row, then start anew; the one place that waits."""
        self.totals = {name: self.world.sum(value.clone()) for name, value in self._sums.items() if value.dim()}
        names = [name for name, value in self._sums.items() if not value.dim()]
        means = self.world.sum(torch.stack([self._sums[name] for name in names])) / (self.world.size * self._steps)
        row = dict(zip(names, means.tolist(), strict=True))
        seconds = time.perf_counter() - self._started
        row |= {"steps_per_second": self._timed_steps / seconds, "data_wait": self._waited / seconds}
        if self.world.device.type == "cuda":
            row["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.restart_clock()
        self._sums, self._steps = {}, 0
        return row

    def restart_clock(self) -> None:
        """Leave out what was not training: validation, sampling, compilation."""
        self._started, self._timed_steps, self._waited = time.perf_counter(), 0, 0.0

    def write(self, step: int, values: dict) -> None:
        """Append one row (main rank); `values` must hold numbers and strings only."""
        if not self.world.is_main:
            return
        values = {
            name: None if value != value or value in (INFINITY, -INFINITY) else value for name, value in values.items()
        }
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)

    def show(self, text: str) -> None:
        """Text at the end of the progress bar."""
        self._bar.set_postfix_str(text, refresh=False)

    def say(self, text: str) -> None:
        """A line above the progress bar (main rank)."""
        if self.world.is_main:
            self._bar.write(text)

    def close(self) -> None:
        self._bar.close()
        if self._board is not None:
            self._board.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):  # the last line of a killed run
        return INFINITY


def _summary_writer(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        from utils.program import UserError

        raise UserError("--tensorboard needs the package tensorboard; install it or leave the flag out.") from error
    return SummaryWriter(str(folder / "tensorboard"))
