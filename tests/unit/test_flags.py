"""Every flag of every program, generated from its settings: nonsense is one sentence, before anything is computed."""

import importlib
import math

import pytest

from utils.program import UserError
from utils.settings import make_parser, parse

PROGRAMS = {
    "autoregressive.sample.sample_c2i": "PictureSettings",
    "autoregressive.sample.sample_c2i_ddp": "SampleSettings",
    "autoregressive.train.extract_codes_c2i": "ExtractionSettings",
    "autoregressive.train.train_c2i": "TrainSettings",
    "autoregressive.train.verify_codes": "VerifySettings",
    "dataset.convert_codes": "ConversionSettings",
    "evaluations.c2i.evaluator": "EvaluatorSettings",
    "evaluations.c2i.train_classifier": "ClassifierSettings",
    "pretrained_models.download": "DownloadSettings",
    "tokenizer.tokenizer_image.reconstruct": "ReconstructSettings",
    "tokenizer.tokenizer_image.vq_train": "VQTrainSettings",
}
NUMBERS = ("nan", "inf", "-inf", "-1", "0", "1e30", str(10**30), "two", "1.5", "")


def numeric_flags():
    for module, name in PROGRAMS.items():
        cls = getattr(importlib.import_module(module), name)
        for action in make_parser(cls, "")._actions:
            if action.type in (int, float):
                yield pytest.param(cls, action, id=f"{module.rpartition('.')[2]}-{action.dest}")


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
