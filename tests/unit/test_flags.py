"""Every flag of every program, generated from its settings: nonsense is one sentence, before anything is computed."""

import importlib
import re
from pathlib import Path

import pytest

from utils.program import UserError
from utils.settings import make_parser, parse

ROOT = Path(__file__).parents[2]
PACKAGES = ("autoregressive", "dataset", "evaluations", "pretrained_models", "scripts", "tokenizer")
NONSENSE = ("nan", "inf", "-inf", "two", "")
ANY_SIZE = {  # weights of losses, rates, scales and times: as large as one likes
    *("--body-lr-share", "--cfg-power", "--cfg-scale", "--ckpt-minutes", "--codebook-weight", "--commit-loss-beta"),
    *("--disc-weight", "--end-lr", "--entropy-loss-ratio", "--keep-hours", "--lr", "--max-grad-norm"),
    *("--perceptual-weight", "--reconstruction-weight", "--sample-cfg-scale", "--temperature", "--warmup-epochs"),
    "--weight-decay",
}
NOT_ZERO = {"--body-lr-share", "--cfg-power", "--cfg-scale", "--sample-cfg-scale"}
SMALL_OR_ZERO = {
    *("--beta1", "--beta2", "--cfg-interval", "--class-dropout-p", "--decay-ratio", "--disc-start", "--drop-path-rate"),
    *("--dropout-p", "--ema-decay", "--global-seed", "--max-shift", "--num-workers", "--revive-dead-codes", "--seed"),
    *("--token-dropout-p", "--top-k"),
}
ACCEPT = {  # which flags take a number that most of them must refuse
    "-1": {"--cfg-interval"},
    "0": ANY_SIZE - NOT_ZERO | SMALL_OR_ZERO,
    "1.5": ANY_SIZE | {"--crop-range"},
    "1e30": ANY_SIZE,
    str(10**30): ANY_SIZE,
}
REFUSED = {("evaluations.c2i.train_classifier", "--lr", "0")}  # its rate is constant: nothing would be learned


def programs() -> list[tuple[str, str]]:
    """(module, name of its settings) of every program: what is started and parses a command line."""
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            text = path.read_text()
            parsed = re.search(r"= parse\(\s*(\w+),", text)
            if parsed and '__name__ == "__main__"' in text:
                found.append((".".join(path.relative_to(ROOT).with_suffix("").parts), parsed[1]))
    return found


def numeric_flags():
    for module, name in programs():
        cls = getattr(importlib.import_module(module), name)
        for action in make_parser(cls, "")._actions:
            if action.type in (int, float):
                yield pytest.param(module, cls, action, id=f"{module}-{action.dest}")


def test_the_programs_are_found():
    assert {"autoregressive.train.train_c2i", "evaluations.c2i.evaluator"} < {module for module, _ in programs()}
    assert len(programs()) > 12


def required(cls, but: str) -> list[str]:
    words = []
    for action in make_parser(cls, "")._actions:
        if action.required and action.dest != but:
            words += [*action.option_strings[:1], str(next(iter(action.choices or ["x"])))]
    return words + (["--code-path", "x"] if hasattr(cls, "patches") or "TrainSettings" in cls.__name__[:13] else [])


def accepts(cls, action, value: str) -> bool:
    """Whether the program takes the value; if not, one sentence names the flag."""
    flag = action.option_strings[0]
    try:
        parse(cls, "", [*required(cls, action.dest), f"{flag}={value}"])
    except UserError as refusal:
        sentence = str(refusal)
    else:
        return True
    assert len(sentence.splitlines()) == 1
    assert flag in sentence
    return False


@pytest.mark.parametrize(("module", "cls", "action"), list(numeric_flags()))
def test_a_number_is_in_its_range_or_refused(module, cls, action):
    flag = action.option_strings[0]
    assert not [value for value in NONSENSE if accepts(cls, action, value)]
    for value, flags in ACCEPT.items():
        assert accepts(cls, action, value) == (flag in flags and (module, flag, value) not in REFUSED), value
