"""The transformer and its loss on a device: golden figures, and the fast loss against its definition."""

import numpy as np
import pytest
import torch

from autoregressive.models import losses
from autoregressive.models.losses import patch_loss, plain_patch_loss
from tests.golden_gpt import golden_figures, golden_model
from tests.gpu import COMPILED

FIGURES = golden_figures()


@pytest.mark.parametrize("side", [1, 2, 4, 8])
def test_golden_logits_losses_and_gradients(device, side):
    codes, labels = (torch.from_numpy(FIGURES[name]).to(device) for name in ("idx", "cls"))
    model = golden_model(class_dropout_prob=1e-12).to(device)
    logits, _ = model(codes, labels, patch_side=side)
    expected = FIGURES[f"p{side}.logits"]
    expected = expected.reshape(3, 64 // side**2, -1, 96)[:, :, 0] if side > 1 else expected
    np.testing.assert_allclose(logits.detach().cpu(), expected, atol=5e-5)
    _, loss = model(codes, labels, codes, patch_side=side)
    loss.backward()
    assert loss.item() == pytest.approx(FIGURES[f"p{side}.loss"].item(), abs=2e-5)
    norms = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    expected = dict(zip(FIGURES["param_names"].tolist(), FIGURES[f"p{side}.gradnorm"].tolist(), strict=True))
    assert norms == pytest.approx(expected, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("chunks", [3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-4), (torch.bfloat16, 0.02), (torch.float16, 0.01)])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=COMPILED)])
def test_gradients_of_the_fast_loss_are_those_of_the_plain_one(device, monkeypatch, compiled, dtype, tolerance, chunks):
    """With the loss scaled as a fresh GradScaler does, which in float16 keeps small gradients."""
    rows, vocab = 2 * 48, 1024
    monkeypatch.setitem(losses.CHUNK_ELEMENTS, device.type, rows * vocab // chunks)
    torch.manual_seed(0)
    hidden = torch.randn(2, 48, 64).to(device).requires_grad_()
    weight = (torch.randn(vocab, 64) / 4).to(device).requires_grad_()
    targets = torch.randint(vocab, (2, 48, 4)).to(device)
    exact = plain_patch_loss(hidden.double(), weight.double(), targets)
    expected = torch.autograd.grad(exact, (hidden, weight))
    fast = torch.compile(patch_loss, dynamic=False) if compiled else patch_loss
    with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        loss = fast(hidden, weight, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=tolerance)
    for found, wanted in zip(torch.autograd.grad(loss * 65536, (hidden, weight)), expected, strict=True):
        assert (found.double() / 65536 - wanted).norm() < tolerance * wanted.norm()
