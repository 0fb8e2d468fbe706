"""The evaluator in this process, and a small network of features for it."""

import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch

from evaluations.c2i import evaluator
from utils.program import run as run_program


class TinyClassifier(torch.nn.Module):
    """The interface of own feature networks; its class is the brightest of the three channels."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        colour = images.mean((1, 2)) / 255  # (N, 3)
        rows = images.mean(2).flatten(1)[:, :6] / 255
        return torch.cat([colour, colour.square()], 1), rows, colour * 50


@cache
def tiny_network() -> Path:
    return exported(TinyClassifier(), Path(mkdtemp(prefix="npp-network-")) / "tiny.pt2")


def exported(module: torch.nn.Module, path: Path) -> Path:
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, (torch.zeros(2, 16, 16, 3),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    return path


def evaluate(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluator.py", *map(str, arguments)])
    evaluator.main()


def refuse(monkeypatch, capsys, *arguments: object) -> str:
    """What the program says when it ends with status 2."""
    monkeypatch.setattr(sys, "argv", ["evaluator.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        run_program(evaluator.main)
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message
