"""Stores that cannot be learned from are refused in a sentence before training begins; sound ones are read once."""

import os
import re
import shutil

import numpy as np
import pytest
import torch

from autoregressive.train import train_c2i
from dataset import code_check
from dataset.code_check import refuse_unsound
from dataset.code_store import CodeStore, open_store
from dataset.code_writer import write_published
from dataset.convert_codes import ConversionSettings, pack
from tests.stores import make_store
from tests.tiny_training import command
from utils.distributed import World
from utils.files import sha256
from utils.program import UserError

WORLD = World(0, 1, 0, torch.device("cpu"))
CODES, CLASSES = 64, 4  # of tests/stores.py


@pytest.fixture
def packed(tmp_path):
    return make_store(tmp_path / "packed" / "tiny16_codes", count=24, shards=(16, 8)).path


@pytest.fixture
def published(packed, tmp_path):
    """A published folder as others make it: without a description."""
    folder = tmp_path / "published" / "tiny16_codes"
    write_published(folder, open_store(packed))
    (folder / "meta.json").unlink()
    return folder


def check(folder, codes=CODES, classes=CLASSES):
    refuse_unsound(open_store(folder), codes, classes, WORLD)


def change(path, value, place=(0,), dtype=None):
    """Put `value` into the array in the file `path`."""
    array = np.load(path).astype(dtype or np.load(path, mmap_mode="r").dtype)
    array[place] = value
    np.save(path, array)


def accept_checksums(folder):
    """As if the store had been written so."""
    meta = folder / "meta.json"
    store = open_store(folder)
    for name, old in code_check.listed_files(store).items():
        meta.write_text(meta.read_text().replace(old, sha256(folder / name)))


def test_sound_stores_are_read_once(packed, published, monkeypatch):
    for folder in (packed, published):
        check(folder)
    monkeypatch.setattr(CodeStore, "codes", None)
    monkeypatch.setattr(code_check, "file_problems", None)
    monkeypatch.setattr(type(open_store(published)), "block", None)
    for folder in (packed, published):
        check(folder)
        with pytest.raises(UserError, match="code 63 is outside the codebook of 32.*--vocab-size"):
            check(folder, codes=32)  # and what was found holds for any question


@pytest.mark.parametrize(
    ("file", "place", "value", "sentence"),
    [
        ("codes-00001.npy", (7, 9, 15), 64, "code 64 is outside the codebook of 64"),
        ("codes-00000.npy", (0, 0, 0), 65535, "code 65535 is outside the codebook of 64"),
        ("labels.npy", 3, 4, "labels from 0 to 4, but there are 4 classes"),  # 4 is the null class
        ("labels.npy", 3, -1, "labels from -1 to 3"),
    ],
)
def test_packed_codes_and_labels_out_of_range(packed, file, place, value, sentence):
    check(packed)
    change(packed / file, value, place)
    with pytest.raises(UserError, match=f"{file} does not match its checksum; .*{sentence}"):
        check(packed)
    accept_checksums(packed)
    with pytest.raises(UserError, match=f"cannot be learned from: .*{sentence}"):
        check(packed)


@pytest.mark.parametrize(
    ("layout", "value", "dtype", "sentence"),
    [
        ("codes", 64, None, "code 64 is outside the codebook of 64"),
        ("codes", 2**40, None, f"5.npy holds {2**40}, which is not between 0 and"),
        ("codes", -1, None, "5.npy holds -1, which is not between 0 and"),
        ("codes", 2.7, float, r"5.npy holds float64 \(1, 10, 16\), not integers"),
        ("labels", 4, None, "labels from 0 to 4, but there are 4 classes"),
        ("labels", 2**40, None, f"5.npy holds {2**40}, which is not between 0 and"),
        ("labels", -1, None, "5.npy holds -1"),
        ("labels", 2.7, float, r"5.npy holds float64 \(1,\), not integers"),
    ],
)
def test_published_codes_and_labels_out_of_range(published, layout, value, dtype, sentence):
    change(published.with_name(f"tiny16_{layout}") / "5.npy", value, dtype=dtype)
    with pytest.raises(UserError, match=sentence):
        check(published)
    if (layout, value) == ("codes", 64):
        return  # a codebook may be larger
    store = open_store(published)
    if layout == "codes" or value != 4:
        with pytest.raises(UserError, match="5.npy holds"):  # nor are they converted
            pack(store, ConversionSettings(codes=published, output=published.with_name("back"), codebook_size=1 << 20))


def test_a_copy_is_looked_through_again(packed, tmp_path):
    check(packed)
    shutil.copytree(packed.parent, tmp_path / "copy")
    change(tmp_path / "copy" / packed.name / "labels.npy", 9, 3)
    with pytest.raises(UserError, match="labels.npy does not match its checksum"):
        check(tmp_path / "copy" / packed.name)


def test_a_copy_with_the_times_of_a_sound_store_is_looked_through(packed):
    check(packed)
    labels = packed / "labels.npy"
    times = os.stat(labels)
    content = bytearray(labels.read_bytes())
    content[-4] ^= 1
    labels.write_bytes(content)
    os.utime(labels, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match="labels.npy does not match its checksum"):
        check(packed)


def test_published_files_that_change_later_are_compared_with_the_same_ranges(published):
    check(published)
    change(published / "5.npy", CODES)
    change(published.with_name("tiny16_labels") / "6.npy", CLASSES)
    store = open_store(published)
    refuse_unsound(store, CODES, CLASSES, WORLD)  # of the folders nothing has changed
    with pytest.raises(UserError, match="5.npy holds 64, which is not between 0 and 63"):
        store.codes(np.array([5, 5]), np.arange(2) * 0)
    with pytest.raises(UserError, match="6.npy holds 4, which is not between 0 and 3"):
        store.labels_of(np.array([6]))


def test_many_damaged_files_are_one_short_sentence(tmp_path):
    store = make_store(tmp_path / "tiny16_codes", count=24, shards=(1,) * 24)
    for number in range(24):
        change(store.path / f"codes-{number:05d}.npy", 0, ...)
    with pytest.raises(UserError, match="codes-00000.npy does not match its checksum; 23 more problems; copy"):
        check(store.path)


def test_a_garbled_note_is_none(packed):
    check(packed)
    note = packed.with_name("tiny16_codes.checked.json")
    wrong = re.sub(r'("largest_code": )\d+', r"\1null", note.read_text())
    assert "null" in wrong
    for content in ("{", "[]", '{"extent": {}, "state": {}}', wrong):
        note.write_text(content)
        check(packed)
    note.unlink()
    note.mkdir()
    check(packed)


def test_training_does_not_begin(packed, tmp_path, monkeypatch):
    change(packed / "labels.npy", 4, 3)
    accept_checksums(packed)
    monkeypatch.setattr("sys.argv", ["train_c2i", *command(packed.parent, tmp_path / "results")])
    with pytest.raises(UserError, match="labels from 0 to 4, but there are 4 classes"):
        train_c2i.main()
    assert not (tmp_path / "results").exists()
