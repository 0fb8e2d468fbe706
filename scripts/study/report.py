"""What a study found, as Markdown: costs, scores with their intervals, paired differences, what they do not show."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from scripts.study.commands import Command, Commands, Run, shown
from scripts.study.declaration import Arm
from scripts.study.results import Results
from scripts.study.shell import clock
from scripts.study.statistics import Mean, mean, paired_difference
from utils.files import atomic_file
from utils.program import UserError


@dataclass(frozen=True)
class Measure:
    name: str  # in the evaluator's report; `loss` is the trainer's
    title: str
    lower_is_better: bool
    factor: float = 1.0  # shown times this

    @property
    def heading(self) -> str:
        return f"{self.title} {'↓' if self.lower_is_better else '↑'}"


MEASURES = (
    Measure("loss", "held-out loss", True),
    Measure("recognised", "recognised, %", False, 100),
    Measure("fid", "FID", True),
    Measure("kid", "KID × 1000", True, 1000),
    Measure("precision", "Precision", False),
    Measure("recall", "Recall", False),
    Measure("density", "Density", False),
    Measure("coverage", "Coverage", False),
)
NOTES = (
    "Means over training seeds ± half of their 95 % interval (Student's t). *Held-out loss*: mean negative "
    "log-likelihood of one code in nats, at patch side 1, on centre crops of images from which neither tokenizer, "
    "classifier nor GPT have learned, at the end of training. *Recognised*: samples that a classifier trained on the "
    "training images takes for the class they were asked to show. This classifier is also the feature network of all "
    "scores, so none of them compares with published ones. *Guidance*: the classifier-free guidance scale whose "
    "{choose_by} was lowest on other samples, averaged over training seeds; the scores are those of {images:,} new "
    "samples of each training{sets}. *Real held-out images* are what a model that has learned the distribution would "
    "reach, *their reconstructions* what this tokenizer allows; a model that repeats training images could score "
    "better. KID is an unbiased estimate: around zero it may be negative."
)
DIFFERENCES = (
    "Differences to **{base}** at equal training seeds ± half of their 95 % interval; in brackets how often retraining "
    "alone would give such a gap or a larger one (two-sided paired t-test). Bold: the interval excludes zero, "
    "as one in twenty does by chance where there is no difference."
)
TIME = Measure("seconds", "training time, s", True)
COVERED = (
    "The intervals are of retraining the GPT: all trainings share one tokenizer, one classifier, one split of the "
    "images and the seeds of the samples. All scores but the loss come from one feature network, so that they are "
    "nearer to one finding than to several."
)


class Values:
    """Each arm's values by measure and training seed."""

    def __init__(self, results: Results, arms: list[Arm]):
        self.results, self.arms = results, arms
        self.found = {
            arm.name: {run.seed: found for run in results.runs([arm]) if (found := results.of(run))} for arm in arms
        }

    def of(self, arm: Arm, measure: str) -> dict[int, float]:
        """By seed, for those seeds of which it is known; scores are means over the sets of samples."""
        found = self.found[arm.name]
        if measure == "loss":
            return {seed: run["training"]["loss"][-1] for seed, run in found.items()}
        if measure in ("flops", "seconds"):
            return {seed: run["training"][measure][-1] for seed, run in found.items()}
        reported = {
            run.seed: self.results.reported(run) for run in self.results.runs([arm]) if self.results.is_reported(run)
        }
        return {
            seed: sum(scores[measure] for scores in sets) / len(sets)
            for seed, sets in reported.items()
            if measure in sets[0]
        }

    def mean(self, arm: Arm, measure: str) -> Mean | None:
        values = list(self.of(arm, measure).values())
        return mean(values) if values else None

    def measures(self) -> list[Measure]:
        return [measure for measure in MEASURES if any(self.of(arm, measure.name) for arm in self.arms)]


def report_text(results: Results, arms: list[Arm], folder: str) -> str:
    """The whole report; `folder` is the way from the text's own place to the results, for its pictures."""
    values = Values(results, arms)
    if not values.measures():
        raise UserError(f"{results.folder} holds no finished run yet.")
    study = results.study
    sections = [
        study.description.strip(),
        state(values),
        cost_table(values),
        score_table(values),
        way_table(values),
        *(difference_section(values, study.arm_named(name)) for name in study.compare_with if values.found.get(name)),
        pictures(results, folder),
        circumstances(values),
        appendix(values),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def state(values: Values) -> str:
    """A warning while runs are missing."""
    runs = values.results.runs(values.arms)
    unfinished = sum(not values.results.is_reported(run) for run in runs)
    return f"**Unfinished: {unfinished} of {len(runs)} runs are missing or not scored yet.**" if unfinished else ""


def cost_table(values: Values) -> str:
    study, budgets = values.results.study, values.results.budgets
    base = study.arm_named(study.compare_with[0])
    rows = [["arm", "trainings", "epochs", "training FLOPs", "relative", "training time", "relative"]]
    for arm in values.arms:
        costs = [(values.mean(arm, name), values.mean(base, name)) for name in ("flops", "seconds")]
        if costs[0][0] is None:
            continue
        relative = ["" if theirs is None else f"{ours.value / theirs.value:.3f}" for ours, theirs in costs]
        flops, seconds = (ours for ours, _ in costs)
        time = clock(seconds.value) if seconds.value > 3600 else f"{with_interval(seconds, 1)} s"
        epochs = budgets[arm.name].epochs
        rows.append([arm.title, f"{flops.count}", f"{epochs}", f"{flops.value:.4g}", relative[0], time, relative[1]])
    return markdown_table(rows)


def score_table(values: Values) -> str:
    study, real = values.results.study, values.results.shared()["scores"]
    measures, sampling = values.measures(), study.sampling
    rows = [["arm", "guidance", *(measure.heading for measure in measures)]]
    for arm in values.arms:
        if values.found[arm.name]:
            guidance = values.results.guidance_of(arm)
            cells = [with_interval(values.mean(arm, measure.name), measure.factor) for measure in measures]
            rows.append([arm.title, "" if guidance is None else f"{guidance:g}", *cells])
    for name, title in (("held-out", "real held-out images"), ("reconstructions", "their reconstructions")):
        scores = [(real[name].get(measure.name), measure.factor) for measure in measures]
        rows.append([f"*{title}*", "", *("" if score is None else f"{score * factor:.4g}" for score, factor in scores)])
    sets = f" (means over {len(sampling.report_seeds)} such sets)" if len(sampling.report_seeds) > 1 else ""
    notes = NOTES.format(choose_by=sampling.choose_by.upper(), sets=sets, images=sampling.images)
    if study.data.test_images != sampling.images:
        notes += (
            f" There are {study.data.test_images:,} of them: with more images FID falls and Coverage rises, and Recall "
            "changes, too; KID, Precision and Density do not."
        )
    return f"{markdown_table(rows)}\n\n{notes} {COVERED}"


def way_table(values: Values) -> str:
    """Held-out loss at side 1 at each quarter of the epochs; levels end at one of them."""
    rows = [["arm", *(f"{quarter / 4:.0%} of its epochs".replace("%", " %") for quarter in range(1, 5))]]
    for arm in values.arms:
        curves = [found["training"] for found in values.found[arm.name].values()]
        if curves:
            ends = [[nearest(curve, quarter / 4) for curve in curves] for quarter in range(1, 5)]
            rows.append([arm.title, *(with_interval(mean(losses), 1) for losses in ends)])
    return f"Held-out loss at side 1 on the way (a coarse level does not train it):\n\n{markdown_table(rows)}"


def nearest(curve: dict[str, list], part: float) -> float:
    """The loss at the validation nearest to a part of the steps."""
    steps = curve["step"]
    return curve["loss"][min(range(len(steps)), key=lambda row: abs(steps[row] - part * steps[-1]))]


def difference_section(values: Values, base: Arm) -> str:
    measures = [*values.measures(), TIME]
    rows, sentences = [["arm", *(measure.heading for measure in measures)]], []
    for arm in values.arms:
        if arm is not base and values.found[arm.name]:
            differences = {
                measure: paired_difference(values.of(arm, measure.name), values.of(base, measure.name))
                for measure in measures
            }
            cells = [difference_cell(difference, measure.factor) for measure, difference in differences.items()]
            rows.append([arm.title, *cells])
            sentences.append(f"- {verdict(arm, base, differences)}")
    return "\n\n".join([DIFFERENCES.format(base=base.title), markdown_table(rows), "\n".join(sentences)])


def difference_cell(difference: Mean | None, factor: float) -> str:
    text = with_interval(difference, factor, "+")
    if difference is None or difference.chance is None:
        return text
    return f"{f'**{text}**' if difference.excludes_zero else text} ({percent(difference.chance)})"


def verdict(arm: Arm, base: Arm, differences: dict[Measure, Mean | None]) -> str:
    """One sentence: where the arm is better, where it is worse, and where nothing is shown."""
    groups: dict[str, list[str]] = {
        "better in": [],
        "worse in": [],
        "no difference shown (the interval contains zero) in": [],
    }
    better, worse, open_ = groups.values()
    for measure, difference in differences.items():
        if difference is None or difference.half_width is None:
            continue
        is_better = (difference.value < 0) == measure.lower_is_better
        group = open_ if not difference.excludes_zero else better if is_better else worse
        group.append(measure.title.split(",")[0].removesuffix(" × 1000"))
    parts = [f"{words} {listed(names)}" for words, names in groups.items() if names]
    return f"**{arm.title}**, compared with {base.title}: {'; '.join(parts) or 'too few trainings to tell'}."


def pictures(results: Results, folder: str) -> str:
    captions = {
        "loss": "Held-out loss at side 1 during training, against compute and against time; bands: 95 % intervals. "
        "Only the ends (dots) compare recipes: on the way arms are at other points of their learning-rate decay, and "
        "coarse levels lie above the frame.",
        "quality": "Scores against the cost of training; bars: 95 % intervals.",
        "samples": "Samples of each arm's first training, the same seed and classes in every row.",
        "guidance": "The samples on which guidance was chosen.",
    }
    return "\n\n".join(
        f"![{caption}]({folder}/{name}.png)\n\n*{caption}*"
        for name, caption in captions.items()
        if (results.folder / f"{name}.png").exists()
    )


def circumstances(values: Values) -> str:
    """Tokenizer, classifier, machine and hours."""
    results, shared = values.results, values.results.shared()
    trained = [found for by_seed in values.found.values() for found in by_seed.values()]
    trained += [found for run in results.learning_rate_runs() if (found := results.of(run))]
    times = [found["wall_seconds"] for found in trained]
    seconds = sum(shared["wall_seconds"].values()) + sum(time["training"] + sum(time["scores"]) for time in times)
    machines = sorted({described(found["machine"]) for found in trained})
    tokenizer, accuracy = shared["tokenizer"], shared["classifier"]["held_out_accuracy"]
    return (
        f"The classifier recognises {100 * accuracy:.1f} % of the held-out images. The tokenizer reconstructs them "
        f"with a PSNR of {tokenizer['psnr']:.2f} dB. {len(trained)} trainings and their samples took {clock(seconds)} "
        f"of one process on {listed(machines)}."
    )


def described(machine: dict) -> str:
    device = machine.get("device", "cpu")
    threads = "" if device != "cpu" else f"{machine['threads']} thread{'s' * (machine['threads'] != '1')}, "
    return f"{machine['processor'] if device == 'cpu' else device} ({threads}PyTorch {machine['versions']['torch']})"


def appendix(values: Values) -> str:
    sections = [
        learning_rate_section(values.results),
        guidance_section(values),
        command_section(values.results, values.arms),
    ]
    return "\n\n".join(section for section in sections if section)


def learning_rate_section(results: Results) -> str:
    """Held-out loss of the deciding arms at several learning rates, and whether each one's best is used."""
    losses = {run: found["training"]["loss"][-1] for run in results.learning_rate_runs() if (found := results.of(run))}
    if not losses:
        return ""
    study, rates = results.study, results.study.learning_rates
    rows, sentences = [["arm", *(f"{lr:g}" for lr in rates.values)]], []
    for arm in map(study.arm_named, rates.arms):
        mine = {run.lr: loss for run, loss in losses.items() if run.arm is arm}
        if mine:
            best = min(mine, key=mine.__getitem__)
            rows.append([arm.title, *(cell(mine.get(lr), lr == best) for lr in rates.values)])
            end = ", the first or last that was tried" if best in (min(rates.values), max(rates.values)) else ""
            sentences.append(f"{arm.title}: {best:g} is best{end}; {study.training_flags(arm)['lr']:g} is used.")
    return (
        f"**Learning rates.** Held-out loss of one training at each rate (seed {rates.seed}, not one of those above), "
        f"made before all others.\n\n{markdown_table(rows)}\n\n{' '.join(sentences)}{own_best(results, losses)}"
    )


def own_best(results: Results, losses: dict[Run, float]) -> str:
    """What the one rate for all has to do with the difference between the arms."""
    study, rates = results.study, results.study.learning_rates
    base, *others = rates.arms
    at = {name: {run.lr: loss for run, loss in losses.items() if run.arm.name == name} for name in rates.arms}
    text = ""
    for name in others:
        used = [at[which].get(study.training_flags(study.arm_named(which))["lr"]) for which in (base, name)]
        if all(at.values()) and None not in used:
            best = min(at[name].values()) - min(at[base].values())
            text += (
                f" {study.arm_named(name).title} differs from {study.arm_named(base).title} by {best:+.4f} at each "
                f"arm's own best rate, by {used[1] - used[0]:+.4f} at the one that is used."
            )
    return text


def cell(loss: float | None, is_best: bool) -> str:
    text = "" if loss is None else f"{loss:.4f}"
    return f"**{text}**" if is_best else text


def guidance_section(values: Values) -> str:
    """The measure by which guidance was chosen, at every scale."""
    sampling = values.results.study.sampling
    measure, scales = sampling.choose_by, sampling.guidance
    rows, at_the_end = [["arm", *(f"{scale:g}" for scale in scales)]], []
    for arm in values.arms:
        chosen = values.results.guidance_of(arm)
        if chosen is None:
            continue
        found = [found["choice_scores"] for found in values.found[arm.name].values()]
        means = [with_interval(mean([scores[f"{scale:g}"][measure] for scores in found]), 1) for scale in scales]
        rows.append(
            [
                arm.title,
                *(f"**{text}**" if scale == chosen else text for scale, text in zip(scales, means, strict=True)),
            ]
        )
        if chosen in (min(scales), max(scales)):
            at_the_end.append(arm.title)
    if len(rows) == 1:
        return ""
    warning = f"\n\nThe best scale is the first or last that was tried for {listed(at_the_end)}." if at_the_end else ""
    title = f"**Guidance.** {measure.upper()} of the samples on which it was chosen."
    return f"{title}\n\n{markdown_table(rows)}{warning}"


def command_section(results: Results, arms: list[Arm]) -> str:
    text = "\n".join(map(shown, example_commands(results, arms)))
    return (
        "<details><summary>The commands: what all share, one training of each arm, one set of samples</summary>\n\n"
        f"```bash\n{text}\n```\n\n</details>"
    )


def example_commands(results: Results, arms: list[Arm]) -> list[Command]:
    """What all share, the first training of each arm, and one set of samples with its scores."""
    commands, sampling = Commands(results.study), results.study.sampling
    first, *_ = runs = results.runs(arms)[: len(arms)]
    guidance, seed = results.guidance_of(first.arm) or sampling.guidance[0], sampling.report_seeds[0]
    return [
        *commands.preparation().values(),
        *(commands.train(run, results.budgets[run.arm.name].epochs) for run in runs),
        commands.sample(first, guidance, seed),
        commands.evaluate_samples(first, guidance, seed),
    ]


def with_interval(value: Mean | None, factor: float, sign: str = "") -> str:
    """`1.8310 ± 0.0042`: two digits of the half interval, and as many places of the mean."""
    if value is None:
        return ""
    if not value.half_width:
        return f"{value.value * factor:{sign}.4g}"
    places = max(0, 1 - math.floor(math.log10(value.half_width * factor)))
    return f"{value.value * factor:{sign}.{places}f} ± {value.half_width * factor:.{places}f}"


def percent(chance: float) -> str:
    if chance < 0.001:
        return "< 0.1 %"
    return f"{100 * chance:.1f} %" if chance < 0.1 else f"{100 * chance:.0f} %"


def listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def markdown_table(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def write_report(results: Results, arms: list[Arm]) -> Path:
    path = results.folder / "report.md"
    with atomic_file(path, "w") as file:
        file.write(f"# {results.study.title}\n\n{report_text(results, arms, '.')}")
    return path


def insert_into(document: Path, results: Results, arms: list[Arm]) -> None:
    """Replace what stands between `<!-- study NAME -->` and `<!-- end of study NAME -->` by the report."""
    begin, end = (f"<!-- {mark}study {results.study.name} -->" for mark in ("", "end of "))
    text = document.read_text() if document.exists() else ""
    if begin not in text or end not in text.split(begin)[1]:
        raise UserError(f"{document} has no lines {begin} and {end}; put them where the report is to stand.")
    report = report_text(results, arms, os.path.relpath(results.folder, document.parent))
    before, after = text.split(begin)[0], text.split(end)[1]
    with atomic_file(document, "w") as file:
        file.write(f"{before}{begin}\n\n{report}\n{end}{after}")
