"""The study's figures (matplotlib, of requirements-study.txt) and strips of samples."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from scripts.study.declaration import Arm
from scripts.study.report import Values
from scripts.study.results import Results
from scripts.study.statistics import mean
from utils.files import atomic_file

STRIP_IMAGES = 20
DOTS_PER_INCH = 110


def save_strip(samples: Path, strip: Path) -> None:
    """The first images of every class of an `.npz`, side by side, as a small PNG: the same places for every strip."""
    with np.load(samples) as arrays:
        images, labels = arrays["arr_0"], arrays["labels"]
    classes = np.unique(labels)
    each = max(1, STRIP_IMAGES // len(classes))
    chosen = np.concatenate([np.flatnonzero(labels == label)[:each] for label in classes[:STRIP_IMAGES]])
    with atomic_file(strip) as file:
        Image.fromarray(np.concatenate(list(images[chosen]), axis=1)).save(file, "png")


def draw_figures(results: Results, arms: list[Arm]) -> list[Path]:
    """All figures of what is known so far, as PNG files in the results' folder; none without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("no figures: they need matplotlib (pip install -r requirements-study.txt)", file=sys.stderr)
        return []
    values = Values(results, arms)
    drawn = []
    for name, draw in (
        ("loss", draw_loss),
        ("quality", draw_quality),
        ("guidance", draw_guidance),
        ("samples", draw_samples),
    ):
        figure = draw(values)
        if figure is not None:
            with atomic_file(results.folder / f"{name}.png") as file:
                figure.savefig(file, format="png", dpi=DOTS_PER_INCH, bbox_inches="tight")
            drawn.append(results.folder / f"{name}.png")
    return drawn


def draw_loss(values: Values):
    """Held-out loss at side 1 against training FLOPs and against seconds: a line per arm, with its 95 % band."""
    figure, axes = _figure(2, sharey=True)
    highest, lowest = [], []
    for number, arm in enumerate(values.arms):
        curves = [found["training"] for found in values.found[arm.name].values()]
        if not curves:
            continue
        losses = np.array([curve["loss"] for curve in curves])
        middle, half = losses.mean(0), half_widths(losses)
        for axis, cost in zip(axes, ("flops", "seconds"), strict=True):
            x = np.mean([curve[cost] for curve in curves], axis=0)
            axis.plot(x, middle, color=f"C{number}", label=arm.title, linewidth=1.5)
            axis.fill_between(x, middle - half, middle + half, color=f"C{number}", alpha=0.2, linewidth=0)
            axis.plot(x[-1], middle[-1], "o", color=f"C{number}", markersize=4)
        lowest.append(middle.min())
        highest.append(middle[-1])
    if not lowest:
        return None
    spread = max(max(highest) - min(lowest), 0.01 * min(lowest))
    axes[0].set_ylim(min(lowest) - 0.5 * spread, max(highest) + 3 * spread)  # the ends, where arms differ little
    axes[0].set_ylabel("held-out loss at side 1, nats per code")
    axes[0].set_xlabel("training FLOPs")
    axes[1].set_xlabel("seconds of training")
    _legend_below(figure, axes[0])
    return figure


def draw_quality(values: Values):
    """Scores against the cost of training: a point per arm with its 95 % interval, and the best any model can reach."""
    measures = [measure for measure in values.measures() if measure.name in ("loss", "fid", "kid", "recognised")]
    if not any(values.of(arm, "fid") for arm in values.arms):
        return None
    figure, axes = _figure(len(measures))
    real = values.results.shared()["scores"]["held-out"]
    for axis, measure in zip(axes, measures, strict=True):
        for number, arm in enumerate(values.arms):
            flops, value = values.mean(arm, "flops"), values.mean(arm, measure.name)
            if value is not None:
                centre, half = value.value * measure.factor, (value.half_width or 0) * measure.factor
                axis.errorbar(flops.value, centre, half, fmt="o", capsize=3, color=f"C{number}", label=arm.title)
        if measure.name in real:
            axis.axhline(real[measure.name] * measure.factor, color="grey", linestyle=":", label="real held-out images")
        axis.set_title(measure.heading, fontsize="medium")
        axis.set_xlabel("training FLOPs")
    _legend_below(figure, axes[-1])
    return figure


def draw_guidance(values: Values):
    """The measure by which guidance is chosen, at every scale."""
    sampling = values.results.study.sampling
    figure, (axis,) = _figure(1)
    for number, arm in enumerate(values.arms):
        if (chosen := values.results.guidance_of(arm)) is None:
            continue
        scores = np.array(
            [
                [found["choice_scores"][f"{scale:g}"][sampling.choose_by] for scale in sampling.guidance]
                for found in values.found[arm.name].values()
            ]
        )
        middle, half = scores.mean(0), half_widths(scores)
        axis.errorbar(sampling.guidance, middle, half, capsize=2, color=f"C{number}", label=arm.title, linewidth=1)
        place = sampling.guidance.index(chosen)
        axis.plot(chosen, middle[place], "o", color=f"C{number}")
    if not axis.lines:
        return None
    axis.set_xlabel("classifier-free guidance scale")
    axis.set_ylabel(sampling.choose_by.upper())
    axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.24))
    return figure


def draw_samples(values: Values):
    """Strips of samples below each other, with the arms' names."""
    rows = [(arm.title, arm.name) for arm in values.arms] + [
        ("real held-out images", "held-out"),
        ("their reconstructions", "reconstructions"),
    ]
    folder = values.results.folder / "samples"
    strips = [
        (title, np.asarray(Image.open(folder / f"{name}.png")))
        for title, name in rows
        if (folder / f"{name}.png").exists()
    ]
    if len(strips) < len(rows):
        return None
    from matplotlib.figure import Figure

    height, width, _ = strips[0][1].shape
    figure = Figure(figsize=(width / 80, len(strips) * height / 70))
    for axis, (title, strip) in zip(figure.subplots(len(strips), 1), strips, strict=True):
        axis.imshow(strip, interpolation="nearest")
        axis.set_axis_off()
        axis.text(-6, height / 2, title, ha="right", va="center", fontsize="small")
    figure.subplots_adjust(hspace=0.05)
    return figure


def half_widths(values: np.ndarray) -> np.ndarray:
    """Of the 95 % intervals of the columns' means, values `(seeds, columns)`; 0 for a single seed."""
    return np.array([mean(list(column)).half_width or 0.0 for column in values.T])


def _figure(panels: int, **options):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 4 * panels, 3.6), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False, **options)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend_below(figure, axis) -> None:
    """Of all lines and points of `axis`, which the other panels share."""
    places = {"loc": "lower center", "bbox_to_anchor": (0.5, -0.18)}
    figure.legend(*axis.get_legend_handles_labels(), ncols=3, fontsize="small", **places)
