"""Temperature, top-k, top-p against golden figures; drawing by inverse CDF against the distribution it must have."""

import re

import numpy as np
import pytest
import torch

from autoregressive.models.filtering import draw_codes, filter_logits
from tests.golden_gpt import golden_figures

FIGURES = golden_figures()
CASES = [key for key in FIGURES if key.startswith("filter.k")]


@pytest.mark.parametrize("case", CASES)
def test_golden_probabilities(case):
    top_k, top_p, temperature = re.fullmatch(r"filter\.k(\d+)\.p([\d.]+)\.t([\d.]+)", case).groups()
    logits = torch.from_numpy(FIGURES["filter.in"])
    probabilities = filter_logits(logits, float(temperature), int(top_k), float(top_p)).softmax(-1)
    np.testing.assert_allclose(probabilities, FIGURES[case], atol=1e-6)


def test_top_k_keeps_ties_and_top_p_keeps_at_least_one():
    logits = torch.tensor([[3.0, 1.0, 1.0, 0.0]])
    assert filter_logits(logits, top_k=2).isfinite().tolist() == [[True, True, True, False]]
    assert filter_logits(logits, top_p=1e-9).isfinite().tolist() == [[True, False, False, False]]
    assert torch.equal(filter_logits(logits, top_k=9), logits)


def test_temperature_zero_is_the_likeliest_code():
    logits = torch.randn(50, 96)
    codes = draw_codes(filter_logits(logits, temperature=0.0), torch.rand(50, dtype=torch.float64))
    assert torch.equal(codes, logits.argmax(-1))


@pytest.mark.parametrize(("vocab", "count"), [(96, 200_000), (16384, 4_000)])
def test_every_code_is_drawn_as_often_as_its_probability_says(vocab, count):
    torch.manual_seed(0)
    logits = 3 * torch.randn(1, vocab)
    uniforms = (
        torch.arange(count, dtype=torch.float64) + 0.5
    ) / count  # no chance in it: counts are off by one at most
    rows = 2000
    codes = torch.cat([draw_codes(logits.expand(rows, -1), part) for part in uniforms.split(rows)])
    counts = codes.bincount(minlength=vocab)
    expected = logits[0].double().softmax(-1) * count
    assert (counts - expected).abs().max() < 1.1


def test_draws_are_distributed_as_those_of_multinomial():
    torch.manual_seed(0)
    logits = filter_logits(2 * torch.randn(1, 200), top_k=60).expand(100_000, -1)
    ours = draw_codes(logits, torch.rand(100_000, dtype=torch.float64)).bincount(minlength=200).double()
    theirs = torch.multinomial(logits[0].softmax(-1), 100_000, replacement=True).bincount(minlength=200).double()
    frequent = ours + theirs > 10
    statistic = ((ours - theirs) ** 2 / (ours + theirs).clamp(min=1))[frequent].sum()  # chi-square of two samples
    degrees = frequent.sum() - 1
    assert abs(statistic - degrees) < 5 * (2 * degrees) ** 0.5
    assert ours[logits[0].isinf()].sum() == 0


@pytest.mark.parametrize("uniform", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
def test_codes_without_probability_are_never_drawn(uniform):
    logits = torch.full((4, 16384), -torch.inf)
    for row, possible in enumerate(([0], [16383], [5, 9000], [16382])):
        logits[row, possible] = 0.0
    codes = draw_codes(logits, torch.full((4,), uniform, dtype=torch.float64))
    assert logits.gather(1, codes.unsqueeze(1)).isfinite().all()


def test_probabilities_far_below_float32_resolution_still_sum_exactly():
    """A float32 running sum over 16,384 codes drifts; the integer sum reaches its total whatever the order."""
    logits = torch.zeros(1, 16384)
    codes = torch.arange(0, 16384, 16)
    assert torch.equal(draw_codes(logits.expand(len(codes), -1), (codes.double() + 0.01) / 16384), codes)


def test_logits_that_are_not_finite_do_not_become_an_index_out_of_range():
    codes = draw_codes(torch.full((3, 96), torch.nan), torch.rand(3, dtype=torch.float64))
    assert ((codes >= 0) & (codes < 96)).all()
