"""The file that fills with images and becomes an `.npz`: complete or absent, identical however often interrupted."""

import os
import shutil
import tracemalloc
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import image_store
from dataset.image_store import ImageStore
from utils.program import UserError

SETTINGS = {"seed": 0, "cfg_scale": 2.0}
IMAGES = np.random.RandomState(0).randint(0, 256, (10, 4, 4, 3), dtype=np.uint8)
LABELS = np.arange(10)


def make(folder: Path) -> bytes:
    """What a run does from wherever an earlier one stopped; the bytes of its result."""
    store = ImageStore(folder, "name", SETTINGS, 10, 4)
    if not store.is_complete():
        store.open(4)
        done = store.done()
        for start in (0, 4, 8):
            if not done[start : start + 4].all():
                store.write(start, np.resize(IMAGES[start : start + 4], (4, 4, 4, 3)))
        store.finish(LABELS, {"batch_size": 4})
    store.remove_partial()
    return store.result.read_bytes()


def test_the_result_is_what_numpy_reads(tmp_path):
    make(tmp_path)
    with np.load(tmp_path / "name.npz", allow_pickle=False) as result:
        assert np.array_equal(result["arr_0"], IMAGES)
        assert np.array_equal(result["labels"], LABELS)
    with zipfile.ZipFile(tmp_path / "name.npz") as archive:
        assert archive.testzip() is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["name.npz", "name.settings.json"]


class Stop(BaseException):
    """Ends a run at once, as a signal does; nothing catches it."""


def make_until(folder: Path, step: int) -> bool:
    """Run, but stop before the `step`-th operation that changes the disk; whether there are that many."""
    calls = 0

    def stopping(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == step:
                raise Stop
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (os, "fsync"),
            (os, "replace"),
            (shutil, "rmtree"),
            (image_store, "write_json"),
            (zipfile.ZipFile, "open"),
        ):
            patch.setattr(owner, name, stopping(getattr(owner, name)))
        try:
            make(folder)
        except Stop:
            return True
    return False


def test_interrupted_at_every_step_on_the_disk(tmp_path):
    """Then run again: the same bytes, and never a part of them under the final name."""
    expected = make(tmp_path / "whole")
    step = 1
    while make_until(tmp_path / str(step), step):
        result = tmp_path / str(step) / "name.npz"
        assert not result.exists() or result.read_bytes() == expected
        assert make(result.parent) == expected
        assert not (result.parent / "name.partial").exists()
        step += 1
    assert step > 20


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    count, size = 400, 256  # 75 MiB of images
    store = ImageStore(tmp_path, "name", SETTINGS, count, size)
    store.open(8)
    batch = np.zeros((8, size, size, 3), dtype=np.uint8)
    tracemalloc.start()
    for start in range(0, count, 8):
        store.write(start, batch)
    store.finish(np.zeros(count, dtype=np.int64), {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20


def test_images_are_read_back_at_their_places(tmp_path):
    store = ImageStore(tmp_path, "name", SETTINGS, 10, 4)
    store.open(4)
    store.write(4, IMAGES[4:8])
    assert store.done().tolist() == [False] * 4 + [True] * 4 + [False] * 2
    assert np.array_equal(store.images(np.array([7, 5])), IMAGES[[7, 5]])
    assert store.recorded_batch_size() == 4


def test_results_and_unfinished_runs_of_others_are_refused(tmp_path):
    make(tmp_path)
    other = ImageStore(tmp_path, "name", SETTINGS | {"seed": 1}, 10, 4)
    with pytest.raises(UserError, match=r"seed \(0 there, 1 here\)"):
        other.is_complete()
    (tmp_path / "name.settings.json").unlink()
    with pytest.raises(UserError, match="without the .settings.json"):
        other.is_complete()
    ImageStore(tmp_path, "unfinished", SETTINGS, 10, 4).open(4)
    with pytest.raises(UserError, match=r"seed \(0 there, 1 here\)"):
        ImageStore(tmp_path, "unfinished", SETTINGS | {"seed": 1}, 10, 4).open(4)


def test_an_incomplete_store_does_not_become_a_result(tmp_path):
    store = ImageStore(tmp_path, "name", SETTINGS, 10, 4)
    store.open(4)
    store.write(0, IMAGES[:4])
    with pytest.raises(RuntimeError, match="6 of the 10 images"):
        store.finish(LABELS, {})
    assert not store.result.exists()


def test_a_second_job_is_refused_while_the_first_writes(tmp_path):
    first = ImageStore(tmp_path, "name", SETTINGS, 10, 4)
    first.open(4)
    with pytest.raises(UserError, match="another process is writing .*name.partial; wait for it, or give another --x"):
        ImageStore(tmp_path, "name", SETTINGS, 10, 4, "give another --x").open(4)
    first.remove_partial()
    ImageStore(tmp_path, "name", SETTINGS, 10, 4).open(4)


def test_a_result_that_another_process_has_made_meanwhile_is_not_made_again(tmp_path):
    late = ImageStore(tmp_path, "name", SETTINGS, 10, 4)
    assert not late.is_complete()
    result = make(tmp_path)
    with pytest.raises(UserError, match="another process has just finished .*name.npz; run the same command again"):
        late.open(4)
    assert not late.partial.exists()
    assert late.is_complete()
    assert late.result.read_bytes() == result


def test_png_files_come_from_the_result_and_once(tmp_path):
    make(tmp_path)
    store = ImageStore(tmp_path, "name", SETTINGS, 10, 4)
    store.write_pngs()
    for index, image in enumerate(IMAGES):
        with Image.open(tmp_path / f"name/{index:06d}.png") as png:
            assert np.array_equal(np.asarray(png), image)
    written = (tmp_path / "name/000003.png").stat().st_mtime_ns
    store.write_pngs()
    assert (tmp_path / "name/000003.png").stat().st_mtime_ns == written
    assert not list(tmp_path.glob("*.partial"))


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(UserError, match="is a file, not a folder"):
            ImageStore(folder, "name", SETTINGS, 10, 4).is_complete()


def unfinished(folder: Path) -> ImageStore:
    """A run that was interrupted after eight of ten images."""
    store = ImageStore(folder, "name", SETTINGS, 10, 4)
    store.open(4)
    for start in (0, 4):
        store.write(start, IMAGES[start : start + 4])
    store._lock.close()
    return ImageStore(folder, "name", SETTINGS, 10, 4)


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "place", "kept"),
    [
        ("images.u8", cut, 5 * 48 + 7, [0, 1, 2, 3, 4]),
        ("images.u8", cut, 0, []),
        ("images.u8", flip, 48, [0, 2, 3, 4, 5, 6, 7]),
        ("sums.u32", cut, 8, [0, 1]),
        ("sums.u32", flip, 3, [1, 2, 3, 4, 5, 6, 7]),
        ("sums.u32", flip, 39, [0, 1, 2, 3, 4, 5, 6, 7]),  # of an image that is not there yet
        ("sums.u32", lambda path, _: path.unlink(), 0, []),
    ],
)
def test_damaged_images_of_an_interrupted_run_are_made_again(tmp_path, capsys, name, damage, place, kept):
    store = unfinished(tmp_path)
    damage(store.partial / name, place)
    store.open(4)
    assert np.flatnonzero(store.done()).tolist() == kept
    unknown = name == "sums.u32" and damage is not flip
    told = f"of {10 - len(kept)} images cannot be checked" if unknown else "are damaged or were cut off"
    assert told in capsys.readouterr().out
    store._lock.close()
    make(tmp_path)
    assert np.array_equal(np.load(tmp_path / "name.npz")["arr_0"], IMAGES)


@pytest.mark.parametrize(
    ("name", "damage", "place"), [("images.u8", cut, 450), ("images.u8", flip, 48), ("sums.u32", cut, 36)]
)
def test_images_damaged_during_the_run_do_not_become_a_result(tmp_path, name, damage, place):
    store = unfinished(tmp_path)
    store.open(4)
    store.write(8, IMAGES[8:])
    damage(store.partial / name, place)
    with pytest.raises((UserError, RuntimeError), match="1 images in .* were damaged on the disk|1 of the 9 images"):
        store.finish(LABELS, {})
    assert not store.result.exists()
    store._lock.close()
    make(tmp_path)
    assert np.array_equal(np.load(tmp_path / "name.npz")["arr_0"], IMAGES)


def test_a_damaged_result_is_not_complete(tmp_path):
    make(tmp_path)
    store = ImageStore(tmp_path, "name", SETTINGS, 10, 4)
    cut(store.result, 300)
    with pytest.raises(UserError, match="name.npz is damaged or cut off; remove it"):
        store.is_complete()
    store.report.write_text('{"settings": []}')
    with pytest.raises(UserError, match="the settings kept with .*name.npz are damaged; move it away"):
        store.is_complete()
    store.report.write_text('{"settings": ')
    with pytest.raises(UserError, match="name.settings.json is damaged .*move .*name.npz away"):
        store.is_complete()


def test_every_bit_of_a_results_directory_may_be_wrong(tmp_path):
    make(tmp_path)
    store = ImageStore(tmp_path, "name", SETTINGS, 10, 4)
    whole = store.result.read_bytes()
    for place in range(whole.index(b"PK\x01\x02"), len(whole)):
        store.result.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with suppress(UserError):
            store.is_complete()
        with suppress(UserError):
            store.write_pngs()


def test_pngs_of_a_damaged_result_are_not_pngs(tmp_path):
    make(tmp_path)
    store = ImageStore(tmp_path, "name", SETTINGS, 10, 4)
    flip(store.result, 300)
    with pytest.raises(UserError, match="name.npz is damaged; remove it"):
        store.write_pngs()
    assert not store.png_folder.exists()


def test_a_garbled_run_file_is_named(tmp_path):
    store = unfinished(tmp_path)
    for content, reason in (("{", "Expecting"), ("[]", "no object"), ('{"settings": {}}', "no batch_size")):
        (store.partial / "run.json").write_text(content)
        with pytest.raises(UserError, match=f"run.json is damaged .*{reason}.*remove .*name.partial to start anew"):
            store.recorded_batch_size()


def test_a_run_that_keeps_nothing_starts_anew_without_looking(tmp_path, capsys):
    store = unfinished(tmp_path)
    flip(store.partial / "images.u8", 48)
    store.open(4, keep=False)
    assert not store.done().any()
    assert capsys.readouterr().out == ""
