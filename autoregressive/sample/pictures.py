"""Pictures of many images: a plain grid, and one with a caption beside each row."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP = 2


def image_grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Images `(N, H, W, 3)` uint8 in rows of `columns` on white; the last row may be short."""
    count, height, width, _ = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    grid = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        grid[top : top + height, left : left + width] = image
    return grid


def rows_of_classes(labels: np.ndarray, rows: int = 8, columns: int = 8) -> np.ndarray:
    """`(≤ rows, ≤ columns)` images, by their place in `labels` `(N,)`: a row for each of a few classes."""
    held = np.unique(labels)
    shown = held[np.arange(min(rows, len(held))) * len(held) // min(rows, len(held))]
    images = [np.flatnonzero(labels == label)[:columns] for label in shown]
    return np.stack([row[: min(map(len, images))] for row in images])


def captioned_rows(images: np.ndarray, captions: list[str]) -> Image.Image:
    """Images `(rows, columns, H, W, 3)` uint8, each row with its caption on the left."""
    rows, columns, height, _, _ = images.shape
    grid = image_grid(images.reshape(-1, *images.shape[2:]), columns)
    font = ImageFont.load_default(size=max(10, min(20, height // 2)))
    margin = max(int(font.getlength(caption)) for caption in captions) + 3 * GAP
    picture = Image.new("RGB", (margin + grid.shape[1], grid.shape[0]), "white")
    picture.paste(Image.fromarray(grid), (margin, 0))
    draw = ImageDraw.Draw(picture)
    for row, caption in enumerate(captions):
        draw.text((GAP, row * (height + GAP) + height // 2), caption, fill="black", font=font, anchor="lm")
    return picture
