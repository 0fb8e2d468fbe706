"""Damaged and foreign files are not taken for weights: one sentence says what they are, and nothing is unpickled."""

import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from utils import weight_files
from utils.checkpoint import load_strict, read_checkpoint
from utils.program import UserError
from utils.weight_files import verify_archive


class Code:
    def __reduce__(self):
        return os.system, ("echo ran >&2",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "is a PNG image, not a PyTorch checkpoint; check the path"),
        (b"\xff\xd8\xff" + bytes(99), "is a JPEG image"),
        (b"\n<!DOCTYPE html><title>Sign in \xc3\xa9", "is a web page .*; open the address in a browser"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "is a pointer of git-lfs.*; run git lfs pull"),
        (b'{"error": "not found"}', "is a text file"),
        (b"\x1f\x8b" + bytes(99), "is compressed by gzip.*; unpack it first"),
        (b"\x93NUMPY" + bytes(99), "is a NumPy array"),
        (b"", "is empty, not a PyTorch checkpoint; copy or download it again"),
        (b"\x10\0\0\0\0\0\0\0" + b"{}              ", "is a safetensors file.*; give it a name that ends in .safe"),
        (bytes(range(128, 256)) * 9, "is not a PyTorch checkpoint, or is damaged"),
        (pickle.dumps({"model": 1}, protocol=2), "is not a complete PyTorch checkpoint"),
        (pickle.dumps(Code(), protocol=2), r"holds more than weights \(posix.system\) and is not read, for safety"),
    ],
)
def test_foreign_files_are_named(content, message, tmp_path, capfd):
    path = tmp_path / "c2i.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as refusal:
        read_checkpoint(path)
    assert len(str(refusal.value).splitlines()) == 1
    assert "weights_only" not in str(refusal.value)
    assert "ran" not in capfd.readouterr().err


def test_foreign_archives_are_named(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "jit.pt")
    np.savez(tmp_path / "array.npz", a=np.ones(1))
    with zipfile.ZipFile(tmp_path / "own.pt", "w") as archive:
        archive.writestr("readme.txt", "x")
    for name, message in (
        ("jit.pt", "is a TorchScript program"),
        ("array.npz", "is a NumPy archive"),
        ("own.pt", "is a zip archive, not a PyTorch checkpoint; unpack it first"),
    ):
        with pytest.raises(UserError, match=message):
            read_checkpoint(tmp_path / name)


@pytest.fixture
def archive(tmp_path):
    torch.save({"model": {"w": torch.arange(500.0)}}, tmp_path / "c2i.pt")
    return tmp_path / "c2i.pt"


def test_flipped_bytes_are_seen_anywhere(archive):
    content = archive.read_bytes()
    with zipfile.ZipFile(archive) as records:
        sizes = {record.filename: record.file_size for record in records.infolist()}
    weights = content.index(torch.arange(500.0).numpy().tobytes())
    assert sizes["c2i/data/0"] == 2000
    for place in (weights, weights + 777, weights + 1999, content.index(b"model")):
        damaged = bytearray(content)
        damaged[place] ^= 4
        archive.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged: .* in it differs from its checksum; copy or download"):
            read_checkpoint(archive)
    for length in (len(content) - 1, len(content) // 2, 9):
        archive.write_bytes(content[:length])
        with pytest.raises(UserError, match="copy or download it again"):
            read_checkpoint(archive)


def test_a_bit_anywhere_is_seen_or_does_not_matter(tmp_path):
    """In the archive's directory, too: a sentence, or the weights as they were."""
    path, weights = tmp_path / "c2i.pt", torch.arange(3.0)
    torch.save({"w": weights}, path)
    content = path.read_bytes()
    directory = content.index(b"PK\1\2")
    for place in (*range(0, directory, 11), *range(directory, len(content), 2)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place // 2 % 8
        path.write_bytes(damaged)
        try:
            assert torch.equal(read_checkpoint(path)["w"], weights)
        except UserError as refusal:
            assert str(path) in str(refusal)  # noqa: PT017 - it need not be refused


def test_an_archive_is_verified_once_unless_it_changes(archive, monkeypatch):
    reads = []
    original = zipfile.ZipFile.testzip
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda self: reads.append(1) or original(self))
    os.utime(archive, ns=(0, 0))
    for _ in range(3):
        verify_archive(archive)
    assert len(reads) == 1
    os.utime(archive, ns=(0, 1))
    verify_archive(archive)
    assert len(reads) == 2
    os.utime(archive)  # another version may be written in the same tick of the file system's clock
    for _ in range(2):
        verify_archive(archive)
    assert len(reads) == 4


def test_an_archive_without_checksums_is_read(tmp_path):
    try:
        torch.serialization.set_crc32_options(False)
        torch.save({"w": torch.ones(3)}, tmp_path / "c2i.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_checkpoint(tmp_path / "c2i.pt")["w"], torch.ones(3))


def test_weights_are_finite_floating_point_numbers():
    model = torch.nn.Linear(2, 1)
    for weight, message in (
        (torch.tensor([[1.0, torch.nan]]), "holds values in weight that are not finite"),
        (torch.tensor([[1.0, -torch.inf]]), "holds values in weight that are not finite"),
        (torch.tensor([[1.0, torch.nan]]).to(torch.float8_e5m2), "holds values in weight that are not finite"),
        (torch.tensor([[1, 2]], dtype=torch.int8), "holds weight as int8; quantised weights are not read"),
    ):
        with pytest.raises(UserError, match=message):
            load_strict(model, {"weight": weight, "bias": torch.zeros(1)}, "c2i.pt", "")
    load_strict(model, {"weight": torch.ones(1, 2, dtype=torch.bfloat16), "bias": torch.zeros(1)}, "c2i.pt", "")


def test_safetensors_carry_checksums(tmp_path):
    pytest.importorskip("safetensors")
    state = {"a": torch.randn(3, 4).t(), "b": torch.ones((), dtype=torch.bfloat16), "c": torch.arange(3)}
    weight_files.write_safetensors(tmp_path / "w.safetensors", state)
    (tmp_path / "plain").touch()
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    read = weight_files.read_safetensors(tmp_path / "w.safetensors")
    assert all(torch.equal(read[name], state[name]) and read[name].dtype == state[name].dtype for name in state)
    content = bytearray((tmp_path / "w.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="w.safetensors is damaged: [abc] in it differs from its checksum"):
        weight_files.read_safetensors(tmp_path / "w.safetensors")
