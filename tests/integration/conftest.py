"""What several files of tests extract: images, a tokenizer, and a place for codes."""

import pytest

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
