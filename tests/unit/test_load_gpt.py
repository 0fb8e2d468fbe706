"""Building a GPT from a file: every published layout loads strictly, and contradictions are refused in one sentence."""

import argparse
import dataclasses

import pytest
import torch

from autoregressive.models.generate import generate
from autoregressive.models.gpt import GPT_models, ModelArgs, Transformer
from autoregressive.models.load import GPTSettings
from autoregressive.models.load import build_gpt as build
from pretrained_models import catalogue
from utils.program import UserError

SETTINGS = dict(block_size=16, grid=(4, 4), num_classes=10, vocab_size=64)
BUILD = dict(image_size=64, downsample_size=16, num_classes=10, vocab_size=64)


def build_gpt(name, path, vocab_size=None, dtype=torch.float32, **flags):
    return build(GPTSettings(gpt_ckpt=str(path), gpt_model=name, **flags), vocab_size, dtype)


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    model = GPT_models["GPT-Tiny"](**SETTINGS).eval()
    torch.nn.init.normal_(model.output.weight)
    return model


@pytest.fixture
def save(tmp_path):
    def write(**contents):
        torch.save(contents.pop("bare", contents), tmp_path / "c2i.pt")
        return tmp_path / "c2i.pt"

    return write


@pytest.mark.parametrize("layout", ["model", "module", "state_dict", "bare"])
def test_every_layout_gives_the_same_model(model, save, layout):
    loaded, info = build_gpt("GPT-Tiny", save(**{layout: model.state_dict()}), **BUILD)
    codes, labels = torch.randint(64, (2, 16)), torch.tensor([1, 2])
    torch.testing.assert_close(loaded(codes, labels)[0], model(codes, labels)[0], rtol=0, atol=0)
    assert (info.weights, info.steps, info.grid_known) == ("raw", None, False)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_published_files_with_a_namespace(model, save):
    args = argparse.Namespace(gpt_model="GPT-Tiny", image_size=64, downsample_size=16, num_classes=10, vocab_size=64)
    path = save(model=model.state_dict(), steps=9, args=args)
    info = build_gpt("GPT-Tiny", path, **BUILD)[1]
    assert info.grid_known
    assert info.steps == 9
    assert "raw weights" in str(info)
    with pytest.raises(UserError, match=r"trained on grids of 4x4 codes \(--image-size 64\), not 8x8"):
        build_gpt("GPT-Tiny", path, **BUILD | dict(image_size=128))


def test_ema_weights_are_taken_unless_told_otherwise(model, save):
    ema = {name: value + 1 for name, value in model.state_dict().items()}
    path = save(model=model.state_dict(), ema=ema)
    for choice, expected in (("auto", "ema"), ("ema", "ema"), ("raw", "raw")):
        loaded, info = build_gpt("GPT-Tiny", path, **BUILD, weights=choice)
        assert info.weights == expected
        torch.testing.assert_close(
            loaded.norm.weight, (ema if expected == "ema" else model.state_dict())["norm.weight"]
        )


def test_weights_are_cast_but_rotary_tables_stay_in_float32(model, save):
    loaded, _ = build_gpt("GPT-Tiny", save(model=model.state_dict()), **BUILD, dtype=torch.bfloat16)
    assert loaded.output.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.rope_1, model.rope_1)
    assert generate(loaded, torch.tensor([1]), 16, 2.0).shape == (1, 16)


def test_fewer_key_value_heads_and_no_null_class_are_found_in_the_file(save):
    model = GPT_models["GPT-Tiny"](**SETTINGS, n_kv_head=2, class_dropout_prob=0.0)
    path = save(model=model.state_dict(), config={"gpt_model": "GPT-Tiny", "n_kv_head": 2})
    loaded, _ = build_gpt("GPT-Tiny", path, **BUILD)
    assert loaded.args.n_kv_head == 2
    assert loaded.cls_embedding.embedding_table.num_embeddings == 10


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("GPT-Huge", {}, "gpt_model is one of GPT-Tiny, GPT-B.*not GPT-Huge"),
        ("GPT-B", {}, "holds GPT-Tiny, not GPT-B; give --gpt-model GPT-Tiny"),
        ("GPT-Tiny", dict(num_classes=1000), "trained with --num-classes 10, not 1000; give --num-classes 10"),
        ("GPT-Tiny", dict(vocab_size=16384), "trained with --codebook-size 64, not 16384; give --codebook-size 64"),
        ("GPT-Tiny", dict(weights="ema"), "holds no EMA weights"),
    ],
)
def test_bare_files_are_known_by_their_shapes(model, save, name, changes, sentence):
    with pytest.raises((UserError, ValueError), match=sentence):
        build_gpt(name, save(bare=model.state_dict()), **BUILD | changes)


def test_fsdp_exports(model, save):
    assert build_gpt("GPT-Tiny", save(bare=model.state_dict()), **BUILD, from_fsdp=True)
    prefixed = {f"_orig_mod.{name}": value for name, value in model.state_dict().items()}
    assert build_gpt("GPT-Tiny", save(bare=prefixed), **BUILD, from_fsdp=True)
    with pytest.raises(UserError, match="not a bare state dict"):
        build_gpt("GPT-Tiny", save(model=model.state_dict()), **BUILD, from_fsdp=True)


@pytest.mark.parametrize("place", ["pretrained_models/npp/c2i_B_256.pt", "catalogue/npp/c2i_B_256.pt"])
def test_published_files_are_known_by_their_place(model, tmp_path, monkeypatch, place):
    """A bare file does not say its image size; the catalogue does."""
    monkeypatch.setattr(catalogue, "FOLDER", tmp_path / "catalogue")
    config = catalogue.PUBLISHED["npp/c2i_B_256.pt"].config
    assert config == {"gpt_model": "GPT-B", "image_size": 256, "downsample_size": 16}
    monkeypatch.setitem(config, "gpt_model", "GPT-Tiny")
    monkeypatch.setitem(config, "image_size", 64)
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    torch.save(model.state_dict(), path)
    assert build_gpt("GPT-Tiny", path, **BUILD)[1].grid_known
    with pytest.raises(UserError, match=r"grids of 4x4 codes \(--image-size 64\), not 8x8"):
        build_gpt("GPT-Tiny", path, **BUILD | dict(image_size=128))
    monkeypatch.setitem(config, "gpt_model", "GPT-B")
    with pytest.raises(UserError, match="holds"):
        build_gpt("GPT-L", path, **BUILD)
    elsewhere = tmp_path / "c2i_B_256.pt"
    torch.save(model.state_dict(), elsewhere)
    assert not build_gpt("GPT-Tiny", elsewhere, **BUILD | dict(image_size=32))[1].grid_known


@pytest.mark.parametrize("contents", [dict(model=torch.zeros(3)), dict(model={0: torch.zeros(3)}), dict(model={})])
def test_files_without_weights(save, contents):
    with pytest.raises(UserError, match="holds no model weights"):
        build_gpt("GPT-Tiny", save(**contents), **BUILD)


def test_settings_of_another_kind_say_nothing(model, save):
    assert not build_gpt("GPT-Tiny", save(model=model.state_dict(), args=[1], config="?"), **BUILD)[1].grid_known


def test_files_that_do_not_fit(model, save, tmp_path):
    state = model.state_dict()
    state["unknown"] = state.pop("norm.weight")
    with pytest.raises(UserError, match="1 tensors are missing, such as norm.weight; 1 are unknown, such as unknown"):
        build_gpt("GPT-Tiny", save(model=state), **BUILD)
    with pytest.raises(UserError, match="there is no checkpoint"):
        build_gpt("GPT-Tiny", tmp_path / "nowhere.pt", **BUILD)
    (tmp_path / "cut.pt").write_bytes(save(model=model.state_dict()).read_bytes()[:1000])
    with pytest.raises(UserError, match="not a complete PyTorch checkpoint|not read, for safety"):
        build_gpt("GPT-Tiny", tmp_path / "cut.pt", **BUILD)


def test_a_model_of_an_unknown_size_is_described(save):
    state = {"tok_embeddings.weight": torch.zeros(64, 100), "layers.0.x": torch.zeros(1), "norm.weight": torch.zeros(1)}
    with pytest.raises(UserError, match="holds a model of 1 layers and width 100, not GPT-Tiny"):
        build_gpt("GPT-Tiny", save(bare=state), **BUILD)


def test_the_record_builds_the_model_and_flags_only_check(save):
    """Of the depth and width of a published size, with other heads; and settings without parameters come back."""
    args = ModelArgs(n_layer=4, n_head=2, dim=128, rope_base=500.0, norm_eps=1e-3, **SETTINGS)
    path = save(model=Transformer(args).state_dict(), config={"model": dataclasses.asdict(args)})
    loaded, info = build(GPTSettings(gpt_ckpt=str(path), image_size=64, downsample_size=16))
    assert loaded.args == args
    assert info.name == "a model of 4 layers, 2 heads and width 128"
    with pytest.raises(UserError, match="holds a model of 4 layers, 2 heads and width 128, not GPT-Tiny"):
        build_gpt("GPT-Tiny", path, **BUILD)


def test_without_flags_the_record_decides(model, save):
    config = {"model": dataclasses.asdict(model.args), "gpt_model": "GPT-Tiny", "image_size": 64, "downsample_size": 16}
    loaded, info = build(GPTSettings(gpt_ckpt=str(save(model=model.state_dict(), config=config))))
    assert loaded.args == model.args
    assert (info.name, info.image_size, info.downsample_size) == ("GPT-Tiny", 64, 16)


def test_a_recorded_setting_of_a_newer_version_is_not_dropped(model, save):
    config = {"model": dataclasses.asdict(model.args) | {"qk_norm": True}}
    with pytest.raises(UserError, match="was trained with qk_norm, which this version does not know"):
        build_gpt("GPT-Tiny", save(model=model.state_dict(), config=config), **BUILD)
