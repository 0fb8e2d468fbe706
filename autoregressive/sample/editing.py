"""Pictures that generation begins from: which codes a mask keeps, and which candidate suits the kept ones best."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from utils.program import UserError

MOST_CANDIDATES = 1000


def open_picture(path: Path) -> Image.Image:
    """The picture in a file. Raises `UserError`."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError as error:
        raise UserError(f"there is no picture {path}; check the path.") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no picture that can be read ({error}); save it again as PNG or JPEG.") from error


def as_picture(image) -> Image.Image:
    """`image` upright and in RGB. Raises `UserError` for what is no picture."""
    if not isinstance(image, Image.Image):
        raise UserError(f"an image is a PIL image, not {type(image).__name__}; give Image.open(file).")
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises of a broken file when it is read
        raise UserError(f"the image cannot be read ({error}); save it again in another format.") from error


def known_codes(pipeline, image, mask) -> torch.Tensor | None:
    """Codes `(h*w,)` of `image` that `mask` keeps, -1 where it has one drawn; None without both. Raises `UserError`.

    `mask` has the image's size, a PIL image or an array `(H, W)`: white, or true, is drawn anew. A code whose pixels it
    touches anywhere is drawn.
    """
    if (image is None) != (mask is None):
        raise UserError("an image and a mask belong together: give --image and --mask, which is white where to draw.")
    if image is None:
        return None
    picture = as_picture(image)
    drawn = touched_codes(_as_mask(mask, image, picture), pipeline.gpt.args.grid)
    if not drawn.any():
        raise UserError(
            "the mask marks nothing to draw in the middle square of the image; paint white what is to be drawn anew."
        )
    return pipeline.encode([picture])[0].masked_fill(torch.from_numpy(drawn.flatten()), -1)


def _as_mask(mask, image: Image.Image, picture: Image.Image) -> np.ndarray:
    """`(H, W)` bool for `image`, which is `picture` when it stands upright."""
    if isinstance(mask, Image.Image):
        mask = np.asarray(ImageOps.exif_transpose(mask).convert("L")) >= 128
    wanted = "a mask is a PIL image or an array (height, width) of bool"
    try:
        mask = np.asarray(mask)
    except ValueError as error:  # rows of different lengths
        raise UserError(f"{wanted}.") from error
    if mask.dtype != bool or mask.ndim != 2:
        raise UserError(f"{wanted}, not {mask.dtype} of shape {mask.shape}.")
    if mask.shape != (picture.height, picture.width):
        turned = " (upright: ImageOps.exif_transpose(image))" if mask.shape == image.size[::-1] else ""
        raise UserError(
            f"the mask is {mask.shape[1]}x{mask.shape[0]} pixels and the image {picture.width}x{picture.height}"
            f"{turned}; give a mask of the image's size."
        )
    return mask


def touched_codes(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Which codes `grid` (bool) of the mask's middle square have a pixel in it."""
    side = min(mask.shape)
    top, left = (mask.shape[0] - side) // 2, (mask.shape[1] - side) // 2

    def bands(part: np.ndarray, count: int) -> np.ndarray:
        return np.stack([part[i * side // count : -(-(i + 1) * side // count)].any(0) for i in range(count)])

    return bands(bands(mask[top : top + side, left : left + side], grid[0]).T, grid[1]).T


def kept_behind(known: torch.Tensor) -> torch.Tensor:
    """Which of the codes `known` `(h*w,)` come after one that is drawn, and so tell candidates apart; bool."""
    return (known >= 0) & ((known < 0).cumsum(0) > 0)


@torch.no_grad()
def likeliest(
    pipeline, condition: np.ndarray, codes: torch.Tensor, known: torch.Tensor, candidates: int
) -> torch.Tensor:
    """Of every `candidates` rows of `codes` the one under which the known codes behind drawn ones are likeliest.

    The likelihood is the model's own, without guidance and temperature. Returns `(B, h*w)`.
    """
    kept = kept_behind(known)
    scores = torch.zeros(len(codes))
    kept = kept.to(pipeline.device)
    for row in range(len(codes)):
        given = codes[row : row + 1].to(pipeline.device)
        with torch.autocast(pipeline.device.type, enabled=False):
            logits = pipeline.gpt(given, pipeline.condition(condition[row : row + 1]).to(pipeline.device))[0]
        scores[row] = -F.cross_entropy(logits[0, kept], given[0, kept], reduction="sum")
    best = scores.view(-1, candidates).argmax(1)
    return codes.view(-1, candidates, codes.shape[1])[torch.arange(len(best)), best]
