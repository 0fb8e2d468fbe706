"""Folders as they lie on disks: hidden entries, symlinks in circles, images that are there twice."""

import os

import pytest
from PIL import Image

from dataset.image_archives import archives_at
from dataset.image_folder import UnreadableImage, list_image_folder, load_rgb
from evaluations.c2i.image_sets import open_images


@pytest.fixture
def images(tmp_path):
    """Two classes of two images each."""
    for name in ("ant/0.png", "ant/1.png", "bee/0.png", "bee/1.png"):
        write(tmp_path / "images" / name)
    return tmp_path / "images"


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def test_hidden_files_and_folders_are_left_out_and_counted(images, capsys):
    plain = list(list_image_folder(images).paths)
    assert capsys.readouterr().err == ""
    for name in (".ipynb_checkpoints", ".git", "@eaDir", "__MACOSX", "ant/.ipynb_checkpoints", "bee/@eaDir"):
        write(images / name / "0.png")
    write(images / "ant/._0.png")
    (images / ".DS_Store").write_text("no image, not worth a word")
    folder = list_image_folder(images)
    assert (folder.class_names, list(folder.paths)) == (["ant", "bee"], plain)
    assert capsys.readouterr().err == (
        f"note: {images}: 7 hidden files or folders are left out, such as .git\n"  # the least of their names
    )
    assert open_images(images).count == 4


def test_symlinks_in_circles_are_left_out_and_counted(images, capsys):
    plain = list(list_image_folder(images).paths)
    (images / "ant" / "again").symlink_to(".")
    (images / "bee" / "up").symlink_to("../..")
    (images / "self").symlink_to(".")
    (images / "nowhere").symlink_to("nowhere")  # to itself
    folder = list_image_folder(images)
    assert (folder.class_names, list(folder.paths)) == (["ant", "bee"], plain)
    said = capsys.readouterr().err
    assert (
        said == f"note: {images}: 3 symlinks that lead back to a folder around them are left out, such as ant/again\n"
    )
    assert open_images(images).count == 4


def test_images_that_are_there_twice_through_symlinks_are_counted(images, tmp_path, capsys):
    (images / "ant_too").symlink_to("ant")
    (images / "bee" / "2.png").symlink_to("1.png")
    write(tmp_path / "elsewhere.png")
    for number in (3, 4):
        (images / "bee" / f"{number}.png").symlink_to(tmp_path / "elsewhere.png")
    assert len(list_image_folder(images)) == 9
    note = f"note: {images}: 4 images are there more than once, through links, such as ant_too/0.png\n"
    assert capsys.readouterr().err == note
    assert open_images(images).count == 9  # the evaluator's set is the extraction's


def test_folders_that_link_to_each_other_do_not_multiply(images, capsys):
    names = [f"sort_{number}" for number in range(7)]
    for name in names:
        write(images / "ant" / name / "0.png")
        for other in set(names) - {name}:
            (images / "ant" / name / other).symlink_to(f"../{other}")
    count = len(list_image_folder(images))
    assert 4 + len(names) <= count < 100  # 13,700 paths lead to them
    assert "symlinks to folders that are listed already are left out" in capsys.readouterr().err


def test_only_the_main_rank_tells(images, capsys, monkeypatch):
    write(images / ".hidden" / "0.png")
    monkeypatch.setenv("RANK", "1")
    list_image_folder(images)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path), os.mkdir])
def test_only_regular_files_are_images(tmp_path, make):
    make(tmp_path / "0.png")
    with pytest.raises(UnreadableImage, match="not a regular file"):
        load_rgb(tmp_path / "0.png")


def test_the_evaluator_does_not_wait_for_a_pipe(images):
    os.mkfifo(images / "bee" / "2.png")
    with pytest.raises(UnreadableImage, match="not a regular file"):
        list(open_images(images).batches(2))


def test_a_symlink_to_itself_is_a_broken_image(tmp_path):
    (tmp_path / "0.png").symlink_to("0.png")
    with pytest.raises(UnreadableImage, match="symbolic links"):
        load_rgb(tmp_path / "0.png")


def test_hidden_folders_beside_shards_leave_them_shards(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / "0.tar").write_bytes(b"")
    os.mkfifo(tmp_path / "1.tar")
    assert archives_at(tmp_path) == [tmp_path / "0.tar"]
