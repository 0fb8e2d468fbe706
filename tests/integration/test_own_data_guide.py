"""Every command of docs/own-data.md is one that its program accepts."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from autoregressive.sample import sample_c2i_ddp
from autoregressive.train import config as gpt_arguments
from autoregressive.train import extract_codes_c2i
from evaluations.c2i import evaluator
from pretrained_models.catalogue import PUBLISHED
from tokenizer.tokenizer_image import reconstruct, vq_arguments

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/own-data.md").read_text()
PARSERS = {
    "scripts/tokenizer/train_vq.sh": vq_arguments.parse_args,
    "scripts/tokenizer/reconstruction_vq.sh": reconstruct.parse_args,
    "scripts/autoregressive/extract_codes_c2i.sh": extract_codes_c2i.parse_args,
    "scripts/autoregressive/train_c2i.sh": gpt_arguments.parse_args,
    "scripts/autoregressive/sample_c2i.sh": sample_c2i_ddp.parse_arguments,
    "evaluations/c2i/evaluator.py": evaluator.parse_arguments,
}


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("command", commands())
def test_command_is_accepted(command, monkeypatch):
    interpreter, script, *flags = shlex.split(command.replace("NUMBER_OF_FOLDERS", "2"))
    assert interpreter == ("python3" if script.endswith(".py") else "bash")
    assert (ROOT / script).is_file()
    if script == "scripts/download.sh":
        assert set(flags) <= set(PUBLISHED)
        return
    monkeypatch.setattr(sys, "argv", [script, *flags])
    PARSERS[script]()


def test_every_program_is_in_the_guide():
    assert all(script in GUIDE for script in PARSERS)


def test_reconstructions_of_the_guide_have_names_of_their_own():
    """So that measuring the second tokenizer is not refused for the first one's results; and FID finds them."""
    lines = [shlex.split(line)[2:] for line in commands() if "reconstruction_vq.sh" in line]
    names = [reconstruct.parse_args(line).name for line in lines]
    assert len(names) == 3
    assert None not in names
    assert len(set(names)) == len(names)
    scored = re.findall(r"reconstructions/(\S+?)(?:-originals)?\.npz", GUIDE)
    assert set(scored) <= set(names)
