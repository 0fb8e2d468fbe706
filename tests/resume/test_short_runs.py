"""Runs on slow machines and short ones: early checkpoints and rows of the log, what a restart says, more epochs."""

import json
import signal
import types

import pytest

from tests.tiny_training import assert_same_state, command, interrupting, last_checkpoint, rows, send, tiny_store, train
from utils.engine import run as training_run

PLAIN = {"--patch-level": 1, "--ckpt-every": 1000, "--keep-last": 20}  # the end is the only milestone


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("codes"))


def a_step_takes(seconds: float):
    """For `before=`: every step takes so long."""

    def patch():
        steps, end_step = [0], training_run.TrainingRun.end_step
        training_run.time = types.SimpleNamespace(monotonic=lambda: 1000 + seconds * steps[0])

        def slow_end_step(self, *args):
            steps[0] += 1
            end_step(self, *args)

        training_run.TrainingRun.end_step = slow_end_step

    return patch


def checkpoints(results) -> list[int]:
    return sorted(int(path.stem) for path in (results / "run/checkpoints").glob("0*.pt"))


def test_early_checkpoints(codes, tmp_path):
    """After 2, 4, 8 … minutes."""
    assert train(command(codes, tmp_path, x=PLAIN), before=a_step_takes(60)) == [0]
    assert checkpoints(tmp_path) == [2, 4, 8, 12]


def test_checkpoints_come_no_more_rarely_than_asked_for(codes, tmp_path):
    assert train(command(codes, tmp_path, x=PLAIN | {"--ckpt-minutes": 3}), before=a_step_takes(60)) == [0]
    assert checkpoints(tmp_path) == [2, 4, 7, 10, 12]


def test_without_minutes_checkpoints_go_by_steps(codes, tmp_path):
    assert train(command(codes, tmp_path, x=PLAIN | {"--ckpt-minutes": 0}), before=a_step_takes(600)) == [0]
    assert checkpoints(tmp_path) == [12]


def test_a_start_says_what_it_found(codes, tmp_path):
    arguments = command(codes, tmp_path, x=PLAIN)
    assert train(arguments, before=interrupting(7, send(signal.SIGKILL))) == [-signal.SIGKILL]
    assert train(arguments, before=interrupting(9, send(signal.SIGTERM)), output=tmp_path / "anew") == [143]
    said = (tmp_path / "anew").read_text()
    assert f"{tmp_path / 'run'} was stopped after step 6 and before its first checkpoint; starting anew" in said
    assert train(arguments, output=tmp_path / "on") == [0]
    assert f"continuing {tmp_path / 'run'} after step 9" in (tmp_path / "on").read_text()


def test_early_rows_on_a_slow_machine_leave_the_regular_ones_as_they_are(codes, tmp_path):
    slow, fast = (command(codes, tmp_path / name, x={"--log-every": 10}) for name in ("slow", "fast"))
    assert train(slow, before=a_step_takes(40)) == [0]
    assert train(fast) == [0]
    assert [row["step"] for row in rows(tmp_path / "slow")] == [
        2,
        4,
        6,
        10,
        12,
    ]  # 6 is the end of a level: a regular one
    assert [row for row in rows(tmp_path / "slow") if row["step"] >= 6] == rows(tmp_path / "fast")
    assert rows(tmp_path / "slow")[0]["loss_2x2"] > 4


def test_a_finished_run_goes_on_when_epochs_are_raised(codes, tmp_path):
    more = {"--epochs": 8, "--keep-last": 2}
    for name in ("whole", "killed"):
        assert train(command(codes, tmp_path / name, "--ema")) == [0]
    assert train(command(codes, tmp_path / "whole", "--ema", x=more), output=tmp_path / "log") == [0]
    assert "had come to the end of --epochs 4; going on to 8" in (tmp_path / "log").read_text()
    assert "after step 12" in (tmp_path / "log").read_text()
    killed = command(codes, tmp_path / "killed", "--ema", x=more | {"--ckpt-every": 1})
    assert train(killed, before=interrupting(17, send(signal.SIGKILL))) == [-signal.SIGKILL]
    assert train(killed) == [0]
    ours, theirs = last_checkpoint(tmp_path / "killed"), last_checkpoint(tmp_path / "whole")
    assert ours["steps"] == 24
    for key in ("model", "optimizer", "ema"):
        assert_same_state(ours[key], theirs[key], key)
    assert 12 in checkpoints(tmp_path / "whole")  # the earlier end stays
    assert json.loads((tmp_path / "whole/run/config.json").read_text())["finished"] == [12, 24]
    assert train(command(codes, tmp_path / "whole", "--ema"), output=tmp_path / "fewer") == [2]
    assert "epochs (8 there, 4 here)" in (tmp_path / "fewer").read_text()


def test_an_unfinished_run_keeps_its_epochs(codes, tmp_path):
    arguments = command(codes, tmp_path)
    assert train(arguments, before=interrupting(8, send(signal.SIGTERM))) == [143]
    assert train(command(codes, tmp_path, x={"--epochs": 8}), output=tmp_path / "log") == [2]
    assert "epochs (4 there, 8 here)" in (tmp_path / "log").read_text()
    assert train(arguments) == [0]
    both = {"--epochs": 8, "--lr": 0.5}
    assert train(command(codes, tmp_path, x=both), output=tmp_path / "log2") == [2]
    assert "with other settings: lr (0.001 there, 0.5 here)" in (tmp_path / "log2").read_text()
