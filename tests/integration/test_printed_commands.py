"""Every command that a program prints runs as printed, pasted into a terminal in another folder."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.inception_graph import InceptionGraph
from tests.tiny_tokenizer import tiny_images
from utils.commands import SCRIPTS, absolute_component, command

PRINTED = re.compile(r"^(?:look|next): (.*)$", re.MULTILINE)


def paste(line: str, folder: Path, environment: dict[str, str]) -> list[str]:
    """Run a line in a shell; the commands that it prints."""
    ended = subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, f"{line}\n{ended.stdout}\n{ended.stderr}"
    return PRINTED.findall(ended.stdout)


@pytest.fixture
def elsewhere(tmp_path):
    """A folder that is not the project's, and an environment with a small network in place of Inception."""
    (tmp_path / "cache").mkdir()
    InceptionGraph(32).save(tmp_path / "cache/classify_image_graph_def.pb")
    (tmp_path / "home").mkdir()
    changes = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "NPP_CACHE": str(tmp_path / "cache")}
    return tmp_path / "home", os.environ | changes


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_a_folder_to_scores_by_printed_commands_alone(elsewhere, tmp_path):
    images = tmp_path / "my images"
    tiny_images(images / "train", 40)
    tiny_images(images / "val", 8)
    begin = {"vq_model": "VQ-Tiny", "codebook_size": 64, "image_size": 32, "epochs": 2, "global_batch_size": 8}
    begin |= {"perceptual_weight": 0, "disc_weight": 0, "ema": True, "no_mirror": True, "num_workers": 0}
    parts = {"data_path": images / "train", "val_data_path": images / "val"}
    waiting, done = [command("tokenizer/train_vq.sh", **parts, **begin)], []
    while waiting:
        line = waiting.pop(0)
        assert not re.search(r"\b[A-Z]{4,}\b", line), line  # nothing to fill in
        waiting += paste(line, *elsewhere)
        done.append(Path(shlex.split(line)[1]).stem)
    assert done == [
        "train_vq",
        "reconstruction_vq",
        "extract_codes_c2i",
        "evaluate",
        "verify_codes",
        "train_c2i",
        "sample_c2i",
        "evaluate",
    ]


@pytest.mark.slow
def test_from_a_classifier_to_its_reference(elsewhere, tmp_path):
    tiny_images(tmp_path / "train", 16)
    begin = [sys.executable, "-m", "evaluations.c2i.train_classifier", "--epochs", "1", "--image-size", "32"]
    paths = ["--data-path", str(tmp_path / "train"), "--output", str(tmp_path / "net work.pt2")]
    home, environment = elsewhere
    [line] = paste(shlex.join(begin + paths), SCRIPTS.parent, environment)
    [line] = paste(line, home, environment)
    (home / "SAMPLE.npz").symlink_to(tmp_path / "net work-reference.npz")  # the one word that nobody knows yet
    assert paste(line, home, environment) == []


def test_quoting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = command("x.sh", Path("a b"), "SAMPLE.npz", some_flag="it's", nothing=None, off=False, alone=True, number=2.0)
    words = ["bash", str(SCRIPTS / "x.sh"), str(tmp_path / "a b"), "SAMPLE.npz"]
    assert shlex.split(line) == words + ["--some-flag", "it's", "--alone", "--number", "2.0"]
    assert absolute_component("mine.py:FSQ(levels=(8, 8))") == f"{tmp_path}/mine.py:FSQ(levels=(8, 8))"
    assert absolute_component("package.module:FSQ") == "package.module:FSQ"
