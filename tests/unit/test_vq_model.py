"""The tokenizer against golden figures and published layouts; loading it and refusing what does not fit."""

import argparse
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenizer.base import ImageTokenizer, TrainableTokenizer
from tokenizer.tokenizer_image import vq_model
from tokenizer.tokenizer_image.load import TokenizerSettings, build_tokenizer
from tokenizer.tokenizer_image.vq_model import VQ_models, to_uint8
from utils.program import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
MANIFEST = json.loads((GOLDEN / "vq_manifest.json").read_text())


def synthetic_state(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """The weights that the golden figures were made with: drawn by name."""
    state = {}
    for name, shape in shapes.items():
        weight = np.random.RandomState(zlib.crc32(name.encode())).randn(*shape).astype(np.float32)
        if name == "quantize.codebook_used":
            weight *= 0
        elif name.endswith(".bias"):
            weight *= 0.05
        elif len(shape) == 1:
            weight = 1 + 0.1 * weight
        elif len(shape) == 4:
            weight /= math.sqrt(math.prod(shape[1:]))
        state[name] = torch.from_numpy(weight)
    return state


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return VQ_models["VQ-Tiny"](codebook_size=64, codebook_embed_dim=4)


def load(path: Path, name: str | None = "VQ-Tiny", size: int | None = 64, dim: int | None = 4, weights: str = "auto"):
    return build_tokenizer(TokenizerSettings(str(path), name, size, dim, weights))


def save(path: Path, model: torch.nn.Module, **entries) -> Path:
    torch.save({"model": model.state_dict(), **entries}, path)
    return path


@pytest.mark.parametrize("name", MANIFEST)
def test_names_and_shapes_are_those_of_the_published_checkpoints(name):
    with torch.device("meta"):
        model = VQ_models[name]()
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == MANIFEST[name]["shapes"]
    assert sum(parameter.numel() for parameter in model.parameters()) == MANIFEST[name]["params"]


@pytest.mark.parametrize("name", MANIFEST)
def test_golden_figures(name):
    golden = np.load(GOLDEN / "vq.npz", allow_pickle=False)
    model = VQ_models[name]().eval()
    model.load_state_dict(synthetic_state(MANIFEST[name]["shapes"]), strict=True)
    images = torch.from_numpy(golden["images"])
    with torch.no_grad():
        latent = model.latent(images)
        _, _, (_, _, indices) = model.encode(images)
        codes = torch.from_numpy(golden[f"{name}.indices"])
        decoded = model.decode_code(codes, tuple(latent.shape))
    expected = torch.from_numpy(golden[f"{name}.latent"])
    assert (latent - expected).abs().max() / expected.abs().max() < 1e-4
    assert (indices.view(codes.shape) == codes).float().mean() >= 0.99
    assert (decoded - torch.from_numpy(golden[f"{name}.decoded"])).abs().max() < 1e-3


def test_codes_are_the_nearest_whatever_the_block_size(tiny, monkeypatch):
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        unit = torch.nn.functional.normalize(tiny.latent(images), dim=1).permute(0, 2, 3, 1).reshape(-1, 4)
    expected = torch.cdist(unit, tiny.quantize.codebook).argmin(dim=1).view(2, -1)
    assert torch.equal(tiny.encode_indices(images), expected)
    monkeypatch.setattr(vq_model, "LOOKUP_ELEMENTS", 7 * 64)
    assert torch.equal(tiny.encode_indices(images), expected)
    assert torch.equal(tiny.encode(images)[2][2].view(2, -1), expected)


def test_train_and_eval_agree_and_forward_changes_nothing(tiny):
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    in_train, in_eval = tiny.train()(images), tiny.eval()(images)
    assert torch.equal(in_train[0], in_eval[0])
    assert torch.equal(in_train[1].codebook, in_eval[1].codebook)
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())


def test_decoding_codes_equals_decoding_their_vectors(tiny):
    images = torch.rand(2, 3, 32, 16) * 2 - 1  # an oblong grid
    reconstruction, _, indices = tiny(images)
    assert tiny.downsample_factor == 4
    decoded = tiny.decode_code(indices, (2, 4, 8, 4))
    torch.testing.assert_close(decoded, reconstruction, rtol=1e-5, atol=1e-5)


def test_it_offers_what_the_program_asks_of_a_tokenizer(tiny):
    assert isinstance(tiny, ImageTokenizer)
    assert isinstance(tiny, TrainableTokenizer)
    images = torch.rand(2, 3, 32, 16) * 2 - 1
    codes = tiny.encode_indices(images)
    assert codes.shape == (2, 8 * 4)
    assert (tiny.codebook_size, tiny.downsample_factor) == (64, 4)
    decoded = tiny.decode_indices(codes.view(2, 8, 4))
    assert torch.equal(decoded, tiny.decode_code(codes, (2, 4, 8, 4)))
    expected = decoded.detach()
    tiny.decoder.bfloat16(), tiny.post_quant_conv.bfloat16()  # the codebook stays in float32
    torch.testing.assert_close(tiny.decode_indices(codes.view(2, 8, 4)).float(), expected, rtol=0.1, atol=0.05)


def test_quantizer_losses_and_their_gradients():
    torch.manual_seed(0)
    quantizer = VQ_models["VQ-Tiny"](codebook_size=16, codebook_embed_dim=4, commit_loss_beta=0.5).quantize
    latent = torch.randn(2, 4, 3, 3, requires_grad=True)
    quantized, losses, indices = quantizer(latent)
    unit = torch.nn.functional.normalize(latent, dim=1)
    nearest = quantizer.codebook[indices].view(2, 3, 3, 4).permute(0, 3, 1, 2)
    distance = (unit - nearest).square().mean()
    torch.testing.assert_close(losses.codebook, distance)
    torch.testing.assert_close(losses.commitment, 0.5 * distance)
    assert losses.entropy is None

    (gradient,) = torch.autograd.grad(losses.codebook, latent, allow_unused=True, retain_graph=True)
    assert gradient is None  # the codebook loss moves the codes, never the encoder
    (gradient,) = torch.autograd.grad(losses.commitment, quantizer.embedding.weight, allow_unused=True)
    assert gradient is None  # and the commitment the other way round
    weight = torch.randn_like(quantized)  # straight through: the gradient is that of the unquantised unit vector
    (through,) = torch.autograd.grad((quantized * weight).sum(), latent)
    (direct,) = torch.autograd.grad((torch.nn.functional.normalize(latent, dim=1) * weight).sum(), latent)
    torch.testing.assert_close(through, direct)


def test_entropy_term_is_lowest_for_certain_and_evenly_used_codes():
    quantizer = VQ_models["VQ-Tiny"](codebook_size=8, codebook_embed_dim=4, entropy_loss_ratio=0.1).quantize
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.cat([torch.eye(4), -torch.eye(4)]))
    even = quantizer.codebook.view(1, 8, 1, 4).permute(0, 3, 1, 2)
    one_code = even[:, :, :1].expand(1, 4, 8, 1)
    torch.manual_seed(0)
    unsure = torch.randn(1, 4, 8, 1)
    unsure[:] = 0.5  # as far from four codes
    entropies = [quantizer(latent)[1].entropy.item() for latent in (even, one_code, unsure)]
    assert entropies[0] == pytest.approx(-0.1 * math.log(8), abs=1e-4)
    assert entropies[1] == pytest.approx(0, abs=1e-4)
    assert entropies[2] == pytest.approx(0, abs=1e-4)


def test_search_is_in_float32_under_autocast(tiny):
    latent = torch.randn(4, 4, 16, 16)
    expected = tiny.quantize.nearest(latent)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tiny.quantize.nearest(latent), expected)


def test_pixels_round_as_published():
    values = torch.tensor([-1.1, -1.0, 0.0, 0.999, 1.0, 2.0])
    assert to_uint8(values).tolist() == [0, 0, 128, 255, 255, 255]


def test_build_tokenizer_says_what_it_loaded(tiny, tmp_path):
    averaged = {name: value + 1 for name, value in tiny.state_dict().items()}
    settings = argparse.Namespace(vq_model="VQ-Tiny", codebook_size=64, codebook_embed_dim=4)
    path = save(tmp_path / "tiny.pt", tiny, ema=averaged, args=settings)
    model, info = load(path)
    assert (info.weights, info.downsample_factor, len(info.sha256)) == ("ema", 4, 64)
    assert "ema weights" in str(info)
    assert torch.equal(model.state_dict()["encoder.conv_in.bias"], averaged["encoder.conv_in.bias"])
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model, info = load(path, weights="raw")
    assert info.weights == "raw"
    assert torch.equal(model.state_dict()["encoder.conv_in.bias"], tiny.state_dict()["encoder.conv_in.bias"])


def test_build_tokenizer_reads_bare_and_wrapped_weights(tiny, tmp_path):
    torch.save(tiny.state_dict(), tmp_path / "bare.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in tiny.state_dict().items()}}, tmp_path / "wrapped.pt")
    for name in ("bare.pt", "wrapped.pt"):
        model, info = load(tmp_path / name)
        assert info.weights == "raw"
        assert torch.equal(model.quantize.embedding.weight, tiny.quantize.embedding.weight)


@pytest.mark.parametrize("settings", [{"codebook_size": 32}, argparse.Namespace(codebook_size=32)])
def test_build_tokenizer_refuses_contradicting_flags(tiny, tmp_path, settings):
    path = save(tmp_path / "tiny.pt", tiny, **{"config" if isinstance(settings, dict) else "args": settings})
    with pytest.raises(UserError, match=r"--codebook-size \(32 there, 64 here\); leave these flags out"):
        load(path)


def test_build_tokenizer_refuses_other_models(tiny, tmp_path):
    path = save(tmp_path / "tiny.pt", tiny)
    with pytest.raises(UserError, match="does not fit this model"):
        load(path, size=32)
    with pytest.raises(UserError, match="VQ-16, VQ-8, VQ-Tiny"):
        load(path, name="VQ-4")
    with pytest.raises(UserError, match="there is no checkpoint"):
        load(tmp_path / "none.pt")
    with pytest.raises(UserError, match="no EMA weights"):
        load(path, weights="ema")


def test_what_the_checkpoint_records_builds_the_model(tmp_path):
    """Without flags, and with every field: one without parameters, and shapes that no published name has."""
    config = {"channels": 16, "z_channels": 8, "num_res_blocks": 2, "norm_groups": 2, "commit_loss_beta": 0.7}
    config |= {"encoder_ch_mult": [1, 3], "decoder_ch_mult": [1, 3], "codebook_size": 24, "codebook_embed_dim": 5}
    model = vq_model.VQModel(vq_model.ModelArgs(**config))
    path = save(tmp_path / "own.pt", model, config={"vq_model": "VQ-8", "image_size": 32, **config})
    found, info = load(path, None, None, None)
    assert found.config == model.config
    assert (info.name, info.codebook_size, info.codebook_embed_dim, info.downsample_factor) == ("VQ-8", 24, 5, 2)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.equal(found.encode_indices(images), model.encode_indices(images))


def test_a_checkpoint_that_records_nothing_is_of_the_published_size(tmp_path):
    assert load(save(tmp_path / "vq.pt", VQ_models["VQ-16"]()), None, None, None)[1].name == "VQ-16"


OWN_CLASS = """
from tokenizer.tokenizer_image.vq_model import VQ_Tiny
open({ran!r}, "a").write("x")
def mine(extra=0, **settings):
    return VQ_Tiny(**settings)
class NoTokenizer:
    pass
"""


@pytest.fixture
def own_class(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(OWN_CLASS.format(ran=str(tmp_path / "ran")))
    model = VQ_models["VQ-Tiny"](codebook_size=64, codebook_embed_dim=4)
    sizes = {"codebook_size": 64, "codebook_embed_dim": 4, "vq_model": f"{file}:mine(extra=1)"}
    return file, save(
        tmp_path / "mine.pt", model, config=sizes | {"vq_model_identity": f"{file}:mine(extra=1) sha256 0"}
    )


def test_a_checkpoint_never_makes_a_users_file_run(own_class, tmp_path):
    file, path = own_class
    with pytest.raises(UserError, match=r"was trained with --vq-model '.*mine.py:mine\(extra=1\)'; give it"):
        load(path, None, None, None)
    with pytest.raises(UserError, match=r"--vq-model \(mine\(extra=1\) there, mine\(extra=2\) here\)"):
        load(path, f"{file}:mine(extra=2)")
    assert not (tmp_path / "ran").exists()


def test_a_users_class_is_given_by_flag_and_may_have_moved_or_changed(own_class, tmp_path, capsys):
    file, path = own_class
    moved = tmp_path / "moved.py"
    file.rename(moved)
    _, info = load(path, f"{moved}:mine( extra = 1 )", None, None)
    assert "sha256" in info.name
    assert (info.label, info.codebook_size) == ("mine", 64)
    assert "warning" in capsys.readouterr().err


def test_refuses_what_is_no_tokenizer(own_class, tmp_path):
    file, _ = own_class
    bare = save(tmp_path / "bare.pt", VQ_models["VQ-Tiny"](codebook_size=64, codebook_embed_dim=4))
    with pytest.raises(UserError, match="is no image tokenizer"):
        load(bare, f"{file}:NoTokenizer")
    with pytest.raises(UserError, match="no function or class nothing"):
        load(bare, f"{file}:nothing")
