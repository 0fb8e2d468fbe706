"""FID, Inception Score, Precision and Recall against plain definitions in NumPy and SciPy."""

import numpy as np
import pytest
import torch

from evaluations.c2i import metrics
from evaluations.c2i.metrics import GaussianAccumulator, InceptionScoreAccumulator, frechet_distance, precision_recall
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
    monkeypatch.setattr(metrics, "HALF_BLOCK", block)
    monkeypatch.setattr(metrics, "BLOCK_ROWS", 32)
    real, generated = features(0, 300, 32), features(1, 240, 32, scale=0.9)
    result = precision_recall(torch.from_numpy(real), torch.from_numpy(generated), distances)
    expected = adm_definitions.precision_recall(real, generated, dtype)
    assert 0.2 < expected[0] < 1
    assert (result.precision, result.recall) == pytest.approx(expected, abs=0 if distances == "exact" else 0.005)
    assert not result.overflowed


def test_half_distances_round_every_result():
    real, generated = features(0, 64, 256), features(1, 50, 256)
    u, v = (metrics._Operand.of(torch.from_numpy(x), torch.float16) for x in (real, generated))
    ours = metrics._squared_distances(u.values @ v.values.T, u, v)
    expected = adm_definitions.squared_distances(real, generated, np.float16)
    assert ours.dtype == torch.float16
    np.testing.assert_allclose(ours.float(), expected.astype(np.float32), atol=2 * np.spacing(np.float16(64)))
    assert (ours.numpy() == expected).mean() > 0.98  # the order of summation may move a rounding


@pytest.mark.parametrize("block", [10_000, 70])
@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_distances_of_a_set_to_itself_come_once_each_with_their_own_roundings(dtype, block, monkeypatch):
    monkeypatch.setattr(metrics, "HALF_BLOCK", block)
    monkeypatch.setattr(metrics, "BLOCK_ROWS", 32)
    own = features(0, 200, 256)
    everything = torch.from_numpy(own)
    ours, times = torch.zeros(200, 200, dtype=torch.float64), torch.zeros(200, 200)
    for row, column, squared in (metrics.exact_blocks if dtype == np.float64 else metrics.HalfBlocks())(
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
    monkeypatch.setattr(metrics, "HALF_BLOCK", block)
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
