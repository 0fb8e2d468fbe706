"""Every command of the README runs as written, on tiny data: models shrunk, loops cut short, paths substituted."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.models.gpt import GPT_SIZES, ModelArgs, Transformer
from pretrained_models import catalogue
from tests.inception_graph import InceptionGraph
from tests.integration.test_notebook import run_notebook
from tests.tiny_python import shrink, tiny_tokenizer
from tokenizer.tokenizer_image.vq_model import VQ_models

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.strip().splitlines()
]
# Tested below, by this run, and by test_demo_page.py:
ELSEWHERE = ("bash scripts/quickstart.sh", "bash scripts/test.sh", "bash scripts/demo.sh")
PIPELINE = [command for command in COMMANDS if not command.startswith(ELSEWHERE)]
SHORT_TRAINING = "--num-classes 2 --epochs 4 --global-batch-size 2 --warmup-epochs 0.5 --log-every 1"
SHORT = {
    "autoregressive.train.train_c2i": SHORT_TRAINING.split(),
    "autoregressive.sample.sample_c2i_ddp": ["--num-fid-samples", "6", "--per-proc-batch-size", "3"],
    "autoregressive.train.verify_codes": ["--num-images", "2"],
}
SHORT_QUICKSTART = {
    "evaluations.c2i.train_classifier": ["--epochs", "1"],
    "tokenizer.tokenizer_image.vq_train": ["--epochs", "1", "--warmup-epochs", "0.5", "--num-workers", "0"],
    "autoregressive.train.train_c2i": ["--epochs", "2", "--warmup-epochs", "0.5"],
    "autoregressive.sample.sample_c2i_ddp": ["--num-fid-samples", "40", "--per-proc-batch-size", "20"],
}


def environment(folder: Path, short: dict) -> dict[str, str]:
    interpreter = folder / "python"
    interpreter.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/tests/tiny_python.py" "$@"\n')
    interpreter.chmod(0o755)
    return os.environ | {
        "PYTHON": str(interpreter),
        "PYTHONPATH": str(ROOT),
        "TINY_FLAGS": json.dumps(short),
        "TINY_WEIGHTS": str(folder / "weights"),
        "NPP_CACHE": str(folder),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with images of two classes, "published" weights, a reference batch, and an Inception graph."""
    folder = tmp_path_factory.mktemp("readme")
    random = np.random.default_rng(0)
    for number in range(4):
        path = folder / f"images/class_{number % 2}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (72, 80, 3), np.uint8)).save(path)
    (folder / "weights/npp").mkdir(parents=True)
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer([1, 1, 1, 1, 1])(codebook_size=16384, codebook_embed_dim=8)
    torch.save({"model": tokenizer.state_dict()}, folder / "weights/vq_ds16_c2i.pt")
    gpt = Transformer(ModelArgs(n_layer=2, n_head=2, dim=32))
    torch.save({"model": gpt.state_dict()}, folder / "weights/npp/c2i_B_256.pt")
    batch = random.integers(0, 256, (8, 64, 64, 3), np.uint8)
    np.savez(folder / "VIRTUAL_imagenet256_labeled.npz", arr_0=batch)
    InceptionGraph(narrower=16).save(folder / "classify_image_graph_def.pb")
    return folder


def run(command: str, folder: Path, short: dict) -> str:
    for written, here in {
        "bash scripts/": f"bash {ROOT}/scripts/",
        "python3 evaluations/": f"{sys.executable} {ROOT}/evaluations/",
        "'examples/": f"'{ROOT}/examples/",
        "/path/to/imagenet/train": "images",
        "/path/to/": "",
    }.items():
        command = command.replace(written, here)
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment(folder, short),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in done.stdout
    return done.stdout


def test_the_pipeline_as_written(workplace):
    """In the README's order, each command finds what those before it made."""
    printed = {command: run(command, workplace, SHORT) for command in PIPELINE}
    assert len(printed) == 11
    said = "\n".join(printed.values())
    assert "0.62x the cost of next-token prediction" in said
    assert (workplace / "codes/imagenet256_codes/meta.json").exists()
    assert (workplace / "codes.png").exists()
    assert list(workplace.glob("copies/GPT-B-*/checkpoints/last.pt"))
    assert len(list(workplace.glob("results/GPT-B-*/checkpoints/last.pt"))) == 2  # another loss, another run
    assert list(workplace.glob("results/GPT-XXL-*/checkpoints/last.pt"))
    samples = next(workplace.glob("samples/*.npz"))
    assert samples.name in README  # the published name, as the evaluator's command has it
    with np.load(samples) as arrays:
        assert arrays["arr_0"].shape == (6, 256, 256, 3)
        assert arrays["arr_0"].dtype == np.uint8
    assert "samples:" in run(next(c for c in PIPELINE if "sample_c2i.sh" in c), workplace, SHORT)  # nothing left to do
    scores = samples.with_suffix(".txt").read_text()
    assert all(name in scores for name in ("Inception Score", "FID", "sFID", "Precision", "Recall"))


def test_the_quickstart(workplace, monkeypatch):
    """Every step of it, far too short to learn anything, and the notebook with its model."""
    out = workplace / "quick"
    printed = run(f"bash scripts/quickstart.sh {out}", workplace, SHORT_QUICKSTART)
    report = json.loads((out / "report.json").read_text())
    assert report.keys() == {"seconds", "classifier", "tokenizer", "gpt", "scores"}
    assert len(report["seconds"]) == 11
    assert report["gpt"].keys() >= {"loss_2x2", "loss_1x1", "val_loss_1x1"}
    assert report["scores"]["metrics"].keys() >= {"fid", "sfid", "inception_score", "precision", "recall", "recognised"}
    assert Image.open(out / "samples.png").height > 10 * 32
    assert "samples recognised as their class" in printed
    monkeypatch.setattr(catalogue, "FOLDER", catalogue.FOLDER)
    for sizes in (GPT_SIZES, VQ_models):
        for name in sizes:
            monkeypatch.setitem(sizes, name, sizes[name])
    shrink()  # undone after this test
    run_notebook(repr(str(out / "gpt/digits")))
