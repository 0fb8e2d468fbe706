"""Tests of what differs on a GPU. Compiled paths are slow to start: `-m "not slow"` leaves them out."""

import pytest

ON_GPU_ALONE = pytest.mark.on_gpu_alone
COMPILED = (ON_GPU_ALONE, pytest.mark.slow)
