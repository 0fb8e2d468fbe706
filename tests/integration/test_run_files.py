"""The files of a run: damaged ones are named, missing ones replaced by no guess, and refusals leave nothing behind."""

import json
import os
import shutil

import numpy as np
import pytest

from tests.stores import make_store
from tests.tiny_training import command, interrupting, rows, tiny_store, train

LEFT = b'{"step": 99, "loss_1'  # what a kill leaves of a row


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("codes"))


@pytest.fixture(scope="module")
def stopped(codes, tmp_path_factory):
    """The results of a run that has stopped after step 8, with a checkpoint of step 6."""
    results = tmp_path_factory.mktemp("stopped")
    assert train(command(codes, results), before=interrupting(8, lambda: exit(9), written=True)) == [9]
    return results


@pytest.fixture
def results(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "results")


def refusal(arguments, log) -> str:
    """The one sentence that a command is refused with."""
    log.unlink(missing_ok=True)
    assert train(arguments, output=log) == [2]
    assert "Traceback" not in log.read_text()
    return next(line for line in log.read_text().splitlines() if "error: " in line)


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\x89PNG\x00\xff",
        b'{"recipe": 7}',
        b'{"recipe": {}, "finished": ["a", 3]}',
        b'{"recipe": {}, "finished": [null, [1]]}',
        b'{"recipe": {}, "content": 7}',
        b'{"recipe": {"epochs": "four"}}',
    ],
)
def test_a_damaged_config_is_named(damage, codes, results, tmp_path):
    (results / "run/config.json").write_bytes(damage)
    sentence = refusal(command(codes, results), tmp_path / "log")
    assert f"{results}/run/config.json is damaged" in sentence
    assert "put a good copy there, or choose another --run-name" in sentence


@pytest.mark.parametrize("place", ["config.json", "metrics.jsonl", "checkpoints/0000009.pt"])
def test_a_pipe_in_the_place_of_a_file(place, codes, results, tmp_path):
    path = results / "run" / place
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    assert f"{path} is no file" in refusal(command(codes, results), tmp_path / "log")


def test_a_place_where_no_folder_can_be(codes, tmp_path):
    sentence = refusal(command(codes, "/proc/results"), tmp_path / "log")
    assert "the folder /proc/results/run cannot be made there; choose another --results-dir" in sentence


def test_a_run_without_its_config_is_not_continued(codes, results, tmp_path):
    (results / "run/config.json").unlink()
    sentence = refusal(command(codes, results, x={"--lr": 0.5}), tmp_path / "log")
    assert "has checkpoints but no config.json" in sentence
    assert not (results / "run/config.json").exists()


@pytest.mark.parametrize("damage", [b"\x89PNG\xff\n", b"[]\n", b'{"step": "two"}\n', b'{"loss": 1}\n', b"garbage"])
def test_a_damaged_log_is_named(damage, codes, results, tmp_path):
    log = results / "run/metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(lines[0] + damage + (b"".join(lines[1:]) if damage.endswith(b"\n") else b""))
    before = log.read_bytes()
    assert "metrics.jsonl is damaged: line 2 is no row" in refusal(command(codes, results), tmp_path / "log")
    assert log.read_bytes() == before


@pytest.mark.parametrize("torn", [LEFT, b"{", bytes(300), LEFT + bytes(300)], ids=["row", "brace", "zeros", "both"])
def test_what_a_kill_or_a_power_cut_leaves_is_mended(torn, codes, results):
    log = results / "run/metrics.jsonl"
    log.write_bytes(log.read_bytes() + torn)
    for leftover in (".config.json.123.tmp", ".metrics.jsonl.123.tmp"):
        (results / "run" / leftover).write_bytes(b"half")
    assert train(command(codes, results)) == [0]
    assert [row["step"] for row in rows(results)] == [2, 4, 6, 8, 10, 12]
    assert not list(results.rglob(".*.tmp"))


@pytest.mark.parametrize(
    "changes",
    [
        {"--resume": "missing.pt"},
        {"--vq-ckpt": "missing.pt"},
        {"--val-code-path": "missing"},
        {"--init-from": "missing.pt"},
        {"--cloud-save-path": "/dev/null/cloud"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_refusal_leaves_no_folder(changes, codes, tmp_path):
    refusal(command(codes, tmp_path / "deep/results", x=changes), tmp_path / "log")
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_folder_in_which_nothing_was_learned_takes_another_recipe(codes, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"recipe": {"lr": 0.5, "epochs": 4}, "finished": []}))
    assert train(command(codes, tmp_path)) == [0]


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("results", "something else is in the place of a folder"),
        ("results/run", "results/run is a file; choose another --run-name"),
        ("results/run/checkpoints", "something else is in the place of a folder"),
    ],
)
def test_a_file_in_the_place_of_a_folder(place, sentence, codes, tmp_path):
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text("here first")
    assert sentence in refusal(command(codes, tmp_path / "results"), tmp_path / "log")
    assert (tmp_path / place).read_text() == "here first"


def test_other_codes_of_the_same_description_are_another_run(codes, results, tmp_path):
    make_store(tmp_path / "other/tiny16_codes", count=24, seed=1)
    sentence = refusal(command(tmp_path / "other", results), tmp_path / "log")
    assert "was trained with other settings: codes (['" in sentence
    config = json.loads((results / "run/config.json").read_text())
    del config["content"]  # as of a run of an earlier version: what it does not say cannot differ
    (results / "run/config.json").write_text(json.dumps(config))
    assert train(command(codes, results)) == [0]
    assert "content" in json.loads((results / "run/config.json").read_text())


def test_a_run_that_diverges_is_not_trained(codes, tmp_path):
    arguments = command(codes, tmp_path, x={"--lr": 1e30, "--warmup-epochs": 0})
    for _ in range(2):  # the second time nothing is left to do
        assert "training has diverged; use" in refusal(arguments, tmp_path / "log")
        assert "trained:" not in (tmp_path / "log").read_text()


OWN = "examples/embedding_sequence.py:EmbeddingSequence"


@pytest.mark.parametrize(
    ("conditioning", "width", "sentence"),
    [
        (f"{OWN}(width=16)", 12, "does not take 2x12 torch.float32 values per image (mat1 and mat2"),
        (f"{OWN}(width=16)", None, "does not take single torch.int64 values per image"),
        (OWN, 16, "missing a required argument: 'width'; it is called with (args), and 'FILE.py:NAME(key=value)'"),
    ],
)
def test_conditions_that_do_not_fit(conditioning, width, sentence, codes, tmp_path):
    x = {"--conditioning": conditioning, "--cls-token-num": 2}
    if width:
        np.save(tmp_path / "conditions.npy", np.zeros((24, 2, width), np.float32))
        x["--conditions"] = tmp_path / "conditions.npy"
    said = refusal(command(codes, tmp_path / "results", x=x), tmp_path / "log")
    assert sentence in said
    assert not (tmp_path / "results").exists()
