"""What the page's buttons do, in plain values: any web framework could call it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from autoregressive.demo import views
from autoregressive.demo.asked import CONTROLS, Asked, asked_for, change_of
from autoregressive.demo.jobs import Artist
from autoregressive.demo.pictures import Picture, keep
from autoregressive.demo.uploads import open_picture, painted
from autoregressive.models.sampling import Sampling
from autoregressive.sample.pipeline import Pipeline
from utils.program import UserError

MOST_KEPT = 60  # pictures in a visitor's gallery
CONTROL_NAMES = ("class", "count", "seed", *CONTROLS)  # in the order of the page's values


@dataclass(frozen=True)
class View:
    """What a step of a drawing changes on the page; None: nothing."""

    stage: str | None  # HTML
    status: str
    kept: tuple[Picture, ...] | None = None  # the visitor's gallery, newest first


class Handlers:
    """Each raises `UserError` for what it refuses."""

    def __init__(self, pipeline: Pipeline, usual: Sampling, most: int, folder: Path):
        """At most `most` pictures are drawn at once; finished ones are written to `folder`."""
        self.artist, self.pipeline = Artist(pipeline), pipeline
        self.usual, self.most, self.folder = usual, most, folder
        self.names = list(pipeline.class_names)

    def draw(self, kept: tuple[Picture, ...], *values: Any) -> Iterator[View]:
        """New pictures; `values` are those of `CONTROL_NAMES`."""
        yield from self._drawn(kept, self._asked(values))

    def edit(
        self,
        kept: tuple[Picture, ...],
        base: Image.Image | None,
        layers: list[Image.Image],
        candidates: Any,
        *values: Any,
    ) -> Iterator[View]:
        """The picture `base`, drawn anew where `layers` are painted."""
        change = change_of(base, painted(layers, self.pipeline.image_size), candidates)
        yield from self._drawn(kept, self._asked(values, change))

    def upload(self, path: str | None) -> Image.Image:
        """A visitor's picture, as the model sees it."""
        if path is None:
            raise UserError("no picture has come; send one.")
        return open_picture(path, self.pipeline.image_size)

    def _asked(self, values, change=None) -> Asked:
        named = dict(zip(CONTROL_NAMES, values, strict=True))
        return asked_for(named, self.names, self.usual, self.most, change)

    def _drawn(self, kept: tuple[Picture, ...], asked: Asked) -> Iterator[View]:
        for progress in self.artist.draw(asked):
            stage = views.stage(progress.images, asked.name) if progress.images else None
            if progress.finished:
                new = keep(progress.images, asked, self.pipeline, self.folder)
                kept = tuple(picture for picture in (*new, *kept) if picture.file.exists())[:MOST_KEPT]
            yield View(stage, str(progress), kept if progress.finished else None)
