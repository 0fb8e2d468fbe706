"""Every flag of every program, generated from its settings: nonsense is one sentence, before anything is computed."""

import importlib
import math
import re
from pathlib import Path

import pytest

from utils.program import UserError
from utils.settings import make_parser, parse

ROOT = Path(__file__).parents[2]
PACKAGES = ("autoregressive", "dataset", "evaluations", "pretrained_models", "scripts", "tokenizer")
NUMBERS = ("nan", "inf", "-inf", "-1", "0", "1e30", str(10**30), "two", "1.5", "")


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
                yield pytest.param(cls, action, id=f"{module}-{action.dest}")


def test_the_programs_are_found():
    assert {"autoregressive.train.train_c2i", "evaluations.c2i.evaluator"} < {module for module, _ in programs()}
    assert len(programs()) > 12


def required(cls, but: str) -> list[str]:
    words = []
    for action in make_parser(cls, "")._actions:
        if action.required and action.dest != but:
            words += [action.option_strings[0], "x"] if action.option_strings else ["x"]
    return words + (["--code-path", "x"] if hasattr(cls, "patches") or "TrainSettings" in cls.__name__[:13] else [])


@pytest.mark.parametrize(("cls", "action"), list(numeric_flags()))
def test_a_number_is_in_its_range_or_refused(cls, action):
    accepted, refusals = [], []
    for value in NUMBERS:
        try:
            parse(cls, "", [*required(cls, action.dest), f"{action.option_strings[0]}={value}"])
            accepted.append(float(value))
        except UserError as refusal:
            refusals.append(str(refusal))
    assert all(len(sentence.splitlines()) == 1 for sentence in refusals)
    assert all(math.isfinite(value) for value in accepted)
    assert action.type is float or all(value < 2**64 for value in accepted)
    assert len(refusals) >= 5  # the numbers that are none, and what is no whole number or astronomical
