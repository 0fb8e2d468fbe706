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
from utils.files import append, atomic_file, warn_unwritten
from utils.program import UserError, first_line
from utils.progress import progress

ROW_BEGINS = '{"step": '


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
        if not id_file.is_file():  # what is no file is refused where it is written
            with atomic_file(id_file, "w") as file:
                file.write(uuid.uuid4().hex)
        which = {"id": id_file.read_text(), "resume": "allow", "name": folder.name, "dir": str(folder)}
        try:
            self._run = wandb.init(**which, config=config)
        except Exception as error:  # no login, no network: errors of its own kinds
            raise UserError(
                f"--wandb: Weights & Biases does not start ({first_line(error)}); run `wandb login`, or set "
                "WANDB_MODE=offline."
            ) from error
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
        self._loggers = list(loggers)
        self._unwritten, self._refused = "", False  # rows that a full disk has not taken yet
        if world.is_main and self.path.exists() and not self.path.is_file():
            raise UserError(f"{self.path} is no file, but the run's log belongs there; move it away.")

    def resume(self, step: int, state: dict | None) -> None:
        """Continue after `step`: forget rows that will be written again, take up the sums since the last one."""
        self._bar.update(step - self._bar.n)
        if state:
            self._sums = {name: value.to(self.world.device) for name, value in state["sums"][self.world.rank].items()}
            self._counts = dict(state.get("counts") or dict.fromkeys(self._sums, state.get("steps")))
        if self.world.is_main and self.path.exists():
            lines = self._lines()
            kept = "".join(line for line in lines if row_of(line)["step"] <= step).encode()
            there = self.path.read_bytes()
            if there != kept and there.startswith(kept):
                os.truncate(self.path, len(kept))  # which a full disk allows
            elif there != kept:
                with atomic_file(self.path) as file:
                    file.write(kept)

    def take_up(self, rows: str) -> None:
        """Append those of the rows that a checkpoint holds (main rank): no disk had taken them when it was written."""
        there = set(self._lines())
        self._unwritten += "".join(row for row in rows.splitlines(keepends=True) if row not in there)
        self._write_rows()

    def state(self) -> dict:
        """For a checkpoint: every rank must call it."""
        self._write_rows()
        sums = {name: value.cpu() for name, value in self._sums.items()}
        state = {"sums": dict(enumerate(self.world.gather(sums))), "counts": dict(self._counts)}
        return state | {"unwritten": self._unwritten}

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
        self._unwritten += json.dumps({"step": step, **values, **not_in_json}) + "\n"  # so begins ROW_BEGINS
        self._write_rows()
        for logger in list(self._loggers):
            try:
                logger.write(step, numbers)
            except OSError as error:
                warn_unwritten(
                    type(logger).__name__, error, "training goes on without it until the run is started again"
                )
                self._loggers.remove(logger)

    def _write_rows(self) -> None:
        """Append the rows that are not on the disk yet; where it takes none, they wait for the next time."""
        if not self._unwritten:
            return
        try:
            append(self.path, self._unwritten)
            self._unwritten, self._refused = "", False
        except OSError as error:
            if not self._refused:
                warn_unwritten(self.path, error, "training goes on, and its rows are written when there is space again")
            self._refused = True

    def last_step(self) -> int:
        """The step of the last row (main rank); 0 without any."""
        return max((row_of(line)["step"] for line in self._lines()), default=0)

    def has(self, step: int, prefix: str) -> bool:
        """Whether a row of `step` holds a value whose name begins with `prefix` (main rank)."""
        rows = map(row_of, [*self._lines(), *self._unwritten.splitlines()])
        return any(row["step"] == step and any(name.startswith(prefix) for name in row) for row in rows)

    def _lines(self) -> list[str]:
        """The rows on the disk, without the one at the end that a kill or a power cut has torn.

        Raises `UserError` for what else is no row.
        """
        if not self.path.exists():
            return []
        *lines, rest = self.path.read_text("utf-8", errors="replace").split("\n")
        torn = rest.strip("\0")[: len(ROW_BEGINS)]
        for number, line in enumerate(lines if ROW_BEGINS.startswith(torn) else [*lines, rest], 1):
            if row_of(line) is None:
                raise UserError(
                    f"{self.path} is damaged: line {number} is no row of this log; mend or remove that line, or put a "
                    "good copy there."
                )
        return [f"{line}\n" for line in lines]

    def show(self, text: str) -> None:
        """Text at the end of the progress bar."""
        self._bar.set_postfix_str(text, refresh=False)

    def say(self, text: str) -> None:
        """A line above the progress bar (main rank)."""
        if self.world.is_main:
            self._bar.write(text)

    def close(self) -> None:
        self._bar.close()
        self._write_rows()
        for logger in self._loggers:
            try:
                logger.close()
            except OSError as error:
                warn_unwritten(type(logger).__name__, error, "what it still held is lost; metrics.jsonl has it")


def row_of(line: str) -> dict | None:
    """The row in a line of `metrics.jsonl`; None for anything else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _package(name: str, flag: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[-1]
        raise UserError(
            f"{flag} needs the package {package}; install it (pip install {package}) or leave the flag out."
        ) from error
