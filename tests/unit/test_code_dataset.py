"""Training batches: draws by counters, the same global batch for any world size and any starting step."""

import itertools
import threading

import numpy as np
import pytest
import torch

from dataset.code_dataset import CodeDataset, CodeLoader
from dataset.code_store import open_store
from dataset.code_writer import write_packed
from dataset.conditions import conditions_identity, open_conditions
from dataset.order import counter_hash, epoch_order
from tests.stores import make_store, random_codes
from utils.program import UserError


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "toy16_codes", count=23)


def take(loader, count):
    return list(itertools.islice(iter(loader), count))


def equal(batches, others):
    return all(
        torch.equal(a, b) for one, other in zip(batches, others, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_counter_hash_is_fixed_and_uniform():
    """The figures are part of the format: another stream would break resuming older runs."""
    expected = np.array([746384585109428344, 12308035827897697970, 12569080381346146386], np.uint64)
    np.testing.assert_array_equal(counter_hash(7, 1, 3, np.arange(3)), expected)
    bits = counter_hash(0, 1, 0, np.arange(100_000))
    assert abs((bits / 2.0**64).mean() - 0.5) < 0.005
    assert len(np.unique(bits)) == 100_000
    assert not np.array_equal(counter_hash(0, 1, 1, np.arange(10)), bits[:10])
    assert not np.array_equal(counter_hash(1, 1, 0, np.arange(10)), bits[:10])
    assert not np.array_equal(counter_hash(0, 0, 0, np.arange(10)), bits[:10])


def test_epoch_order_is_a_permutation_and_changes():
    order = epoch_order(1000, 0, seed=0)
    np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    np.testing.assert_array_equal(order, epoch_order(1000, 0, seed=0))
    assert not np.array_equal(order, epoch_order(1000, 1, seed=0))
    assert not np.array_equal(order, epoch_order(1000, 0, seed=1))


def test_batch_holds_one_crop_of_each_image(store):
    dataset = CodeDataset([store], seed=5)
    images = np.array([22, 3, 3, 10])
    codes, labels = dataset.batch(4, images)
    _, crops = dataset.draw(4, images)
    np.testing.assert_array_equal(codes, random_codes(23)[images, crops].astype(np.int64))
    np.testing.assert_array_equal(labels, images % 4)
    assert (codes.dtype, labels.dtype) == (torch.int64, torch.int64)


def test_crops_are_drawn_evenly_and_anew_each_epoch(store):
    dataset = CodeDataset([store])
    images = np.arange(23)
    crops = np.stack([dataset.draw(epoch, images)[1] for epoch in range(1000)])
    shares = np.bincount(crops.ravel(), minlength=10) / crops.size
    assert np.abs(shares - 0.1).max() < 0.01
    assert abs(np.corrcoef(crops[:, 0], crops[:, 1])[0, 1]) < 0.12
    assert abs(np.corrcoef(crops[:-1].ravel(), crops[1:].ravel())[0, 1]) < 0.03


def test_stores_are_mixed_by_weight(store, tmp_path):
    other = make_store(tmp_path / "b" / "toy16_codes", count=23, seed=9, crop_range=1.05)
    dataset = CodeDataset([store, other], weights=[3, 1])
    images = np.arange(23)
    chosen = np.stack([dataset.draw(epoch, images)[0] for epoch in range(1000)])
    assert abs(chosen.mean() - 0.25) < 0.01
    codes, _ = dataset.batch(0, images)
    store_of, crops = dataset.draw(0, images)
    both = np.stack([random_codes(23), random_codes(23, seed=9)])
    np.testing.assert_array_equal(codes, both[store_of, images, crops].astype(np.int64))


def test_without_augmentation_it_is_the_centre_crop(store, tmp_path):
    codes, _ = CodeDataset([store], augment=False).batch(0, np.arange(23))
    np.testing.assert_array_equal(codes, random_codes(23)[:, 4].astype(np.int64))
    two = make_store(tmp_path / "two" / "toy16_codes", crops=2)
    codes, _ = CodeDataset([two], augment=False).batch(0, np.arange(20))
    np.testing.assert_array_equal(codes, random_codes(20, crops=2)[:, 0].astype(np.int64))


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_global_batches_do_not_depend_on_the_world(store, world_size, resident):
    dataset = CodeDataset([store], seed=1)
    one = take(CodeLoader(dataset, 6, 0, 1, seed=1), 9)
    shares = [
        take(CodeLoader(dataset, 6, rank, world_size, seed=1, resident=resident), 9) for rank in range(world_size)
    ]
    joined = [tuple(torch.cat(parts) for parts in zip(*batches, strict=True)) for batches in zip(*shares, strict=True)]
    assert equal(one, joined)


def test_any_step_can_be_the_first(store):
    dataset = CodeDataset([store], seed=1)
    straight = take(CodeLoader(dataset, 5, seed=1), 13)
    assert equal(straight[7:], take(CodeLoader(dataset, 5, seed=1, start_step=7), 6))


def test_an_epoch_visits_each_image_once_and_drops_the_rest(store):
    loader = CodeLoader(CodeDataset([store]), 5)
    assert loader.order.steps_per_epoch == 4
    for epoch in (0, 1, 2):
        visits = [loader.order.indices(step) for step in range(4 * epoch, 4 * epoch + 4)]
        assert {number for number, _ in visits} == {epoch}
        images = np.concatenate([images for _, images in visits])
        assert len(np.unique(images)) == 20


@pytest.mark.parametrize("codebook_size", [64, 40_000, 1 << 16, 100_000])
def test_large_codes_survive_the_signed_transport(tmp_path, codebook_size):
    store = make_store(tmp_path / "toy16_codes", codebook_size=codebook_size)
    dataset = CodeDataset([store])
    for resident in (False, True):
        loader = CodeLoader(dataset, 20, resident=resident)
        (codes, labels), *_ = take(loader, 1)
        expected = dataset.batch(*loader.order.indices(0))
        assert torch.equal(codes, expected[0])
        assert torch.equal(labels, expected[1])
        assert codes.max() > 0.9 * codebook_size
    assert codes.min() >= 0


def test_resident_codes_of_several_stores(store, tmp_path):
    other = make_store(tmp_path / "b" / "toy16_codes", count=23, seed=9, crops=2)
    dataset = CodeDataset([store, other], weights=[1, 2])
    assert equal(take(CodeLoader(dataset, 23), 3), take(CodeLoader(dataset, 23, resident=True), 3))


def test_sequential_batches_visit_every_image_on_one_rank(store):
    dataset = CodeDataset([store], augment=False)
    parts = [list(dataset.sequential_batches(4, rank, 3)) for rank in range(3)]
    labels = torch.cat([labels for part in parts for _, labels in part])
    assert sorted(labels.tolist()) == sorted((np.arange(23) % 4).tolist())
    assert all(len(labels) <= 4 for part in parts for _, labels in part)


def test_stopping_early_ends_the_thread(store):
    before = set(threading.enumerate())
    batches = iter(CodeLoader(CodeDataset([store]), 5))
    next(batches)
    (own,) = set(threading.enumerate()) - before
    batches.close()
    assert not own.is_alive()


def test_an_error_while_gathering_reaches_the_consumer(store, monkeypatch):
    dataset = CodeDataset([store])
    monkeypatch.setattr(dataset, "codes_of", lambda *_: (_ for _ in ()).throw(UserError("the disk is gone")))
    with pytest.raises(UserError, match="the disk is gone"):
        take(CodeLoader(dataset, 5), 1)


def test_impossible_batches_are_refused(store):
    dataset = CodeDataset([store])
    with pytest.raises(UserError, match="larger than the 23 images"):
        CodeLoader(dataset, 24)
    with pytest.raises(UserError, match="not divisible by 2 processes"):
        CodeLoader(dataset, 5, 0, 2)
    for weights in ([1], [1, -1], [0, 0]):
        with pytest.raises(UserError, match="as many weights"):
            CodeDataset([store, store], weights=weights)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"count": 22}, "images"),
        ({"grid": (2, 8)}, "grid"),
        ({"codebook_size": 60}, "codebook_size"),
        ({"num_classes": 3}, "class_names"),
    ],
)
def test_stores_of_different_images_are_not_mixed(store, tmp_path, change, what):
    other = make_store(tmp_path / "b" / "toy16_codes", **{"count": 23, **change})
    with pytest.raises(UserError, match=f"cannot be mixed: .* other settings: {what} .*extract both"):
        CodeDataset([store, other])


def without_sources(store, folder, labels=None):
    """The same codes as packed from a published folder, which does not list its images."""
    write_packed(folder, store.meta, store.block, store.labels if labels is None else labels)
    return open_store(folder)


def test_stores_without_a_list_of_images_are_compared_by_their_labels(store, tmp_path):
    unlisted = without_sources(store, tmp_path / "b" / "toy16_codes")
    assert len(CodeDataset([store, unlisted])) == len(CodeDataset([unlisted, unlisted])) == 23
    others = without_sources(store, tmp_path / "c" / "toy16_codes", np.roll(store.labels, 1))
    for first in (store, unlisted):
        with pytest.raises(UserError, match="cannot be mixed: .* other settings: labels"):
            CodeDataset([first, others])


@pytest.fixture(params=[np.float32, np.float16, np.int32])
def conditions(request, tmp_path):
    """(23, 2, 3) conditions of one row per image, as they lie on the disk."""
    np.save(tmp_path / "conditions.npy", np.arange(23 * 6).reshape(23, 2, 3).astype(request.param))
    return open_conditions(tmp_path / "conditions.npy", 23)


@pytest.mark.parametrize("resident", [False, True])
def test_conditions_take_the_place_of_the_labels(store, conditions, resident):
    dataset = CodeDataset([store], seed=1, conditions=conditions)
    dtype = torch.int64 if conditions.dtype == np.int32 else torch.float32
    loader = CodeLoader(dataset, 6, seed=1, resident=resident)
    labelled = take(CodeLoader(CodeDataset([store], seed=1), 6, seed=1), 5)
    for step, (codes, given) in enumerate(take(loader, 5)):
        epoch, images = loader.order.indices(step)
        assert torch.equal(given, torch.from_numpy(conditions[images]).to(dtype))
        assert given.dtype == dtype
        assert torch.equal(codes, labelled[step][0])
        assert equal([(codes, given)], [dataset.batch(epoch, images)])


def test_conditions_are_validated_on_in_order(store, conditions):
    parts = [
        list(CodeDataset([store], augment=False, conditions=conditions).sequential_batches(4, r, 3)) for r in range(3)
    ]
    for rank, part in enumerate(parts):
        given = torch.cat([given for _, given in part])
        np.testing.assert_array_equal(given, conditions[rank::3])


def test_conditions_have_an_identity(conditions):
    same, copy = conditions_identity(conditions), np.array(conditions)
    assert conditions_identity(copy) == same
    copy[22, 1, 2] += 1
    others = (copy, conditions[:22], conditions.reshape(23, 6), conditions.astype(np.float64))
    assert same not in {conditions_identity(other) for other in others}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "there is no file"),
        (b"no array", "not a complete .npy file"),
        (np.zeros((22, 3)), "has 22 rows, but there are 23 images"),
        (np.zeros(()), "has 0 rows"),
        (np.full((23, 3), np.nan), "not finite"),
        (np.array(["a"] * 23), "holds <U1; conditions are one array of floats or integers"),
        (np.zeros(23, bool), "holds bool"),
        (np.array([{}] * 23), "not a complete .npy file"),
    ],
)
def test_unusable_conditions_are_refused_in_a_sentence(tmp_path, content, sentence):
    path = tmp_path / "conditions.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(UserError, match=sentence):
        open_conditions(path, 23)


def test_conditions_for_sampling_may_be_any_number(tmp_path):
    np.save(tmp_path / "conditions.npy", np.zeros((5, 2)))
    assert open_conditions(tmp_path / "conditions.npy").shape == (5, 2)
    np.save(tmp_path / "conditions.npy", np.zeros((0, 2)))
    with pytest.raises(UserError, match="has 0 rows; write one row per image"):
        open_conditions(tmp_path / "conditions.npy")


def test_conditions_of_another_number_of_images_are_a_mistake_of_the_program(store):
    with pytest.raises(ValueError, match="22 conditions for 23 images"):
        CodeDataset([store], conditions=np.zeros((22, 3)))
