"""What the runs of a study cost: epochs and FLOPs of every arm, and the time they will take."""

import json
import platform
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

from scripts.study.commands import Commands
from scripts.study.declaration import Arm, Expected, Study
from scripts.study.shell import Shell
from utils.files import write_json
from utils.program import UserError

IMAGENET_IMAGES = 1_281_167  # for which `train_c2i.sh --dry-run` makes its plan
TOLERANCE = 0.02  # of "equal compute"


@dataclass(frozen=True)
class Budget:
    epochs: int
    flops: float  # of one training


def make_budgets(study: Study, shell: Shell) -> dict[str, Budget]:
    """Every arm's budget, from the trainer's own plan. An arm with `compute_of` gets the number of epochs that costs
    as many FLOPs as that arm.

    Raises `UserError` if no whole number of epochs comes within 2 %.
    """
    plans = Plans(study, shell)
    budgets = {}
    for arm in study.arm:
        epochs = study.training_flags(arm)["epochs"]
        if arm.compute_of is not None:
            target = plans.flops(study.arm_named(arm.compute_of))
            epochs = max(1, round(epochs * target / plans.flops(arm)))
            difference = plans.flops(arm, epochs) / target - 1
            if abs(difference) > TOLERANCE:
                raise UserError(
                    f"{epochs} epochs of {arm.name} cost {difference:+.1%} of the FLOPs of {arm.compute_of}, and no "
                    f"other whole number comes nearer; declare another number of epochs for all arms."
                )
        budgets[arm.name] = Budget(epochs, plans.flops(arm, epochs))
    plans.keep()
    return budgets


class Plans:
    """FLOPs of whole trainings as `train_c2i.sh --dry-run` prints them; kept in `$WORK/plans.json`."""

    def __init__(self, study: Study, shell: Shell):
        self.study, self.commands, self.shell = study, Commands(study), shell
        self.file = shell.work / "plans.json"
        self.known: dict[str, float] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def flops(self, arm: Arm, epochs: int | None = None) -> float:
        command = self.commands.plan(arm, epochs)
        key = " ".join(command)
        if key not in self.known:
            self.known[key] = float(re.search(r"([\d.e+]+) FLOPs in all", self.shell.output_of(command))[1])
        batch = self.study.training_flags(arm).get("global-batch-size", 256)
        return self.known[key] * (self.study.data.train_images // batch) / (IMAGENET_IMAGES // batch)

    def keep(self) -> None:
        write_json(self.file, self.known)


@dataclass(frozen=True)
class Pace:
    """How fast one process of the study works."""

    gflops: float  # of training, per second
    seconds_per_score: float
    measured: bool  # or only declared

    def seconds(self, flops: float, sets_of_samples: int) -> float:
        return flops / self.gflops / 1e9 + sets_of_samples * self.seconds_per_score


def pace_of(finished: list[dict], processor: str, expected: Expected) -> Pace:
    """From the finished runs of this processor; where there are none, what the declaration expects."""
    mine = [found for found in finished if found["machine"]["processor"] == processor]
    gflops = [found["training"]["flops"][-1] / found["wall_seconds"]["training"] / 1e9 for found in mine]
    scores = [seconds for found in mine for seconds in found["wall_seconds"]["scores"]]
    return Pace(
        statistics.median(gflops) if gflops else expected.training_gflops,
        statistics.median(scores) if scores else expected.seconds_per_score,
        bool(gflops),
    )


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
