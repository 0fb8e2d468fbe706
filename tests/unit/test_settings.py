"""Settings: ranges, the command line made from them, and the identity that cannot be forgotten."""

from pathlib import Path

import pytest

from utils.program import UserError
from utils.settings import (
    REQUIRED,
    default_identity,
    identity,
    option,
    parse,
    recipe,
    refuse_contradictions,
    refuse_differences,
    settings,
    unusual,
    values_of,
    with_defaults,
)


@settings("inner")
class Inner:
    lr: float = recipe(1e-4, "learning rate", at_least=0)
    steps: int = recipe(10, "steps", at_least=1, at_most=100)
    kind: str = recipe("a", "kind", choices=("a", "b"))
    workers: int = option(2, "workers", at_least=0)


@settings("outer")
class Outer:
    inner: with_defaults(Inner, steps=20)
    path: Path = option(REQUIRED, "a path")
    fast: bool = option(False, "be fast")
    mirror: bool = recipe(True, "mirror")
    compile: bool | None = option(None, "compile")
    width: int | None = recipe(None, "width", at_least=1, flag="--model-width")
    hidden: int = recipe(3, "not a flag", at_least=0, flag=None)

    def __post_init__(self):
        if self.width == 13:
            raise UserError("13 is unlucky.")


def parsed(*flags: str) -> Outer:
    return parse(Outer, "a program", ["--path", "x", *flags])


def test_the_command_line_is_made_from_the_settings():
    usual = parsed()
    assert (usual.inner.lr, usual.inner.steps, usual.path, usual.fast) == (1e-4, 20, Path("x"), False)
    assert (usual.mirror, usual.compile, usual.width, usual.hidden) == (True, None, None, 3)
    chosen = parsed("--lr", "0.5", "--fast", "--no-mirror", "--no-compile", "--model-width", "7", "--kind", "b")
    assert (chosen.inner.lr, chosen.fast, chosen.mirror, chosen.compile, chosen.width) == (0.5, True, False, False, 7)
    assert chosen.inner.kind == "b"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--lr", "nan"], "--lr must be at least 0, got nan."),
        (["--lr", "inf"], "--lr must be at least 0, got inf."),
        (["--lr", "-1"], "--lr must be at least 0, got -1.0."),
        (["--steps", "101"], "--steps must be at least 1 and at most 100, got 101."),
        (["--model-width", "0"], "--model-width must be at least 1, got 0."),
        (["--model-width", "13"], "13 is unlucky."),
        (["--steps", "2.5"], "argument --steps: invalid int value: '2.5'; --help lists"),
        (["--kind", "c"], "invalid choice: 'c'"),
        (["--step", "3"], "unrecognized arguments: --step 3"),
        (["--hidden", "3"], "unrecognized arguments"),
    ],
)
def test_what_does_not_fit_is_one_sentence(flags, sentence):
    with pytest.raises(UserError) as refusal:
        parsed(*flags)
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_settings_are_frozen_and_checked_from_python_too():
    with pytest.raises(ValueError, match="steps must be at least 1"):
        Inner(steps=0)
    with pytest.raises(ValueError, match="kind is one of a, b, not c"):
        Inner(kind="c")
    with pytest.raises(AttributeError):
        Inner().lr = 1


def test_a_setting_without_its_answer_cannot_be_defined():
    with pytest.raises(TypeError, match=r"Careless.lr must be a recipe"):

        @settings("careless")
        class Careless:
            lr: float = 1e-4

    with pytest.raises(TypeError, match=r"Unbounded.lr must declare its range"):

        @settings("unbounded")
        class Unbounded:
            lr: float = recipe(1e-4, "learning rate")


def test_identity_follows_from_the_settings():
    chosen = parsed("--workers", "9", "--lr", "1")
    assert identity(chosen) == {"lr": 1.0, "steps": 20, "kind": "a", "mirror": True, "model_width": None}
    assert unusual(chosen) == {"lr": 1.0}
    assert default_identity(Outer)["steps"] == 20
    assert values_of(chosen)["path"] == "x"
    assert values_of(chosen)["workers"] == 9


def test_refusals_name_what_differs():
    refuse_differences("the run was trained", {"a": 1}, {"a": 1, "new": 2}, "x")
    with pytest.raises(UserError, match=r"^the run was trained with other settings: a \(1 there, 2 here\); go away\.$"):
        refuse_differences("the run was trained", {"a": 1}, {"a": 2}, "go away")
    refuse_contradictions("x.pt", {"num_classes": 10}, {"num_classes": None})
    with pytest.raises(UserError, match="x.pt was trained with --num-classes 10, not 9; give --num-classes 10"):
        refuse_contradictions("x.pt", {"num_classes": 10}, {"num_classes": 9})
