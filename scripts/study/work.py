"""Carries out a study: claims what is missing, runs its commands, keeps what they find.

Several processes may do this at once, on machines that share the folders: a run belongs to the process that holds the
lock of its folder, and nothing else is agreed upon.
"""

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from scripts.study.budget import processor_name
from scripts.study.commands import Command, Commands, Run
from scripts.study.declaration import Arm, Study
from scripts.study.pictures import save_strip
from scripts.study.results import Results, loss_curve
from scripts.study.shell import ROOT, Shell, clock
from utils.files import HeldError, lock_folder
from utils.program import UserError

POLL_SECONDS = 5


@dataclass(frozen=True)
class Task:
    """A piece of a run that one process does without waiting for others."""

    run: Run
    what: str
    do: Callable[[Run, IO], None]
    is_done: Callable[[Run], bool]
    is_ready: Callable[[Run], bool] = lambda run: True


class Worker:
    """One process of a study."""

    def __init__(self, study: Study, results: Results, shell: Shell, arms: list[Arm]):
        self.study, self.results, self.shell, self.arms = study, results, shell, arms
        self.work, self.commands = shell.work, Commands(study)

    def tasks(self) -> list[Task]:
        """All of the study's, in the order in which they are to be done."""
        results, runs = self.results, self.results.runs(self.arms)
        is_known = lambda run: results.of(run) is not None  # noqa: E731
        is_guided = lambda run: results.guidance_of(run.arm) is not None  # noqa: E731
        return (
            [Task(run, "train", self._train, is_known) for run in results.learning_rate_runs()]
            + [Task(run, "train, find guidance", self._train_and_choose, results.is_chosen) for run in runs]
            + [Task(run, "sample at the chosen guidance", self._report, results.is_reported, is_guided) for run in runs]
        )

    def missing(self) -> list[Task]:
        return [task for task in self.tasks() if not task.is_done(task.run)]

    def carry_out(self) -> None:
        """Do what is missing and not being done by another process; return once nothing is missing."""
        self.results.shared()  # refuses what was made with other settings
        if self.missing():
            self._prepare_once()
        told = False
        while missing := self.missing():
            if not any(self._do_if_free(task) for task in missing):
                if not told:
                    print(f"waiting for other processes: {len(missing)} tasks are not finished", flush=True)
                told = True
                time.sleep(POLL_SECONDS)

    def _do_if_free(self, task: Task) -> bool:
        """Whether the task was ready and no other process was doing it; if so it is done now."""
        lock = claim(self.work / "runs" / task.run.name) if task.is_ready(task.run) else None
        if lock is None:
            return False
        with lock:
            if not task.is_done(task.run):
                started = time.monotonic()
                print(f"{task.run.name}: {task.what} …", end=" ", flush=True)
                task.do(task.run, lock)
                print(f"{clock(time.monotonic() - started)}; {len(self.missing())} more to do", flush=True)
        return True

    def _prepare_once(self) -> None:
        """Data, classifier, tokenizer and codes; a process that is at it is waited for."""
        done, told = self.work / "preparation/done", False
        is_missing = lambda: not done.exists() or self.results.shared() is None  # noqa: E731
        while is_missing():
            lock = claim(done.parent)
            if lock is not None:
                with lock:
                    if is_missing():  # another process may have done it since
                        self._prepare(lock)
                        done.touch()
                continue
            if not told:
                print("another process prepares data, tokenizer and codes; waiting for it", flush=True)
                told = True
            time.sleep(POLL_SECONDS)

    def _prepare(self, lock: IO) -> None:
        seconds = {}
        for name, command in self.commands.preparation().items():
            print(f"{name} …", end=" ", flush=True)
            seconds[name] = self._run([command], self.work / "preparation", lock)
            print(clock(seconds[name]), flush=True)
        tokenizer = read(self._only("codes/*_codes/meta.json"))["tokenizer"]["hash"]
        found = self.results.shared()
        if found is not None and found["tokenizer"]["hash"] != tokenizer:
            raise UserError(
                f"the results in {self.results.folder} were made with another tokenizer than the one in "
                f"{self.work}; give --results FOLDER to make results of your own."
            )
        scores = {name: read(self.work / f"scores/{name}.json") for name in ("held-out", "reconstructions")}
        self.results.keep_shared(
            {
                "tokenizer": {"hash": tokenizer}
                | read(self._only("reconstructions/held-out*.settings.json"))["scores"],
                "classifier": read(self.work / "classifier.json"),
                "scores": {name: report["metrics"] for name, report in scores.items()},
                "wall_seconds": seconds,
                "machine": machine() | {"device": scores["held-out"]["device"]},
            }
        )
        for name, images in (("held-out", "held-out-originals"), ("reconstructions", "held-out")):
            save_strip(self.work / f"reconstructions/{images}.npz", self.results.folder / f"samples/{name}.png")

    def _train(self, run: Run, lock: IO) -> None:
        command = self.commands.train(run, self.results.budgets[run.arm.name].epochs)
        seconds = self._run([command], self.work / "runs" / run.name, lock)
        batch_size = self.study.training_flags(run.arm)["global-batch-size"]
        curve = loss_curve(self.work / f"gpt/{run.name}/metrics.jsonl", batch_size)
        wall_seconds = {"training": max(seconds, curve["seconds"][-1]), "scores": []}  # a part may have run before
        found = {"training": curve, "choice_scores": {}, "report_scores": {}, "wall_seconds": wall_seconds}
        self.results.keep(run, found | {"machine": machine()})

    def _train_and_choose(self, run: Run, lock: IO) -> None:
        if self.results.of(run) is None or not self._has_weights(run):
            self._train(run, lock)
        for guidance in self.study.sampling.guidance:
            if f"{guidance:g}" not in self.results.of(run)["choice_scores"]:
                self._score(run, guidance, self.study.sampling.choice_seed, lock)
        self._discard_samples(run)

    def _report(self, run: Run, lock: IO) -> None:
        """Scores at the arm's guidance, on samples that had no part in choosing it."""
        if not self._has_weights(run):  # the results were begun elsewhere
            self._train_and_choose(run, lock)
        guidance = self.results.guidance_of(run.arm)
        known = self.results.of(run)["report_scores"].get(f"{guidance:g}", {})
        for seed in self.study.sampling.report_seeds:
            if str(seed) not in known:
                self._score(run, guidance, seed, lock)
        self._discard_samples(run)

    def _score(self, run: Run, guidance: float, seed: int, lock: IO) -> None:
        """Sample, evaluate, and add the scores to what is known of the run."""
        commands = [self.commands.sample(run, guidance, seed), self.commands.evaluate_samples(run, guidance, seed)]
        seconds = self._run(commands, self.work / "runs" / run.name, lock)
        report = read(self.work / f"scores/{self.commands.scores_name(run, guidance, seed)}.json")
        if (run.seed, seed) == (self.study.seeds[0], self.study.sampling.report_seeds[0]):
            samples = self._only(f"{self.commands.sample_folder(run, guidance, seed)}/*.npz")
            save_strip(samples, self.results.folder / f"samples/{run.arm.name}.png")
        found = self.results.of(run)
        scores = {name: float(f"{value:.6g}") for name, value in report["metrics"].items()}
        if seed == self.study.sampling.choice_seed:
            found["choice_scores"][f"{guidance:g}"] = scores
        else:
            found["report_scores"].setdefault(f"{guidance:g}", {})[str(seed)] = scores
        found["wall_seconds"]["scores"].append(seconds)
        found["machine"]["device"] = report["device"]
        self.results.keep(run, found)

    def _discard_samples(self, run: Run) -> None:
        """They are large; the weights and a seed make them again."""
        shutil.rmtree(self.work / "samples" / run.name, ignore_errors=True)

    def _has_weights(self, run: Run) -> bool:
        return (self.work / f"gpt/{run.name}/checkpoints/last.pt").exists()

    def _run(self, commands: list[Command], folder: Path, lock: IO) -> float:
        """Run commands with their output in `folder/log.txt`; the seconds they took."""
        started = time.monotonic()
        for command in commands:
            self.shell.run(command, folder / "log.txt", lock)
        return round(time.monotonic() - started, 1)

    def _only(self, pattern: str) -> Path:
        return next(self.work.glob(pattern.removeprefix("$WORK/")))


def claim(folder: Path) -> IO | None:
    """The lock of `folder`, which is made if need be; None if another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return lock_folder(folder, "", required=True)
    except HeldError:
        return None


def machine() -> dict[str, Any]:
    """What made a result: processor, threads of each run, versions, the project's revision."""
    revision = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "processor": processor_name(),
        "threads": os.environ.get("OMP_NUM_THREADS", "1"),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "numpy")},
        "revision": revision.stdout.strip() or None,
    }


def read(path: Path) -> dict:
    return json.loads(path.read_text())
