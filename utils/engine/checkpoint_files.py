"""A run's checkpoint files: written asynchronously, complete or absent, pruned, and found again."""

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO

import torch

from utils.checkpoint import read_checkpoint
from utils.files import atomic_file, sweep, warn_unwritten
from utils.program import UserError


def checkpoint_path(folder: Path, step: int) -> Path:
    return Path(folder) / f"{step:07d}.pt"


def is_complete(path: Path) -> bool:
    """Whether every byte of a checkpoint is as it was written, and PyTorch reads it (as a memory map).

    Raises `OSError` where the file system fails, which says nothing of the file.
    """
    try:
        read_checkpoint(path)
        return True
    except UserError:
        return False


def saved_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder`, ascending."""
    return sorted(int(path.stem) for path in Path(folder).glob("*.pt") if path.stem.isdigit())


def newest_complete(folder: Path) -> Path | None:
    """The newest undamaged checkpoint in `folder`; says so for each damaged one that it passes over."""
    for step in reversed(saved_steps(folder)):
        path = checkpoint_path(folder, step)
        if is_complete(path):
            return path
        print(f"warning: {path} is damaged; taking an older checkpoint", file=sys.stderr)
    return None


class CheckpointWriter:
    """Writes checkpoints in a background thread, one at a time, and removes the ones no longer wanted.

    `last.pt` is a symlink to the newest. Keeps the newest `keep_last`, those younger than `keep_hours`, and the steps
    for which `keep_forever` is true. `mirrors` are further folders that get a copy. A write that fails (a full disk, a
    quota, a file-size limit) warns, and training goes on with the last good file. `newest` is the newest undamaged
    checkpoint that was there before, `good` the steps of those that are known to be whole.
    """

    def __init__(
        self,
        folder: Path,
        mirrors: list[Path],
        keep_last: int,
        keep_hours: float,
        keep_forever: Callable[[int], bool] = lambda step: False,
    ):
        self.folders = [Path(folder), *map(Path, mirrors)]
        self.keep_last, self.keep_hours, self.keep_forever = keep_last, keep_hours, keep_forever
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        for each in self.folders:
            there = next(path for path in (each, *each.parents) if path.exists())
            if not there.is_dir():
                raise UserError(f"checkpoints cannot go into {each}: {there} is no folder; name another path.")
            sweep(each)
            for step in saved_steps(each):
                if not (path := checkpoint_path(each, step)).is_file():
                    raise UserError(f"{path} is no file, but has a checkpoint's name; move it away.")
        self.newest = newest_complete(self.folders[0])
        self.good = set() if self.newest is None else {int(self.newest.stem)}
        if self.newest is not None:  # a run may be killed after a checkpoint and before what follows it
            self._bring_up_to_date(self.newest)
            self._start(partial(self._copy_to_mirrors, int(self.newest.stem), missing_only=True))

    def save(self, step: int, state: dict) -> None:
        """Start writing `state` as the checkpoint of `step`; waits for the one before it."""
        self.wait()
        self._start(partial(self._write, step, state))

    def wait(self) -> None:
        """Return once the last `save` is on the disk; raises what its thread raised, except for a failed write."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _start(self, work: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                work()
            except BaseException as error:  # raised again by wait(), in the training thread
                self._failure = error

        self._thread = threading.Thread(target=guarded)
        self._thread.start()

    def _write(self, step: int, state: dict) -> None:
        if self._write_to(self.folders[0], step, lambda file: torch.save(state, file)):
            self.good.add(step)
            self._copy_to_mirrors(step)

    def _copy_to_mirrors(self, step: int, missing_only: bool = False) -> None:
        def copy(file: IO) -> None:
            with open(checkpoint_path(self.folders[0], step), "rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)

        for mirror in self.folders[1:]:
            if missing_only and checkpoint_path(mirror, step).exists():
                self._bring_up_to_date(checkpoint_path(mirror, step))
            else:
                self._write_to(mirror, step, copy)

    def _write_to(self, folder: Path, step: int, write: Callable) -> bool:
        """Whether the file was written; if not, for want of space or of the file system, a warning has been given."""
        path = checkpoint_path(folder, step)
        try:
            with atomic_file(path) as file:
                write(file)
        except OSError as error:
            warn_unwritten(
                path, error, "training goes on and tries again at the next checkpoint; the last good one stays"
            )
            return False
        self._bring_up_to_date(path)
        return True

    def _bring_up_to_date(self, newest: Path) -> None:
        """`last.pt` and the older checkpoints beside `newest`."""
        try:
            _point_last_at(newest)
            self._prune(newest)
        except OSError as error:
            print(
                f"warning: {newest} is written, but last.pt or older checkpoints stay as they were "
                f"({error.strerror or error}); training goes on.",
                file=sys.stderr,
            )

    def _prune(self, newest: Path) -> None:
        """Remove old checkpoints; of those after `newest`, which are damaged, none stands for a good one."""
        steps = [step for step in saved_steps(newest.parent) if step <= int(newest.stem)]
        for step in steps[: -self.keep_last]:
            path = checkpoint_path(newest.parent, step)
            young = time.time() - os.path.getmtime(path) < self.keep_hours * 3600
            if not young and not self.keep_forever(step):
                path.unlink()


def _point_last_at(path: Path) -> None:
    """`last.pt` beside the checkpoints is always a symlink to the newest one."""
    link = path.with_name(f".last.pt.{os.getpid()}.tmp")
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    os.replace(link, path.with_name("last.pt"))
