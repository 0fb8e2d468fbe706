"""Checkpoint files: complete or absent, pruned by count and age, and training goes on when the disk is full."""

import errno
import os
import time

import pytest
import torch

from utils.checkpoint import load_strict, read_checkpoint, select_weights
from utils.engine import checkpoint_files
from utils.engine.checkpoint_files import CheckpointWriter, is_complete, newest_complete, saved_steps
from utils.program import UserError

STATE = {"model": {"w": torch.arange(1000.0)}}


def write(folder, *steps, mirrors=(), keep_last=2, keep_hours=0.0, keep_forever=lambda step: False):
    writer = CheckpointWriter(folder, mirrors, keep_last, keep_hours, keep_forever)
    for step in steps:
        writer.save(step, STATE | {"steps": step})
    writer.wait()
    return writer


def test_keeps_the_newest_and_the_milestones_everywhere(tmp_path):
    write(tmp_path / "a", 1, 2, 3, 4, 5, mirrors=[tmp_path / "b"], keep_forever=lambda step: step == 2)
    assert saved_steps(tmp_path / "a") == saved_steps(tmp_path / "b") == [2, 4, 5]
    assert read_checkpoint(tmp_path / "b/0000005.pt")["steps"] == 5
    assert read_checkpoint(tmp_path / "a/last.pt")["steps"] == 5
    assert read_checkpoint(tmp_path / "b/last.pt")["steps"] == 5


def test_what_a_kill_after_the_last_checkpoint_left_undone_is_done(tmp_path):
    """Killed before `last.pt` leads to it and a mirror has it, a run that ended has nothing more to save."""
    a, b = tmp_path / "a", tmp_path / "b"
    write(a, 1, 2, mirrors=[b])
    for folder in (a, b):
        (folder / "last.pt").unlink()
        (folder / "last.pt").symlink_to("0000001.pt")
    (b / "0000002.pt").unlink()
    write(a, mirrors=[b])
    assert [read_checkpoint(folder / "last.pt")["steps"] for folder in (a, b)] == [2, 2]


def test_a_lost_mirror_does_not_touch_the_first_place(tmp_path, capsys):
    writer = CheckpointWriter(tmp_path / "a", [tmp_path / "b"], 2, 0)
    (tmp_path / "b").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="b is no folder; name another path"):
        CheckpointWriter(tmp_path / "a", [tmp_path / "b/deep"], 2, 0)
    for step in (1, 2, 3):
        writer.save(step, STATE)
    writer.wait()
    assert saved_steps(tmp_path / "a") == [2, 3]
    assert (tmp_path / "a/last.pt").exists()
    assert capsys.readouterr().err.count("b/000000") == 3


def test_keeps_young_files_and_removes_them_when_old(tmp_path):
    writer = write(tmp_path, 1, 2, 3, 4, keep_hours=1)
    assert saved_steps(tmp_path) == [1, 2, 3, 4]
    old = time.time() - 3601
    os.utime(tmp_path / "0000001.pt", (old, old))
    writer.save(5, STATE)
    writer.wait()
    assert saved_steps(tmp_path) == [2, 3, 4, 5]


def test_a_full_disk_warns_and_keeps_the_last_good_file(tmp_path, monkeypatch, capsys):
    writer = write(tmp_path, 1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    writer.save(2, STATE)
    writer.wait()
    assert "could not be written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000001.pt", "last.pt"]
    monkeypatch.undo()
    writer.save(3, STATE)
    writer.wait()
    assert saved_steps(tmp_path) == [1, 3]


def test_a_really_full_device(capsys):
    """/dev/full refuses every byte: torch.save reports it in its own words."""
    writer = CheckpointWriter("/dev", [], 2, 0)
    original = checkpoint_files.atomic_file
    checkpoint_files.atomic_file = lambda path: open("/dev/full", "wb")  # noqa: SIM115
    try:
        writer.save(1, STATE)
        writer.wait()
    finally:
        checkpoint_files.atomic_file = original
    assert "could not be written" in capsys.readouterr().err


def test_other_failures_of_the_writing_thread_are_raised(tmp_path):
    writer = CheckpointWriter(tmp_path, [], 2, 0)
    writer.save(1, {"model": lambda: None})  # cannot be pickled
    with pytest.raises(Exception, match="pickle"):
        writer.wait()
    assert not list(tmp_path.iterdir())


def test_files_of_a_killed_writer_are_swept(tmp_path):
    (tmp_path / ".0000007.pt.123.tmp").write_bytes(b"half")
    CheckpointWriter(tmp_path, [], 2, 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-1],
        lambda b: b[: len(b) // 2],
        lambda b: b"",
        lambda b: b"x" * 99,
        lambda b: b[:900] + b"\xff\xfe" + b[902:],
        *(lambda b, place=place: b[:place] + bytes([b[place] ^ 4]) + b[place + 1 :] for place in (-30, -60, -76)),
    ],
)
def test_damage_is_seen(damage, tmp_path, capsys):
    write(tmp_path, 1, 2)
    newest = tmp_path / "0000002.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    assert not is_complete(newest)
    assert newest_complete(tmp_path) == tmp_path / "0000001.pt"
    assert "is damaged" in capsys.readouterr().err


def test_what_is_damaged_is_not_good_and_takes_no_place(tmp_path):
    """Not in the number that stays, nor as what a mirror gets or `last.pt` leads to; until it is written anew."""
    a, b = tmp_path / "a", tmp_path / "b"
    write(a, 1, 2, 3, 4, keep_last=4)
    for step in (3, 4):
        (a / f"000000{step}.pt").write_bytes(b"damaged")
    writer = write(a, mirrors=[b])
    assert (writer.newest, writer.good) == (a / "0000002.pt", {2})
    assert read_checkpoint(a / "last.pt")["steps"] == read_checkpoint(b / "0000002.pt")["steps"] == 2
    (b / "0000003.pt").write_bytes(b"a copy of the damaged one")
    writer.save(3, STATE | {"steps": 3})
    writer.wait()
    assert writer.good == {2, 3}
    assert saved_steps(a) == [2, 3, 4]
    assert newest_complete(a) == a / "0000003.pt"
    assert read_checkpoint(b / "0000003.pt")["steps"] == 3


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/dev/null", path)])
def test_what_is_no_file_is_named(make, tmp_path):
    write(tmp_path, 1)
    make(tmp_path / "0000009.pt")
    with pytest.raises(UserError, match=r"0000009.pt is no file, but has a checkpoint's name; move it away"):
        CheckpointWriter(tmp_path, [], 2, 0)


def test_a_file_system_that_fails_does_not_make_a_checkpoint_damaged(tmp_path, monkeypatch):
    write(tmp_path, 1, 2)

    def stale(path):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(checkpoint_files, "read_checkpoint", stale)
    with pytest.raises(OSError, match="Stale"):
        newest_complete(tmp_path)


def test_a_written_checkpoint_without_its_link_is_written(tmp_path, monkeypatch, capsys):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_files, "_point_last_at", full)
    writer = write(tmp_path / "a", 1, mirrors=[tmp_path / "b"])
    assert writer.good == {1}
    assert saved_steps(tmp_path / "a") == saved_steps(tmp_path / "b") == [1]
    said = capsys.readouterr().err
    assert said.count("0000001.pt is written, but last.pt or older checkpoints stay as they were (No space") == 2
    assert "could not be written" not in said


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"PK\x03\x04 half a zip", "is not a complete"), (b"text", "x.pt")]
)
def test_files_that_are_no_checkpoints(content, message, tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_checkpoint(path)


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "none.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds a list"):
        read_checkpoint(tmp_path / "list.pt")
    torch.save({"steps": 1}, tmp_path / "empty.pt")
    with pytest.raises(UserError, match="holds no model weights"):
        select_weights(read_checkpoint(tmp_path / "empty.pt"), "empty.pt")


def test_weights_are_found_where_publishers_put_them():
    w = {"w": torch.ones(1)}
    for checkpoint in ({"model": w}, {"module": w}, {"state_dict": w}, w, {"model": {"module.w": w["w"]}}):
        assert select_weights(checkpoint, "x") == (w, "raw")
    both = {"model": w, "ema": {"w": torch.zeros(1)}}
    assert select_weights(both, "x")[1] == "ema"
    assert select_weights(both, "x", "raw") == (w, "raw")
    with pytest.raises(UserError, match="holds no EMA weights; use --weights raw"):
        select_weights({"model": w}, "x", "ema")


def test_loading_is_strict():
    model = torch.nn.Linear(2, 3)
    for state, message in (
        ({}, "2 tensors are missing, such as bias"),
        ({**model.state_dict(), "more": torch.ones(1)}, "1 are unknown, such as more"),
        ({**model.state_dict(), "bias": torch.ones(4)}, r"bias is \(4,\) in the file and \(3,\) in the model"),
    ):
        with pytest.raises(UserError, match=f"c.pt does not fit this model: .*{message}.*; check --flags"):
            load_strict(model, state, "c.pt", "check --flags.")
