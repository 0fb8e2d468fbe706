"""Packed linear layers: the same products, in float32 bit for bit the same in any batch, on any number of threads."""

import pytest
import torch
from torch import nn

from autoregressive.models.generate import CodeGenerator, Sampling
from autoregressive.models.gpt import FeedForward
from autoregressive.models.packed_linear import PackedFeedForward, PackedLinear, pack_linears
from tests.golden_gpt import golden_args, golden_figures, golden_model

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 192), (768, 768), (2048, 768), (1280, 1000)])
def test_a_row_does_not_depend_on_its_neighbours_or_on_threads(inputs, outputs):
    torch.manual_seed(0)
    linear, x = nn.Linear(inputs, outputs, bias=False), torch.randn(64, inputs)
    packed = PackedLinear(linear)
    together = packed(x)
    torch.testing.assert_close(together, linear(x))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in (1, 2, 7, 14, 16, 32, 64):
                assert torch.equal(packed(x[:rows]), together[:rows])
                assert torch.equal(packed(x[-rows:].unsqueeze(1)).squeeze(1), together[-rows:])
    finally:
        torch.set_num_threads(threads)


def test_a_row_of_the_feed_forward_does_not_depend_on_its_neighbours_or_on_threads():
    torch.manual_seed(0)
    plain = FeedForward(golden_args(dim=96))
    packed, x, threads = PackedFeedForward(plain), torch.randn(301, 96), torch.get_num_threads()
    together = packed(x)
    torch.testing.assert_close(together, plain(x))
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            for rows in (1, 2, 7, 100, 301):
                assert torch.equal(packed(x[-rows:]), together[-rows:])
    finally:
        torch.set_num_threads(threads)


def test_codes_are_the_golden_ones_and_equal_in_any_batch():
    figures, model = golden_figures(), golden_model()
    pack_linears(model)
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    generator = CodeGenerator(model, 3, 64, Sampling(2.0, sample_logits=False))
    labels, uniforms = torch.from_numpy(figures["cls"]), torch.rand(32, 64, dtype=torch.float64)
    assert generator(labels, uniforms[:3]).tolist() == figures["gen.cfg2.0.int-1"].tolist()
    labels = torch.arange(32) % 10
    sampling = Sampling(cfg_scale=2.0, cfg_interval=10)
    together = CodeGenerator(model, 32, 64, sampling)(labels, uniforms)
    for size in (1, 7):
        generator = CodeGenerator(model, size, 64, sampling)
        for start in range(0, 32 - size, size):
            part = slice(start, start + size)
            assert torch.equal(generator(labels[part], uniforms[part]), together[part])


def test_without_the_operators_layers_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    model = golden_model()
    pack_linears(model)
    assert any(isinstance(module, nn.Linear) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_precisions(dtype):
    model = golden_model().to(dtype)
    pack_linears(model)
    codes = CodeGenerator(model, 2, 64, Sampling(2.0))(torch.tensor([1, 2]), torch.rand(2, 64, dtype=torch.float64))
    assert codes.shape == (2, 64)


def test_a_bias_is_kept():
    """Of a conditioning of the user's own, for one."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 40))
    x = torch.randn(3, 24)
    expected = model(x)
    pack_linears(model)
    torch.testing.assert_close(model(x), expected)
