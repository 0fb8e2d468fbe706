"""What several files of tests extract, images, a tokenizer and a place for codes; and what they evaluate."""

from pathlib import Path

import numpy as np
import pytest

from tests.tensorflow_reference import synthetic_images
from tests.tiny_extraction import make_images, make_tokenizer


@pytest.fixture
def data(tmp_path):
    return make_images(tmp_path / "images")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny.pt")


@pytest.fixture
def codes(tmp_path):
    return tmp_path / "codes"


@pytest.fixture
def sets(tmp_path) -> tuple[Path, Path]:
    """A reference of 60 and a labelled sample of 45 images, 16 x 16."""
    generated = synthetic_images(1, 45, 16, 16, contrast=0.7)
    labels = generated.astype(np.float64).mean((1, 2)).argmax(1)
    labels[:9] = (labels[:9] + 1) % 3  # nine are not what was asked for
    np.savez(tmp_path / "ref.npz", arr_0=synthetic_images(0, 60, 16, 16))
    np.savez(tmp_path / "sample.npz", arr_0=generated, labels=labels)
    return tmp_path / "ref.npz", tmp_path / "sample.npz"
