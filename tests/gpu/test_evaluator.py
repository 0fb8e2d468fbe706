"""The evaluator on a device: features against golden ones, metrics against the CPU's."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluations.c2i.features import InceptionFeatures
from evaluations.c2i.metrics import Gaussian, GaussianAccumulator, frechet_distance, kernel_distance
from evaluations.c2i.neighbours import density_coverage, precision_recall
from tests.inception_graph import InceptionGraph


@pytest.fixture(scope="module")
def features():
    random = np.random.default_rng(0)
    return [torch.from_numpy(random.random((300, 64), np.float32) * scale) for scale in (1.0, 1.05)]


@pytest.mark.skipif("NPP_GOLDEN" not in os.environ, reason="NPP_GOLDEN names no folder")
@pytest.mark.parametrize("name", ["ref", "sample"])
def test_golden_features(device, name):
    golden = Path(os.environ["NPP_GOLDEN"]) / "evaluator"
    images = torch.from_numpy(np.load(golden / f"{name}.npz")["arr_0"][:16])
    found = InceptionFeatures(golden / "graph.pb", device)(images)
    expected = np.load(golden / "features.npz")
    np.testing.assert_allclose(found.pool.cpu(), expected[f"{name}_pool"], atol=2e-4, rtol=0)
    np.testing.assert_allclose(found.spatial.cpu(), expected[f"{name}_spatial"], atol=2e-4, rtol=0)


def test_features_are_those_of_the_cpu(device, tmp_path):
    graph = InceptionGraph(narrower=8).save(tmp_path / "graph.pb")
    images = torch.randint(0, 256, (3, 48, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = InceptionFeatures(graph, torch.device("cpu"))(images)
    for found, wanted in zip(InceptionFeatures(graph, device)(images), expected, strict=True):
        torch.testing.assert_close(found.cpu(), wanted, atol=2e-4, rtol=1e-3)
    halves = InceptionFeatures(graph, device, precision="bf16")(images)
    assert (halves.pool.cpu() - expected.pool).norm() < 0.05 * expected.pool.norm()


def test_metrics_are_those_of_the_cpu(device, features):
    there = [part.to(device) for part in features]
    for distances, tolerance in (("exact", 0.0), ("half", 0.02)):
        found, wanted = (precision_recall(*parts, distances) for parts in (there, features))
        assert found.precision == pytest.approx(wanted.precision, abs=tolerance)
        assert found.recall == pytest.approx(wanted.recall, abs=tolerance)
    assert density_coverage(*there) == pytest.approx(density_coverage(*features), abs=1e-9)
    assert kernel_distance(*there, 100, 10) == pytest.approx(kernel_distance(*features, 100, 10), rel=1e-9, abs=1e-12)
    assert frechet(there) == pytest.approx(frechet(features), rel=1e-9)


def frechet(parts: list[torch.Tensor]) -> float:
    gaussians: list[Gaussian] = []
    for part in parts:
        accumulator = GaussianAccumulator()
        for batch in part.split(64):
            accumulator.add(batch)
        gaussians.append(accumulator.finish())
    return frechet_distance(*gaussians)[0]
