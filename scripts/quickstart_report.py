"""The end of scripts/quickstart.sh: a table on screen, a labelled grid of samples, and report.json."""

import json
from pathlib import Path

import numpy as np

from autoregressive.sample.pictures import captioned_rows
from utils.files import atomic_file, write_json
from utils.program import run
from utils.settings import REQUIRED, option, parse, settings

COLUMNS, SCALE = 16, 2
METRICS = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "precision": "Precision",
    "recall": "Recall",
}


@settings("quickstart")
class ReportSettings:
    folder: Path = option(REQUIRED, "folder of the quickstart", flag="folder")
    samples: Path = option(REQUIRED, "its samples, an .npz", flag="samples")


def main() -> None:
    chosen = parse(ReportSettings, "Print, draw and write what the quickstart has found.")
    folder, samples = chosen.folder, chosen.samples
    seconds = dict(line.split("\t") for line in (folder / "steps.tsv").read_text().splitlines())
    report = {
        "seconds": {name: int(value) for name, value in seconds.items()},
        "classifier": pick(read(folder / "classifier.json"), "held_out_accuracy", "held_out_images"),
        "tokenizer": reconstruction(folder),
        "gpt": losses(folder / "gpt/digits/metrics.jsonl"),
        "scores": read(folder / "evaluation.json"),
    }
    write_json(folder / "report.json", report)
    with np.load(samples) as arrays, atomic_file(folder / "samples.png") as file:
        grid_of_classes(arrays["arr_0"], arrays["labels"]).save(file, "png")
    print("\n" + table(report))
    print(f"\npicture: {folder / 'samples.png'}\nreport:  {folder / 'report.json'}")


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def pick(values: dict, *names: str) -> dict:
    return {name: values[name] for name in names}


def reconstruction(folder: Path) -> dict:
    """Scores of the tokenizer on held-out images."""
    return read(next((folder / "reconstructions").glob("held-out*.settings.json")))["scores"]


def losses(path: Path) -> dict:
    """The last training and validation loss of each level."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {name: value for row in rows for name, value in row.items() if "loss" in name}


def grid_of_classes(images: np.ndarray, labels: np.ndarray):
    """The first images of each class, one class per row, enlarged."""
    rows = [images[labels == label][:COLUMNS] for label in np.unique(labels)]
    return captioned_rows(np.stack(rows).repeat(SCALE, 2).repeat(SCALE, 3), [str(label) for label in np.unique(labels)])


def table(report: dict) -> str:
    scores = report["scores"]["metrics"]
    lines = [("step", "seconds")]
    lines += [(name, f"{value}") for name, value in report["seconds"].items()]
    lines += [("all steps", str(sum(report["seconds"].values()))), ("", "")]
    lines += [("classifier: held-out accuracy", f"{report['classifier']['held_out_accuracy']:.2%}")]
    lines += [("tokenizer: held-out PSNR", f"{report['tokenizer']['psnr']:.2f} dB")]
    lines += [("tokenizer: codes used", f"{report['tokenizer']['code_usage']:.0%}")]
    lines += [(f"GPT: {name.replace('_', ' ')}", f"{value:.4f}") for name, value in report["gpt"].items()]
    lines += [("samples recognised as their class", f"{scores['recognised']:.1%}")]
    lines += [(f"{METRICS[name]} (digit classifier)", f"{scores[name]:.3f}") for name in METRICS]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name.ljust(width)}  {value.rjust(10)}" for name, value in lines)


if __name__ == "__main__":
    run(main)
