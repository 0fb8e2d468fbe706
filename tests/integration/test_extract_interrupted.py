"""Extraction that was interrupted, and images that change or cannot be read meanwhile; every refusal."""

import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from autoregressive.train import extract_codes_c2i
from dataset import extraction_job
from dataset.code_store import open_store
from tests.processes import run_main
from tests.tiny_extraction import (
    CLASSES,
    IMAGES,
    arguments,
    contents,
    extract,
    interrupt,
    make_tokenizer,
    one_at_a_time,
)
from utils.program import UserError

COUNT = len(CLASSES) * IMAGES


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
    assert len(list((codes / "toy16_codes.partial" / "work").glob("block-*.npz"))) == 2  # no refusal costs any


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


def reshaped(path):
    with np.load(path) as arrays:
        np.savez(path, **{**arrays, "codes": arrays["codes"][:, :5]})


def replaced(path):
    path.write_bytes(path.with_name("block-000000.npz").read_bytes())


def misdirected(path):
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] ^= 1  # as if encrypted
    path.write_bytes(content)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip, cut, reshaped, replaced, misdirected])
def test_damaged_blocks_are_encoded_again(monkeypatch, data, codes, tokenizer, capsys, damage):
    extract(monkeypatch, arguments(data, codes / "straight", tokenizer))
    command = arguments(data, codes / "resumed", tokenizer)
    interrupt(monkeypatch, command, after_blocks=4)
    damage(codes / "resumed" / "toy16_codes.partial" / "work" / "block-000001.npz")
    extract(monkeypatch, command)
    assert "1 finished blocks in " in capsys.readouterr().out
    assert contents(codes / "resumed") == contents(codes / "straight")


def test_what_is_damaged_before_it_is_joined_does_not_become_a_store(monkeypatch, data, codes, tokenizer):
    extract(monkeypatch, arguments(data, codes / "straight", tokenizer))
    command, work = arguments(data, codes / "resumed", tokenizer), codes / "resumed" / "toy16_codes.partial"
    write_block = extraction_job.Job.write_block

    def damaged_at_once(job, block, *rest):
        write_block(job, block, *rest)
        if block == 5:
            cut(job.block_path(block))

    with monkeypatch.context() as patch:
        patch.setattr(extraction_job.Job, "write_block", damaged_at_once)
        with pytest.raises(UserError, match="block-000005.npz was damaged on the disk; run the same command again"):
            extract(patch, command)
    with monkeypatch.context() as patch:  # nor does a shard that is damaged between joining and the end
        patch.setattr(extraction_job.Job, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            extract(patch, command)
    flip(work / "codes-00000.npy")
    extract(monkeypatch, command)
    assert contents(codes / "resumed") == contents(codes / "straight")


def test_garbled_or_lost_files_of_an_unfinished_extraction(monkeypatch, data, codes, tokenizer, capsys):
    command = arguments(data, codes, tokenizer)
    interrupt(monkeypatch, command)
    plan, sources = (codes / "toy16_codes.partial" / "work" / name for name in ("plan.json", "images.jsonl"))
    as_it_was = plan.read_text()
    plan.write_text("{")
    with pytest.raises(UserError, match="plan.json is damaged"):
        extract(monkeypatch, command)
    plan.write_text(re.sub('("image_list": ")[0-9a-f]*', r"\1", as_it_was))
    with pytest.raises(UserError, match="the images are not those with which .*partial was begun; restore them"):
        extract(monkeypatch, command)
    plan.write_text(as_it_was)
    for content in (None, "", '["ant/0.png"]\n', '["ant/0.png", 7]\n'):  # what it lists is known otherwise
        sources.unlink() if content is None else sources.write_text(content)
        interrupt(monkeypatch, command, after_blocks=0)
        assert "images.jsonl was lost or damaged" in capsys.readouterr().out
        assert len(sources.read_text().splitlines()) == COUNT
    plan.unlink()  # then nothing says how the blocks were made
    extract(monkeypatch, [*command, "--crop-range", "1.3"])
    assert "has lost its plan.json; its 2 finished blocks are encoded again" in capsys.readouterr().out
    extract(monkeypatch, arguments(data, codes / "straight", tokenizer, "--crop-range", "1.3"))
    stores = (open_store(folder / "toy16_codes") for folder in (codes, codes / "straight"))
    np.testing.assert_array_equal(*(store.block(0, COUNT) for store in stores))


def test_pipes_and_devices_are_unreadable_images(monkeypatch, data, codes, tokenizer):
    """Reading one would never end."""
    os.mkfifo(data / "bee" / "9.png")
    (data / "cat" / "9.png").symlink_to("/dev/zero")
    extract(monkeypatch, arguments(data, codes, tokenizer, "--skip-bad-images"))
    store = open_store(codes / "toy16_codes")
    assert store.meta.unreadable == [[f"{name}/9.png", "not a regular file"] for name in ("bee", "cat")]
    assert len(store) == COUNT
