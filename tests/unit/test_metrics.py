"""The log of a run: rows, and the loggers beside `metrics.jsonl`."""

import errno
import json
import os
import resource
import sys
import types

import pytest
import torch

from tests.tiny_training import command, rows, tiny_store, train
from utils.distributed import World
from utils.engine.metrics import Metrics, WandbLogger
from utils.program import UserError

ALONE = World(0, 1, 0, torch.device("cpu"))


class Recorder:
    def __init__(self):
        self.rows, self.closed = [], False

    def write(self, step, values):
        self.rows.append((step, values))

    def close(self):
        self.closed = True


def test_every_logger_gets_the_numbers_of_every_row(tmp_path):
    loggers = [Recorder(), Recorder()]
    metrics = Metrics(tmp_path / "metrics.jsonl", ALONE, 10, loggers)
    metrics.write(3, {"loss": 2.0, "note": "text", "norm": float("inf")})
    metrics.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 3,
        "loss": 2.0,
        "note": "text",
        "norm": None,
    }
    for logger in loggers:
        assert logger.rows == [(3, {"loss": 2.0, "norm": float("inf")})]
        assert logger.closed


class FullDisk(Recorder):
    def write(self, step, values):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_costs_no_row(tmp_path, capsys):
    """Rows wait in memory until there is space; a logger that cannot write is left out."""
    good = Recorder()
    metrics = Metrics(tmp_path / "metrics.jsonl", ALONE, 10, [FullDisk(), good])
    metrics.write(1, {"loss": 1.0})
    limit, size = resource.getrlimit(resource.RLIMIT_FSIZE), (tmp_path / "metrics.jsonl").stat().st_size
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 9, limit[1]))  # a part of a row
        metrics.write(2, {"loss": 2.0})
        metrics.write(3, {"loss": 3.0})
        assert (tmp_path / "metrics.jsonl").stat().st_size == size
        assert metrics.has(2, "loss")
        kept = metrics.state()["unwritten"]  # a checkpoint has what the disk has not
        killed = Metrics(tmp_path / "metrics.jsonl", ALONE, 10)
        killed.resume(3, None)
        killed.take_up(kept)
        assert killed.state()["unwritten"] == kept
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    metrics.state()  # the next checkpoint tries again
    metrics.write(4, {"loss": 4.0})
    Metrics(tmp_path / "metrics.jsonl", ALONE, 10).take_up(kept)  # which are there by now: nothing happens to them
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [1, 2, 3, 4]
    assert [step for step, _ in good.rows] == [1, 2, 3, 4]
    said = capsys.readouterr().err
    assert said.count("FullDisk could not be written (No space left on device); training goes on without it") == 1
    assert said.count("metrics.jsonl could not be written (File too large); training goes on, and its rows are") == 2


def test_continuing_cuts_the_log_without_writing_it_anew(tmp_path):
    """A run that a full disk has stopped must start on it."""
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    node = log.stat().st_ino
    Metrics(log, ALONE, 10).resume(1, None)
    assert (log.read_text(), log.stat().st_ino) == ('{"step": 1}\n', node)


def test_a_logger_that_cannot_end_does_not_end_the_run(tmp_path, capsys):
    logger = Recorder()
    logger.close = lambda: FullDisk().write(1, {})
    Metrics(tmp_path / "metrics.jsonl", ALONE, 10, [logger]).close()
    assert "Recorder could not be written (No space left on device); what it still" in capsys.readouterr().err


def test_an_early_row_leaves_the_next_one_as_it_would_be(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl", ALONE, 10)
    metrics.add(loss=torch.tensor(1.0))
    assert metrics.row(start_anew=False)["loss"] == 1
    metrics.add(loss=torch.tensor(2.0))
    assert metrics.row()["loss"] == 1.5
    metrics.add(loss=torch.tensor(7.0))
    assert metrics.row()["loss"] == 7


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """Stands in for the package: what is asked of it goes into a file, as training is a process of its own."""
    calls = tmp_path / "calls"

    def note(name, /, **values):
        with open(calls, "a") as file:
            file.write(json.dumps([name, values], default=str) + "\n")

    run = types.SimpleNamespace(
        define_metric=lambda name, step_metric: note("define", name=name, by=step_metric),
        log=lambda values: note("log", **values),
        finish=lambda: note("finish"),
    )
    module = types.ModuleType("wandb")
    module.init = lambda **values: note("init", **values) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    return lambda: [json.loads(line) for line in calls.read_text().splitlines()]


def test_weights_and_biases_beside_tensorboard(wandb, tmp_path):
    codes = tiny_store(tmp_path / "codes")
    arguments = command(codes, tmp_path, "--wandb", "--tensorboard")
    assert train(arguments) == [0]
    assert train(arguments) == [0]  # continues the same run
    names = [name for name, _ in wandb()]
    assert names == ["init", "define", *["log"] * 6, "finish", "init", "define", "finish"]
    first, second = (values for name, values in wandb() if name == "init")
    assert first["id"] == second["id"] == (tmp_path / "run/wandb-id").read_text()
    assert (first["resume"], first["name"], first["dir"]) == ("allow", "run", str(tmp_path / "run"))
    assert first["config"]["epochs"] == 4
    logged = [values for name, values in wandb() if name == "log"]
    assert [values["step"] for values in logged] == [2, 4, 6, 8, 10, 12]
    assert [values["lr"] for values in logged] == [row["lr"] for row in rows(tmp_path)]
    assert list((tmp_path / "run/tensorboard").glob("events.out.tfevents.*"))


def test_a_pipe_in_the_place_of_the_identity(wandb, tmp_path):
    os.mkfifo(tmp_path / "wandb-id")
    with pytest.raises(UserError, match="wandb-id is a device or a pipe"):
        WandbLogger(tmp_path, {})


def test_weights_and_biases_without_a_login(wandb, monkeypatch, tmp_path):
    def refuse(**values):
        raise RuntimeError("api_key not configured (no-tty).\nmore")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    arguments = command(tiny_store(tmp_path / "codes"), tmp_path / "results", "--wandb")
    assert train(arguments, output=tmp_path / "log") == [2]
    assert (
        "error: --wandb: Weights & Biases does not start (api_key not configured (no-tty)); run `wandb login`, or set "
        "WANDB_MODE=offline.\n" in (tmp_path / "log").read_text()
    )
    assert not (tmp_path / "results").exists()


def test_a_package_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    codes = tiny_store(tmp_path / "codes")
    assert train(command(codes, tmp_path, "--wandb"), output=tmp_path / "log") == [2]
    assert "--wandb needs the package wandb; install it (pip install wandb)" in (tmp_path / "log").read_text()


def test_only_the_main_rank_logs(wandb, tmp_path):
    codes = tiny_store(tmp_path / "codes")
    assert train(command(codes, tmp_path, "--wandb"), 2) == [0, 0]
    assert [name for name, _ in wandb()].count("init") == 1
