"""Drawing on the device: one step at a time, in one thread, however many visitors there are."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image

from autoregressive.demo.asked import Asked
from autoregressive.sample.pipeline import Pipeline
from utils.program import UserError


@dataclass(frozen=True)
class Progress:
    drawn: int  # codes
    total: int
    seconds: float
    images: list[Image.Image] | None  # grey where nothing is drawn yet; None: as last time

    @property
    def finished(self) -> bool:
        return self.drawn == self.total

    def __str__(self) -> str:
        if not self.finished:
            return f"{self.drawn / self.total:.0%} drawn, {self.seconds:.1f} s"
        count = len(self.images)
        pictures = f"{count} picture" + ("s" if count > 1 else "")
        return f"{pictures} in {self.seconds:.2f} s, {count / max(self.seconds, 1e-9):.3g} images/s"


class Artist:
    """A pipeline that draws for one visitor at a time, every step in a thread of its own.

    The page's queue lets one in at a time. But a visitor who leaves during a step is gone for the queue before the step
    is done, and what was drawing may never be closed: so the next drawing waits for the step, and closes it.
    """

    def __init__(self, pipeline: Pipeline):
        self.pipeline = pipeline
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._last: Iterator[Progress] | None = None

    def draw(self, asked: Asked) -> Iterator[Progress]:
        """Pictures row by row; closing the iterator, or another drawing, ends it. Raises `UserError`."""
        steps = self._steps(asked)
        self._in_thread(self._replace_last, steps)
        try:
            while (progress := self._in_thread(next, steps, None)) is not None:
                yield progress
        finally:
            self._thread.submit(steps.close)  # whoever closes this may be the server's own loop: it does not wait

    def _replace_last(self, steps: Iterator[Progress]) -> None:
        if self._last is not None:
            self._last.close()
        self._last = steps

    def _steps(self, asked: Asked) -> Iterator[Progress]:
        """Looking at an unfinished picture takes a pass of the tokenizer: not more time goes there than into drawing.

        Its seconds are those of drawing, without looks at what is unfinished and waits for the visitor's connection.
        """
        begin = time.perf_counter()
        stream = self.pipeline.stream([asked.label] * asked.count, **asked.arguments)
        seconds = looked = cost = 0.0
        try:
            for drawing in stream:
                images = drawing.images if drawing.finished else None
                seconds += time.perf_counter() - begin
                if images is None and seconds - looked >= cost:
                    begin = time.perf_counter()
                    images, looked = drawing.images, seconds
                    cost = time.perf_counter() - begin
                yield Progress(drawing.drawn, drawing.total, seconds, images)
                begin = time.perf_counter()
        finally:
            stream.close()

    def _in_thread(self, function, *arguments):
        try:
            return self._thread.submit(function, *arguments).result()
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
                raise
            raise UserError("there is not enough memory for so many pictures at once; ask for fewer.") from error
