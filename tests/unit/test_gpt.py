"""The transformer and next-patch prediction against golden figures and against their definitions."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from autoregressive.models import losses
from autoregressive.models.conditioning import LabelEmbedder
from autoregressive.models.gpt import DropPath, GPT_models, ModelArgs, Transformer, causal_attention
from autoregressive.models.losses import patch_loss, plain_patch_loss
from autoregressive.models.patch import check_patch_side, patch_codes
from autoregressive.train.compilation import compile_model
from tests.golden_gpt import GOLDEN, golden_args, golden_figures, golden_model

FIGURES = golden_figures()
CODES, LABELS = torch.from_numpy(FIGURES["idx"]), torch.from_numpy(FIGURES["cls"])


@pytest.mark.parametrize("side", [1, 2, 4, 8])
@pytest.mark.parametrize("train", [False, True])
def test_logits_and_loss(side, train):
    model = golden_model(class_dropout_prob=1e-12).train(train)
    before = {name: value.clone() for name, value in model.named_buffers()}
    logits, _ = model(CODES, LABELS, patch_side=side)
    expected = FIGURES[f"p{side}.logits"]
    expected = expected.reshape(3, 64 // side**2, -1, 96)[:, :, 0] if side > 1 else expected
    np.testing.assert_allclose(logits.detach(), expected, atol=1e-5)
    _, loss = model(CODES, LABELS, CODES, patch_side=side)
    assert loss.item() == pytest.approx(FIGURES[f"p{side}.loss"].item(), abs=1e-5)
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())


@pytest.mark.parametrize("side", [1, 2, 4, 8])
@pytest.mark.parametrize("chunk", [2**23, 96 * 7])
def test_gradient_norms(side, chunk, monkeypatch):
    monkeypatch.setitem(losses.CHUNK_ELEMENTS, "cpu", chunk)
    model = golden_model(class_dropout_prob=1e-12)
    model(CODES, LABELS, CODES, patch_side=side)[1].backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    expected = dict(zip(FIGURES["param_names"], FIGURES[f"p{side}.gradnorm"], strict=True))
    assert norms.keys() == expected.keys()
    for name, value in expected.items():
        assert norms[name] == pytest.approx(value, rel=1e-4, abs=1e-9), name


@pytest.mark.parametrize("side", [1, 2])
def test_activation_checkpointing_changes_nothing(side):
    plain, recomputing = golden_model().eval(), golden_model(activation_checkpointing=True).eval()
    for model in (plain, recomputing):
        model(CODES, LABELS, CODES, patch_side=side)[1].backward()
    for a, b in zip(plain.parameters(), recomputing.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("name", sorted(json.loads((GOLDEN / "gpt_manifest.json").read_text())))
def test_published_sizes(name):
    manifest = json.loads((GOLDEN / "gpt_manifest.json").read_text())[name]
    with torch.device("meta"):
        model = GPT_models[name]()
    state = model.state_dict()
    assert sum(p.numel() for p in model.parameters()) == manifest["params"]
    assert len(state) == manifest["n_keys"]
    outside_other_layers = [n for n in state if not n.startswith("layers.") or n.startswith("layers.0.")]
    assert {n: list(state[n].shape) for n in outside_other_layers} == manifest["shapes"]


def test_patches_are_raster_ordered_blocks():
    codes = torch.arange(24).view(1, 24)  # 4 rows of 6
    assert patch_codes(codes, (4, 6), 2)[0].tolist()[:2] == [[0, 1, 6, 7], [2, 3, 8, 9]]
    assert patch_codes(codes, (4, 6), 1).shape == (1, 24, 1)


@pytest.mark.parametrize("side", [0, -1, 3, 8])
def test_patch_sides_that_do_not_tile(side):
    with pytest.raises(ValueError, match="do not tile a grid of 28x20 codes"):
        check_patch_side((28, 20), side)


def test_any_grid_trains_at_every_side_that_tiles_it():
    model = Transformer(golden_args(block_size=24, grid=(4, 6))).eval()
    torch.nn.init.normal_(model.output.weight)
    codes, labels = torch.randint(96, (2, 24)), torch.tensor([1, 2])
    assert model(codes, labels, patch_side=2)[0].shape == (2, 6, 96)
    with pytest.raises(ValueError, match="do not tile"):
        model(codes, labels, patch_side=4)
    with pytest.raises(ValueError, match="expected 24 codes"):
        model(codes[:, 1:], labels)
    with pytest.raises(ValueError, match="does not hold"):
        ModelArgs(block_size=24, grid=(5, 5))


@pytest.mark.parametrize("side", [1, 2])
def test_a_position_never_sees_its_own_patch_or_later_ones(side):
    model = golden_model().eval()
    changed = CODES.clone()
    changed.view(-1, 8, 8)[:, 4:] = (changed.view(-1, 8, 8)[:, 4:] + 1) % 96  # the lower half of every image
    first_changed = 32 // side**2
    a, b = (model(codes, LABELS, patch_side=side)[0] for codes in (CODES, changed))
    torch.testing.assert_close(a[:, : first_changed + 1], b[:, : first_changed + 1])
    assert not torch.allclose(a[:, first_changed + 1 :], b[:, first_changed + 1 :])


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("chunk", [2**23, 50 * 3])
def test_patch_loss_is_cross_entropy_of_repeated_logits(k, chunk, monkeypatch):
    monkeypatch.setitem(losses.CHUNK_ELEMENTS, "cpu", chunk)
    torch.manual_seed(0)
    hidden = torch.randn(2, 5, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    targets = torch.randint(50, (2, 5, k))
    targets[0, 0] = 7  # a code that stands several times in one patch
    loss = patch_loss(hidden, weight, targets)
    repeated = (hidden @ weight.T).repeat_interleave(k, 1)
    expected = F.cross_entropy(repeated.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(plain_patch_loss(hidden, weight, targets), expected)
    got = torch.autograd.grad(loss * 3, (hidden, weight))
    for a, b in zip(got, torch.autograd.grad(expected * 3, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(patch_loss(hidden, weight, targets), expected)


def test_patch_loss_under_autocast_is_close_and_finite():
    torch.manual_seed(0)
    model = golden_model()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(CODES, LABELS, CODES, patch_side=2)[1]
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(FIGURES["p2.loss"].item(), rel=2e-2)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_patch_loss_in_fp16_keeps_small_gradients():
    """Of 4,096 rows and 512 codes, with the loss scaled as a fresh GradScaler does."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 4096, 16), torch.randn(512, 16, requires_grad=True)
    targets = torch.randint(8, (1, 4096, 1))  # 504 codes are never a target: their gradients are small sums
    (expected,) = torch.autograd.grad(patch_loss(hidden, weight, targets), weight)
    with torch.autocast("cpu", torch.float16):
        loss = patch_loss(hidden, weight, targets)
    (scaled,) = torch.autograd.grad(loss * 65536, weight)
    assert scaled.dtype == torch.float32
    for rows in (slice(0, 8), slice(8, None)):
        assert (scaled / 65536 - expected)[rows].norm() < 0.01 * expected[rows].norm()


@pytest.mark.parametrize(("side", "backend"), [(1, "aot_eager"), (2, "inductor"), (2, "as in training")])
def test_compiled_equals_eager(side, backend):
    model = golden_model().eval()
    model.layers = model.layers[:1]
    expected = model(CODES, LABELS, CODES, patch_side=side)[1]
    expected_grads = torch.autograd.grad(expected, list(model.parameters()))
    if backend == "as in training":
        compile_model(compiled := model)
    else:
        compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    loss = compiled(CODES, LABELS, CODES, patch_side=side)[1]
    torch.testing.assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(loss, list(model.parameters())), expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_attention_has_the_precision_of_its_inputs(dtype):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 8, 16, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    out = causal_attention(q.to(dtype), k.to(dtype), v.to(dtype), 0.0)
    assert out.dtype == dtype
    assert (out - expected).abs().max() < 10 * torch.finfo(dtype).eps


def test_label_dropout_uses_the_null_class():
    model = golden_model(class_dropout_prob=1.0).train()
    null = torch.full_like(LABELS, 10)
    torch.testing.assert_close(model(CODES, LABELS)[0], model.eval()(CODES, null)[0])


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    torch.manual_seed(0)
    out = DropPath(0.25)(torch.ones(4000, 2, 3))
    torch.testing.assert_close(out.unique(), torch.tensor([0.0, 4 / 3]))
    assert out.mean().item() == pytest.approx(1.0, abs=0.05)
    assert (out.flatten(1).std(1) == 0).all()


@pytest.mark.parametrize("settings", [dict(model_type="t2i"), dict(cls_token_num=2), dict(n_head=5), dict(n_kv_head=3)])
def test_unusable_settings_are_refused(settings):
    with pytest.raises(ValueError):
        Transformer(golden_args(**settings))


def test_a_conditioning_of_another_length_than_the_settings_say_is_refused():
    class Two(LabelEmbedder):
        def forward(self, cond, dropped=None):
            return super().forward(cond, dropped).expand(-1, 2, -1)

    with pytest.raises(ValueError, match="gives 2 vectors per image, cls_token_num is 1"):
        Transformer(golden_args(), conditioning=Two)(CODES, LABELS)
