"""Temperature, top-k, top-p against golden figures; both ways to draw against the distribution they must have."""

import itertools
import re

import numpy as np
import pytest
import torch

from autoregressive.models.sampling import draw_codes, draw_gumbel, filter_logits, gumbel_noise, philox
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


@pytest.mark.parametrize("draw", [draw_codes, draw_gumbel])
@pytest.mark.parametrize(
    "filters",
    [
        dict(zip(("temperature", "top_k", "top_p"), values, strict=True))
        for values in itertools.product((1.0, 0.7, 1.5), (0, 60), (1.0, 0.9))
    ],
)
def test_draws_are_distributed_as_those_of_multinomial(draw, filters):
    torch.manual_seed(0)
    conditional, unconditional = 2 * torch.randn(2, 1, 200)
    guided = unconditional + (conditional - unconditional) * 1.5
    logits = filter_logits(guided, **filters).expand(100_000, -1)
    ours = draw(logits, torch.rand(100_000, dtype=torch.float64)).bincount(minlength=200).double()
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


def test_philox_gives_the_published_words():
    """The test vectors that its authors publish for philox4x32 with 10 rounds; the upper counters here are 0."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [
        word.item() for word in philox(torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64))
    ] == words


def test_noise_is_gumbels_whatever_is_beside_it():
    uniforms = torch.rand(300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise, threads = gumbel_noise(uniforms, 1001), torch.get_num_threads()
    ordered = torch.exp(-torch.exp(-noise.double())).flatten().sort().values  # uniform in [0, 1]
    count = len(ordered)
    distance = (ordered - (torch.arange(count) + 0.5) / count).abs().max()
    assert distance < 1.6 / count**0.5  # Kolmogorov-Smirnov, about 1 in 80
    assert noise[:, :500].flatten().dot(noise[:, 500:1000].flatten()) / count * 2 == pytest.approx(0.5772**2, abs=0.02)
    try:
        for threads_now in (1, 2, 3):
            torch.set_num_threads(threads_now)
            for rows in (1, 2, 7, 100):
                assert torch.equal(gumbel_noise(uniforms[-rows:], 1001), noise[-rows:])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(gumbel_noise(uniforms, 96), noise[:, :96])


def test_gumbel_draws_agree_where_distributions_do():
    """What windows of codes live from: two distributions that differ in a few codes hardly ever draw differently."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(20_000, 200)
    other = logits.clone()
    other[:, 0] += 1  # moves the borders of the codes after it
    uniforms = torch.rand(20_000, dtype=torch.float64)
    differs = [(draw(logits, uniforms) != draw(other, uniforms)).double().mean() for draw in (draw_gumbel, draw_codes)]
    variation = (logits.softmax(-1) - other.softmax(-1)).abs().sum(1).mean() / 2  # no two draws can differ less often
    assert differs[0] < 2 * variation
    assert differs[0] < differs[1] / 3


def test_noise_is_drawn_from_as_uniform_numbers_are():
    logits, uniforms = torch.randn(50, 96), torch.rand(50, dtype=torch.float64)
    assert torch.equal(draw_gumbel(logits, gumbel_noise(uniforms, 96)), draw_gumbel(logits, uniforms))
    filtered = filter_logits(logits, top_k=1)
    assert torch.equal(draw_gumbel(filtered, uniforms), logits.argmax(-1))
