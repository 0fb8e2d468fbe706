"""For the tests of the demo page: its handlers with tiny models, and values of its controls."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from autoregressive.demo.handlers import Handlers
from autoregressive.sample.pipeline import PictureSampling, Pipeline
from tests.sampling_models import CODEBOOK, write_models

ASKED = {"class": 3, "count": 2, "seed": 5, "cfg_scale": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def asked(**changes) -> list:
    """Values of the page's controls, in their order."""
    return list((ASKED | changes).values())


def tiny_pipeline(folder: Path) -> Pipeline:
    """16x16 pixels, 4x4 codes, classes `digit 0` to `digit 9`."""
    write_models(folder)
    sizes = {"vq_model": "VQ-Tiny", "codebook_size": CODEBOOK, "codebook_embed_dim": 4}
    return Pipeline.from_pretrained(folder / "c2i_B_256.pt", folder / "vq.pt", device=torch.device("cpu"), **sizes)


def make_handlers(pipeline: Pipeline, folder: Path, most: int = 16) -> Handlers:
    return Handlers(pipeline, PictureSampling(cfg_scale=2.0, top_k=0), most, folder)


class SlowPipeline:
    """A pipeline that takes `seconds` for every row of codes, waits at its `gate`, and notes what its streams do."""

    def __init__(self, pipeline: Pipeline, seconds: float):
        self._pipeline, self.seconds = pipeline, seconds
        self.rows = self.running = self.most_running = self.closed = 0
        self.threads = set()
        self.gate = threading.Event()
        self.gate.set()

    def __getattr__(self, name):
        return getattr(self._pipeline, name)

    def stream(self, *classes, **settings):
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            for drawing in self._pipeline.stream(*classes, **settings):
                time.sleep(self.seconds)
                self.gate.wait(20)
                self.rows += 1
                self.threads.add(threading.current_thread().name)
                yield drawing
        finally:
            self.running -= 1
            self.closed += 1


def wait_until(happened: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
