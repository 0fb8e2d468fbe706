"""A contact sheet: images beside their decoded codes, with class and PSNR, for a person to judge at a glance."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from utils.files import atomic_file

COLUMNS, MARGIN, CAPTION, NARROWEST = 4, 8, 16, 80


@dataclass(frozen=True)
class Example:
    source: np.ndarray  # (S, S, 3) uint8
    decoded: np.ndarray  # the same
    caption: str

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio in dB of 8-bit images: 10·log10(255² / mean squared error)."""
        error = np.mean((self.source.astype(np.float64) - self.decoded) ** 2)
        return float(10 * np.log10(255**2 / max(error, 1e-10)))


def draw_sheet(examples: list[Example], path: Path) -> None:
    """Write a PNG of all examples, the source left, the decoded codes right; small images are enlarged."""
    size = len(examples[0].source)
    zoom = -(-NARROWEST // size)
    side = size * zoom
    cell_width, cell_height = 2 * side + MARGIN, side + CAPTION + MARGIN
    rows = -(-len(examples) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * cell_width + MARGIN, rows * cell_height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for number, example in enumerate(examples):
        left, top = MARGIN + number % COLUMNS * cell_width, MARGIN + number // COLUMNS * cell_height
        for offset, pixels in ((0, example.source), (side, example.decoded)):
            picture = Image.fromarray(np.ascontiguousarray(pixels)).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (left + offset, top))
        draw.text((left, top + side + 1), f"{example.psnr:.1f} dB  {example.caption}", fill="black")
    with atomic_file(path) as file:
        sheet.save(file, "PNG")
