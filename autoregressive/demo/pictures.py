"""Finished pictures: PNG files that carry their settings, and what the gallery says of them."""

import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from autoregressive.demo.asked import CONTROLS, Asked
from autoregressive.sample.pipeline import Pipeline
from utils.files import atomic_file
from utils.program import UserError
from utils.settings import unusual

SETTINGS_KEY, TEXT_KEY = "npp-settings", "Description"  # of the texts in a PNG: JSON, and a sentence


@dataclass(frozen=True)
class Picture:
    file: Path
    caption: str
    settings: dict[str, Any]  # what draws it again

    def opened(self) -> Image.Image:
        """Raises `UserError` if the page has deleted it."""
        try:
            return Image.open(self.file)
        except FileNotFoundError as error:
            raise UserError("this picture is too old and has been deleted; draw it again.") from error


def keep(images: list[Image.Image], asked: Asked, pipeline: Pipeline, folder: Path) -> list[Picture]:
    """Write finished images to a new folder inside `folder`, each with its settings."""
    place, shared = folder / uuid.uuid4().hex, settings_of(asked, pipeline)
    pictures = []
    for number, image in enumerate(images):
        settings = {"class": asked.name, "label": asked.label, "seed": asked.seed, "number": number} | shared
        texts = PngImagePlugin.PngInfo()
        texts.add_itxt(TEXT_KEY, ", ".join(f"{name} {value}" for name, value in settings.items()))
        texts.add_itxt(SETTINGS_KEY, json.dumps(settings))
        path = place / f"class-{asked.label}-seed-{asked.seed}-{number}.png"
        with atomic_file(path) as file:
            image.save(file, format="png", pnginfo=texts)
        edited = " ✎" if asked.change else ""
        pictures.append(Picture(path, f"{asked.label} · seed {asked.seed}{edited}", settings))
    return pictures


def settings_of(asked: Asked, pipeline: Pipeline) -> dict[str, Any]:
    """What the pictures of a request have in common; names of files without their folders, which are private."""
    sampling = {control: getattr(asked.sampling, field) for field, control in CONTROLS.items()}
    others = {name: value for name, value in unusual(asked.sampling).items() if name not in CONTROLS}
    settings = sampling | others
    if asked.change:
        share = f"{asked.change.mask.mean():.0%} of the picture"
        settings |= {"drawn anew": share, "candidates": asked.change.candidates}
    model, tokenizer = pipeline.gpt_info, pipeline.tokenizer_info
    settings |= {"model": f"{model.name} ({file_name(model.checkpoint)})"}
    if model.steps is not None:
        settings["steps"] = model.steps
    return settings | {"tokenizer": f"{tokenizer.label} ({file_name(tokenizer.checkpoint)})"}


def file_name(checkpoint: str) -> str:
    """What a checkpoint is called: a run's by the run, another by its file."""
    path = Path(checkpoint)
    return f"{path.parents[1].name}/{path.name}" if path.parent.name == "checkpoints" else path.name
