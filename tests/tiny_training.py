"""A GPT small enough to train for a few steps in a test, on a small store of random codes."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from autoregressive.models import gpt
from autoregressive.train import train_c2i
from tests.processes import run_main
from tests.stores import make_store
from utils.engine import run as training_run

COMMAND = {  # 24 images, batch 8: 3 steps an epoch; level 1 is steps 0-5, level 2 steps 6-11
    "--dataset": "tiny_code",
    "--image-size": 16,
    "--downsample-size": 4,
    "--vocab-size": 64,
    "--num-classes": 4,
    "--gpt-model": "GPT-Tiny",
    "--epochs": 4,
    "--global-batch-size": 8,
    "--warmup-epochs": 1,
    "--lr": 1e-3,
    "--mixed-precision": "none",
    "--log-every": 2,
    "--ckpt-every": 3,
    "--run-name": "run",
}
NO_DROPOUT = {"--dropout-p": 0, "--token-dropout-p": 0, "--class-dropout-p": 0}


def tiny_store(folder: Path) -> Path:
    make_store(folder / "tiny16_codes", count=24)
    return folder


def shrink_gpt() -> None:
    """Make GPT-Tiny tinier still, in this process (call it in a fork or under monkeypatch)."""
    gpt.GPT_SIZES["GPT-Tiny"] = (2, 2, 32)


def command(codes: Path, results: Path, *flags: str, **changes) -> list[str]:
    """The command line of a tiny run; `changes` replace or add flags, given as `{"--flag": value}` under any name."""
    settings = COMMAND | {"--code-path": codes, "--results-dir": results}
    for change in changes.values():
        settings |= change
    return ["--scheduler", *flags, *(str(word) for pair in settings.items() for word in pair)]


def train(arguments: list[str], world_size: int = 1, output=None, before=lambda: None) -> list[int]:
    def main():
        shrink_gpt()
        before()
        train_c2i.main()

    return run_main(main, arguments, world_size, output)


def interrupting(after_step: int, action, written: bool = False) -> Callable[[], None]:
    """For `before=`: do `action` after a step has been taken, before it is logged or saved.

    With `written`, the checkpoints of earlier steps, which a thread writes, are there, or have failed.
    """

    def patch():
        original = training_run.TrainingRun.end_step

        def end_step(self, steps_done, log, found_inf):
            if steps_done == after_step:
                if written and self._writer is not None:  # the main rank's
                    self._writer.wait()
                action()
            original(self, steps_done, log, found_inf)

        training_run.TrainingRun.end_step = end_step

    return patch


def send(number: int):
    return lambda: os.kill(os.getpid(), number)


def last_checkpoint(results: Path, run: str = "run") -> dict:
    return torch.load(results / run / "checkpoints/last.pt", weights_only=True)


def rows(results: Path, run: str = "run") -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    lines = (results / run / "metrics.jsonl").read_text().splitlines()
    clocked = ("images_per_second", "data_wait", "mfu", "memory_gib")
    return [{key: value for key, value in json.loads(line).items() if key not in clocked} for line in lines]


def assert_same_state(a, b, where: str = "", tolerance: float = 0.0) -> None:
    """Equal nested dicts of tensors; bit for bit unless a tolerance is given."""
    assert type(a) is type(b) or isinstance(a, list | tuple), where  # betas come back from a file as a list
    if isinstance(a, torch.Tensor):
        same = torch.equal(a, b) if tolerance == 0 else torch.allclose(a, b, rtol=0, atol=tolerance)
        assert same, where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_state(a[key], b[key], f"{where}/{key}", tolerance)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{where}/{number}", tolerance)
    else:
        assert a == b, where
