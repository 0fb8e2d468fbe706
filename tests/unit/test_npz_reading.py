"""Images streamed from .npz files and folders, and what is said about files that cannot be used."""

import io
import pickle
import random
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluations.c2i import image_sets
from evaluations.c2i.image_sets import open_images, prefetched
from tests.tensorflow_reference import synthetic_images
from utils.program import UserError

IMAGES = synthetic_images(0, 23, 12, 10)


def saved(tmp_path: Path, compressed: bool = False, **arrays: np.ndarray) -> Path:
    path = tmp_path / "images.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def read(path: Path, size: int = 7) -> np.ndarray:
    return np.concatenate(list(open_images(path).batches(size)))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("size", [1, 7, 23, 100])
def test_batches_are_the_array(tmp_path, compressed, size):
    path = saved(tmp_path, compressed, arr_0=IMAGES)
    images = open_images(path)
    assert (images.count, images.height, images.width, images.labels) == (23, 12, 10, None)
    batches = list(images.batches(size))
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    np.testing.assert_array_equal(np.concatenate(batches), IMAGES)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    path = saved(tmp_path, arr_0=np.zeros((600, 128, 128, 3), np.uint8))  # 29 MB
    images = open_images(path)
    tracemalloc.start()
    total = sum(len(batch) for batch in images.batches(16))  # 0.8 MB each
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 600
    assert peak < 4e6


def test_batches_of_large_images_are_smaller(tmp_path, monkeypatch):
    monkeypatch.setattr(image_sets, "MAX_BATCH_BYTES", 1_000)
    assert [len(batch) for batch in open_images(saved(tmp_path, arr_0=IMAGES)).batches(64)] == [2] * 11 + [1]


@pytest.mark.parametrize("name", ["labels", "arr_1"])
def test_labels(tmp_path, name):
    labels = np.arange(23, dtype=np.int32) % 4
    np.testing.assert_array_equal(open_images(saved(tmp_path, arr_0=IMAGES, **{name: labels})).labels, labels)


def test_other_arrays_and_arr_1_that_is_no_label(tmp_path):
    images = open_images(saved(tmp_path, arr_0=IMAGES, arr_1=np.zeros((23, 5)), sigma=np.eye(3, order="F") * 2))
    assert images.labels is None
    np.testing.assert_array_equal(images.array("sigma"), np.eye(3) * 2)
    assert images.array("mu") is None


@pytest.mark.parametrize("unrelated", [np.array([{"a": 1}], object), np.zeros(99, np.uint8), np.array("text")])
def test_an_unrelated_arr_1_is_ignored(tmp_path, unrelated):
    assert open_images(saved(tmp_path, arr_0=IMAGES, arr_1=unrelated)).labels is None


def test_a_member_without_npy_is_no_array(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.npz", "w") as archive:
        archive.writestr("arr_0", b"")
    with pytest.raises(UserError, match=r"holds no arr_0.npy \(it holds: arr_0\)"):
        open_images(tmp_path / "images.npz")


def test_the_most_compressible_images_are_read(tmp_path):
    black = np.zeros((200, 64, 64, 3), np.uint8)
    np.testing.assert_array_equal(read(saved(tmp_path, True, arr_0=black)), black)


def fortran(array: np.ndarray) -> np.ndarray:
    return np.asfortranarray(array)


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({"images": IMAGES}, "holds no arr_0"),
        ({"arr_0": IMAGES.astype(np.float32)}, "float32 .*must be uint8"),
        ({"arr_0": np.full((4, 8, 8, 3), np.nan)}, "float64 .*must be uint8"),
        ({"arr_0": IMAGES[..., 0]}, "must be uint8 of shape"),
        ({"arr_0": IMAGES.transpose(0, 3, 1, 2).copy()}, "must be uint8 of shape"),
        ({"arr_0": np.zeros((3, 0, 8, 3), np.uint8)}, "must be uint8 of shape"),
        ({"arr_0": fortran(IMAGES)}, "Fortran order"),
        ({"arr_0": IMAGES, "labels": np.zeros(5, np.int64)}, "must be integers of shape"),
        ({"arr_0": IMAGES, "labels": np.zeros(23, np.float32)}, "must be integers of shape"),
    ],
)
def test_unusable_arrays(tmp_path, arrays, complaint):
    with pytest.raises(UserError, match=complaint):
        open_images(saved(tmp_path, **arrays))


class Trap:
    """Leaves a file behind if it is ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["arr_0", "labels"])
def test_object_arrays_are_never_unpickled(tmp_path, name):
    sprung = tmp_path / "sprung"
    array = np.empty(1, object)
    array[0] = Trap(sprung)
    path = saved(tmp_path, **{"arr_0": IMAGES, name: array})
    with pytest.raises(UserError, match="object array, which could run code"):
        open_images(path)
    path.write_bytes(pickle.dumps(array))
    with pytest.raises(UserError, match="damaged or is not an .npz"):
        open_images(path)
    assert not sprung.exists()


def npy(header: str, content: bytes = b"") -> bytes:
    encoded = header.encode("latin1")
    return b"\x93NUMPY\x01\x00" + len(encoded).to_bytes(2, "little") + encoded + content


@pytest.mark.parametrize(
    "member",
    [
        b"",
        b"not an array",
        npy("{'descr': '|u1', 'fortran_order': False, 'shape': (9999999, 512, 512, 3)}", bytes(100)),
        npy("{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 8, 8, 3)}"),
        npy("{'descr': '|u1', 'shape': (1, 8, 8, 3)}"),
        npy("__import__('os').abort()"),
        npy("(" * 5_000),
        npy("[" * 90),
        b"\x93NUMPY\x02\x00" + (1 << 31).to_bytes(4, "little"),
        b"\x93NUMPY\x09\x00" + bytes(100),
    ],
)
def test_broken_npy_headers(tmp_path, member):
    path = tmp_path / "images.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", member)
    with pytest.raises(UserError, match="damaged or is not an .npz"):
        open_images(path)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("compressed", [False, True])
def test_truncated_archives(tmp_path, share, compressed):
    path = saved(tmp_path, compressed, arr_0=IMAGES)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match="damaged or is not an .npz"):
        read(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_changed_pixels_are_noticed(tmp_path, compressed):
    path = saved(tmp_path, compressed, arr_0=IMAGES)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged or is not an .npz"):
        read(path)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="there is no file or folder"):
        open_images(tmp_path / "none.npz")


def test_mutated_archives_are_read_or_refused(tmp_path):
    """Whatever is done to the bytes, the images come out unchanged in number and size, or one sentence does."""
    generator = random.Random(0)
    contents = []
    for compressed in (False, True):
        path = saved(tmp_path, compressed, arr_0=IMAGES[:4], labels=np.arange(4), mu=np.zeros(3))
        contents.append(path.read_bytes())
    refused = 0
    for index in range(400):
        mutated = bytearray(contents[index % 2])
        for _ in range(generator.choice([1, 4, 20])):
            position = generator.randrange(len(mutated))
            if generator.random() < 0.8:
                mutated[position] = generator.randrange(256)
            else:
                del mutated[position : position + generator.randrange(1, 30)]
        path.write_bytes(mutated)
        try:
            images = open_images(path)
            batches = list(images.batches(3))
            images.array("mu")
        except UserError:
            refused += 1
            continue
        assert sum(batch.nbytes for batch in batches) == images.count * images.height * images.width * 3
    assert refused > 200


def test_prefetching_keeps_order_and_passes_errors_on():
    assert list(prefetched(iter(range(100)))) == list(range(100))

    def failing():
        yield 1
        raise UserError("the disk fell out")

    batches = prefetched(failing())
    assert next(batches) == 1
    with pytest.raises(UserError, match="fell out"):
        next(batches)


def test_prefetching_stops_reading_when_the_caller_does():
    read_so_far = []
    batches = prefetched(read_so_far.append(index) or index for index in range(1_000))
    assert next(batches) == 0
    batches.close()
    assert len(read_so_far) < 10


def test_folders_are_read_in_order_as_rgb(tmp_path):
    for index, image in enumerate(IMAGES[:5]):
        folder = tmp_path / f"class{index % 2}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{index}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    np.testing.assert_array_equal(read(tmp_path, 2), IMAGES[[0, 2, 4, 1, 3]])
    Image.fromarray(IMAGES[0, ..., 0]).save(tmp_path / "a_gray.PNG")
    np.testing.assert_array_equal(read(tmp_path)[0], np.repeat(IMAGES[0, ..., :1], 3, axis=2))


def test_folders_that_cannot_be_used(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="holds no images"):
        open_images(tmp_path)
    Image.fromarray(IMAGES[0]).save(tmp_path / "0.png")
    Image.fromarray(IMAGES[0][:5]).save(tmp_path / "1.png")
    with pytest.raises(UserError, match="1.png has 10 x 5 pixels.*resize them"):
        read(tmp_path)
    buffer = io.BytesIO()
    Image.fromarray(IMAGES[0]).save(buffer, "png")
    (tmp_path / "1.png").write_bytes(buffer.getvalue()[:200])
    with pytest.raises(UserError, match="1.png cannot be read as an image"):
        read(tmp_path)
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match="0.png cannot be read as an image"):
        open_images(tmp_path)
    Image.fromarray(IMAGES[0]).save(tmp_path / "0.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UserError, match="0.png cannot be read as an image .*decompression bomb"):
        open_images(tmp_path)
