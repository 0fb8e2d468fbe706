"""What a study has found so far: `FOLDER/shared.json` and `FOLDER/runs/RUN.json`, kilobytes, to be committed."""

import json
from pathlib import Path

from scripts.study.budget import Budget
from scripts.study.commands import Run
from scripts.study.declaration import Arm, Flags, Study
from utils.files import atomic_file
from utils.program import UserError
from utils.settings import refuse_differences


class Results:
    def __init__(self, folder: Path, study: Study, budgets: dict[str, Budget]):
        self.folder, self.study, self.budgets = folder, study, budgets

    def shared(self) -> dict | None:
        """What all runs share. Raises `UserError` if it was made with other settings than the study's."""
        return self._read(self.folder / "shared.json", shared_settings(self.study))

    def of(self, run: Run) -> dict | None:
        """What is known of a run. Raises `UserError` if it was made with other settings than the study's."""
        return self._read(self.folder / "runs" / f"{run.name}.json", self.settings_of(run))

    def keep_shared(self, found: dict) -> None:
        _write(self.folder / "shared.json", {"settings": shared_settings(self.study)} | found)

    def keep(self, run: Run, found: dict) -> None:
        _write(self.folder / "runs" / f"{run.name}.json", {"settings": self.settings_of(run)} | found)

    def settings_of(self, run: Run) -> Flags:
        lr = {} if run.lr is None else {"lr": run.lr}
        sampling = {"images": self.study.sampling.images} | self.study.sampler | self.study.evaluator
        epochs = self.budgets[run.arm.name].epochs
        return self.study.training_flags(run.arm) | sampling | {"epochs": epochs, "seed": run.seed} | lr

    def runs(self, arms: list[Arm]) -> list[Run]:
        """Seed by seed: a study that is stopped half-way can be compared."""
        return [Run(arm, seed) for seed in self.study.seeds for arm in arms]

    def learning_rate_runs(self) -> list[Run]:
        rates = self.study.learning_rates
        if rates is None:
            return []
        return [Run(self.study.arm_named(name), rates.seed, lr) for name in rates.arms for lr in rates.values]

    def is_chosen(self, run: Run) -> bool:
        """Whether the samples on which guidance is chosen have been scored at every scale."""
        found = self.of(run)
        scales = [f"{scale:g}" for scale in self.study.sampling.guidance]
        return found is not None and all(scale in found["choice_scores"] for scale in scales)

    def guidance_of(self, arm: Arm) -> float | None:
        """The scale that was best on the samples for choosing, on average over all training seeds; None until known."""
        runs = self.runs([arm])
        if not all(self.is_chosen(run) for run in runs):
            return None
        scores, measure = [self.of(run)["choice_scores"] for run in runs], self.study.sampling.choose_by
        if any(measure not in score for by_scale in scores for score in by_scale.values()):
            raise UserError(f"choose-by {measure}: the evaluator does not report it.")
        return min(
            self.study.sampling.guidance, key=lambda scale: sum(by_scale[f"{scale:g}"][measure] for by_scale in scores)
        )

    def reported(self, run: Run) -> list[dict[str, float]]:
        """Scores of the samples to report that have been made, at the arm's guidance: one dict for each seed."""
        found, guidance = self.of(run), self.guidance_of(run.arm)
        by_seed = {} if found is None or guidance is None else found["report_scores"].get(f"{guidance:g}", {})
        return [by_seed[str(seed)] for seed in self.study.sampling.report_seeds if str(seed) in by_seed]

    def is_reported(self, run: Run) -> bool:
        return len(self.reported(run)) == len(self.study.sampling.report_seeds)

    def _read(self, path: Path, settings: Flags) -> dict | None:
        if not path.exists():
            return None
        found, here = json.loads(path.read_text()), json.loads(json.dumps(settings))
        names = sorted(found["settings"].keys() | here.keys())
        there, here = ({name: flags.get(name, "unset") for name in names} for flags in (found["settings"], here))
        remedy = "declare what was declared then, or give other folders with --results and --work"
        refuse_differences(f"{path} was made", there, here, remedy)
        return found


def shared_settings(study: Study) -> Flags:
    data = {name: value for name, value in vars(study.data).items() if value is not None and name != "path"}
    tables = {
        "data": data,
        "classifier": study.classifier,
        "tokenizer": study.tokenizer,
        "codes": study.codes,
        "sampling": {"images": study.sampling.images},
    }
    return {f"{table}.{name}": value for table, flags in tables.items() for name, value in flags.items()}


def loss_curve(metrics: Path, batch_size: int) -> dict[str, list]:
    """Held-out loss at side 1 on the way: columns of steps, training FLOPs, seconds of training (validation left out)
    and loss, from a run's `metrics.jsonl`, where each validation follows a row of training at the same step.
    """
    curve: dict[str, list] = {"step": [], "flops": [], "seconds": [], "loss": []}
    step, flops, seconds = 0, 0, 0.0
    for row in map(json.loads, metrics.read_text().splitlines()):
        if "images_per_second" in row:
            seconds += (row["step"] - step) * batch_size / row["images_per_second"]
            step, flops = row["step"], row["flops"]
        if row.get("val_loss_1x1") is not None:
            values = (step, flops, round(seconds, 1), round(row["val_loss_1x1"], 5))
            for column, value in zip(curve.values(), values, strict=True):
                column.append(value)
    return curve


def _write(path: Path, found: dict) -> None:
    """JSON with a line for each entry: short to read, and differences show."""
    with atomic_file(path, "w") as file:
        file.write(
            "{\n" + ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in found.items()) + "\n}\n"
        )
