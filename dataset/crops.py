"""Crops of images: the centre crop and random crop of ADM (arXiv 2105.05233), and ten crops of an enlarged image.

The ten-crop of codes at size S and crop range r: the image is scaled and centre-cropped to a square of int(S · r)
pixels, of which the four corners and the centre are taken at S, then the same five of the square's mirror image.
Without ten-crop there are two: the centre crop and its mirror image. Where mirroring changes what an image shows
(digits, text), the second halves are left out: five crops, or one.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

FIVE_PLACES = (5, 10)  # numbers of crops that come from five places of a larger square


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """(size, size, 3) uint8: the shorter side scaled to `size`, the middle taken."""
    pixels = np.asarray(_scale_shorter_side(image, size))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def random_crop_and_flip(image: Image.Image, size: int, uniform: Sequence[float]) -> np.ndarray:
    """(size, size, 3) uint8 for training: a square of 0.8 to 1 of the shorter side, and its mirror half of the time.

    `uniform` are four numbers in [0, 1): scale, vertical place, horizontal place, mirror.
    """
    largest = -int(-size // 0.8)
    shorter = size + int(uniform[0] * (largest + 1 - size))
    pixels = np.asarray(_scale_shorter_side(image, shorter))
    top = int(uniform[1] * (pixels.shape[0] - size + 1))
    left = int(uniform[2] * (pixels.shape[1] - size + 1))
    crop = pixels[top : top + size, left : left + size]
    return crop[:, ::-1] if uniform[3] < 0.5 else crop


def crop_count(ten_crop: bool, mirror: bool) -> int:
    return (5 if ten_crop else 1) * (2 if mirror else 1)


def enlarged_size(size: int, crops: int, crop_range: float) -> int:
    """Side of the square from which `crops` crops of `size` are cut."""
    return int(size * crop_range) if crops in FIVE_PLACES else size


def cut_crops(squares: torch.Tensor, size: int, crops: int) -> torch.Tensor:
    """(B, S, S, 3) squares of `enlarged_size` -> (B, crops, size, size, 3)."""
    corner = squares.shape[1] - size
    middle = int(round(corner / 2.0))  # to even, as torchvision rounds
    places = (
        [(0, 0), (0, corner), (corner, 0), (corner, corner), (middle, middle)] if crops in FIVE_PLACES else [(0, 0)]
    )
    views = [squares] if crops == len(places) else [squares, squares.flip(2)]
    cuts = [view[:, top : top + size, left : left + size] for view in views for top, left in places]
    return torch.stack(cuts, dim=1)


def to_model_range(pixels: torch.Tensor) -> torch.Tensor:
    """(…, H, W, 3) uint8 -> (…, 3, H, W) float32 in [-1, 1], channels last in memory, rounded as published."""
    return pixels.float().div_(255).sub_(0.5).div_(0.5).movedim(-1, -3)


def _scale_shorter_side(image: Image.Image, size: int) -> Image.Image:
    """Halve by box filter while that leaves at least `size`, then bicubic."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    return image.resize((width, height), resample=Image.Resampling.BICUBIC)
