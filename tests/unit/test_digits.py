"""The embedded data set: complete, stratified, always the same, and refused in a sentence."""

import sys

import numpy as np
import pytest
from PIL import Image

from dataset.digits import write_digits
from dataset.image_folder import list_image_folder
from utils.program import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "data"
    assert write_digits(folder) == {"train": 1442, "test": 355}
    return folder


def test_it_is_an_ordinary_image_folder_with_the_held_out_part_stratified(folder):
    parts = {part: list_image_folder(folder / part) for part in ("train", "test")}
    assert parts["train"].class_names == parts["test"].class_names == [f"digit_{digit}" for digit in range(10)]
    counts = {part: np.bincount(images.labels) for part, images in parts.items()}
    shares = counts["test"] / (counts["train"] + counts["test"])
    assert np.all((shares > 0.19) & (shares <= 0.2))
    names = [{path.split("/")[1] for path in images.paths} for images in parts.values()]
    assert not names[0] & names[1]


def test_images_are_rgb_with_room_for_ten_crops(folder):
    image = Image.open(next((folder / "train" / "digit_3").iterdir()))
    assert (image.mode, image.size) == ("RGB", (36, 36))
    pixels = np.asarray(image)
    assert pixels.min() == 0
    assert pixels.max() > 200


def test_a_second_run_keeps_what_is_there(folder):
    before = sorted(path.stat().st_mtime_ns for path in folder.rglob("*.png"))
    write_digits(folder)
    assert sorted(path.stat().st_mtime_ns for path in folder.rglob("*.png")) == before


def test_another_folder_is_not_touched(tmp_path):
    with pytest.raises(UserError, match="holds something else"):
        write_digits(tmp_path)


def test_missing_scikit_learn_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        write_digits(tmp_path / "data")
