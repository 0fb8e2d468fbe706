"""Is one recipe better than another? A declared study: every arm and seed trained, sampled and scored, then compared.

bash scripts/study.sh scripts/studies/digits.toml

Shows what will run and how long it will take, goes on where it stopped, and ends with a table and figures. The same
command in several terminals, or as Slurm tasks, shares the work.
"""

from pathlib import Path

from scripts.study.budget import Budget, make_budgets, pace_of, processor_name
from scripts.study.commands import shown
from scripts.study.declaration import Arm, Study, read_declaration
from scripts.study.pictures import draw_figures
from scripts.study.report import example_commands, insert_into, write_report
from scripts.study.results import Results
from scripts.study.shell import ROOT, Shell, clock
from scripts.study.work import Worker
from utils.program import run
from utils.settings import REQUIRED, option, parse, recipe, settings


@settings("study")
class StudySettings:
    declaration: Path = recipe(REQUIRED, "TOML file that declares the study", flag="declaration")
    results: Path | None = option(
        None, "folder of the results, kilobytes to be kept; default: named after the declaration, beside it"
    )
    work: Path | None = option(
        None, "folder of codes, weights and samples; default: results/study-NAME in the checkout"
    )
    ablation: bool = option(False, "also run the arms declared as optional")
    dry_run: bool = option(False, "show the commands, what they cost, and stop")
    report: bool = option(False, "only report what has been found so far")
    into: Path | None = option(None, "Markdown file that takes the report between the study's two marks")


def main() -> None:
    chosen = parse(
        StudySettings, "Train, sample and score every arm and seed of a declared study, and compare.", prog="study.sh"
    )
    study = read_declaration(chosen.declaration)
    results_folder = chosen.results or chosen.declaration.with_suffix("")
    shell = Shell((chosen.work or ROOT / "results" / f"study-{study.name}").resolve())
    arms = [arm for arm in study.arm if chosen.ablation or not arm.optional]
    budgets = make_budgets(study, shell)
    results = Results(results_folder, study, budgets)
    worker = Worker(study, results, shell, arms)
    print(overview(study, arms, budgets, worker))
    if chosen.dry_run:
        print("\n" + "\n".join(map(shown, example_commands(results, arms))))
        return
    if not chosen.report:
        worker.carry_out()
    for path in [*draw_figures(results, arms), write_report(results, arms)]:
        print(path)
    if chosen.into is not None:
        insert_into(chosen.into, results, arms)


def overview(study: Study, arms: list[Arm], budgets: dict[str, Budget], worker: Worker) -> str:
    """What will run and how long it will take."""
    base = budgets[study.compare_with[0]].flops
    rows = [["arm", "epochs", "training FLOPs", "relative", "seeds done"]]
    for arm in arms:
        runs = worker.results.runs([arm])
        done = sum(worker.results.is_chosen(run) for run in runs)
        budget = budgets[arm.name]
        rows.append(
            [
                arm.title,
                str(budget.epochs),
                f"{budget.flops:.3g}",
                f"{budget.flops / base:.2f}",
                f"{done} of {len(runs)}",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([study.title, *lines, time_left(worker)])


def time_left(worker: Worker) -> str:
    """How long one process will take for what is missing."""
    study, results = worker.study, worker.results
    arm_runs, rate_runs = results.runs(worker.arms), results.learning_rate_runs()
    known = {run: results.of(run) for run in (*rate_runs, *arm_runs)}
    pace = pace_of([found for found in known.values() if found], processor_name(), study.expected)
    flops = sum(results.budgets[run.arm.name].flops for run, found in known.items() if found is None)
    sets = sum(
        len(study.sampling.guidance)
        - len((known[run] or {"choice_scores": ()})["choice_scores"])
        + len(study.sampling.report_seeds)
        - len(results.reported(run))
        for run in arm_runs
    )
    if not worker.missing():
        return "nothing is missing"
    seconds = pace.seconds(flops, sets) + (0 if results.shared() else study.expected.preparation_seconds)
    source = "as finished runs took here" if pace.measured else "as declared"
    return (
        f"about {clock(seconds)} for one process ({source}); the same command in other terminals or Slurm tasks "
        "shares the work"
    )


if __name__ == "__main__":
    run(main)
