"""Drawing images of chosen classes, in batches, and the pictures of them while they are drawn."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
import torch
from PIL import Image

from autoregressive.models.generate import CodeGenerator
from autoregressive.models.sampling import Sampling
from autoregressive.sample.editing import likeliest
from autoregressive.sample.seeds import image_uniforms
from utils.program import UserError

BATCH_SIZE = {"cpu": 8, "cuda": 64}
GREY = 128


class Drawing:
    """Images of which `drawn` of `total` codes are drawn; what is not drawn yet is grey. At the end both are equal."""

    def __init__(self, drawn: int, total: int, decode: Callable[[], list[Image.Image]]):
        self.drawn, self.total, self._decode = drawn, total, decode

    @cached_property
    def images(self) -> list[Image.Image]:
        """In the order asked; decoded when they are looked at."""
        return self._decode()

    @property
    def finished(self) -> bool:
        return self.drawn == self.total


def streams(labels: list[int]) -> np.ndarray:
    """The number of each image that its randomness belongs to: of its class, and of how often that came before."""
    seen: Counter[int] = Counter()
    found = []
    for label in labels:
        found.append(label * 2**32 + seen[label])
        seen[label] += 1
    return np.array(found)


def draw(
    pipeline, labels: list[int], seed: int, sampling: Sampling, known: torch.Tensor | None = None, candidates: int = 1
) -> Iterator[Drawing]:
    """An image for each of `labels`: a `Drawing` after every row of codes, the last one finished.

    `known` `(h*w,)` are codes that all images keep, -1 where one is drawn. Of several `candidates` of an image the one
    is kept under which the known codes are likeliest; while they are drawn, the first is shown. Raises `UserError`.
    """
    length, width = pipeline.gpt.args.block_size, pipeline.gpt.args.grid[1]
    condition = np.repeat(np.array(labels), candidates)
    uniforms = torch.from_numpy(image_uniforms(streams(labels), candidates * length, seed)).view(-1, length)
    count = len(condition)
    batches = -(-count // BATCH_SIZE[pipeline.device.type])
    batch_size = -(-count // batches)
    codes = (torch.full((length,), -1) if known is None else known).repeat(count, 1)
    with pipeline.lent_generator(batch_size, sampling) as generator:
        for start in range(0, count, batch_size):
            stop = min(start + batch_size, count)
            batch = np.resize(np.arange(start, stop), batch_size)  # the last one is filled up
            given = None if known is None else known.expand(batch_size, -1)
            for drawn in _rows(generator, width, pipeline.condition(condition[batch]), uniforms[batch], given):
                codes[start:stop, :drawn] = generator.codes[: stop - start, :drawn].cpu()
                if drawn < length:
                    done = start * length + (stop - start) * drawn
                    yield _unfinished(pipeline, done, count * length, codes[::candidates].clone())
        try:
            generator.check_finite()
        except FloatingPointError as error:
            raise UserError(f"{error}; give --precision bf16 or none, or another checkpoint.") from error
    if candidates > 1:
        codes = likeliest(pipeline, condition, codes, known, candidates)
    yield Drawing(count * length, count * length, lambda: pipeline.decode(codes))


def _rows(generator: CodeGenerator, width: int, *batch) -> Iterator[int]:
    """Those of `generator.passes` after which further rows of codes are final; the caller may do anything between."""
    passes, rows = generator.passes(*batch), 0
    while True:
        with torch.autocast(generator.device.type, enabled=False):
            drawn = next(passes, None)
        if drawn is None:
            return
        if drawn // width > rows:
            rows = drawn // width
            yield drawn


def _unfinished(pipeline, drawn: int, total: int, codes: torch.Tensor) -> Drawing:
    return Drawing(drawn, total, lambda: _pictures(pipeline, codes))


def _pictures(pipeline, codes: torch.Tensor) -> list[Image.Image]:
    """Images of `codes` `(B, h*w)`, grey where they are -1."""
    height, width = pipeline.gpt.args.grid
    size = pipeline.image_size_eval
    codes = codes.view(-1, height, width)
    done = codes >= 0
    codes = codes.clamp(min=0)
    for row in range(1, height):  # undrawn codes stand beside drawn ones in the decoder: the code above is a fair guess
        codes[:, row] = torch.where(done[:, row], codes[:, row], codes[:, row - 1])
    begun = done.flatten(1).any(1)
    pixels = np.full((len(codes), size, size, 3), GREY, dtype=np.uint8)
    if begun.any():
        rows = 1 + int(done.any(2).any(0).nonzero().max()) if pipeline.decodes_fewer_rows else height
        decoded = pipeline.pixels(codes[begun, :rows].flatten(1))
        pixels[begun.numpy(), : decoded.shape[1]] = decoded
        place = np.arange(size)
        shown = done.numpy()[:, place[:, None] * height // size, place * width // size]
        pixels[~shown] = GREY
    return [Image.fromarray(image) for image in pixels]
