"""Image folders: torchvision's order, and what happens to every odd kind of image file."""

import errno
import os
import pickle
import warnings

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from dataset.image_folder import UnreadableImage, list_image_folder, load_rgb
from utils.program import UserError

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (24, 20, 3), np.uint8)


def test_classes_and_images_come_in_torchvisions_order(tmp_path):
    names = ["n02/b.JPEG", "n02/a.png", "n02/sub/0.jpg", "n02/sub2/1.jpg", "n02/Z.png"]
    names += ["n01/10.png", "n01/9.png", "N03/é x.png", "n01.5/y.webp"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(COLOURS).save(path)
    (tmp_path / "n02" / "notes.txt").write_text("no image")
    (tmp_path / "list.png").write_text("not in a class folder")
    expected = datasets.ImageFolder(str(tmp_path))
    folder = list_image_folder(tmp_path)
    assert folder.class_names == expected.classes
    found = [(folder.path(index), folder.labels[index]) for index in range(len(folder))]
    assert found == expected.samples
    part = folder.subset(np.array([4, 1]))
    assert [part.paths[0], part.paths[1]] == [folder.paths[4], folder.paths[1]]
    assert list(folder.paths) == [path.removeprefix(f"{tmp_path}/") for path, _ in expected.samples]


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no folder .*one folder of images per class"):
        list_image_folder(tmp_path / "missing")
    with pytest.raises(UserError, match="holds no class folders"):
        list_image_folder(tmp_path)
    (tmp_path / "empty_class").mkdir()
    with pytest.raises(UserError, match="empty_class holds no images"):
        list_image_folder(tmp_path)


def test_a_folder_that_cannot_be_listed_is_not_left_out(tmp_path, monkeypatch):
    (tmp_path / "ant" / "secret").mkdir(parents=True)
    Image.fromarray(COLOURS).save(tmp_path / "ant" / "0.png")
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("secret"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"ant/secret cannot be listed \(permission denied\)"):
        list_image_folder(tmp_path)


def test_very_long_images_are_unreadable(tmp_path):
    for width, refused in ((200, False), (201, True)):
        for shape in ((width, 1), (1, width)):
            Image.new("RGB", shape).save(tmp_path / "long.png")
            if refused:
                with pytest.raises(UnreadableImage, match="beyond 1 : 200"):
                    load_rgb(tmp_path / "long.png")
            else:
                assert load_rgb(tmp_path / "long.png").size == shape


def saved(tmp_path, image, name, **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def published(path):
    """What torchvision's loader, and with it the published pipeline, makes of a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(datasets.folder.default_loader(str(path)))


def grayscale(tmp_path):
    return saved(tmp_path, Image.fromarray(COLOURS[..., 0]), "gray.png")


def cmyk(tmp_path):
    return saved(tmp_path, Image.fromarray(COLOURS).convert("CMYK"), "cmyk.jpg", quality=95)


def palette_with_transparency(tmp_path):
    image = Image.fromarray(COLOURS).quantize(16)
    return saved(tmp_path, image, "palette.png", transparency=bytes(range(0, 256, 16)))


def rgba(tmp_path):
    alpha = RNG.integers(0, 256, (24, 20, 1), np.uint8)
    return saved(tmp_path, Image.fromarray(np.concatenate([COLOURS, alpha], axis=2)), "rgba.png")


def bilevel(tmp_path):
    return saved(tmp_path, Image.fromarray(COLOURS[..., 0]).convert("1"), "bilevel.png")


def exif_rotated(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90°
    return saved(tmp_path, Image.fromarray(COLOURS), "rotated.jpg", exif=exif, quality=95)


def one_pixel(tmp_path):
    return saved(tmp_path, Image.fromarray(COLOURS[:1, :1]), "pixel.png")


@pytest.mark.parametrize(
    "make",
    [grayscale, cmyk, palette_with_transparency, rgba, bilevel, exif_rotated, one_pixel],
    ids=lambda f: f.__name__,
)
def test_odd_images_are_read_as_published(tmp_path, make):
    path = make(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = load_rgb(path)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), published(path))


def test_exif_orientation_is_ignored(tmp_path):
    assert load_rgb(exif_rotated(tmp_path)).size == (20, 24)


def test_transparency_is_dropped_and_the_colour_beneath_stays(tmp_path):
    np.testing.assert_array_equal(np.asarray(load_rgb(rgba(tmp_path))), COLOURS)


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_16_bit_grayscale_keeps_its_upper_bits_where_the_published_pipeline_clips(tmp_path, name):
    deep = RNG.integers(0, 1 << 16, (24, 20)).astype(np.uint16)
    path = saved(tmp_path, Image.fromarray(deep), name)
    np.testing.assert_array_equal(np.asarray(load_rgb(path)), (deep >> 8)[..., None].repeat(3, axis=2))
    np.testing.assert_array_equal(published(path)[..., 0], deep.clip(0, 255))


def truncated(path):
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:3000])


def text(path):
    path.write_text("<html>404</html>")


def empty(path):
    path.write_bytes(b"")


def damaged_header(path):
    Image.fromarray(COLOURS).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = b"\xff" * 8  # width and height of a PNG
    path.write_bytes(data)


def dangling_link(path):
    path.symlink_to(path.with_name("gone"))


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
@pytest.mark.parametrize("damage", [truncated, text, empty, dangling_link], ids=lambda f: f.__name__)
def test_broken_images_are_named(tmp_path, damage, name):
    damage(tmp_path / name)
    with pytest.raises(UnreadableImage, match=rf"{name} cannot be read as an image \(.+\); repair or remove it"):
        load_rgb(tmp_path / name)


def test_broken_header_is_named(tmp_path):
    damaged_header(tmp_path / "a.png")
    with pytest.raises(UnreadableImage, match="cannot be read"):
        load_rgb(tmp_path / "a.png")


def test_a_failing_disk_is_not_taken_for_a_broken_image(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    path = saved(tmp_path, Image.fromarray(COLOURS), "a.png")
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError, match="Input/output"):
        load_rgb(path)


def test_the_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(UnreadableImage("a.png", "truncated")))
    assert (error.path, error.reason) == ("a.png", "truncated")
