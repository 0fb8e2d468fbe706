"""Averaged weights of short trainings: later programs take them by default, so they must be as good as the raw ones."""

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.crops import to_model_range
from tests.tiny_tokenizer import command, smaller_tokenizer, tiny_images, train
from tokenizer.tokenizer_image.load import TokenizerSettings, build_tokenizer
from tokenizer.tokenizer_image.metrics import psnr
from tokenizer.tokenizer_image.vq_model import VQ_models, to_uint8


@pytest.mark.slow
def test_after_300_steps_averaged_weights_reconstruct_as_well_as_the_raw_ones(tmp_path, monkeypatch):
    images = tiny_images(tmp_path / "images")
    flags = {"--epochs": 100, "--disc-weight": 0, "--log-every": 100, "--ckpt-every": 1000}
    assert train(command(images, tmp_path, "--ema", x=flags), output=tmp_path / "log") == [0]
    assert "the averaged weights still hold" not in (tmp_path / "log").read_text()
    monkeypatch.setitem(VQ_models, "VQ-Tiny", smaller_tokenizer)
    crops = [np.asarray(Image.open(path))[2:34, 4:36] for path in sorted(images.rglob("*.png"))]
    pixels = torch.from_numpy(np.stack(crops))
    found = {weights: _mean_psnr(tmp_path / "run/checkpoints/last.pt", weights, pixels) for weights in ("raw", "ema")}
    assert found["raw"] > 15  # 11 before training
    assert abs(found["ema"] - found["raw"]) < 0.5


def _mean_psnr(checkpoint, weights: str, pixels: torch.Tensor) -> float:
    """Of reconstructions of `pixels` `(N, 32, 32, 3)` uint8."""
    tokenizer, _ = build_tokenizer(TokenizerSettings(vq_ckpt=str(checkpoint), vq_weights=weights))
    with torch.no_grad():
        reconstructions = tokenizer.decode_indices(tokenizer.encode_indices(to_model_range(pixels)).view(-1, 8, 8))
    return psnr(to_uint8(reconstructions), pixels.permute(0, 3, 1, 2)).mean().item()


def test_an_average_that_still_holds_its_beginning_is_warned_of(tmp_path):
    images = tiny_images(tmp_path / "images")
    assert train(command(images, tmp_path, "--ema"), output=tmp_path / "log") == [0]
    assert "warning: the averaged weights still hold" not in (tmp_path / "log").read_text()
    one_step = {"--epochs": 1, "--warmup-epochs": 0, "--global-batch-size": 24, "--run-name": "one"}
    assert train(command(images, tmp_path, "--ema", x=one_step), output=tmp_path / "log") == [0]
    assert "warning: the averaged weights still hold 10% of what they were" in (tmp_path / "log").read_text()
