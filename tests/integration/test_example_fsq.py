"""examples/fsq.py: a tokenizer of one's own trains, and its checkpoint serves every later step."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.processes import run_main
from tests.tiny_tokenizer import command, tiny_images, train
from tests.tiny_training import assert_same_state, interrupting, last_checkpoint, rows
from tokenizer.tokenizer_image import reconstruct
from tokenizer.tokenizer_image.load import TokenizerSettings, build_tokenizer
from utils.component import load_component

FILE = Path(__file__).parents[2] / "examples/fsq.py"
TINY = "channels=8, z_channels=8, num_res_blocks=1, norm_groups=4, encoder_ch_mult=[1, 2], decoder_ch_mult=[1, 2]"
FSQ = f"{FILE}:FSQ(levels=(5, 4, 3), {TINY})"
CODES = 5 * 4 * 3


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny_images(tmp_path_factory.mktemp("images") / "held-out")


def fsq_command(images, results, *flags, **changes) -> list[str]:
    arguments = command(images, results, *flags, own={"--vq-model": FSQ, "--disc-start": 2, "--epochs": 2}, **changes)
    for flag in ("--codebook-size", "--codebook-embed-dim"):
        place = arguments.index(flag)
        del arguments[place : place + 2]
    return arguments


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    results = tmp_path_factory.mktemp("trained")
    assert train(fsq_command(images, results, "--ema", "--disc-adaptive-weight", more={"--val-data-path": images})) == [
        0
    ]
    return results


def load(results, name: str | None = FSQ, **settings):
    return build_tokenizer(TokenizerSettings(str(results / "run/checkpoints/last.pt"), name, **settings))


def test_it_is_short():
    assert len(FILE.read_text().splitlines()) <= 42


def test_codes_and_vectors_are_one_to_one():
    quantizer = load_component(FSQ, "--vq-model").make().quantize
    codes = torch.arange(CODES).view(1, 6, 10)
    vectors = quantizer.lookup(codes)
    assert vectors.abs().max() == 1
    assert torch.equal(quantizer.nearest(torch.atanh(vectors.clamp(-0.999, 0.999))), codes)
    assert quantizer.lookup(torch.tensor([[[0, CODES - 1]]])).flatten().tolist() == [-1, 1] * 3
    huge = quantizer.nearest(torch.randn(2, 3, 8, 8) * 1e6)
    assert huge.min() >= 0
    assert huge.max() < CODES


def test_gradients_pass_straight_through_the_rounding():
    quantizer = load_component(FSQ, "--vq-model").make().quantize
    latent = torch.randn(2, 3, 4, 4, requires_grad=True)
    vectors, losses, codes = quantizer(latent)
    torch.testing.assert_close(vectors, quantizer.lookup(codes.view(2, 4, 4)))
    assert losses == (None, None, None)
    weight = torch.randn_like(vectors)
    (through,) = torch.autograd.grad((vectors * weight).sum(), latent)
    (direct,) = torch.autograd.grad((latent.tanh() * weight).sum(), latent)
    torch.testing.assert_close(through, direct)


def test_training_learns_without_a_codebook_loss(trained):
    steps = [row for row in rows(trained) if "reconstruction" in row]
    assert all("codebook" not in row and "commitment" not in row for row in steps)
    assert steps[-1]["reconstruction"] < steps[0]["reconstruction"]
    assert np.isfinite(steps[-1]["generator"])
    assert any("val_psnr" in row for row in rows(trained))
    assert [path.name for path in trained.iterdir()] == ["run"]


def test_a_kill_changes_nothing(images, trained, tmp_path):
    arguments = fsq_command(images, tmp_path, "--ema", "--disc-adaptive-weight")
    assert train(arguments, before=interrupting(4, lambda: exec("raise SystemExit(9)"))) == [9]
    assert train(arguments) == [0]
    for key in ("model", "ema", "optimizer", "discriminator"):
        assert_same_state(last_checkpoint(tmp_path)[key], last_checkpoint(trained)[key], key)


def test_the_checkpoint_builds_it_again(images, trained):
    model, info = load(trained)
    assert (info.codebook_size, info.codebook_embed_dim, info.downsample_factor) == (CODES, 3, 2)
    assert info.label == "FSQ"
    batch = torch.rand(3, 3, 32, 16) * 2 - 1
    reconstruction, _, indices = model(batch)
    codes = model.encode_indices(batch)
    assert torch.equal(codes.flatten(), indices.flatten())
    assert codes.min() >= 0
    assert codes.max() < CODES
    torch.testing.assert_close(model.decode_indices(codes.view(3, 16, 8)), reconstruction, rtol=1e-4, atol=1e-5)
    again, _ = load(trained, codebook_size=CODES, vq_weights="raw")
    assert_same_state(dict(again.state_dict()), dict(last_checkpoint(trained)["model"]))


def test_reconstruct_runs(images, trained, tmp_path):
    flags = ["--data-path", images, "--vq-ckpt", trained / "run/checkpoints/last.pt", "--vq-model", FSQ]
    flags += ["--image-size", 32, "--num-workers", 0, "--sample-dir", tmp_path]
    assert run_main(reconstruct.main, flags, output=tmp_path / "log") == [0]
    assert (tmp_path / "FSQ-held-out-size-32-size-32.npz").exists()
    assert f"of {CODES} codes used" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"--codebook-size": 64}, "--codebook-size 64 does not fit"),
        ({"--revive-dead-codes": 2}, "has no learned codebook"),
        ({"--vq-model": f"{FILE}:NoSuch"}, "defines no function or class NoSuch"),
    ],
    ids=str,
)
def test_refusals(change, sentence, images, tmp_path):
    more = [str(word) for pair in change.items() for word in pair]
    assert train(fsq_command(images, tmp_path) + more, output=tmp_path / "log") == [2]
    said = (tmp_path / "log").read_text()
    assert sentence in said
    assert "Traceback" not in said
