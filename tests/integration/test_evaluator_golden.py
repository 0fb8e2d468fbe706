"""The published evaluator's own values, on a full set of images too large to keep here.

NPP_GOLDEN names a folder with evaluator/{graph.pb, ref.npz, sample.npz, features.npz, expected.json}: a narrow graph,
2,200 and 2,100 images, and what OpenAI's code computed for them. Without it these tests are skipped; the same claims
are tested against TensorFlow and plain definitions in test_frozen_graph.py and test_evaluator_cli.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluations.c2i import evaluator
from evaluations.c2i.features import InceptionFeatures

pytestmark = pytest.mark.skipif("NPP_GOLDEN" not in os.environ, reason="NPP_GOLDEN names no folder")


def golden(name: str) -> Path:
    return Path(os.environ["NPP_GOLDEN"]) / "evaluator" / name


def test_features():
    network = InceptionFeatures(golden("graph.pb"), torch.device("cpu"))
    expected = np.load(golden("features.npz"))
    for name in ("ref", "sample"):
        features = network(torch.from_numpy(np.load(golden(f"{name}.npz"))["arr_0"][:16]))
        np.testing.assert_allclose(features.pool, expected[f"{name}_pool"], atol=2e-4, rtol=0)
        np.testing.assert_allclose(features.spatial, expected[f"{name}_spatial"], atol=2e-4, rtol=0)


@pytest.mark.timeout(1_800)
@pytest.mark.parametrize(("distances", "tolerance"), [("half", 0.01), ("exact", 0.0005)])
@pytest.mark.parametrize("backend", ["torch", "tensorflow"])
def test_numbers(backend, distances, tolerance, tmp_path):
    report = tmp_path / "report"
    arguments = [golden("ref.npz"), golden("sample.npz"), "--graph", golden("graph.pb")]
    arguments += ["--backend", backend, "--distances", distances, "--report", report]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # all cores
    subprocess.run([sys.executable, evaluator.__file__, *map(str, arguments)], env=environment, check=True)
    metrics = json.loads(report.with_name("report.json").read_text())["metrics"]
    expected = json.loads(golden("expected.json").read_text())
    assert metrics["fid"] == pytest.approx(expected["fid"], rel=1e-4)
    assert metrics["sfid"] == pytest.approx(expected["sfid"], rel=1e-4)
    assert metrics["inception_score"] == pytest.approx(expected["inception_score"], abs=1e-3)
    assert metrics["precision"] == pytest.approx(expected[f"precision_{distances}"], abs=tolerance)
    assert metrics["recall"] == pytest.approx(expected[f"recall_{distances}"], abs=tolerance)
