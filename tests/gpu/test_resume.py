"""The trainers themselves on a device, in this process: interrupted and continued, they end where they would have."""

import sys
from importlib.util import find_spec

import pytest
import torch

from autoregressive.models import gpt
from autoregressive.train import train_c2i
from tests import tiny_tokenizer, tiny_training
from tests.gpu import COMPILED, ON_GPU_ALONE
from tests.tiny_training import assert_same_state, last_checkpoint, rows
from tokenizer.tokenizer_image import vq_model, vq_setup, vq_train
from utils.engine.run import TrainingRun

# The backward pass of attention on GPUs adds in any order.
TOLERANCE = {"cpu": 0.0, "cuda": 1e-4}


def train(main, monkeypatch, arguments: list[str], stop_after: int | None = None) -> None:
    """Run a trainer in this process; `stop_after` so many steps it is interrupted, with what it holds let go."""
    end_step = TrainingRun.end_step

    def stopping(run, steps_done, log, found_inf):
        if steps_done == stop_after:
            if run._writer is not None:
                run._writer.wait()
            run.folder.lock.close()
            raise KeyboardInterrupt
        end_step(run, steps_done, log, found_inf)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "end_step", stopping)
        patch.setattr(sys, "argv", ["program", *map(str, arguments)])
        if stop_after is None:
            main()
        else:
            with pytest.raises(KeyboardInterrupt):
                main()


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    return tiny_training.tiny_store(tmp_path_factory.mktemp("codes"))


@pytest.mark.parametrize(
    ("precision", "flags"),
    [
        ("none", ("--no-compile", "--codes-on-device")),
        pytest.param("bf16", ("--no-compile",), marks=ON_GPU_ALONE),
        pytest.param("bf16", ("--compile",), marks=COMPILED),
    ],
)
def test_training_continues_exactly(device, codes, monkeypatch, tmp_path, precision, flags):
    """With dropout, averages, a validation loss, and across the switch of the patch side."""
    monkeypatch.setitem(gpt.GPT_SIZES, "GPT-Tiny", (2, 2, 32))
    changes = {"--mixed-precision": precision, "--val-code-path": codes, "--val-every": 6}

    def arguments(folder: str) -> list[str]:
        return tiny_training.command(codes, tmp_path / folder, "--ema", *flags, change=changes)

    train(train_c2i.main, monkeypatch, arguments("whole"))
    train(train_c2i.main, monkeypatch, arguments("parts"), stop_after=5)
    train(train_c2i.main, monkeypatch, arguments("parts"))
    whole, parts = last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "parts")
    assert parts["steps"] == 12
    for key in ("model", "ema", "optimizer"):
        assert_same_state(parts[key], whole[key], key, TOLERANCE[device.type])
    for mine, theirs in zip(rows(tmp_path / "parts"), rows(tmp_path / "whole"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("precision", "flag"),
    [
        ("none", "--no-compile"),
        pytest.param("bf16", "--no-compile", marks=ON_GPU_ALONE),
        pytest.param("bf16", "--compile", marks=COMPILED),
    ],
)
def test_the_tokenizers_training_continues(device, monkeypatch, tmp_path, precision, flag):
    """Past the discriminator's start; convolutions on GPUs add in any order, so that only losses are compared."""
    monkeypatch.setitem(vq_model.VQ_models, "VQ-Tiny", tiny_tokenizer.smaller_tokenizer)
    monkeypatch.setattr(vq_setup, "PatchDiscriminator", tiny_tokenizer.smaller_discriminator)
    images = tiny_tokenizer.tiny_images(tmp_path / "images")
    changes = {"--mixed-precision": precision}
    if find_spec("torchvision"):  # which draws the reconstructions
        changes |= {"--val-data-path": images, "--val-every": 6}

    def arguments(folder: str) -> list[str]:
        return tiny_tokenizer.command(images, tmp_path / folder, "--ema", flag, change=changes)

    train(vq_train.main, monkeypatch, arguments("whole"))
    train(vq_train.main, monkeypatch, arguments("parts"), stop_after=8)
    train(vq_train.main, monkeypatch, arguments("parts"))
    compared = ("loss", "reconstruction", "commitment", "codebook", "val_psnr")
    for mine, theirs in zip(rows(tmp_path / "parts"), rows(tmp_path / "whole"), strict=True):
        mine, theirs = ({name: row[name] for name in compared if name in row} for row in (mine, theirs))
        assert mine == pytest.approx(theirs, rel=0.0 if device.type == "cpu" else 0.05)
    state = last_checkpoint(tmp_path / "parts")
    assert all(value.isfinite().all() for value in state["model"].values() if value.is_floating_point())
    assert isinstance(state["discriminator"], dict)
    assert torch.stack([value.float().abs().max() for value in state["discriminator"].values()]).max() > 0
