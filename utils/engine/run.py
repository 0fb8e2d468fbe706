"""The part of training that every trainer shares: where a run lives, when it logs and saves, how it stops and resumes.

A trainer's loop stays its own method; it calls `TrainingRun` at the end of each step.
"""

import argparse
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from utils.checkpoint import read_checkpoint
from utils.distributed import World
from utils.engine.checkpoint_files import CheckpointWriter, checkpoint_path, is_complete, newest_complete, saved_steps
from utils.engine.metrics import Metrics
from utils.engine.run_folder import default_run_name, open_run_folder
from utils.engine.state import Trained, capture_state, restore_state
from utils.program import UserError

STOPPED_STATUS = 143  # 128 + SIGTERM


def add_run_arguments(parser: argparse.ArgumentParser, ckpt_every: int, keep_last: int = 3) -> None:
    """Flags of every trainer about its run folder, its checkpoints and its log."""
    group = parser.add_argument_group("run folder, checkpoints, log")
    group.add_argument("--results-dir", default="results", help="parent of the run folders")
    group.add_argument("--run-name", help="run folder under --results-dir; default: the model and a hash of the "
                       "recipe, so that the same command continues the same run")  # fmt: skip
    group.add_argument("--resume", default="auto", help="auto: continue from the run folder's newest complete "
                       "checkpoint; or a training checkpoint, for a folder that has none yet")  # fmt: skip
    group.add_argument("--cloud-save-path", help="a second place that gets a copy of every checkpoint")
    group.add_argument("--no-local-save", action="store_true", help="keep the run folder under --cloud-save-path only")
    group.add_argument("--log-every", type=int, default=100, help="steps between rows of metrics.jsonl")
    group.add_argument("--ckpt-every", type=int, default=ckpt_every, help="steps between checkpoints")
    group.add_argument(
        "--ckpt-minutes", type=float, default=30, help="and minutes at most between them (0: steps only)"
    )
    group.add_argument("--keep-last", type=int, default=keep_last, help="newest checkpoints kept (2 or more)")
    group.add_argument("--keep-hours", type=float, default=0, help="checkpoints younger than this are kept as well")
    group.add_argument("--max-skipped-steps", type=int, default=100, help="stop when the gradients of as many steps in "
                       "a row were not finite (such steps leave the weights as they are)")  # fmt: skip
    group.add_argument("--tensorboard", action="store_true", help="also write TensorBoard files into the run folder")


class TrainingRun:
    """One run: its folder, metrics and checkpoints.

    `parts` are what learns, `config` goes into `config.json` and every checkpoint. `milestones` are steps that are
    always logged, saved and kept; the last is the end. After `start`, call `end_step` once a step; it may end the
    process (SIGTERM).
    """

    def __init__(
        self,
        args: argparse.Namespace,
        world: World,
        model_name: str,
        recipe: dict,
        config: dict,
        parts: Sequence[Trained],
        milestones: Sequence[int],
        scaler: torch.amp.GradScaler,
    ):
        _check(args)
        self.args, self.world, self.config, self.parts, self.scaler = args, world, config, parts, scaler
        self.milestones, self.total_steps = frozenset(milestones), max(milestones)
        parent = args.cloud_save_path if args.no_local_save else args.results_dir
        name = args.run_name or default_run_name(model_name, recipe)
        self.folder = open_run_folder(parent, name, recipe, {"args": vars(args), "config": config}, world)
        copies = [args.cloud_save_path] if args.cloud_save_path and not args.no_local_save else []
        mirrors = [Path(place) / name / "checkpoints" for place in copies]
        self._writer = None
        if world.is_main:
            self._writer = CheckpointWriter(
                self.folder.checkpoints, mirrors, args.keep_last, args.keep_hours, self.milestones.__contains__
            )
        self.metrics = Metrics(self.folder.path / "metrics.jsonl", world, self.total_steps, args.tensorboard)
        self._save_asked = self._stop_asked = False
        self._skipped = torch.zeros(2, device=world.device)  # steps in all, and up to now in a row
        # Ranks agree on signals and on the clock by a collective on the CPU, which need not happen at every step.
        self._agree_every = 1 if world.size == 1 else min(10, args.log_every)

    def start(self) -> int:
        """Restore the newest checkpoint, if there is one; returns the number of steps already done."""
        signal.signal(signal.SIGTERM, self._on_stop)
        signal.signal(signal.SIGUSR1, self._on_save)
        path = self.world.broadcast(self._checkpoint_to_resume() if self.world.is_main else None)
        self._last_save = time.monotonic()
        if path is None:
            self.metrics.resume(0, None)
            return 0
        checkpoint = read_checkpoint(path) if self.world.is_main else {}
        restore_state(self.parts, checkpoint, self.world)
        progress = {key: checkpoint.get(key) for key in ("steps", "metrics", "skipped_steps", "scaler")}
        progress = self.world.broadcast(progress)
        same_world = progress["metrics"] and len(progress["metrics"]["sums"]) == self.world.size
        self.metrics.resume(progress["steps"], progress["metrics"] if same_world else None)
        self._skipped += torch.tensor(progress["skipped_steps"], device=self.world.device)
        self.scaler.load_state_dict(progress["scaler"])
        self.metrics.say(f"continuing {self.folder.path} after step {progress['steps']:,}")
        return progress["steps"]

    def end_step(self, steps_done: int, log: Callable[[dict], dict], found_inf: torch.Tensor) -> None:
        """Log and save when it is time. `log` completes a row of means; `found_inf` is 1.0 for a skipped step."""
        self._skipped += found_inf
        self._skipped[1] *= found_inf
        milestone = steps_done in self.milestones
        if milestone or steps_done % self.args.log_every == 0:
            skipped, in_a_row = map(int, self._skipped.tolist())
            self.metrics.write(steps_done, log(self.metrics.row() | {"skipped_steps": skipped}))
            self._stop_if_diverged(in_a_row)
        save, stop = self._agree(steps_done)
        if milestone or save or stop or steps_done % self.args.ckpt_every == 0:
            self.save(steps_done)
        if stop and steps_done < self.total_steps:
            self._leave(steps_done)

    def save(self, steps_done: int) -> None:
        """Copy the state and write it in the background; every rank must call it."""
        state = capture_state(self.parts, self.world)
        state |= {"metrics": self.metrics.state(), "skipped_steps": self._skipped.tolist()}
        state["scaler"] = self.scaler.state_dict()
        if self._writer is not None:
            state |= {"steps": steps_done, "args": vars(self.args), "config": self.config}
            self._writer.save(steps_done, state)
        self._last_save, self._save_asked = time.monotonic(), False

    def finish(self) -> Path:
        """Wait for the last checkpoint and return its path."""
        path = self._finish_at(self.total_steps)
        self.metrics.close()
        return path

    def _finish_at(self, steps_done: int) -> Path:
        path = checkpoint_path(self.folder.checkpoints, steps_done)
        if not self._is_written(path):
            self.save(steps_done)  # once more
        if not self._is_written(path):
            raise UserError(f"the last checkpoint {path} could not be written; free some space and run the same "
                            "command again.")  # fmt: skip
        return path

    def _is_written(self, path: Path) -> bool:
        if self._writer is not None:
            self._writer.wait()
        return self.world.broadcast(path.exists())

    def _checkpoint_to_resume(self) -> Path | None:
        own = newest_complete(self.folder.checkpoints)
        if own is None and saved_steps(self.folder.checkpoints):
            raise UserError(f"every checkpoint in {self.folder.checkpoints} is damaged; remove them to start anew, "
                            "or copy a good one there.")  # fmt: skip
        if own is not None and self.args.resume != "auto":
            print(f"continuing this run's own {own.name} instead of {self.args.resume}", file=sys.stderr)
        if own is not None or self.args.resume == "auto":
            return own
        path = Path(self.args.resume)
        checkpoint = read_checkpoint(path)
        learned = [name for part in self.parts for name in part.names[: 3 if part.ema is not None else 2]]
        missing = [key for key in (*learned, "steps", "metrics", "config") if key not in checkpoint]
        if missing:
            raise UserError(f"{path} holds no {missing[0]}, so training cannot continue from it; "
                            "to start from its weights alone use --init-from.")  # fmt: skip
        if checkpoint["steps"] >= self.total_steps:
            raise UserError(f"{path} has {checkpoint['steps']:,} steps, this run ends at {self.total_steps:,}; raise "
                            "--epochs, or use --init-from to start from its weights alone.")  # fmt: skip
        if not is_complete(path):
            raise UserError(f"{path} is damaged; copy it again.")
        different = [key for key, value in self.config.items() if checkpoint["config"].get(key, value) != value]
        if different:
            key = different[0]
            raise UserError(f"{path} was trained with {key} {checkpoint['config'][key]}, this run has "
                            f"{self.config[key]}; give the same settings, or use --init-from.")  # fmt: skip
        return path

    def _agree(self, steps_done: int) -> tuple[bool, bool]:
        """Whether any rank wants to (save, stop) now."""
        if steps_done % self._agree_every:
            return False, False
        minutes = (time.monotonic() - self._last_save) / 60
        due = self.world.is_main and 0 < self.args.ckpt_minutes <= minutes
        wishes = torch.tensor([self._save_asked or due, self._stop_asked], dtype=torch.int32)
        save, stop = self.world.sum(wishes).tolist()
        return bool(save), bool(stop)

    def _stop_if_diverged(self, skipped: int) -> None:
        if skipped >= self.args.max_skipped_steps:
            raise UserError(
                f"the gradients of {skipped} steps in a row were not finite; use --mixed-precision bf16, lower --lr or "
                f"lengthen --warmup-epochs, in a new --run-name (--resume {self.folder.checkpoints}/… continues an "
                "earlier checkpoint there)."
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


def _check(args: argparse.Namespace) -> None:
    for name in ("log_every", "ckpt_every", "max_skipped_steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}.")
    if args.keep_last < 2:
        raise UserError(
            f"--keep-last must be at least 2 (the newest may be the one being written), got {args.keep_last}."
        )
    if args.no_local_save and not args.cloud_save_path:
        raise UserError("--no-local-save needs --cloud-save-path, or the run would be saved nowhere.")
