"""The end of a training step against PyTorch's own clipping, scaler and optimizer."""

import copy

import pytest
import torch
from torch import nn

from utils.engine.state import EMA, Trained
from utils.engine.step import apply_gradients


def trained(model: nn.Module) -> Trained:
    return Trained(model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("max_norm", [0, 0.5, 1e6])  # does not clip, clips, never reached
def test_updates_are_those_of_pytorch(max_norm, scaled):
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    ours, plain = trained(model), copy.deepcopy(model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1)
    scalers = [torch.amp.GradScaler("cpu", enabled=scaled) for _ in range(2)]
    for step in range(4):
        x = torch.randn(8, 6) * (torch.inf if step == 2 else 10 ** (step - 1))
        for net, scaler in zip((model, plain), scalers, strict=True):
            scaler.scale(net(x).square().mean()).backward()
        norm, skipped = apply_gradients(ours, scalers[0], max_norm)
        scalers[1].unscale_(optimizer)
        expected = nn.utils.clip_grad_norm_(plain.parameters(), max_norm or torch.inf)
        if step != 2:
            scalers[1].step(optimizer)
            torch.testing.assert_close(norm, expected)
        elif scaled:
            scalers[1].step(optimizer)
        scalers[1].update()
        optimizer.zero_grad()
        assert skipped == (step == 2)
        assert model.weight.grad is None
        torch.testing.assert_close(model.state_dict(), plain.state_dict())
    assert scalers[0].get_scale() == scalers[1].get_scale()
    assert ours.optimizer.state[model.weight]["step"] == 3


@pytest.mark.parametrize("scaled", [False, True])
def test_an_overflow_of_the_norm_alone_skips_the_step(scaled):
    model = nn.Linear(2, 2)
    before, part = copy.deepcopy(model.state_dict()), trained(model)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=4.0)
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    for parameter in model.parameters():
        parameter.grad.fill_(1e25)  # finite, its square is not
    norm, skipped = apply_gradients(part, scaler, 1.0)
    assert norm.isinf()
    assert skipped == 1
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert scaler.get_scale() == (2.0 if scaled else 1.0)


def test_averages_warm_up_so_that_short_trainings_do_not_keep_their_beginning():
    """The decay of update n is min(decay, (1 + n) / (10 + n)), as in TensorFlow's ExponentialMovingAverage."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = EMA(model, 0.5)
    expected = 0.0
    for n in range(12):
        nn.init.constant_(model.weight, float(n))
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
        assert ema.averages[0].item() == pytest.approx(expected)
    assert EMA(model, 0.9999).share_of_beginning == 1
    ema = EMA(model, 0.9999)
    ema.updates = 300
    assert ema.share_of_beginning < 1e-9
    with ema.in_place():
        assert model.weight.item() == 11.0
    assert model.weight.item() == 11.0
