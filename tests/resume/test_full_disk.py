"""A disk that is full for a while, a real one where mounting is allowed, costs a run checkpoints but not its end."""

import errno
import resource
import subprocess

import pytest

from tests.tiny_training import assert_same_state, command, interrupting, last_checkpoint, rows, tiny_store, train
from utils.engine import metrics
from utils.engine.checkpoint_files import saved_steps
from utils.engine.run_folder import RunFolder

KILOBYTES = 1100  # one checkpoint, not two
FILE_LIMIT = 300 << 10  # less than a checkpoint


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("codes"))


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={KILOBYTES}k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def assert_went_on(results, codes, log, missed: list[int], tmp_path):
    said = log.read_text()
    for step in missed:
        assert said.count(f"{step:07d}.pt could not be written (") == 1
    assert "training goes on and tries again at the next checkpoint" in said
    assert "Traceback" not in said
    assert not set(missed) & {*saved_steps(results / "run/checkpoints")}
    assert not list(results.rglob(".*.tmp"))
    assert train(command(codes, tmp_path / "undisturbed")) == [0]
    assert rows(results) == rows(tmp_path / "undisturbed")
    for key in ("model", "optimizer", "metrics"):
        assert_same_state(last_checkpoint(results)[key], last_checkpoint(tmp_path / "undisturbed")[key], key)


def test_a_full_disk(codes, small_disk, tmp_path):
    def enlarge():
        subprocess.run(["mount", "-o", "remount,size=9m", small_disk], check=True)

    log, arguments = tmp_path / "log", command(codes, small_disk)
    assert train(arguments, output=log, before=interrupting(8, enlarge, written=True)) == [0]
    assert_went_on(small_disk, codes, log, [6], tmp_path)


def test_a_disk_that_stays_full_asks_for_space_at_the_end(codes, small_disk, tmp_path):
    assert train(command(codes, small_disk), output=tmp_path / "log") == [2]
    assert "error: the last checkpoint" in (tmp_path / "log").read_text()
    assert saved_steps(small_disk / "run/checkpoints") == [3]
    assert rows(small_disk)[-1]["step"] == 12


def test_a_log_that_was_never_written_is_in_the_checkpoint(codes, tmp_path):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_until_killed():
        metrics.append = refuse
        interrupting(8, lambda: exit(9))()

    assert train(command(codes, tmp_path / "results"), output=tmp_path / "log", before=full_until_killed) == [9]
    assert not (tmp_path / "results/run/metrics.jsonl").exists()

    def full_at_the_end():
        RunFolder.note_finished = refuse

    assert train(command(codes, tmp_path / "results"), output=tmp_path / "log", before=full_at_the_end) == [0]
    assert (
        "config.json could not be written (No space left on device); before --epochs" in (tmp_path / "log").read_text()
    )
    assert "trained: " in (tmp_path / "log").read_text()
    assert [row["step"] for row in rows(tmp_path / "results")] == [2, 4, 6, 8, 10, 12]


def test_a_file_size_limit(codes, tmp_path):
    def limit(size):  # in the process that trains
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def small_until_step_8():
        limit(FILE_LIMIT)()
        interrupting(8, limit(resource.RLIM_INFINITY), written=True)()

    log, results = tmp_path / "log", tmp_path / "results"
    assert train(command(codes, results), output=log, before=small_until_step_8) == [0]
    assert_went_on(results, codes, log, [3, 6], tmp_path)
    last = results / "run/checkpoints/0000012.pt"
    last.write_bytes(last.read_bytes()[:-1])  # a damaged file of its name is not the checkpoint
    config = results / "run/config.json"
    config.write_text(config.read_text().replace('"finished": [\n  12\n ]', '"finished": []'))
    log.unlink()
    assert train(command(codes, results), output=log, before=limit(FILE_LIMIT)) == [2]
    assert f"\nerror: the last checkpoint {last} could not be written; free" in log.read_text()
    assert "trained:" not in log.read_text()
    assert train(command(codes, results), output=log) == [0]
