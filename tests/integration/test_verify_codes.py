"""What verification accepts, shows, and finds wrong."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from autoregressive.train import verify_codes
from dataset.crops import enlarged_size
from tests.tiny_extraction import (
    CLASSES,
    CODEBOOK,
    IMAGES,
    arguments,
    contents,
    extract,
    foreign_published,
    make_tokenizer,
    run_tool,
    verify,
)
from utils.program import UserError

COUNT = len(CLASSES) * IMAGES


def test_verify_accepts_a_sound_store_and_draws_it(monkeypatch, data, codes, tokenizer, tmp_path, capsys):
    extract(monkeypatch, arguments(data, codes, tokenizer))
    verify(monkeypatch, codes / "toy16_codes", data, tokenizer, tmp_path / "sheet.png")
    said = capsys.readouterr().out
    for line in (
        "3 match their checksums",
        "3 classes with 8 to 8 images",
        "of 64 in use, perplexity",
        "100.00% of the codes of 24 random crops are found again",
        "is sound",
    ):
        assert line in said
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (4 * 168 + 8, 6 * 104 + 8)
    run_tool(monkeypatch, verify_codes, "--codes", codes / "toy16_codes")
    assert "no contact sheet" in capsys.readouterr().out


def test_verify_reads_the_published_layout(monkeypatch, data, codes, tokenizer, tmp_path, capsys):
    foreign_published(monkeypatch, data, codes, tokenizer)
    run_tool(
        monkeypatch,
        verify_codes,
        "--codes",
        codes / "toy16_codes",
        "--data-path",
        data,
        "--vq-ckpt",
        tokenizer,
        "--output",
        tmp_path / "sheet.png",
        "--vq-model",
        "VQ-Tiny",
        "--codebook-size",
        CODEBOOK,
    )
    said = capsys.readouterr().out
    assert "no checksums are kept" in said
    assert "100.00% of the codes" in said


def test_verify_takes_the_crop_range_that_the_store_does_not_tell(monkeypatch, data, codes, tokenizer, tmp_path):
    foreign_published(monkeypatch, data, codes, tokenizer, "--crop-range", "1.5")
    ranges = []
    monkeypatch.setattr(verify_codes, "enlarged_size", lambda *given: ranges.append(given[2]) or enlarged_size(*given))
    common = (
        "--codes",
        codes / "toy16_codes",
        "--vq-ckpt",
        tokenizer,
        "--data-path",
        data,
        "--vq-model",
        "VQ-Tiny",
        "--codebook-size",
        CODEBOOK,
        "--output",
        tmp_path / "sheet.png",
    )
    run_tool(monkeypatch, verify_codes, *common, "--crop-range", 1.5)
    assert set(ranges) == {1.5}
    with pytest.raises(UserError, match="--crop-range must be at least 1 and at most 100, got 0.5"):
        run_tool(monkeypatch, verify_codes, *common, "--crop-range", 0.5)


def overwrite(path, offset, content):
    with open(path, "r+b") as file:
        file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        file.write(content)


def swap_images(store, data):
    for number in range(IMAGES):
        first, second = data / "ant" / f"{number}.png", data / "bee" / f"{number}.png"
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)


def relabel(store, data):
    labels = np.load(store / "labels.npy")
    np.save(store / "labels.npy", labels[::-1].copy())


def empty_class(store, data):
    np.save(store / "labels.npy", np.minimum(np.load(store / "labels.npy"), 1))


def wrong_label(store, data):
    np.save(store / "labels.npy", np.load(store / "labels.npy") + 1)


def lose_image_list(store, data):
    (store / "images.jsonl").unlink()


def shorten_image_list(store, data):
    lines = (store / "images.jsonl").read_text().splitlines(keepends=True)
    (store / "images.jsonl").write_text("".join(lines[:-1]))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda store, data: overwrite(store / "codes-00000.npy", -2, b"\x01\x00"), "codes-00000.npy does not match"),
        (lambda store, data: overwrite(store / "codes-00000.npy", -2, b"\xff\xff"), "65535 is outside the codebook"),
        (relabel, "images are labelled unlike their folders, such as ant/0.png"),
        (empty_class, "1 classes have no image"),
        (wrong_label, "labels from 1 to 3, but there are 3 classes"),
        (lose_image_list, "images.jsonl is missing"),
        (shorten_image_list, "lists 23 images, the store holds 24"),
        (swap_images, r"codes of \d+ of 24 images are not theirs"),
    ],
)
def test_verify_says_what_is_wrong(monkeypatch, data, codes, tokenizer, tmp_path, damage, sentence):
    extract(monkeypatch, arguments(data, codes, tokenizer))
    damage(codes / "toy16_codes", data)
    with pytest.raises(UserError, match=sentence):
        verify(monkeypatch, codes / "toy16_codes", data, tokenizer, tmp_path / "sheet.png")


def test_labels_that_no_memory_can_count_are_refused(monkeypatch):
    foreign = SimpleNamespace(meta=SimpleNamespace(num_classes=None), labels=np.array([0, 2**27]))
    monkeypatch.setattr("utils.memory.available_memory", lambda: 1 << 20)
    with pytest.raises(UserError, match="counting the images of 134,217,729 classes takes 1.0 GiB"):
        verify_codes.check_labels(foreign)


def test_verify_notices_another_tokenizer(monkeypatch, data, codes, tokenizer, tmp_path):
    extract(monkeypatch, arguments(data, codes, tokenizer))
    other = make_tokenizer(tmp_path / "other.pt", seed=1)
    with pytest.raises(UserError, match="made with other weights"):
        verify(monkeypatch, codes / "toy16_codes", data, other, tmp_path / "sheet.png")


def test_the_sheet_does_not_overwrite_what_is_read(monkeypatch, data, codes, tokenizer):
    before, link = contents(data), data.with_name("link")
    link.symlink_to(data)
    for output in (data / "ant" / "0.png", link / "ant" / "0.png", tokenizer):
        with pytest.raises(UserError, match="is one of the files that are read, or lies among them"):
            verify(monkeypatch, codes / "toy16_codes", data, tokenizer, output)
    assert contents(data) == before
