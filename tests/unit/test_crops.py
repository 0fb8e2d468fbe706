"""Crops: bit-equal to the golden ones, in the published order, at every shape of image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from dataset.crops import center_crop, crop_count, cut_crops, enlarged_size, random_crop_and_flip, to_model_range

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "crops.npz")


def ten(image, size, crop_range):
    square = center_crop(image, enlarged_size(size, 10, crop_range))
    return cut_crops(torch.from_numpy(square.copy())[None], size, 10)[0].numpy()


@pytest.mark.parametrize(("size", "crop_range"), [(64, "1.1"), (64, "1.05"), (48, "1.1")])
def test_ten_crop_equals_the_golden_one(size, crop_range):
    image = Image.fromarray(GOLDEN["image"])
    np.testing.assert_array_equal(ten(image, size, float(crop_range)), GOLDEN[f"ten.{size}.{crop_range}"])


def test_centre_crop_equals_the_golden_one():
    np.testing.assert_array_equal(center_crop(Image.fromarray(GOLDEN["image"]), 64), GOLDEN["center.64"])


@pytest.mark.parametrize("size", [31, 32, 33, 50])
@pytest.mark.parametrize("crop_range", [1.0, 1.05, 1.1, 1.37])
def test_ten_crop_equals_torchvision_at_odd_sizes(size, crop_range):
    square = Image.fromarray(center_crop(Image.fromarray(GOLDEN["image"]), enlarged_size(size, 10, crop_range)))
    expected = np.stack([np.asarray(crop) for crop in transforms.TenCrop(size)(square)])
    np.testing.assert_array_equal(ten(Image.fromarray(GOLDEN["image"]), size, crop_range), expected)


def test_two_crops_are_the_centre_crop_and_its_mirror():
    square = center_crop(Image.fromarray(GOLDEN["image"]), enlarged_size(48, 2, 1.1))
    assert square.shape == (48, 48, 3)
    crops = cut_crops(torch.from_numpy(square.copy())[None], 48, 2)[0].numpy()
    np.testing.assert_array_equal(crops, [square, square[:, ::-1]])


def test_without_mirror_images_the_first_half_remains():
    squares = torch.from_numpy(GOLDEN["image"][:64, :64].copy())[None]
    assert torch.equal(cut_crops(squares, 48, 5), cut_crops(squares, 48, 10)[:, :5])
    assert torch.equal(cut_crops(squares, 64, 1), cut_crops(squares, 64, 2)[:, :1])
    counts = {(ten, mirror): crop_count(ten, mirror) for ten in (True, False) for mirror in (True, False)}
    assert counts == {(True, True): 10, (True, False): 5, (False, True): 2, (False, False): 1}


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (300, 2), (35, 35), (36, 35), (500, 375), (1025, 64)])
def test_any_shape_of_image_gives_the_size_asked_for(shape):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8))
    assert ten(image, 32, 1.1).shape == (10, 32, 32, 3)
    for uniform in ([0.0] * 4, [0.999] * 4, [0.3, 0.9, 0.1, 0.6]):
        assert random_crop_and_flip(image, 32, uniform).shape == (32, 32, 3)


def test_random_crop_uses_each_number():
    image = Image.fromarray(GOLDEN["image"])
    base = random_crop_and_flip(image, 64, [0.5, 0.5, 0.5, 0.9])
    np.testing.assert_array_equal(random_crop_and_flip(image, 64, [0.5, 0.5, 0.5, 0.1]), base[:, ::-1])
    for position in range(3):
        uniform = [0.5, 0.5, 0.5, 0.9]
        uniform[position] = 0.0
        assert not np.array_equal(random_crop_and_flip(image, 64, uniform), base)
    np.testing.assert_array_equal(random_crop_and_flip(image, 64, [0, 0, 0.5, 0.9])[:, :5].shape, (64, 5, 3))


def test_model_range_rounds_as_torchvision_does():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    normalize = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
    images = to_model_range(torch.from_numpy(pixels))
    assert torch.equal(images[0], normalize(pixels[0]))
    assert images.is_contiguous(memory_format=torch.channels_last)
