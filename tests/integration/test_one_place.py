"""One idea, one place: a setting of the model without parameters is added to one file and goes all the way."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.stores import make_store
from tests.tiny_training import COMMAND
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils.files import sha256

ROOT = Path(__file__).parents[2]
PACKAGES = ("autoregressive", "dataset", "pretrained_models", "tokenizer", "utils")
SETTING = """    logit_scale: float = recipe(1.0, "factor of the logits", above=0)
"""


@pytest.mark.slow
def test_a_setting_without_parameters_is_found_again_after_training_and_sampling(tmp_path):
    project = tmp_path / "project"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, project / package, ignore=shutil.ignore_patterns("__pycache__", "*.pt"))
    gpt = project / "autoregressive/models/gpt.py"
    text = gpt.read_text()
    text = text.replace("    vocab_size: int = recipe", SETTING + "    vocab_size: int = recipe", 1)
    text = text.replace("return self.norm(x)", "return self.norm(x) * self.args.logit_scale", 1)
    gpt.write_text(text)

    torch.save({"model": VQ_models["VQ-Tiny"](codebook_size=64, codebook_embed_dim=8).state_dict()}, tmp_path / "vq.pt")
    make_store(tmp_path / "codes/tiny16_codes", count=24, tokenizer_hash=sha256(tmp_path / "vq.pt"))
    flags = COMMAND | {"--epochs": 2, "--warmup-epochs": 0, "--code-path": tmp_path / "codes"}
    flags |= {"--results-dir": tmp_path, "--logit-scale": 3.0}
    run(project, "autoregressive.train.train_c2i", flags)
    recorded = json.loads((tmp_path / "run/config.json").read_text())
    assert recorded["config"]["model"]["logit_scale"] == 3.0
    assert recorded["recipe"]["logit_scale"] == 3.0
    continued = run(project, "autoregressive.train.train_c2i", flags | {"--logit-scale": 2.0}, status=2)
    assert "logit_scale (3.0 there, 2.0 here)" in continued

    probe = tmp_path / "probe.py"
    probe.write_text(PROBE)
    sampling = {"--gpt-ckpt": tmp_path / "run/checkpoints/last.pt", "--vq-ckpt": tmp_path / "vq.pt"}
    sampling |= {"--vq-model": "VQ-Tiny", "--codebook-size": 64, "--output": tmp_path / "a.png"}
    assert "the sampler's logit_scale: 3.0" in run(project, probe, sampling)
    unknown = run(ROOT, "autoregressive.sample.sample_c2i", sampling, status=2)
    assert "was trained with logit_scale, which this version does not know" in unknown


PROBE = """
from autoregressive.sample import sample_c2i

original = sample_c2i.Pipeline.describe

def describe(pipeline):
    return f"the sampler's logit_scale: {pipeline.gpt.args.logit_scale}\\n{original(pipeline)}"

sample_c2i.Pipeline.describe = describe
sample_c2i.main()
"""


def run(project: Path, program, flags: dict, status: int = 0) -> str:
    """What a module or file of `project` prints."""
    words = [str(word) for pair in flags.items() for word in pair]
    start = ["-m", program] if isinstance(program, str) else [str(program)]
    environment = os.environ | {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, *start, *words], cwd=project, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == status, ended.stderr
    return ended.stdout + ended.stderr
