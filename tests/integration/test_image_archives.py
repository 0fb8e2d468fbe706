"""--data-path as `.tar` shards or a `.zip`: the same images in the same order, and the same store, bit for bit."""

import io
import os
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.image_batches import RandomViews
from dataset.image_folder import UnreadableImage, file_sizes, list_image_folder, load_rgb
from tests.tiny_extraction import arguments, contents, extract, make_images, make_tokenizer
from utils.program import UserError


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three classes, one with folders inside whose names sort otherwise than as parts of paths."""
    folder = make_images(tmp_path_factory.mktemp("images") / "train")
    for number, inside in enumerate(("b", "b-c", "b/d")):
        (folder / "bee" / inside).mkdir()
        (folder / f"bee/{number}.png").rename(folder / "bee" / inside / "0.png")
    (folder / "ant/notes.txt").write_text("no image")
    return folder


def shards(images: Path, folder: Path, count: int = 3) -> Path:
    """The images of a folder dealt out to so many shards, in no order."""
    folder.mkdir()
    files = sorted((path for path in images.rglob("*") if path.is_file()), key=lambda path: path.name)
    for number in range(count):
        with tarfile.open(folder / f"train-{number:04d}.tar", "w") as tar:
            for file in files[number::count]:
                tar.add(file, file.relative_to(images))
    return folder


def zipped(images: Path, path: Path, compression: int, top: str = "") -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(images.rglob("*"), reverse=True):
            if file.is_file():
                archive.write(file, Path(top) / file.relative_to(images))
    return path


@pytest.fixture(scope="module")
def forms(images, tmp_path_factory):
    """The same images four times over."""
    place = tmp_path_factory.mktemp("archives")
    return {
        "shards": shards(images, place / "shards"),
        "pattern": place / "shards" / "train-*.tar",
        "stored": zipped(images, place / "stored.zip", zipfile.ZIP_STORED),
        "deflated": zipped(images, place / "deflated.zip", zipfile.ZIP_DEFLATED, top="train"),
    }


FORMS = ("shards", "pattern", "stored", "deflated")


@pytest.mark.parametrize("form", FORMS)
def test_the_same_images_in_the_same_order(form, images, forms):
    expected, found = list_image_folder(images), list_image_folder(forms[form])
    assert found.class_names == expected.class_names
    assert list(found.paths) == list(expected.paths)
    assert found.labels.tolist() == expected.labels.tolist()
    assert file_sizes(found) == file_sizes(expected)
    for image in range(len(expected)):
        assert np.array_equal(load_rgb(found.path(image)), load_rgb(expected.path(image)))
    few = found.subset(np.array([3, 1]))
    assert np.array_equal(load_rgb(few.path(1)), load_rgb(expected.path(1)))
    views = [RandomViews(folder, 16, 0, True)((1, np.arange(4))) for folder in (expected, found)]
    assert torch.equal(*views)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "vq.pt")


def store(folder: Path) -> dict[str, bytes]:
    """All of a store but the note of where its images lay."""
    return {name: data for name, data in contents(folder).items() if not name.endswith("places.json")}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_store(form, images, forms, tokenizer, tmp_path, monkeypatch):
    extract(monkeypatch, arguments(images, tmp_path / "folder", tokenizer))
    extract(monkeypatch, arguments(forms[form], tmp_path / form, tokenizer, "--num-workers", 1))
    assert store(tmp_path / form) == store(tmp_path / "folder")


def test_a_broken_image_in_a_shard_is_met_as_in_a_folder(images, tokenizer, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    subprocess.run(["cp", "-r", images, broken], check=True)
    (broken / "cat/3.png").write_bytes(b"nothing")
    archives = zipped(broken, tmp_path / "broken.zip", zipfile.ZIP_DEFLATED)
    for name, place in (("folder", broken), ("zip", archives)):
        with pytest.raises(UserError, match=r"cat/3\.png \(not an image file\)"):
            extract(monkeypatch, arguments(place, tmp_path / name, tokenizer))
        extract(monkeypatch, arguments(place, tmp_path / name, tokenizer, "--skip-bad-images"))
    assert store(tmp_path / "zip") == store(tmp_path / "folder")
    repaired = tmp_path / "again"
    with pytest.raises(UserError):
        extract(monkeypatch, arguments(archives, repaired, tokenizer))
    archives.unlink()
    zipped(images, archives, zipfile.ZIP_STORED)  # the same command, the image repaired
    extract(monkeypatch, arguments(archives, repaired, tokenizer))
    extract(monkeypatch, arguments(images, tmp_path / "whole", tokenizer))
    assert store(repaired) == store(tmp_path / "whole")


def png(value: int) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (20, 20), (value, 0, 0)).save(file, "png")
    return file.getvalue()


def webdataset(path: Path, samples: dict[str, str | None]) -> Path:
    """A shard of flat samples with their class, if any, in a `.cls` file."""
    with tarfile.open(path, "w") as tar:
        for key, label in samples.items():
            for name, data in ((f"{key}.png", png(10)), (f"{key}.cls", label and label.encode())):
                if data is not None:
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return path


def test_classes_in_files_as_webdataset_has_them(tmp_path):
    webdataset(tmp_path / "0.tar", {"00": "10", "01": "2"})
    webdataset(tmp_path / "1.tar", {"02": "2\n"})
    folder = list_image_folder(tmp_path)
    assert folder.class_names == ["2", "10"]  # numbers by their value
    assert list(folder.paths) == ["2/01.png", "2/02.png", "10/00.png"]
    assert folder.labels.tolist() == [0, 0, 1]
    assert load_rgb(folder.path(2)).getpixel((0, 0)) == (10, 0, 0)


def test_refusals(images, tmp_path):
    def refused(path, message):
        with pytest.raises(UserError, match=message):
            list_image_folder(path)

    refused(webdataset(tmp_path / "none.tar", {"00": None}), "00.png in .* has no class")
    (tmp_path / "twice").mkdir()
    for number in range(2):
        webdataset(tmp_path / f"twice/{number}.tar", {"00": "1"})
    refused(tmp_path / "twice", "holds 1/00.png twice")
    (tmp_path / "text.zip").write_text("no zip")
    refused(tmp_path / "text.zip", "is damaged or no .zip")
    zipped(images, tmp_path / "whole.zip", zipfile.ZIP_STORED)
    content = (tmp_path / "whole.zip").read_bytes()
    directory, end = content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")
    for place, value in ((directory + 6, 0xFF), (end + 15, 0x7F)):
        (tmp_path / "text.zip").write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
        refused(tmp_path / "text.zip", "is damaged or no .zip")
    with zipfile.ZipFile(tmp_path / "text.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("00.png", png(10))
        archive.writestr("00.cls", "1" * 99)
        place = archive.getinfo("00.cls").header_offset + 30 + len("00.cls")
    content = bytearray((tmp_path / "text.zip").read_bytes())
    content[place] ^= 6  # no such kind of block
    (tmp_path / "text.zip").write_bytes(content)
    refused(tmp_path / "text.zip", "is damaged or no .zip")
    cut = tmp_path / "cut.tar"
    cut.write_bytes(
        webdataset(tmp_path / "whole.tar", {f"{number:02d}": "1" for number in range(9)}).read_bytes()[:9000]
    )
    refused(cut, "is damaged or no .tar")
    (tmp_path / "file.txt").write_text("")
    refused(tmp_path / "file.txt", "is a file; --data-path is a folder of images per class, a .zip, or .tar shards")
    zipped(images, tmp_path / "bzip2.zip", zipfile.ZIP_BZIP2)
    refused(tmp_path / "bzip2.zip", "zip the folder again")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    refused(tmp_path / "empty.zip", "holds no images")


def test_links_in_tar_shards_are_the_files_they_lead_to(tmp_path, capsys):
    (tmp_path / "images/ant").mkdir(parents=True)
    (tmp_path / "images/ant/0.png").write_bytes(png(10))
    os.link(tmp_path / "images/ant/0.png", tmp_path / "images/ant/1.png")
    os.symlink("0.png", tmp_path / "images/ant/2.png")
    os.symlink("2.png", tmp_path / "images/ant/3.png")
    os.symlink("/elsewhere.png", tmp_path / "images/ant/4.png")
    os.symlink("ant", tmp_path / "images/bee")
    os.mkfifo(tmp_path / "images/ant/5.png")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(tmp_path / "images", ".")
    folder = list_image_folder(tmp_path / "shard.tar")
    assert list(folder.paths) == [f"ant/{number}.png" for number in range(6)]
    assert [load_rgb(folder.path(number)).getpixel((0, 0)) for number in range(4)] == [(10, 0, 0)] * 4
    for number in (4, 5):
        with pytest.raises(UnreadableImage, match="not a regular file"):
            load_rgb(folder.path(number))
    assert [size for _, size in file_sizes(folder)][4:] == [-1, -1]
    assert capsys.readouterr().err.splitlines() == [
        f"note: {tmp_path}/shard.tar: 1 links in it, to a folder or to nothing, are left out, such as bee",
        f"note: {tmp_path}/shard.tar: 3 images are there more than once, through links, such as ant/1.png",
    ]


def test_hidden_entries_of_archives_are_left_out(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "mac.zip", "w") as archive:
        for name in ("ant/0.png", "__MACOSX/ant/._0.png", "ant/.thumbnails/0.png"):
            archive.writestr(name, png(10))
    assert list(list_image_folder(tmp_path / "mac.zip").paths) == ["ant/0.png"]
    assert "2 hidden files or folders are left out" in capsys.readouterr().err
