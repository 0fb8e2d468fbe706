"""The code store: both layouts behind one reader, its writer, and every way in which a folder can be wrong."""

import json

import numpy as np
import pytest

from dataset.code_store import CodeStore, PublishedStore, find_stores, open_store, partial_folder, store_folder
from dataset.code_writer import codes_dtype, write_published
from tests.stores import make_store, random_codes
from utils.program import UserError


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "codes" / "toy16_codes"


def published(folder, count=6, crops=10, tokens=16, seed=3):
    """The published layout as its extraction left it: no description, int64, one file an image."""
    codes = random_codes(count, crops, (1, tokens), seed=seed).astype(np.int64)
    labels_folder = folder.parent / folder.name.replace("_codes", "_labels")
    folder.mkdir(parents=True)
    labels_folder.mkdir()
    for image in range(count):
        np.save(folder / f"{image}.npy", codes[image : image + 1])
        np.save(labels_folder / f"{image}.npy", np.array([image % 3]))
    return codes


@pytest.mark.parametrize("shards", [(), (1, 12, 7)])
def test_packed_store_returns_what_was_written(folder, shards):
    make_store(folder, shards=shards)
    store = open_store(folder)
    codes = random_codes(20)
    images, crops = np.array([19, 0, 3, 3, 12, 1]), np.array([9, 0, 4, 5, 1, 2])
    np.testing.assert_array_equal(store.codes(images, crops), codes[images, crops])
    np.testing.assert_array_equal(np.concatenate([block for _, block in store.blocks(6)]), codes)
    np.testing.assert_array_equal(store.labels, np.arange(20) % 4)
    assert store.codes(images, crops).dtype == np.uint16
    assert store.sources()[3] == ("class_3/3.png", 103)
    assert [shard["count"] for shard in store.meta.shards] == list(shards or (20,))
    assert (store.meta.grid, store.meta.tokens, len(store)) == ((4, 4), 16, 20)


def test_large_codebook_gets_wider_codes(folder):
    store = make_store(folder, codebook_size=1 << 18)
    assert store.codes(np.arange(3), np.zeros(3)).dtype == np.uint32
    assert store.codes(np.arange(20), np.zeros(20)).max() > 1 << 16
    assert (codes_dtype(1 << 16), codes_dtype((1 << 16) + 1)) == ("uint16", "uint32")


def test_images_and_crops_outside_the_store_are_refused(folder):
    store = make_store(folder)
    for image, crop in ((20, 0), (-1, 0), (0, 10), (0, -1)):
        with pytest.raises(IndexError):
            store.codes(np.array([image]), np.array([crop]))


def test_published_folder_is_read(folder):
    codes = published(folder)
    store = open_store(folder)
    assert isinstance(store, PublishedStore)
    assert (store.meta.count, store.meta.crops, store.meta.grid, store.meta.image_size) == (6, 10, (4, 4), 16)
    np.testing.assert_array_equal(store.codes(np.array([5, 2]), np.array([9, 0])), codes[[5, 2], [9, 0]])
    np.testing.assert_array_equal(store.block(1, 4), codes[1:4])
    np.testing.assert_array_equal(store.labels, [0, 1, 2, 0, 1, 2])


def test_published_folder_written_here_has_the_published_shapes(folder, tmp_path):
    store = make_store(folder)
    write_published(tmp_path / "out" / "toy16_codes", store)
    one = np.load(tmp_path / "out" / "toy16_codes" / "7.npy")
    label = np.load(tmp_path / "out" / "toy16_labels" / "7.npy")
    assert (one.shape, one.dtype, label.shape, label.dtype) == ((1, 10, 16), np.int64, (1,), np.int64)
    reread = open_store(tmp_path / "out" / "toy16_codes")
    assert reread.meta.tokenizer == store.meta.tokenizer
    np.testing.assert_array_equal(reread.block(0, 20), store.block(0, 20))


def test_find_stores_names_the_sizes_that_are_there(folder):
    make_store(folder)
    make_store(folder.with_name("toy24_codes"), image_size=24, grid=(6, 6))
    assert find_stores(folder.parent, "toy_code", 24)[0].meta.image_size == 24
    with pytest.raises(UserError, match=r"toy at image size 16, 24, not 32; use --image-size 16 or extract at 32"):
        find_stores(folder.parent, "toy_code", 32)
    with pytest.raises(UserError, match="holds no codes of other .*run extract_codes_c2i.sh"):
        find_stores(folder.parent, "other", 32)
    with pytest.raises(UserError, match="there is no folder .*nowhere"):
        find_stores(folder.parent / "nowhere", "toy", 16)


def test_unfinished_extraction_is_not_a_store(folder):
    partial_folder(folder).mkdir(parents=True)
    with pytest.raises(UserError, match="unfinished; run the same extract_codes_c2i.sh"):
        find_stores(folder.parent, "toy", 16)


@pytest.mark.parametrize("named", [False, True])
def test_second_crop_range(tmp_path, named):
    first = tmp_path / "imagenet_ten_crop"
    second = tmp_path / ("elsewhere" if named else "imagenet_ten_crop_105")
    make_store(store_folder(first, "toy", 16))
    assert len(find_stores(first, "toy_code", 16)) == 1
    make_store(store_folder(second, "toy", 16), crop_range=1.05)
    stores = find_stores(first, "toy_code", 16, second_code_path=second if named else None)
    assert [store.meta.crop_range for store in stores] == [1.1, 1.05]


def test_second_crop_range_that_was_named_must_exist(folder, tmp_path):
    make_store(folder)
    with pytest.raises(UserError, match="there is no folder"):
        find_stores(folder.parent, "toy", 16, second_code_path=tmp_path / "missing")


def truncate_shard(folder):
    path = folder / "codes-00000.npy"
    path.write_bytes(path.read_bytes()[:-10])


def remove_shard(folder):
    (folder / "codes-00000.npy").unlink()


def edit_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **changes}))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (truncate_shard, "damaged or incomplete"),
        (remove_shard, "is missing"),
        (lambda folder: (folder / "meta.json").write_text("{"), "is damaged"),
        (lambda folder: edit_meta(folder, version=99), "newer than this program"),
        (lambda folder: edit_meta(folder, count=19), "another number of images"),
        (lambda folder: edit_meta(folder, crops=5), "says uint16"),
        (lambda folder: edit_meta(folder, layout="other"), "is damaged"),
        (lambda folder: edit_meta(folder, surprise=1), "is damaged"),
        (lambda folder: edit_meta(folder, count="20"), "is damaged"),
        (lambda folder: edit_meta(folder, dtype="O"), "is damaged"),
        (lambda folder: edit_meta(folder, shards={}), "is damaged"),
        (lambda folder: edit_meta(folder, shards=[{"file": "codes-00000.npy", "count": 20}]), "damaged .'sha256'"),
        (lambda folder: (folder / "meta.json").unlink(), "no code store"),
    ],
)
def test_damaged_store_is_refused_in_a_sentence(folder, damage, sentence):
    make_store(folder)
    damage(folder)
    with pytest.raises(UserError, match=sentence):
        open_store(folder)


def test_pickled_codes_are_never_unpickled(folder):
    published(folder)
    np.save(folder / "0.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(UserError, match="damaged"):
        open_store(folder)


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.zeros((1, 10, 15), np.int64), "not a square grid"),
        (np.zeros((10, 16), np.int64), r"not \(1, crops, codes\)"),
        (np.zeros((1, 10, 16)), r"not \(1, crops, codes\)"),
    ],
)
def test_foreign_files_are_refused(folder, array, sentence):
    published(folder)
    np.save(folder / "0.npy", array)
    with pytest.raises(UserError, match=sentence):
        open_store(folder)


def test_published_folder_whose_name_has_no_size_is_refused(folder):
    published(folder.with_name("toy_codes"))
    with pytest.raises(UserError, match="does not say its image size; rename it"):
        open_store(folder.with_name("toy_codes"))


def test_published_folder_with_gaps_or_without_labels_is_refused(folder):
    published(folder)
    (folder / "3.npy").unlink()
    with pytest.raises(UserError, match="has gaps: 5 files, the last 5.npy"):
        open_store(folder)
    (folder.parent / "toy16_labels").rename(folder.parent / "gone")
    (folder / "4.npy").unlink()
    (folder / "5.npy").unlink()
    with pytest.raises(UserError, match="no labels beside it"):
        open_store(folder)


def test_opening_a_packed_store_reads_no_codes(folder, monkeypatch):
    """A store opens by mapping its shards: the rows are not touched."""
    make_store(folder)
    maps = []
    load = np.load
    monkeypatch.setattr(np, "load", lambda *args, **kw: maps.append(kw.get("mmap_mode")) or load(*args, **kw))
    assert isinstance(open_store(folder), CodeStore)
    assert maps == ["r"]


def test_a_taken_name_is_not_overwritten(folder):
    make_store(folder)
    with pytest.raises(UserError, match="exists already"):
        make_store(folder)


def test_damaged_labels_in_the_way_are_others(folder, tmp_path):
    store = make_store(folder)
    (tmp_path / "other16_labels").mkdir()
    (tmp_path / "other16_labels" / "0.npy").write_bytes(b"")
    with pytest.raises(UserError, match="other16_labels exists already and holds other labels"):
        write_published(tmp_path / "other16_codes", store)
