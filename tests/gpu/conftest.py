"""The same tests on a GPU (NPP_TEST_GPU=1) and, to see that they run, on the CPU (NPP_TEST_GPU=cpu); else skipped.

With NPP_TEST_ROWS each outcome is appended to the file of that name as soon as it is known (benchmarks/gpu_check.py).
"""

import json
import os
from pathlib import Path

import pytest
import torch

MODE = os.environ.get("NPP_TEST_GPU", "")


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if MODE not in ("1", "cpu"):
                item.add_marker(pytest.mark.skip("NPP_TEST_GPU is neither 1 nor cpu"))
            elif MODE == "1" and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip("PyTorch sees no GPU"))
            elif MODE == "cpu" and item.get_closest_marker("on_gpu_alone"):
                item.add_marker(pytest.mark.skip("on a GPU alone"))


def pytest_runtest_logreport(report):
    path, final = os.environ.get("NPP_TEST_ROWS"), report.when == "call" or report.outcome != "passed"
    if path and final:
        row = {"what": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        lines = [line for line in str(report.longrepr or "").splitlines() if line.strip()]
        append(path, row | ({"why": lines[-1][:300]} if lines else {}))


def append(path: str, row: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", 0) if MODE == "1" else torch.device("cpu")


@pytest.fixture
def figure():
    """Keeps a number that a test has measured beside the outcomes: `figure(name, value, unit)`."""

    def keep(name: str, value: float, unit: str) -> None:
        row = dict.fromkeys(("published", "floor", "ratio", "of_floor"))
        if path := os.environ.get("NPP_TEST_ROWS"):
            append(path, {"what": name, "here": value, "unit": unit, "more": {}} | row)

    return keep


@pytest.fixture(autouse=True)
def settings_of_pytorch():
    """Programs set these for their process; one test must not decide them for the next."""
    precision = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32 = before
    torch.set_float32_matmul_precision(precision)
