"""A few kills at random moments; tests/soak has many (docs/training.md has its figures)."""

import pytest

from tests.soak.extraction import extraction
from tests.soak.killing import soak
from tests.soak.sampling import sampling
from tests.soak.training import training


@pytest.mark.parametrize(("subject", "processes"), [(training, 1), (training, 2), (sampling, 1), (extraction, 1)])
def test_killed_and_started_again_it_ends_alike(subject, processes, tmp_path):
    (tmp_path / "inputs").mkdir()
    (tmp_path / "results").mkdir()
    figures = soak(subject(tmp_path / "inputs"), tmp_path / "results", kills=2, processes=processes)
    assert figures.kills == 2
