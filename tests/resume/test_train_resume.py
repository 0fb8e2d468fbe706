"""Killed anywhere and started again by the same command, a run ends bit for bit where an uninterrupted one does."""

import os
import random
import signal
import sys

import pytest

from autoregressive.train import train_c2i
from tests.processes import fork, wait
from tests.tiny_training import (
    assert_same_state,
    command,
    interrupting,
    last_checkpoint,
    rows,
    send,
    shrink_gpt,
    tiny_store,
    train,
)
from utils.engine import run as training_run
from utils.engine.checkpoint_files import newest_complete
from utils.program import run

LEARNED = ("model", "optimizer", "ema", "steps", "skipped_steps", "metrics")


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("codes"))


@pytest.fixture(scope="module")
def uninterrupted(codes, tmp_path_factory):
    results = tmp_path_factory.mktemp("uninterrupted")
    assert train(command(codes, results, "--ema")) == [0]
    return results


def assert_ended_equally(results, uninterrupted):
    ours, theirs = last_checkpoint(results), last_checkpoint(uninterrupted)
    for key in LEARNED:
        assert_same_state(ours[key], theirs[key], key)
    assert rows(results) == rows(uninterrupted)


@pytest.mark.parametrize("at", [2, 5, 6, 7, 11, 12])
def test_kill_and_resume_is_bit_exact(at, codes, uninterrupted, tmp_path):
    """Level 1 is steps 1-6 of two epochs, so: mid-epoch, both sides of the switch, mid-epoch of level 2, the end."""

    arguments = command(codes, tmp_path, "--ema", every={"--ckpt-every": 1})
    assert train(arguments, before=interrupting(at, send(signal.SIGKILL))) == [-signal.SIGKILL]
    assert train(arguments) == [0]
    assert_ended_equally(tmp_path, uninterrupted)


def test_sigterm_saves_at_once_and_stops(codes, uninterrupted, tmp_path):
    assert train(command(codes, tmp_path, "--ema"), before=interrupting(5, send(signal.SIGTERM))) == [143]
    assert last_checkpoint(tmp_path)["steps"] == 5
    assert train(command(codes, tmp_path, "--ema")) == [0]
    assert_ended_equally(tmp_path, uninterrupted)


def test_sigusr1_saves_and_goes_on(codes, tmp_path):
    arguments = command(codes, tmp_path, keep={"--keep-last": 9})
    assert train(arguments, before=interrupting(5, send(signal.SIGUSR1))) == [0]
    assert sorted(int(path.stem) for path in (tmp_path / "run/checkpoints").glob("0*.pt")) == [3, 5, 6, 9, 12]


def test_a_damaged_checkpoint_is_passed_over(codes, uninterrupted, tmp_path):
    train(command(codes, tmp_path, "--ema"), before=interrupting(11, send(signal.SIGKILL)))
    newest = newest_complete(tmp_path / "run/checkpoints")
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    assert train(command(codes, tmp_path, "--ema"), output=tmp_path / "log") == [0]
    assert "is damaged; taking an older checkpoint" in (tmp_path / "log").read_text()
    assert_ended_equally(tmp_path, uninterrupted)


def test_random_kills_lose_at_most_the_interval(codes, uninterrupted, tmp_path):
    """Kills at random moments (tests/soak has more): no progress is lost, and the end is the same."""
    arguments = command(codes, tmp_path, "--ema", every={"--ckpt-every": 1})
    reached = tmp_path / "reached"
    reached.write_text("0")

    def tell_progress():
        original = training_run.TrainingRun.save

        def save(self, steps_done):
            if self._writer is not None:
                self._writer.wait()  # the checkpoints before this one are on the disk
                reached.write_text(str(steps_done - 1))
            original(self, steps_done)

        training_run.TrainingRun.save = save
        shrink_gpt()

    kills, moment = 0, random.Random(0)
    while kills < 10:
        before = int(reached.read_text() or 0)
        status = _train_and_kill(arguments, tell_progress, moment.uniform(0.01, 0.6))
        newest = newest_complete(tmp_path / "run/checkpoints")
        steps = 0 if newest is None else int(newest.stem)
        assert steps >= before
        kills += status == -signal.SIGKILL
        if status == 0:  # it came to the end: begin again, the kills so far count
            assert_ended_equally(tmp_path, uninterrupted)
            for path in (tmp_path / "run/checkpoints").glob("*.pt"):
                path.unlink()
            (tmp_path / "run/metrics.jsonl").unlink()
            reached.write_text("0")
        else:
            assert status == -signal.SIGKILL
    assert train(arguments) == [0]
    assert_ended_equally(tmp_path, uninterrupted)


def _train_and_kill(arguments, before, seconds: float) -> int:
    def work():
        sys.argv = ["program", *arguments]
        before()
        run(train_c2i.main)

    return wait(fork(work, os.devnull), kill_after=seconds)
