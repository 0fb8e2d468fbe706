"""The embedded data sets: complete, split the same way every time, read from IDX files, refused in a sentence."""

import gzip
import struct
import sys
from hashlib import sha256

import numpy as np
import pytest
from PIL import Image

from dataset.embedded import DATA_SETS, DataSet, Part, cifar_10, digits, fashion_mnist, write_image_folder
from dataset.image_folder import list_image_folder
from utils.files import lock_folder
from utils.program import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "data"
    assert write_image_folder(digits(), folder) == {"train": 1442, "test": 355}
    return folder


def test_digits_are_an_ordinary_image_folder_with_the_held_out_part_stratified(folder):
    parts = {part: list_image_folder(folder / part) for part in ("train", "test")}
    assert parts["train"].class_names == parts["test"].class_names == [f"digit_{digit}" for digit in range(10)]
    counts = {part: np.bincount(images.labels) for part, images in parts.items()}
    shares = counts["test"] / (counts["train"] + counts["test"])
    assert np.all((shares > 0.19) & (shares <= 0.2))
    names = [{path.split("/")[1] for path in images.paths} for images in parts.values()]
    assert not names[0] & names[1]


def test_digits_are_the_same_files_as_ever(folder):
    """Codes, and every figure of the quickstart and of the study, follow from them."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    assert names[:2] == ["test/digit_0/0036.png", "test/digit_0/0078.png"]
    assert sha256("\n".join(names).encode()).hexdigest()[:16] == "b8160729d4099380"


def test_images_are_rgb_with_room_for_ten_crops(folder):
    image = Image.open(next((folder / "train" / "digit_3").iterdir()))
    assert (image.mode, image.size) == ("RGB", (36, 36))
    pixels = np.asarray(image)
    assert pixels.min() == 0
    assert pixels.max() > 200


def test_a_second_run_keeps_what_is_there(folder):
    before = sorted(path.stat().st_mtime_ns for path in folder.rglob("*.png"))
    write_image_folder(digits(), folder)
    assert sorted(path.stat().st_mtime_ns for path in folder.rglob("*.png")) == before


def test_another_folder_is_not_touched(tmp_path, folder):
    with pytest.raises(UserError, match="holds something else"):
        write_image_folder(digits(), tmp_path)
    with pytest.raises(UserError, match="holds something else"):
        write_image_folder(digits(), folder, train_images=100)


def test_what_a_killed_run_left_is_written_anew(tmp_path):
    leftover = tmp_path / "data.partial/images/train/digit_0/9999.png"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    assert write_image_folder(digits(), tmp_path / "data", 5, 2) == {"train": 5, "test": 2}
    assert len(list((tmp_path / "data").rglob("*.png"))) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_two_processes_do_not_write_into_each_others_images(tmp_path):
    with (
        lock_folder(tmp_path / "data.partial", "held"),
        pytest.raises(UserError, match="another process is writing .*data.partial; wait for it"),
    ):
        write_image_folder(digits(), tmp_path / "data", 5, 2)
    assert write_image_folder(digits(), tmp_path / "data", 5, 2) == {"train": 5, "test": 2}


def test_missing_scikit_learn_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        digits()


def test_parts_are_the_first_images(tmp_path):
    images = np.arange(6, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    part = Part(images, np.array([1, 0, 1, 0, 1, 0]), np.arange(6))
    counts = write_image_folder(DataSet(["a", "b"], part, part), tmp_path / "data", 3, 2)
    assert counts == {"train": 3, "test": 2}
    written = {
        str(path.relative_to(tmp_path / "data")): np.asarray(Image.open(path))[0, 0].tolist()
        for path in (tmp_path / "data").rglob("*.png")
    }
    assert written == {
        "train/b/0000.png": [0, 0, 0],
        "train/a/0001.png": [1, 1, 1],
        "train/b/0002.png": [2, 2, 2],
        "test/b/0000.png": [0, 0, 0],
        "test/a/0001.png": [1, 1, 1],
    }
    with pytest.raises(UserError, match="--train-images 7: there are only 6"):
        write_image_folder(DataSet(["a", "b"], part, part), tmp_path / "more", 7)


@pytest.fixture
def idx_files(tmp_path):
    """Fashion-MNIST's four files with 20 and 10 random images, one of them compressed."""
    random = np.random.default_rng(0)
    for name, count in (("train", 20), ("t10k", 10)):
        images = random.integers(0, 256, (count, 28, 28), np.uint8)
        header = struct.pack(">4I", 2051, count, 28, 28)
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = struct.pack(">2I", 2049, count) + bytes(i % 10 for i in range(count))
        (tmp_path / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    return tmp_path


def test_fashion_mnist_from_idx_files_has_a_margin(idx_files):
    data = fashion_mnist(idx_files)
    assert data.train.images.shape == (20, 32, 32)
    assert data.test.images.shape == (10, 32, 32)
    assert data.class_names[data.train.labels[9]] == "ankle_boot"
    source = np.frombuffer((idx_files / "train-images-idx3-ubyte").read_bytes()[16:], np.uint8).reshape(20, 28, 28)
    assert np.array_equal(data.train.images[:, 2:-2, 2:-2], source)
    assert data.train.images.sum() == source.sum()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda file: file.unlink(), "holds no train-images-idx3-ubyte or"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "is damaged"),
        (lambda file: file.write_bytes(b""), "is damaged"),
        (lambda file: file.write_bytes(struct.pack(">4I", 2052, *(4, 1, 1)) + b"abcd"), "not the IDX file"),
    ],
)
def test_wrong_idx_files_are_named(idx_files, spoil, sentence):
    spoil(idx_files / "train-images-idx3-ubyte")
    with pytest.raises(UserError, match=sentence):
        fashion_mnist(idx_files)


def test_cifar_10_without_its_files_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"cannot load CIFAR10 .*give --source"):
        cifar_10(tmp_path)
    assert set(DATA_SETS) == {"digits", "fashion-mnist", "cifar-10"}
