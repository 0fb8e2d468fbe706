"""One picture of chosen classes, and what it shares with the 50,000: names, labels, uniform numbers, batch sizes."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.models.gpt import GPT_SIZES, ModelArgs
from autoregressive.sample import batch_size, sample_c2i
from autoregressive.sample.batch_size import fitting_batch_size
from autoregressive.sample.class_names import class_names, parse_classes
from autoregressive.sample.pictures import captioned_rows, image_grid
from autoregressive.sample.seeds import image_labels, image_uniforms
from tests.sampling_models import flags, write_models
from utils.program import UserError


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


def picture(monkeypatch, models, path, checkpoint="c2i_B_256.pt", **changes) -> np.ndarray:
    arguments = flags(models, checkpoint, output=path, **dict(columns=2) | changes)
    monkeypatch.setattr(sys, "argv", ["sample_c2i", *arguments])
    sample_c2i.main()
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_picture_of_chosen_classes(monkeypatch, models, tmp_path, capsys):
    by_label = picture(monkeypatch, models, tmp_path / "a.png", classes="3,5")
    by_name = picture(monkeypatch, models, tmp_path / "b.png", classes="digit 3, Digit 5")
    assert np.array_equal(by_label, by_name)
    assert by_label.shape[0] == 2 * 16 + 2
    assert "picture:" in capsys.readouterr().out


def test_an_image_does_not_depend_on_the_other_rows_but_on_the_seed(monkeypatch, models, tmp_path):
    both = picture(monkeypatch, models, tmp_path / "a.png", classes="3,5")
    one = picture(monkeypatch, models, tmp_path / "b.png", classes="5")
    assert np.array_equal(both[18:, -34:], one[:, -34:])
    other_seed = picture(monkeypatch, models, tmp_path / "c.png", classes="5", seed=1)
    assert not np.array_equal(one[:, -34:], other_seed[:, -34:])


def test_a_class_named_twice_gets_other_images(monkeypatch, models, tmp_path):
    rows = picture(monkeypatch, models, tmp_path / "a.png", classes="5,5")
    assert not np.array_equal(rows[:16, -34:], rows[18:34, -34:])
    assert np.array_equal(rows[:16, -34:], picture(monkeypatch, models, tmp_path / "b.png", classes="5")[:, -34:])


def test_classes_without_names_are_spread_over_all(monkeypatch, models, tmp_path):
    assert picture(monkeypatch, models, tmp_path / "a.png", "bare.pt", columns=1).shape[0] == 8 * 18 - 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(classes="10"), "there is no class 10; --classes takes labels 0 to 9"),
        (dict(classes="-1"), "there is no class -1"),
        (dict(classes="1,--5"), "'--5' fits no class"),
        (dict(classes="²"), "'²' fits no class"),
        (dict(classes="cat"), "'cat' fits no class"),
        (dict(classes="digit"), r"'digit' fits several classes: 0 \(digit 0\), 1 \(digit 1\)"),
        (dict(classes=","), "'' fits no class"),
        (dict(columns=0), "--columns must be at least 1, got 0"),
        (dict(gpt_ckpt="nowhere.pt"), "there is no checkpoint nowhere.pt"),
        (dict(image_size=32), "grids of 4x4 codes"),
    ],
)
def test_refusals(monkeypatch, models, tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        picture(monkeypatch, models, tmp_path / "a.png", **changes)
    assert not list(tmp_path.iterdir())


def test_a_gpt_of_another_tokenizer_is_refused(monkeypatch, models, tmp_path):
    other = torch.load(models / "vq.pt", weights_only=True)
    other["model"]["quantize.embedding.weight"] += 1
    torch.save(other, tmp_path / "vq.pt")
    with pytest.raises(UserError, match="trained on codes of another tokenizer"):
        picture(monkeypatch, models, tmp_path / "a.png", vq_ckpt=tmp_path / "vq.pt")


def test_imagenet_classes_have_names():
    names = class_names(1000, None)
    assert parse_classes("207, Golden Retriever,lesser pan", names) == [207, 207, 387]
    with pytest.raises(UserError, match=r"fits several classes: 205 \(flat-coated retriever\), 206"):
        parse_classes("retriever", names)
    assert class_names(3, ("a", "b", "c")) == ["a", "b", "c"]
    assert class_names(3, None) == ["0", "1", "2"]


def test_labels_are_balanced_or_random():
    assert np.bincount(image_labels(np.arange(5000), 10, 0)).tolist() == [500] * 10
    drawn = image_labels(np.arange(5000), 10, 0, balanced=False)
    counts = np.bincount(drawn, minlength=10)
    assert counts.min() > 400
    assert counts.std() > 0
    assert not np.array_equal(drawn, image_labels(np.arange(5000), 10, 1, balanced=False))


def test_uniform_numbers_belong_to_the_image():
    numbers = image_uniforms(np.arange(100, 104), 256, seed=5)
    assert np.array_equal(image_uniforms(np.array([103]), 256, seed=5)[0], numbers[3])
    assert np.array_equal(image_uniforms(np.array([100]), 10, seed=5)[0], numbers[0, :10])
    assert not np.array_equal(image_uniforms(np.array([100]), 256, seed=6)[0], numbers[0])
    assert numbers.dtype == np.float64


def test_uniform_numbers_never_change():
    """On any platform and with any version of NumPy; a change would change every sampled image."""
    assert image_uniforms(np.array([0, 49999, 2**40]), 2, seed=0).tolist() == [
        [0.24154919656271812, 0.11142585551493822],
        [0.5888449763966667, 0.794524978067668],
        [0.20004848363643812, 0.16056845394154706],
    ]


def test_uniform_numbers_are_uniform_within_and_across_images():
    numbers = image_uniforms(np.arange(2000), 64, seed=0)
    assert 0 <= numbers.min() < numbers.max() < 1
    for values in (numbers[:, 0], numbers[:, 63], numbers[17].repeat(1), numbers.ravel()):
        ordered = np.sort(values)
        distance = np.abs(ordered - (np.arange(len(ordered)) + 0.5) / len(ordered)).max()  # Kolmogorov-Smirnov
        assert distance < 1.95 / np.sqrt(len(ordered))  # 0.1 % of true uniforms exceed it
    neighbours = np.corrcoef(numbers[:-1, 5], numbers[1:, 5])[0, 1]
    assert abs(neighbours) < 4 / np.sqrt(len(numbers))


def test_grids_and_captions():
    images = np.zeros((5, 4, 6, 3), dtype=np.uint8)
    assert image_grid(images, columns=3).shape == (4 + 2 + 4, 3 * 8 - 2, 3)
    assert (image_grid(images, columns=3)[5:, 16:] == 255).all()  # the last row is short
    assert image_grid(images[:1], columns=8).shape == (4, 6, 3)
    assert captioned_rows(images[:4].reshape(2, 2, 4, 6, 3), ["cat", "a dog"]).height == 10


def test_memory_that_caches_would_give_up_is_available(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:     8 kB\n")
    assert batch_size.available_memory(tmp_path / "meminfo") == 8 * 1024
    monkeypatch.setattr(batch_size, "available_memory", lambda: 4096)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert batch_size._free_memory(torch.device("cpu")) == 1024


def test_batch_sizes_follow_free_memory(monkeypatch):
    sizes = {}
    for name in ("GPT-B", "GPT-XXL"):
        layers, heads, width = GPT_SIZES[name]
        args = ModelArgs(n_layer=layers, n_head=heads, dim=width)
        for gigabytes in (1, 8, 80):
            monkeypatch.setattr(batch_size, "_free_memory", lambda device, size=gigabytes: size * 2**30)
            fitting = fitting_batch_size(args, True, torch.bfloat16, torch.device("cuda"), 32 * 256**2)
            cache = 2 * 2 * layers * 256 * width * 2
            assert fitting == 1 or fitting * cache < gigabytes * 2**30
            sizes[name, gigabytes] = fitting
    assert sizes["GPT-B", 80] == 512
    assert sizes["GPT-B", 1] == 1  # the decoder's activations alone would not fit: as small as can be
    assert sizes["GPT-XXL", 8] < sizes["GPT-XXL", 80] < sizes["GPT-B", 80]
    assert sizes["GPT-XXL", 80] % 32 == 0
