"""Pictures that visitors send: measured before they are decoded, and only in formats that are plain pixels."""

import os
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps

from dataset.crops import center_crop
from utils.program import UserError

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 24_000_000
FORMATS = ("PNG", "JPEG", "WEBP")
EDITOR_SIDE = 512  # pixels, at least, of a side of the picture to paint on


@contextmanager
def picture_limits():
    """Within it, Pillow opens nothing but `FORMATS`, and no more than `MAX_PIXELS`, whoever asks it.

    Other formats are more than pixels: for an EPS file it would start Ghostscript.
    """
    Image.init()  # now: later it would add the other formats again
    before = Image.MAX_IMAGE_PIXELS, Image.ID
    Image.MAX_IMAGE_PIXELS, Image.ID = MAX_PIXELS // 2, list(FORMATS)  # up to twice the number it only warns
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS, Image.ID = before


@contextmanager
def refusing_bad_pictures():
    """What is raised inside, where a visitor's picture is opened and decoded, becomes a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise too_large(f"more than {MAX_PIXELS / 1e6:.0f}") from error
    except Exception as error:  # decoders raise whatever they like at broken files
        raise UserError(f"this is no {' or '.join(FORMATS)} picture, or it is broken; send another.") from error


def too_large(megapixels: str) -> UserError:
    return UserError(
        f"the picture has {megapixels} megapixels, and this page takes {MAX_PIXELS / 1e6:.0f}; send a smaller one."
    )


def open_picture(path: str | os.PathLike, size: int) -> Image.Image:
    """The picture in the file at `path` as the model sees images: RGB, its middle, `size` pixels a side.

    Raises `UserError` for files that are no picture, broken or too large; the number of pixels is read first.
    """
    with refusing_bad_pictures():
        if os.path.getsize(path) > MAX_BYTES:
            raise UserError(f"the file is larger than {MAX_BYTES // 2**20} MB; send a smaller picture.")
        with Image.open(path, formats=FORMATS) as image:
            pixels = image.width * image.height
            if pixels > MAX_PIXELS:
                raise too_large(f"{pixels / 1e6:.0f}")
            return Image.fromarray(center_crop(_opaque(ImageOps.exif_transpose(image)), size))


def _opaque(image: Image.Image) -> Image.Image:
    """RGB; what is transparent lies on white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def enlarged(image: Image.Image) -> Image.Image:
    """A picture large enough to paint on; small ones with their pixels as squares."""
    factor = max(1, EDITOR_SIDE // image.width)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def painted(layers: list[Image.Image], size: int) -> np.ndarray:
    """Which pixels `(size, size)` of the model's picture are painted, at least half of each, on any of the layers."""
    mask = np.zeros((size, size), dtype=bool)
    for layer in layers:
        opacity = layer.convert("RGBA").getchannel("A").point(lambda alpha: 255 if alpha else 0)
        mask |= np.asarray(opacity.resize((size, size), Image.Resampling.BOX)) >= 128
    return mask
