"""FID, Inception Score, KID, Precision, Recall, Density and Coverage against plain definitions in NumPy and SciPy."""

import numpy as np
import pytest
import torch

from evaluations.c2i import metrics, neighbours
from evaluations.c2i.metrics import (
    GaussianAccumulator,
    InceptionScoreAccumulator,
    frechet_distance,
    kernel_distance,
    kid_subsets,
)
from evaluations.c2i.neighbours import density_coverage, precision_recall
from tests import adm_definitions


def features(seed: int, count: int, width: int, scale: float = 1.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(width, width)) / np.sqrt(width)
    return (np.maximum(random.normal(size=(count, width)) @ mixing, -0.3) * scale + 0.4).astype(np.float32)


def gaussian(values: np.ndarray, batch: int = 37) -> metrics.Gaussian:
    accumulator = GaussianAccumulator()
    for start in range(0, len(values), batch):
        accumulator.add(torch.from_numpy(values[start : start + batch]))
    return accumulator.finish()


def test_statistics_accumulate_to_mean_and_covariance():
    values = features(0, 500, 24)
    result = gaussian(values)
    assert result.count == 500
    assert result.mean.dtype == result.covariance.dtype == torch.float64
    np.testing.assert_allclose(result.mean, values.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(result.covariance, np.cov(values.astype(np.float64), rowvar=False), atol=1e-13)


def test_statistics_keep_their_digits_far_from_zero():
    values = features(0, 400, 8).astype(np.float64) + 1e6
    np.testing.assert_allclose(gaussian(values).covariance, np.cov(values, rowvar=False), rtol=1e-7)


def test_statistics_need_two_features():
    with pytest.raises(ValueError, match="at least two"):
        gaussian(features(0, 1, 4))


@pytest.mark.parametrize("width", [3, 64, 200])
def test_frechet_distance_equals_the_matrix_square_root(width):
    first, second = features(0, 3 * width + 20, width), features(1, 2 * width + 20, width, scale=1.2)
    distance, singular = frechet_distance(gaussian(first), gaussian(second))
    assert distance == pytest.approx(adm_definitions.frechet(first, second), rel=1e-6)
    assert not singular


def test_frechet_distance_of_equal_sets_is_zero():
    same = gaussian(features(0, 300, 40))
    assert frechet_distance(same, same)[0] == pytest.approx(0, abs=1e-9)


def test_frechet_distance_reports_and_survives_singular_covariances():
    few, many = features(0, 50, 100), features(1, 400, 100, scale=1.3)
    for first, second in ((few, many), (many, few), (few, features(2, 30, 100))):
        distance, singular = frechet_distance(gaussian(first), gaussian(second))
        assert singular
        assert distance == pytest.approx(adm_definitions.frechet_any_rank(first, second), rel=1e-6)


def test_frechet_distance_with_constant_features():
    first, second = features(0, 200, 10), features(1, 200, 10)
    first[:, 4] = second[:, 4] = 0.5
    distance, singular = frechet_distance(gaussian(first), gaussian(second))
    assert singular
    assert distance == pytest.approx(adm_definitions.frechet_any_rank(first, second), rel=1e-6)


def score(logits: np.ndarray, batch: int, split: int = 5_000) -> float:
    accumulator = InceptionScoreAccumulator(split)
    for start in range(0, len(logits), batch):
        accumulator.add(torch.from_numpy(logits[start : start + batch]))
    return accumulator.finish()


@pytest.mark.parametrize("count", [300, 250, 99, 7])  # whole splits, a smaller last one, less than one
@pytest.mark.parametrize("batch", [10, 64, 1_000])
def test_inception_score_equals_its_definition_in_splits(count, batch):
    logits = np.random.default_rng(0).normal(0, 2, (count, 20)).astype(np.float32)
    probabilities = torch.from_numpy(logits).double().softmax(1).numpy()
    expected = adm_definitions.inception_score(probabilities, split=100)
    assert score(logits, batch, split=100) == pytest.approx(expected, rel=1e-12)


def test_inception_score_survives_probabilities_that_underflow():
    logits = np.full((40, 10), -2_000, np.float32)
    logits[np.arange(40), np.arange(40) % 10] = 2_000
    assert score(logits, 8) == pytest.approx(10)
    logits[:, 3] = -np.float32(1e30)  # never predicted: its marginal is zero
    assert np.isfinite(score(logits, 8))


@pytest.mark.parametrize(("distances", "dtype"), [("exact", np.float64), ("half", np.float16)])
@pytest.mark.parametrize("block", [10_000, 70])
def test_precision_and_recall_equal_their_definition(distances, dtype, block, monkeypatch):
    monkeypatch.setattr(neighbours, "HALF_BLOCK", block)
    monkeypatch.setattr(neighbours, "BLOCK_ROWS", 32)
    real, generated = features(0, 300, 32), features(1, 240, 32, scale=0.9)
    result = precision_recall(torch.from_numpy(real), torch.from_numpy(generated), distances)
    expected = adm_definitions.precision_recall(real, generated, dtype)
    assert 0.2 < expected[0] < 1
    assert (result.precision, result.recall) == pytest.approx(expected, abs=0 if distances == "exact" else 0.005)
    assert not result.overflowed


def test_half_distances_round_every_result():
    real, generated = features(0, 64, 256), features(1, 50, 256)
    u, v = (neighbours._Operand.of(torch.from_numpy(x), torch.float16) for x in (real, generated))
    ours = neighbours._squared_distances(u.values @ v.values.T, u, v)
    expected = adm_definitions.squared_distances(real, generated, np.float16)
    assert ours.dtype == torch.float16
    np.testing.assert_allclose(ours.float(), expected.astype(np.float32), atol=2 * np.spacing(np.float16(64)))
    assert (ours.numpy() == expected).mean() > 0.98  # the order of summation may move a rounding


@pytest.mark.parametrize("block", [10_000, 70])
@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_distances_of_a_set_to_itself_come_once_each_with_their_own_roundings(dtype, block, monkeypatch):
    monkeypatch.setattr(neighbours, "HALF_BLOCK", block)
    monkeypatch.setattr(neighbours, "BLOCK_ROWS", 32)
    own = features(0, 200, 256)
    everything = torch.from_numpy(own)
    ours, times = torch.zeros(200, 200, dtype=torch.float64), torch.zeros(200, 200)
    for row, column, squared in (neighbours.exact_blocks if dtype == np.float64 else neighbours.HalfBlocks())(
        everything, everything
    ):
        ours[row, column], times[row, column] = squared.double(), times[row, column] + 1
    assert (times == 1).all()
    expected = adm_definitions.squared_distances(own, own, dtype).astype(np.float64)
    if dtype == np.float64:
        np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9)
    else:
        for half in (np.triu_indices(200), np.tril_indices(200)):  # above and below the diagonal
            assert (ours.numpy()[half] == expected[half]).mean() > 0.98


@pytest.mark.parametrize("block", [10_000, 50])
def test_an_overflowing_half_switches_its_block_to_float32(block, monkeypatch):
    monkeypatch.setattr(neighbours, "HALF_BLOCK", block)
    real, generated = features(0, 120, 32), features(1, 100, 32)
    real[:40] *= 300  # squared norms beyond 65,504
    result = precision_recall(torch.from_numpy(real), torch.from_numpy(generated))
    assert result.overflowed
    assert np.isfinite([result.precision, result.recall]).all()
    if block == 10_000:
        assert (result.precision, result.recall) == pytest.approx(
            adm_definitions.precision_recall(real, generated, np.float32), abs=0.01
        )


def test_identical_sets_have_full_precision_and_recall():
    same = torch.from_numpy(features(0, 60, 16))
    for distances in ("half", "exact"):
        result = precision_recall(same, same, distances)
        assert (result.precision, result.recall) == (1.0, 1.0)


@pytest.mark.parametrize("rows", [1_024, 7])
def test_kid_equals_its_definition(rows, monkeypatch):
    monkeypatch.setattr(metrics, "KERNEL_ROWS", rows)
    real, generated = features(0, 90, 32), features(1, 70, 32, scale=1.1)
    mean, deviation = kernel_distance(torch.from_numpy(real), torch.from_numpy(generated), size=40, subsets=6)
    subsets = [(first.numpy(), second.numpy()) for first, second in kid_subsets(90, 70, 40, 6)]
    expected = [adm_definitions.squared_mmd(real[first], generated[second]) for first, second in subsets]
    assert (mean, deviation) == pytest.approx((np.mean(expected), np.std(expected)), rel=1e-9)


def test_kid_by_hand():
    """In one dimension: the kernels (xy + 1)³ are 1 and 8 within {0, 1}, and 27 and 1 between {1} or {0} and {2}."""
    real, generated = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [2.0]])
    within_real, within_generated, between = 1, 5**3, (1 + 27) / 2
    assert kernel_distance(real, generated, size=2, subsets=3) == (within_real + within_generated - 2 * between, 0)


def test_kid_is_zero_on_average_for_equal_distributions_whatever_the_subset_size():
    same, again = (torch.from_numpy(features(seed, 2_000, 16)) for seed in (0, 1))
    for size in (10, 100):
        mean, deviation = kernel_distance(same, again, size, subsets=400)
        assert abs(mean) < 4 * deviation / np.sqrt(400)


def test_kid_subsets_are_the_same_every_time_and_hold_no_image_twice():
    first, again = (list(kid_subsets(50, 40, 30, 4)) for _ in range(2))
    for (real, generated), repeated in zip(first, again, strict=True):
        assert torch.equal(real, repeated[0])
        assert torch.equal(generated, repeated[1])
        assert len(real.unique()) == len(generated.unique()) == 30
        assert real.max() < 50
        assert generated.max() < 40
    assert not torch.equal(first[0][0], first[1][0])


@pytest.mark.parametrize("block", [10_000, 70])
def test_density_and_coverage_equal_their_definition(block, monkeypatch):
    monkeypatch.setattr(neighbours, "HALF_BLOCK", block)
    monkeypatch.setattr(neighbours, "BLOCK_ROWS", 32)
    real, generated = features(0, 300, 8), features(1, 240, 8, scale=0.8)
    expected = adm_definitions.density_coverage(real, generated)
    assert 0.3 < expected[1] < 0.99
    assert expected[0] > 1
    ours = density_coverage(torch.from_numpy(real), torch.from_numpy(generated))
    assert ours == pytest.approx(expected, abs=1e-12)


def test_density_and_coverage_by_hand():
    """On a line with k = 1: balls around 0, 1 and 10 of radius 1, 1 and 9."""
    real = torch.tensor([[0.0], [1.0], [10.0]])
    generated = torch.tensor([[0.5], [0.25], [12.0], [40.0]])  # in two balls, two, one and none
    assert density_coverage(real, generated, neighbours=1) == (5 / 4, 1)
    assert density_coverage(real, generated[2:], neighbours=1) == (1 / 2, 1 / 3)
    assert density_coverage(real, torch.tensor([[-1.0]]), neighbours=1) == (0, 0)  # on the surface is outside


def test_identical_sets_have_density_and_coverage_one():
    same = torch.from_numpy(features(0, 60, 16))
    assert density_coverage(same, same) == (1, 1)
