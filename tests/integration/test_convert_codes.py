"""Conversion between the layouts, both ways, and of folders that others made."""

import numpy as np
import pytest

from dataset import convert_codes
from dataset.code_store import open_store
from tests.tiny_extraction import (
    CLASSES,
    CODEBOOK,
    IMAGES,
    arguments,
    contents,
    extract,
    foreign_published,
    interrupt,
    make_images,
    publish,
    run_tool,
)
from utils.program import UserError

COUNT = len(CLASSES) * IMAGES


def test_labels_of_others_are_not_published_over(monkeypatch, data, codes, tokenizer):
    extract(monkeypatch, arguments(data, codes / "whole", tokenizer))
    (codes / "toy16_labels").mkdir(parents=True)
    np.save(codes / "toy16_labels" / "0.npy", [2])
    with pytest.raises(UserError, match="toy16_labels exists already and holds other labels"):
        publish(monkeypatch, codes / "whole" / "toy16_codes", codes / "toy16_codes")
    assert not (codes / "toy16_codes").exists()


def test_conversion_leaves_an_interrupted_extraction_alone(monkeypatch, data, codes, tokenizer):
    extract(monkeypatch, arguments(data, codes / "whole", tokenizer))
    command = arguments(data, codes / "begun", tokenizer)
    interrupt(monkeypatch, command)
    before = contents(codes / "begun")
    with pytest.raises(UserError, match="holds an interrupted extraction; finish it"):
        publish(monkeypatch, codes / "whole" / "toy16_codes", codes / "begun" / "toy16_codes")
    assert contents(codes / "begun") == before


def test_both_conversions(monkeypatch, data, codes, tokenizer):
    extract(monkeypatch, arguments(data, codes / "packed", tokenizer))
    packed, published = codes / "packed" / "toy16_codes", codes / "published" / "toy16_codes"
    publish(monkeypatch, packed, published)
    np.testing.assert_array_equal(open_store(packed).block(0, COUNT), open_store(published).block(0, COUNT))
    assert sorted(path.name for path in published.parent.iterdir()) == ["toy16_codes", "toy16_labels"]
    codes_of_9, label_of_9 = np.load(published / "9.npy"), np.load(published.parent / "toy16_labels" / "9.npy")
    assert (codes_of_9.shape, label_of_9) == ((1, 10, 16), [1])
    run_tool(monkeypatch, convert_codes, "--codes", published, "--output", codes / "b" / "toy16_codes")
    (packed / "places.json").unlink()  # where things lay at extraction, which the published layout does not say
    assert contents(codes / "b") == contents(codes / "packed")


def test_foreign_published_folder_gets_its_description_from_the_flags(monkeypatch, data, codes, tokenizer, tmp_path):
    foreign_published(monkeypatch, data, codes, tokenizer)
    plain = tmp_path / "plain" / "toy16_codes"
    run_tool(monkeypatch, convert_codes, "--codes", codes / "toy16_codes", "--output", plain)
    assert open_store(plain).meta.crop_range is None
    source, output = codes / "toy16_codes", tmp_path / "packed" / "toy16_codes"
    fewer = make_images(tmp_path / "fewer")
    (fewer / "ant" / "0.png").unlink()
    with pytest.raises(UserError, match="but the codebook has 2; give the tokenizer's --codebook-size"):
        run_tool(monkeypatch, convert_codes, "--codes", source, "--output", output, "--codebook-size", 2)
    with pytest.raises(UserError, match="does not hold the images of"):
        run_tool(monkeypatch, convert_codes, "--codes", source, "--output", output, "--data-path", fewer)
    run_tool(
        monkeypatch,
        convert_codes,
        "--codes",
        source,
        "--output",
        output,
        "--data-path",
        data,
        "--codebook-size",
        CODEBOOK,
        "--crop-range",
        1.05,
    )
    store = open_store(output)
    assert store.meta.crop_range == 1.05
    assert (store.meta.class_names, store.meta.num_classes, store.meta.dtype) == (list(CLASSES), 3, "uint16")
    assert store.sources()[0][0] == "ant/0.png"
    np.testing.assert_array_equal(store.block(0, COUNT), open_store(source).block(0, COUNT))
    with pytest.raises(UserError, match="has the packed layout already"):
        run_tool(monkeypatch, convert_codes, "--codes", output, "--output", tmp_path / "x")
    with pytest.raises(UserError, match="exists already"):
        run_tool(monkeypatch, convert_codes, "--codes", source, "--output", output)
    with pytest.raises(UserError, match="name ends in _codes"):
        run_tool(monkeypatch, convert_codes, "--codes", output, "--output", tmp_path / "x", "--layout", "published")
