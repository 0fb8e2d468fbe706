"""The part of training that every trainer shares: where a run lives, when it logs and saves, how it stops and resumes.

A trainer's loop stays its own method; it calls `TrainingRun` at the end of each step.
"""

import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

import torch

from utils.checkpoint import read_checkpoint
from utils.distributed import World
from utils.engine.checkpoint_files import CheckpointWriter, checkpoint_path, saved_steps
from utils.engine.metrics import Logger, Metrics, TensorBoardLogger, WandbLogger
from utils.engine.run_folder import RunFolder, RunIdentity, default_run_name
from utils.engine.state import Trained, averages_record, capture_state, own_weights, restore_state
from utils.files import atomic_file, warn_unwritten
from utils.program import UserError
from utils.settings import (
    SettingError,
    default_identity,
    identity,
    json_values,
    option,
    refuse_differences,
    settings,
    unusual,
    values_of,
)

FIRST_SAVE = 2  # minutes; from then on the interval doubles up to --ckpt-minutes
EARLY_ROW = 60  # seconds between rows until the first one of --log-every
STOPPED_STATUS = 143  # 128 + SIGTERM
LAST_STEPS = 10  # of a run: if none of them has learned anything, it has diverged


@settings("run folder, checkpoints, log")
class RunSettings:
    results_dir: str = option("results", "parent of the run folders")
    run_name: str | None = option(
        None,
        "run folder under --results-dir; default: the model and a hash of the settings that change the result, so that "
        "the same command continues the same run",
    )
    resume: str = option(
        "auto",
        "auto: continue from the newest complete checkpoint of the run folder; or a training checkpoint to start a new "
        "folder from",
    )
    cloud_save_path: str | None = option(None, "a second folder that gets a copy of every checkpoint")
    no_local_save: bool = option(False, "keep the run folder under --cloud-save-path only")
    log_every: int = option(100, "steps between rows of metrics.jsonl", at_least=1)
    ckpt_every: int = option(250_000, "steps between checkpoints", at_least=1)
    ckpt_minutes: float = option(
        30.0, "minutes between checkpoints at most, fewer in the first half hour; 0: by steps alone", at_least=0
    )
    keep_last: int = option(
        3, "newest checkpoints to keep; at least 2, for the newest may be the one being written", at_least=2
    )
    keep_hours: float = option(0.0, "checkpoints younger than so many hours are kept as well", at_least=0)
    max_skipped_steps: int = option(
        100,
        "stop when the gradients of so many steps in a row were not finite (such steps leave the weights unchanged)",
        at_least=1,
    )
    tensorboard: bool = option(False, "also write TensorBoard files into the run folder")
    wandb: bool = option(
        False, "also log to Weights & Biases (WANDB_PROJECT names the project, WANDB_MODE=offline needs no network)"
    )

    def __post_init__(self):
        if self.no_local_save and not self.cloud_save_path:
            raise SettingError(
                "no_local_save", "--no-local-save", "needs --cloud-save-path, or the run would be saved nowhere"
            )


class TrainingRun:
    """One run: its folder, metrics and checkpoints.

    `program` are all settings of the trainer and `data` what describes what it learns from: those that change the
    result name the folder and decide whether it may be continued; so does `content`, hashes that tell such data apart,
    but for the name. `config` is what later programs must know of the weights; it goes into `config.json` and every
    checkpoint. `places` are paths of what it was learned from, which a checkpoint only notes. `parts` are what learns.
    `milestones` are steps that are always logged, saved and kept; the last is the end. Nothing is written before
    `start`; after it, call `end_step` once per step; it may end the process (SIGTERM).
    """

    metrics: Metrics  # from `start` on

    def __init__(
        self,
        settings: RunSettings,
        program: Any,
        world: World,
        model_name: str,
        data: dict,
        content: dict,
        config: dict,
        parts: Sequence[Trained],
        milestones: Sequence[int],
        scaler: torch.amp.GradScaler,
        places: dict[str, str] | None = None,
    ):
        self.settings, self.args, self.config = settings, values_of(program), config
        self.world, self.parts, self.scaler, self.places = world, parts, scaler, places or {}
        self.total_steps, self.milestones = max(milestones), frozenset(milestones)
        parent = settings.cloud_save_path if settings.no_local_save else settings.results_dir
        self._name = settings.run_name or default_run_name(model_name, unusual(program) | data)
        self.folder = RunFolder(Path(parent) / self._name)
        self._identity = RunIdentity(
            recipe=identity(program) | data,
            defaults=default_identity(type(program)),
            content=content,
            config={"args": self.args, "config": self.config},
        )
        self._writer: CheckpointWriter | None = None
        self._save_asked = self._stop_asked = self._logged_regularly = False
        self._skipped = torch.zeros(2, device=world.device)  # steps in all, and up to now in a row
        # Ranks agree on signals and on the clock by a collective on the CPU, which need not happen at every step.
        self._agree_every = 1 if world.size == 1 else min(10, settings.log_every)

    def start(self) -> int:
        """Enter the run's folder and restore its newest checkpoint, if there is one; returns the steps already done."""
        signal.signal(signal.SIGTERM, self._on_stop)
        signal.signal(signal.SIGUSR1, self._on_save)
        with self.folder.enter(self._identity, self.world):
            self.milestones |= {*self.folder.finished}
            if self.world.is_main:
                self._writer = self._open_writer()
            path = self.world.broadcast(self._checkpoint_to_resume() if self.world.is_main else None)
            loggers = self._loggers() if self.world.is_main else ()
            self.metrics = Metrics(self.folder.path / "metrics.jsonl", self.world, self.total_steps, loggers)
            self._started = self._last_save = self._last_log = time.monotonic()
            return self._start_anew() if path is None else self._continue(path)

    def _open_writer(self) -> CheckpointWriter:
        chosen, mirrors = self.settings, []
        if chosen.cloud_save_path and not chosen.no_local_save:
            mirrors = [Path(chosen.cloud_save_path) / self._name / "checkpoints"]
        return CheckpointWriter(
            self.folder.checkpoints, mirrors, chosen.keep_last, chosen.keep_hours, self.milestones.__contains__
        )

    def _start_anew(self) -> int:
        if self.world.is_main and (lost := self.metrics.last_step()):
            self.metrics.say(
                f"{self.folder.path} was stopped after step {lost:,} and before its first checkpoint; starting anew"
            )
        self.metrics.resume(0, None)
        return 0

    def _continue(self, path: Path) -> int:
        checkpoint = read_checkpoint(path) if self.world.is_main else {}
        restore_state(self.parts, checkpoint, self.world)
        progress = {key: checkpoint.get(key) for key in ("steps", "metrics", "skipped_steps", "scaler")}
        progress = self.world.broadcast(progress)
        same_world = progress["metrics"] and len(progress["metrics"]["sums"]) == self.world.size
        self.metrics.resume(progress["steps"], progress["metrics"] if same_world else None)
        if self.world.is_main and path.parent == self.folder.checkpoints:
            self.metrics.take_up((progress["metrics"] or {}).get("unwritten", ""))
        self._skipped += torch.tensor(progress["skipped_steps"], device=self.world.device)
        self._logged_regularly = progress["steps"] >= self.settings.log_every
        self.scaler.load_state_dict(progress["scaler"])
        for part in self.parts:
            if part.ema is not None:
                part.ema.updates = progress["steps"]
        self.metrics.say(f"continuing {self.folder.path} after step {progress['steps']:,}")
        return progress["steps"]

    def end_step(self, steps_done: int, log: Callable[[dict], dict], found_inf: torch.Tensor) -> None:
        """Log and save when it is time. `log` completes a row of means; `found_inf` is 1.0 for a skipped step."""
        self._skipped += found_inf
        self._skipped[1] *= found_inf
        milestone = steps_done in self.milestones
        regular_row = milestone or steps_done % self.settings.log_every == 0
        if regular_row:
            self._stop_if_diverged(self._log(steps_done, log), self.settings.max_skipped_steps)
        save, stop, early_row = self._agree(steps_done)
        if early_row and not regular_row:
            self._log(steps_done, log, regular=False)
        if milestone or save or stop or steps_done % self.settings.ckpt_every == 0:
            self.save(steps_done)
        if stop and steps_done < self.total_steps:
            self._leave(steps_done)

    def _log(self, steps_done: int, log: Callable[[dict], dict], regular: bool = True) -> int:
        """Write a row of the log; returns how many steps in a row were skipped.

        One that comes early, on a slow machine, leaves the regular one as it would be without it.
        """
        skipped, in_a_row = map(int, self._skipped.tolist())
        self.metrics.write(steps_done, log(self.metrics.row(start_anew=regular) | {"skipped_steps": skipped}))
        self._logged_regularly |= regular
        self._last_log = time.monotonic()
        return in_a_row

    def save(self, steps_done: int) -> None:
        """Copy the state, and the rows that the log could not take, and write them in the background.

        Every rank must call it.
        """
        state = capture_state(self.parts, self.world)
        state |= {"metrics": self.metrics.state(), "skipped_steps": self._skipped.tolist()}
        state["scaler"] = self.scaler.state_dict()
        if self._writer is not None:
            state |= {"steps": steps_done, "args": self.args, "config": self.config, "places": self.places}
            state["averages"] = averages_record(self.parts)
            self._writer.save(steps_done, state)
        self._last_save, self._save_asked = time.monotonic(), False

    def save_picture(self, steps_done: int, write: Callable[[IO], None]) -> None:
        """`samples/{step}.png`, written by `write` (main rank); a full disk is told, and training goes on."""
        path = self.picture(steps_done)
        try:
            with atomic_file(path) as file:
                write(file)
        except OSError as error:
            warn_unwritten(path, error, "training goes on without this picture")

    def picture(self, steps_done: int) -> Path:
        return self.folder.samples / f"{steps_done:07d}.png"

    def finish(self) -> Path:
        """Wait for the last checkpoint and return its path. Raises `UserError` if training has come to nothing."""
        path = self._finish_at(self.total_steps)
        self._refuse_what_has_diverged()
        if self.world.is_main:
            self._note_finished()
        self.metrics.close()
        shares = [part.ema.share_of_beginning for part in self.parts if part.ema is not None]
        if self.world.is_main and max(shares, default=0) > 0.01:
            print(
                f"warning: the averaged weights still hold {max(shares):.0%} of what they were before training; "
                "lower --ema-decay, train longer, or use --weights raw later",
                file=sys.stderr,
            )
        return path

    def _note_finished(self) -> None:
        try:
            self.folder.note_finished(self.total_steps)
        except OSError as error:
            then = "before --epochs can be raised, the same command must have noted there that the run has ended"
            warn_unwritten(self.folder.path / "config.json", error, then)

    def _refuse_what_has_diverged(self) -> None:
        """Weights that are not finite, or none learned any more: of a short run, too."""
        spoiled = [not weight.isfinite().all() for part in self.parts for weight in own_weights(part.module)]
        if self.world.sum(torch.tensor(float(any(spoiled)))):
            self._refuse(f"the weights are no finite numbers any more, training has diverged; {self._remedy}.")
        self._stop_if_diverged(int(self._skipped[1]), min(LAST_STEPS, -(-self.total_steps // 2)))

    def _finish_at(self, steps_done: int) -> Path:
        path = checkpoint_path(self.folder.checkpoints, steps_done)
        if not self._is_written(steps_done):
            self.save(steps_done)  # once more
        if not self._is_written(steps_done):
            self._refuse(
                f"the last checkpoint {path} could not be written; free some space and run the same command again."
            )
        return path

    def _is_written(self, steps_done: int) -> bool:
        """Whether the checkpoint is on the disk and whole; a damaged file of its name may lie there, too."""
        if self._writer is not None:
            self._writer.wait()
        return self.world.broadcast(self._writer is not None and steps_done in self._writer.good)

    def _checkpoint_to_resume(self) -> Path | None:
        own = self._writer.newest
        if own is None and saved_steps(self.folder.checkpoints):
            raise UserError(
                f"every checkpoint in {self.folder.checkpoints} is damaged; remove them to start anew, "
                "or copy a good one there."
            )
        if own is not None and self.settings.resume != "auto":
            print(f"continuing this run's own {own.name} instead of {self.settings.resume}", file=sys.stderr)
        if own is not None or self.settings.resume == "auto":
            return own
        path = Path(self.settings.resume)
        checkpoint = read_checkpoint(path)
        learned = [name for part in self.parts for name in part.names[: 3 if part.ema is not None else 2]]
        missing = [key for key in (*learned, "steps", "metrics", "config") if key not in checkpoint]
        if missing:
            raise UserError(
                f"{path} holds no {missing[0]}, so training cannot continue from it; "
                "to start from its weights alone use --init-from."
            )
        if checkpoint["steps"] >= self.total_steps:
            raise UserError(
                f"{path} has {checkpoint['steps']:,} steps, this run ends at {self.total_steps:,}; raise "
                "--epochs, or use --init-from to start from its weights alone."
            )
        remedy = "give the same settings, or use --init-from"
        refuse_differences(f"{path} was trained", json_values(checkpoint["config"]), json_values(self.config), remedy)
        return path

    def _agree(self, steps_done: int) -> tuple[bool, bool, bool]:
        """Whether any rank wants to (save, stop, log) now."""
        if steps_done % self._agree_every:
            return False, False, False
        interval = min(self.settings.ckpt_minutes, max(FIRST_SAVE, (self._last_save - self._started) / 60))
        now = time.monotonic()
        due = self.world.is_main and 0 < interval <= (now - self._last_save) / 60
        log = self.world.is_main and not self._logged_regularly and now - self._last_log > EARLY_ROW
        wishes = torch.tensor([self._save_asked or due, self._stop_asked, log], dtype=torch.int32)
        save, stop, log = self.world.sum(wishes).tolist()
        return bool(save), bool(stop), bool(log)

    def _loggers(self) -> list[Logger]:
        folder = self.folder.path
        wanted = [TensorBoardLogger(folder)] if self.settings.tensorboard else []
        return wanted + ([WandbLogger(folder, self.args)] if self.settings.wandb else [])

    def _stop_if_diverged(self, skipped: int, allowed: int) -> None:
        if skipped >= allowed:
            self._refuse(
                f"the gradients of {skipped} steps in a row were not finite, training has diverged; {self._remedy}."
            )

    def _refuse(self, sentence: str) -> NoReturn:
        """Raise `UserError`; the log has got what it can."""
        self.metrics.close()
        raise UserError(sentence)

    @property
    def _remedy(self) -> str:
        return (
            "use --mixed-precision bf16, lower --lr or lengthen --warmup-epochs, in a new --run-name "
            f"(--resume {self.folder.checkpoints}/… continues an earlier checkpoint there)"
        )

    def _leave(self, steps_done: int) -> None:
        self._finish_at(steps_done)
        self.metrics.close()
        if self.world.is_main:
            print(f"stopped by a signal after step {steps_done:,}; the same command continues", file=sys.stderr)
        self.world.close()
        sys.exit(STOPPED_STATUS)

    def _on_stop(self, *_) -> None:
        self._stop_asked = True

    def _on_save(self, *_) -> None:
        self._save_asked = True
