"""Extraction: the right codes in the right order, the same for any batch and number of ranks; every refusal."""

import errno
import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.train import extract_codes_c2i, verify_codes
from dataset import convert_codes, extraction_job
from dataset.code_store import open_store
from dataset.crops import center_crop, cut_crops, enlarged_size, to_model_range
from dataset.image_folder import list_image_folder, load_rgb
from tests.processes import run_main
from tests.tiny_extraction import CLASSES, CODEBOOK, IMAGES, arguments, contents, extract, make_images, make_tokenizer
from tokenizer.tokenizer_image.load import TokenizerSettings, build_tokenizer
from utils.program import UserError

COUNT = len(CLASSES) * IMAGES


@pytest.fixture
def data(tmp_path):
    return make_images(tmp_path / "images")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny.pt")


@pytest.fixture
def codes(tmp_path):
    return tmp_path / "codes"


def load(tokenizer):
    return build_tokenizer(TokenizerSettings(str(tokenizer), "VQ-Tiny", CODEBOOK))[0]


def one_at_a_time(data, tokenizer, image_size=16, crop_range=1.1):
    """(images, 10, H·W) codes by the published procedure: one image a pass, float32."""
    model = load(tokenizer)
    folder = list_image_folder(data)
    codes = []
    for image in range(len(folder)):
        square = center_crop(load_rgb(folder.path(image)), int(image_size * crop_range))
        crops = cut_crops(torch.from_numpy(square.copy())[None], image_size, 10)[0]
        codes.append(model.encode_indices(to_model_range(crops)))
    return torch.stack(codes).numpy()


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


def interrupt(monkeypatch, command, after_blocks=2):
    """Stop an extraction by a full disk after some blocks."""
    write_block, written = extraction_job.Job.write_block, []

    def fail_later(job, block, codes, bad):
        if len(written) == after_blocks:
            raise OSError(errno.ENOSPC, "No space left on device", "block")
        written.append(block)
        write_block(job, block, codes, bad)

    with monkeypatch.context() as patch:
        patch.setattr(extraction_job.Job, "write_block", fail_later)
        with pytest.raises(OSError, match="No space left"):
            extract(patch, command)


def test_a_full_disk_stops_it_and_the_same_command_continues(monkeypatch, data, codes, tokenizer, capsys):
    extract(monkeypatch, arguments(data, codes / "straight", tokenizer))
    command = arguments(data, codes / "resumed", tokenizer)
    interrupt(monkeypatch, command, after_blocks=3)
    assert not (codes / "resumed" / "toy16_codes").exists()
    encoded = []
    write_block = extraction_job.Job.write_block
    monkeypatch.setattr(
        extraction_job.Job,
        "write_block",
        lambda job, block, *rest: encoded.append(block) or write_block(job, block, *rest),
    )
    extract(monkeypatch, command)
    assert encoded == list(range(3, 12))  # nothing twice
    assert "continuing: 6 of 24 images are encoded" in capsys.readouterr().out
    assert contents(codes / "resumed") == contents(codes / "straight")


def test_an_extraction_begun_before_settings_had_their_names_is_continued(monkeypatch, data, codes, tokenizer):
    command = arguments(data, codes, tokenizer, "--precision", "none")
    interrupt(monkeypatch, command)
    plan = codes / "toy16_codes.partial" / "work" / "plan.json"
    there = {name: value for name, value in json.loads(plan.read_text()).items() if name not in ("ten_crop", "mirror")}
    plan.write_text(json.dumps(there | {"precision": "fp32"}))
    with pytest.raises(UserError, match=r"crops \(10 there, 5 here\)"):
        extract(monkeypatch, [*command, "--no-mirror"])
    extract(monkeypatch, [*command, "--precision", "fp32"])
    assert len(open_store(codes / "toy16_codes")) == COUNT


def test_an_unfinished_extraction_refuses_other_settings(monkeypatch, data, codes, tokenizer, tmp_path):
    command = arguments(data, codes, tokenizer)
    interrupt(monkeypatch, command)
    other = make_tokenizer(tmp_path / "other.pt", seed=1)
    for options, difference in (
        (["--crop-range", "1.3"], r"crop_range \(1.1 there, 1.3 here\)"),
        (["--no-mirror"], r"mirror \(True there, False here\), crops \(10 there, 5 here\)"),
        (["--precision", "bf16"], r"precision \(tf32 there, bf16 here\)"),
        (["--batch-size", "40"], r"batch_size \(20 there, 40 here\)"),
        (["--vq-ckpt", str(other)], "tokenizer_sha256"),
    ):
        with pytest.raises(UserError, match=f"other settings: {difference}"):
            extract(monkeypatch, command + options)
    Image.new("RGB", (20, 20)).save(data / "bee" / "new.png")
    with pytest.raises(UserError, match="1 added, such as bee/new.png"):
        extract(monkeypatch, command)
    (data / "bee" / "new.png").unlink()
    (data / "cat" / "2.png").unlink()
    with pytest.raises(UserError, match="1 removed, such as cat/2.png"):
        extract(monkeypatch, command)


def test_a_finished_store_refuses_other_settings(monkeypatch, data, codes, tokenizer):
    extract(monkeypatch, arguments(data, codes, tokenizer))
    with pytest.raises(UserError, match=r"crop_range \(1.1 there, 1.05 here\).*choose another --code-path"):
        extract(monkeypatch, arguments(data, codes, tokenizer, "--crop-range", "1.05"))
    (data / "cat" / "2.png").unlink()
    with pytest.raises(UserError, match=r"images \(24 there, 23 here\)"):
        extract(monkeypatch, arguments(data, codes, tokenizer))


def test_an_encoded_image_may_not_change_but_a_waiting_one_may(monkeypatch, data, codes, tokenizer):
    command = arguments(data, codes, tokenizer)
    interrupt(monkeypatch, command)
    Image.new("RGB", (20, 20)).save(data / "cat" / "7.png")
    first = (data / "ant" / "0.png").read_bytes()
    Image.new("RGB", (20, 20)).save(data / "ant" / "0.png")
    with pytest.raises(UserError, match=r"ant/0.png has changed since it was encoded \(1 such images\)"):
        extract(monkeypatch, command)
    (data / "ant" / "0.png").write_bytes(first)
    extract(monkeypatch, command)
    assert open_store(codes / "toy16_codes").sources()[-1] == ("cat/7.png", os.path.getsize(data / "cat" / "7.png"))


def test_a_second_extraction_into_the_same_folder_is_refused(monkeypatch, data, codes, tokenizer, tmp_path):
    command = arguments(data, codes, tokenizer)
    interrupt(monkeypatch, command)
    blocks = extraction_job.Job.pending_blocks

    def start_another(job):
        log = tmp_path / "log"
        assert run_main(extract_codes_c2i.main, command, output=log) == [2]
        assert "another extraction is writing to" in log.read_text()
        return blocks(job)

    monkeypatch.setattr(extraction_job.Job, "pending_blocks", start_another)
    extract(monkeypatch, command)
    assert len(open_store(codes / "toy16_codes")) == COUNT


def test_unreadable_images_stop_it_before_anything_final(monkeypatch, data, codes, tokenizer, capsys):
    broken = {"bee/2.png": b"no image", "cat/7.png": (data / "cat" / "7.png").read_bytes()[:100]}
    whole = {name: (data / name).read_bytes() for name in broken}
    for name, content in broken.items():
        (data / name).write_bytes(content)
    command = arguments(data, codes, tokenizer)
    with pytest.raises(UserError, match=r"2 of 24 images cannot be read, such as .*bee/2.png \(not an image file\)"):
        extract(monkeypatch, command)
    assert not (codes / "toy16_codes").exists()
    assert capsys.readouterr().err.count("unreadable: ") == 2
    with open(codes / "toy16_codes.partial" / "unreadable.jsonl") as file:
        assert [json.loads(line)[0] for line in file] == list(broken)
    extract(monkeypatch, [*command, "--skip-bad-images"])
    store = open_store(codes / "toy16_codes")
    kept = [image for image in range(COUNT) if image not in (IMAGES + 2, COUNT - 1)]
    assert (len(store), [path for path, _ in store.meta.unreadable]) == (COUNT - 2, list(broken))
    assert "left out as unreadable: 2 images" in capsys.readouterr().out
    for name, content in whole.items():
        (data / name).write_bytes(content)
    assert (store.block(0, COUNT - 2) == one_at_a_time(data, tokenizer)[kept]).mean() >= 0.999
    np.testing.assert_array_equal(store.labels, np.repeat(np.arange(3), IMAGES)[kept])
    assert not {path for path, _ in store.sources()} & set(broken)
    extract(monkeypatch, arguments(data, codes / "clean", tokenizer))
    assert open_store(codes / "clean" / "toy16_codes").meta.unreadable == []


def test_repaired_images_are_encoded_and_nothing_else_is(monkeypatch, data, codes, tokenizer):
    extract(monkeypatch, arguments(data, codes / "straight", tokenizer))
    whole = (data / "bee" / "2.png").read_bytes()
    (data / "bee" / "2.png").write_bytes(b"")
    command = arguments(data, codes / "repaired", tokenizer)
    with pytest.raises(UserError, match="1 of 24 images cannot be read"):
        extract(monkeypatch, command)
    (data / "bee" / "2.png").write_bytes(whole)
    extract(monkeypatch, command)
    assert contents(codes / "repaired") == contents(codes / "straight")


def test_an_image_repaired_at_the_same_size_is_encoded(monkeypatch, data, codes, tokenizer):
    extract(monkeypatch, arguments(data, codes / "straight", tokenizer))
    whole = (data / "bee" / "2.png").read_bytes()
    (data / "bee" / "2.png").write_bytes(bytes(len(whole)))
    (data / "cat" / "1.png").write_bytes(b"")
    command = arguments(data, codes / "repaired", tokenizer)
    with pytest.raises(UserError, match="2 of 24 images cannot be read"):
        extract(monkeypatch, command)
    (data / "bee" / "2.png").write_bytes(whole)
    with pytest.raises(UserError, match="1 of 24 images cannot be read, such as .*cat/1.png"):
        extract(monkeypatch, command)
    extract(monkeypatch, [*command, "--skip-bad-images"])
    store, straight = (open_store(codes / name / "toy16_codes") for name in ("repaired", "straight"))
    kept = [image for image in range(COUNT) if image != 2 * IMAGES + 1]
    np.testing.assert_array_equal(store.block(0, COUNT - 1), straight.block(0, COUNT)[kept])


def test_an_image_repaired_after_its_shard_was_joined_is_encoded(monkeypatch, data, codes, tokenizer):
    extract(monkeypatch, arguments(data, codes / "straight", tokenizer))
    whole = (data / "bee" / "2.png").read_bytes()
    (data / "bee" / "2.png").write_bytes(bytes(len(whole)))
    command = arguments(data, codes / "repaired", tokenizer, "--skip-bad-images")
    with monkeypatch.context() as patch:
        patch.setattr(extraction_job.Job, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            extract(patch, command)
    assert (codes / "repaired" / "toy16_codes.partial" / "codes-00000.npy").exists()
    (data / "bee" / "2.png").write_bytes(whole)
    extract(monkeypatch, command)
    assert contents(codes / "repaired") == contents(codes / "straight")


def test_several_ranks_list_what_they_cannot_read(data, codes, tokenizer, tmp_path):
    (data / "bee" / "2.png").write_bytes(b"")
    log = tmp_path / "log"
    assert set(run_main(extract_codes_c2i.main, arguments(data, codes, tokenizer), 2, output=log)) == {2}
    assert "1 of 24 images cannot be read" in log.read_text()
    listed = (codes / "toy16_codes.partial" / "unreadable.jsonl").read_text()
    assert json.loads(listed) == ["bee/2.png", "not an image file"]


def test_out_of_memory_is_told_in_a_sentence(monkeypatch, data, codes, tokenizer):
    def encode(self, squares):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(extract_codes_c2i.Encoder, "__call__", encode)
    with pytest.raises(UserError, match="does not hold 20 crops of 16 px at a time; use a smaller --batch-size"):
        extract(monkeypatch, arguments(data, codes, tokenizer))


def publish(monkeypatch, packed, output):
    run_tool(monkeypatch, convert_codes, "--codes", packed, "--output", output, "--layout", "published")


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


def test_a_link_to_nowhere_is_an_unreadable_image(monkeypatch, data, codes, tokenizer):
    (data / "bee" / "9.png").symlink_to(data / "gone.png")
    extract(monkeypatch, arguments(data, codes, tokenizer, "--skip-bad-images"))
    assert open_store(codes / "toy16_codes").meta.unreadable[0][0] == "bee/9.png"
    assert len(open_store(codes / "toy16_codes")) == COUNT


def test_skipping_every_image_is_refused(monkeypatch, data, codes, tokenizer):
    for path in data.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 24 images can be read"):
        extract(monkeypatch, arguments(data, codes, tokenizer, "--skip-bad-images"))
    assert not (codes / "toy16_codes").exists()


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


def foreign_published(monkeypatch, data, codes, tokenizer, *options):
    """A store in the published layout without the description that is kept here."""
    extract(monkeypatch, arguments(data, codes / "packed", tokenizer, *options))
    publish(monkeypatch, codes / "packed" / "toy16_codes", codes / "toy16_codes")
    for name in ("meta.json", "images.jsonl", "labels.npy"):
        (codes / "toy16_codes" / name).unlink()


def run_tool(monkeypatch, module, *arguments):
    monkeypatch.setattr("sys.argv", [module.__name__, *map(str, arguments)])
    module.main()


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


def verify(monkeypatch, store, data, tokenizer, sheet, *options):
    paths = ("--codes", store, "--data-path", data, "--vq-ckpt", tokenizer, "--output", sheet)
    run_tool(monkeypatch, verify_codes, *paths, *options)


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
    with pytest.raises(UserError, match="--crop-range must be at least 1, got 0.5"):
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


def test_verify_notices_another_tokenizer(monkeypatch, data, codes, tokenizer, tmp_path):
    extract(monkeypatch, arguments(data, codes, tokenizer))
    other = make_tokenizer(tmp_path / "other.pt", seed=1)
    with pytest.raises(UserError, match="made with other weights"):
        verify(monkeypatch, codes / "toy16_codes", data, other, tmp_path / "sheet.png")


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
        (["--crop-range", "0.9"], "--crop-range must be at least 1, got 0.9"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
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
