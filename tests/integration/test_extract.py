"""Extraction: the right codes in the right order, the same for any batch and number of ranks."""

import os
import re

import numpy as np
import pytest
import torch

from autoregressive.train import extract_codes_c2i
from dataset import extraction_job
from dataset.code_store import open_store
from dataset.crops import center_crop, to_model_range
from dataset.image_folder import load_rgb
from tests.processes import run_main
from tests.tiny_extraction import CLASSES, CODEBOOK, IMAGES, arguments, contents, extract, load, one_at_a_time, verify
from utils.program import UserError

COUNT = len(CLASSES) * IMAGES


@pytest.mark.parametrize("batch_size", [10, 70, 1000])
def test_codes_equal_those_of_one_image_at_a_time(monkeypatch, data, codes, tokenizer, batch_size):
    extract(monkeypatch, arguments(data, codes, tokenizer, "--batch-size", batch_size))
    store = open_store(codes / "toy16_codes")
    equal = store.block(0, COUNT) == one_at_a_time(data, tokenizer)
    assert equal.mean() >= 0.999
    np.testing.assert_array_equal(store.labels, np.repeat(np.arange(3), IMAGES))


def test_the_store_describes_itself(monkeypatch, data, codes, tokenizer, capsys):
    extract(monkeypatch, arguments(data, codes, tokenizer))
    store = open_store(codes / "toy16_codes")
    meta = store.meta
    assert (meta.image_size, meta.grid, meta.crops, meta.crop_range, meta.count) == (16, (4, 4), 10, 1.1, COUNT)
    assert (meta.codebook_size, meta.num_classes, meta.class_names) == (CODEBOOK, 3, list(CLASSES))
    assert (meta.tokenizer["name"], meta.tokenizer["weights"]) == ("VQ-Tiny", "raw")
    assert len(meta.tokenizer["hash"]) == 64
    assert "torch" in meta.software
    path, size = store.sources()[IMAGES]
    assert (path, size) == ("bee/0.png", os.path.getsize(data / "bee" / "0.png"))
    files = ("codes-00000.npy", "images.jsonl", "labels.npy", "meta.json", "places.json")
    assert sorted(contents(codes)) == [f"toy16_codes/{name}" for name in files]
    said = capsys.readouterr().out
    assert "24 images × 10 crops at crop range 1.1, 16 px, 4×4 codes, 3 classes" in said
    assert "scripts/autoregressive/train_c2i.sh --code-path" in said
    assert "--dataset toy_code --image-size 16 --downsample-size 4 --vocab-size 64 --num-classes 3" in said


def test_without_ten_crop_the_centre_crop_and_its_mirror_are_stored(monkeypatch, data, codes, tokenizer):
    command = [word for word in arguments(data, codes, tokenizer) if word != "--ten-crop"]
    extract(monkeypatch, command)
    store = open_store(codes / "toy16_codes")
    assert (store.meta.crops, store.meta.crop_range) == (2, None)
    model = load(tokenizer)
    square = torch.from_numpy(center_crop(load_rgb(data / "ant" / "3.png"), 16).copy())
    pair = model.encode_indices(to_model_range(torch.stack([square, square.flip(1)])))
    np.testing.assert_array_equal(store.codes(np.array([3, 3]), np.array([0, 1])), pair)


def test_no_mirror_leaves_the_first_half(monkeypatch, data, codes, tokenizer):
    extract(monkeypatch, arguments(data, codes, tokenizer))
    extract(monkeypatch, arguments(data, codes / "upright", tokenizer, "--no-mirror"))
    half = open_store(codes / "upright" / "toy16_codes")
    assert half.meta.crops == 5
    assert (half.block(0, COUNT) == open_store(codes / "toy16_codes").block(0, COUNT)[:, :5]).mean() >= 0.999


def test_debug_takes_the_first_images_of_each_class(monkeypatch, data, codes, tokenizer, capsys):
    monkeypatch.setattr(extract_codes_c2i, "DEBUG_IMAGES", 2)
    extract(monkeypatch, arguments(data, codes, tokenizer, "--debug"))
    store = open_store(codes / "toy_debug16_codes")
    assert [path for path, _ in store.sources()] == [f"{name}/{i}.png" for name in CLASSES for i in (0, 1)]
    assert "--dataset toy_debug_code" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--precision", "bf16"], ["--precision", "none"], ["--num-workers", "2"]])
def test_other_precisions_and_workers(monkeypatch, data, codes, tokenizer, options):
    extract(monkeypatch, arguments(data, codes, tokenizer, *options))
    equal = (open_store(codes / "toy16_codes").block(0, COUNT) == one_at_a_time(data, tokenizer)).mean()
    assert equal > (0.5 if "bf16" in options else 0.999)


OWN_TOKENIZER = '''
import torch
from torch import nn
from torch.nn import functional as F

class Grey(nn.Module):
    """Codes are levels of grey, and there is nothing else in it."""
    downsample_factor, codebook_size = 4, 16

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def encode_indices(self, images):
        grey = F.avg_pool2d(images.float().mean(1, keepdim=True), 4).add(1).mul(8 * self.gain)
        return grey.long().clamp(0, 15).flatten(1)

    def decode_indices(self, codes):
        return F.interpolate((codes[:, None].float() / 8 - 0.9375).expand(-1, 3, -1, -1), scale_factor=4.0)
'''


def test_a_tokenizer_of_ones_own_needs_only_the_protocol(monkeypatch, data, codes, tmp_path, capsys):
    (tmp_path / "grey.py").write_text(OWN_TOKENIZER)
    torch.save({"model": {"gain": torch.ones(())}}, tmp_path / "grey.pt")
    own = ("--vq-model", f"{tmp_path / 'grey.py'}:Grey", "--codebook-size", 16)
    extract(monkeypatch, arguments(data, codes, tmp_path / "grey.pt", *own))
    store = open_store(codes / "toy16_codes")
    assert (store.meta.codebook_size, store.meta.grid, store.meta.dtype) == (16, (4, 4), "uint16")
    assert "grey.py:Grey sha256 " in store.meta.tokenizer["name"]
    assert 4 < len(np.unique(store.block(0, COUNT))) <= 16
    verify(monkeypatch, store.path, data, tmp_path / "grey.pt", tmp_path / "sheet.png", *own[:2])
    assert "100.00% of the codes of 24 random crops are found again" in capsys.readouterr().out


def test_codes_outside_the_codebook_are_refused_and_not_wrapped(monkeypatch, data, codes, tmp_path):
    (tmp_path / "grey.py").write_text(OWN_TOKENIZER.replace("return grey", "return 65536 + grey"))
    torch.save({"model": {"gain": torch.ones(())}}, tmp_path / "grey.pt")
    own = ("--vq-model", f"{tmp_path / 'grey.py'}:Grey", "--codebook-size", 16)
    with pytest.raises(UserError, match=r"gives codes from 655\d\d to 655\d\d, but its codebook_size is 16"):
        extract(monkeypatch, arguments(data, codes, tmp_path / "grey.pt", *own))
    assert not (codes / "toy16_codes").exists()


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_gives_the_same_store(data, codes, tokenizer, tmp_path, world_size):
    for ranks, path in ((1, codes), (world_size, tmp_path / "other")):
        log = tmp_path / "log"
        assert run_main(extract_codes_c2i.main, arguments(data, path, tokenizer), ranks, log) == [0] * ranks, (
            log.read_text()
        )
    assert contents(codes) == contents(tmp_path / "other")


def test_several_shards_hold_the_same_codes(monkeypatch, data, codes, tokenizer):
    extract(monkeypatch, arguments(data, codes / "one", tokenizer))
    monkeypatch.setattr(extraction_job, "SHARD_IMAGES", 10)
    extract(monkeypatch, arguments(data, codes / "many", tokenizer))
    one, many = open_store(codes / "one" / "toy16_codes"), open_store(codes / "many" / "toy16_codes")
    assert [shard["count"] for shard in many.meta.shards] == [10, 10, 4]
    np.testing.assert_array_equal(one.block(0, COUNT), many.block(0, COUNT))


def test_the_same_command_again_has_nothing_to_do(monkeypatch, data, codes, tokenizer, capsys):
    extract(monkeypatch, arguments(data, codes, tokenizer))
    before = contents(codes)
    monkeypatch.setattr(extract_codes_c2i, "extract", None)
    extract(monkeypatch, arguments(data, codes, tokenizer))
    assert contents(codes) == before
    assert "next: " in capsys.readouterr().out.split("next: ", 1)[1]


def test_out_of_memory_is_told_in_a_sentence(monkeypatch, data, codes, tokenizer):
    def encode(self, squares):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(extract_codes_c2i.Encoder, "__call__", encode)
    with pytest.raises(UserError, match="does not hold 20 crops of 16 px at a time; use a smaller --batch-size"):
        extract(monkeypatch, arguments(data, codes, tokenizer))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--data-path", "{tmp}/missing"], "there is no folder"),
        (["--data-path", "{tmp}/empty"], "holds no class folders"),
        (["--vq-ckpt", "{tmp}/missing.pt"], "there is no checkpoint"),
        (["--vq-ckpt", "{tmp}/broken.pt"], "not a complete PyTorch checkpoint"),
        (["--vq-model", "VQ-16"], "does not fit this model"),
        (["--vq-model", "VQ-99"], "there is no tokenizer VQ-99"),
        (["--codebook-size", "32"], "does not fit this model"),
        (["--image-size", "18"], "--image-size 18 is not a multiple of 4, .* use 16"),
        (["--image-size", "2"], "--image-size 2 is not a multiple of 4, .* use 4"),
        (["--crop-range", "0.9"], "--crop-range must be at least 1 and at most 100, got 0.9"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--image-size", "40000000"], "takes .* PiB of memory, and .* are free; use a smaller --image-size"),
        (["--num-workers", "-1"], "--num-workers must be at least 0, got -1"),
        (["--code-path", "{tmp}/taken"], "exists without a meta.json of this program"),
    ],
)
def test_bad_input_ends_in_one_sentence(data, codes, tokenizer, tmp_path, options, sentence):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04")
    (tmp_path / "taken" / "toy16_codes").mkdir(parents=True)
    command = arguments(data, codes, tokenizer, *(option.format(tmp=tmp_path) for option in options))
    log = tmp_path / "log"
    assert run_main(extract_codes_c2i.main, command, output=log) == [2]
    said = log.read_text().strip()
    assert said.startswith("error: ")
    assert said.count("\n") == 0
    assert re.search(sentence, said), said
    assert not codes.exists()
