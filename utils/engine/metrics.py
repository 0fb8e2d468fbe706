"""What a person watches: a progress bar, `metrics.jsonl`, and further loggers when asked for: TensorBoard, W&B."""

import importlib
import json
import math
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol

import torch

from utils.distributed import World
from utils.program import UserError
from utils.progress import progress


class Logger(Protocol):
    """Where rows go beside `metrics.jsonl`; exists on the main rank alone."""

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoardLogger:
    """Event files in `folder/tensorboard`."""

    def __init__(self, folder: Path):
        self._board = _package("torch.utils.tensorboard", "--tensorboard").SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._board.close()


class WandbLogger:
    """A Weights & Biases run with the name of the run folder, which a continued run continues.

    Its files lie in `folder/wandb`; WANDB_PROJECT, WANDB_MODE=offline and its other variables say the rest.
    """

    def __init__(self, folder: Path, config: dict):
        wandb, id_file = _package("wandb", "--wandb"), folder / "wandb-id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex)
        self._run = wandb.init(id=id_file.read_text(), resume="allow", name=folder.name, dir=str(folder), config=config)
        self._run.define_metric("*", step_metric="step")  # W&B's own step may not go back, as a continued run does

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class Metrics:
    """Means over the steps since the last row, kept on the device until they are read: one host sync a row."""

    def __init__(self, path: Path, world: World, total_steps: int, loggers: Sequence[Logger] = ()):
        self.path, self.world = Path(path), world
        self._sums: dict[str, torch.Tensor] = {}
        self.totals: dict[str, torch.Tensor] = {}  # of the last row: what was added as vectors, summed over all ranks
        self._counts: dict[str, int] = {}  # how often each was added since the last row
        self._started = time.perf_counter()
        self._timed_steps = 0
        self._waited = 0.0
        self._bar = progress(
            description="training", total=total_steps, unit="step", show=world.is_main, own_time_left=True
        )
        self._loggers = loggers

    def resume(self, step: int, state: dict | None) -> None:
        """Continue after `step`: forget rows that will be written again, take up the sums since the last one."""
        self._bar.update(step - self._bar.n)
        if state:
            self._sums = {name: value.to(self.world.device) for name, value in state["sums"][self.world.rank].items()}
            self._counts = dict(state.get("counts") or dict.fromkeys(self._sums, state.get("steps")))
        if self.world.is_main and self.path.exists():
            rows = [line for line in self.path.read_text().splitlines(keepends=True) if _step_of(line) <= step]
            with open(self.path.with_suffix(".tmp"), "w") as file:
                file.writelines(rows)
            os.replace(self.path.with_suffix(".tmp"), self.path)

    def state(self) -> dict:
        """For a checkpoint: every rank must call it."""
        sums = {name: value.cpu() for name, value in self._sums.items()}
        return {"sums": dict(enumerate(self.world.gather(sums))), "counts": dict(self._counts)}

    def add(self, **values: torch.Tensor) -> None:
        """Add one step's values on the device; nothing waits for them. Not-finite values count as they are.

        Scalars become the row's means over the steps that added them; vectors (counts) are summed, and stand in
        `totals` once a row is made.
        """
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1
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

    def row(self, start_anew: bool = True) -> dict[str, float]:
        """Means over ranks and over the steps since the last row, then start anew; the one place that waits."""
        self.totals = {name: self.world.sum(value.clone()) for name, value in self._sums.items() if value.dim()}
        names = [name for name, value in self._sums.items() if not value.dim()]
        sums = self.world.sum(torch.stack([self._sums[name] for name in names])).tolist()
        row = {name: total / (self.world.size * self._counts[name]) for name, total in zip(names, sums, strict=True)}
        seconds = time.perf_counter() - self._started
        row |= {"steps_per_second": self._timed_steps / seconds, "data_wait": self._waited / seconds}
        if self.world.device.type == "cuda":
            row["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if start_anew:
            self.restart_clock()
            self._sums, self._counts = {}, {}
        return row

    def restart_clock(self) -> None:
        """Leave out what was not training: validation, sampling, compilation."""
        self._started, self._timed_steps, self._waited = time.perf_counter(), 0, 0.0

    def write(self, step: int, values: dict) -> None:
        """Append one row (main rank); `values` must hold numbers and strings only."""
        if not self.world.is_main:
            return
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        not_in_json = {name: None for name, value in numbers.items() if not math.isfinite(value)}
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values, **not_in_json}) + "\n")
        for logger in self._loggers:
            logger.write(step, numbers)

    def last_step(self) -> int:
        """The step of the last row (main rank); 0 without any."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return max((int(step) for line in lines if (step := _step_of(line)) != math.inf), default=0)

    def has(self, step: int, prefix: str) -> bool:
        """Whether a row of `step` holds a value whose name begins with `prefix` (main rank)."""
        rows = map(json.loads, self.path.read_text().splitlines()) if self.path.exists() else ()
        return any(row["step"] == step and any(name.startswith(prefix) for name in row) for row in rows)

    def show(self, text: str) -> None:
        """Text at the end of the progress bar."""
        self._bar.set_postfix_str(text, refresh=False)

    def say(self, text: str) -> None:
        """A line above the progress bar (main rank)."""
        if self.world.is_main:
            self._bar.write(text)

    def close(self) -> None:
        self._bar.close()
        for logger in self._loggers:
            logger.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):  # the last line of a killed run
        return math.inf


def _package(name: str, flag: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[-1]
        raise UserError(
            f"{flag} needs the package {package}; install it (pip install {package}) or leave the flag out."
        ) from error
