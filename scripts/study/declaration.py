"""A study as its author declares it: one TOML file with the data, the arms, the seeds and the budgets.

Tables such as [training] hold the flags of one program without the dashes in front; `true` is a flag without a value.
 scripts/studies/digits.toml is a complete example and says what each entry means.
"""

import dataclasses
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.program import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Flags = dict[str, Any]
TRAINING_NEEDS = ("gpt-model", "epochs", "global-batch-size", "lr", "log-every", "val-every")
TOKENIZER_NEEDS = ("vq-model", "codebook-size")


@dataclass(frozen=True)
class Data:
    image_size: int
    pixels_per_code: int
    classes: int
    train_images: int
    test_images: int
    embedded: str | None = None  # a name of dataset/embedded.py; or
    path: str | None = None  # a folder with train/ and test/, one folder per class in each

    def __post_init__(self):
        if (self.embedded is None) == (self.path is None):
            raise ValueError("give either embedded or path")


@dataclass(frozen=True)
class Sampling:
    images: int  # in each set of samples
    guidance: list[float]  # scales to choose from
    choice_seed: int  # of the samples on which an arm's guidance is chosen
    report_seeds: list[int]  # of the samples on which it is reported
    choose_by: str = "fid"  # the measure whose mean over the training seeds is to be lowest

    def __post_init__(self):
        if self.choice_seed in self.report_seeds:
            raise ValueError("choice-seed is one of report-seeds; guidance must be chosen on other samples")


@dataclass(frozen=True)
class LearningRates:
    """Runs of one seed at several learning rates, made before all others and shown in the appendix."""

    arms: list[str]
    values: list[float]
    seed: int


@dataclass(frozen=True)
class Expected:
    """What the work costs on one process, until finished runs on this machine say it better."""

    preparation_seconds: float
    training_gflops: float  # per second
    seconds_per_score: float  # sampling and evaluating one set of samples


@dataclass(frozen=True, eq=False)  # an arm is itself, not its settings: runs are sorted by it
class Arm:
    name: str
    title: str
    flags: Flags
    compute_of: str | None = None  # the arm whose training FLOPs this one's number of epochs has to match
    optional: bool = False  # runs with --ablation only


@dataclass(frozen=True)
class Study:
    name: str  # of the file
    title: str
    seeds: list[int]
    compare_with: list[str]  # arms that all others are compared with, the deciding one first
    data: Data
    classifier: Flags
    tokenizer: Flags
    codes: Flags
    training: Flags
    sampling: Sampling
    expected: Expected
    arm: list[Arm]
    learning_rates: LearningRates | None = None
    description: str = ""
    sampler: Flags = field(default_factory=dict)
    evaluator: Flags = field(default_factory=dict)

    def __post_init__(self):
        names = [arm.name for arm in self.arm]
        repeated = [name for name in names if names.count(name) > 1]
        if repeated:
            raise ValueError(f"two arms are named {repeated[0]}")
        named = [*self.compare_with, *filter(None, (arm.compute_of for arm in self.arm))]
        named += self.learning_rates.arms if self.learning_rates else []
        unknown = [name for name in named if name not in names]
        if unknown:
            raise ValueError(f"there is no arm {unknown[0]}; the arms are {', '.join(names)}")
        for table, needed in (("training", TRAINING_NEEDS), ("tokenizer", TOKENIZER_NEEDS)):
            for name in needed:
                if name not in getattr(self, table):
                    raise ValueError(f"{table}.{name} is missing")
        if self.training["val-every"] % self.training["log-every"]:
            raise ValueError("val-every must be a multiple of log-every, so that each loss has its FLOPs and seconds")
        if not self.seeds or not self.compare_with:
            raise ValueError("give at least one seed, and an arm to compare with")

    def arm_named(self, name: str) -> Arm:
        return next(arm for arm in self.arm if arm.name == name)

    def training_flags(self, arm: Arm) -> Flags:
        return self.training | arm.flags


def read_declaration(path: Path) -> Study:
    """The study declared in a TOML file. `UserError` for one that does not fit."""
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"there is no declaration {path}; scripts/studies holds some.") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path} is not a TOML file ({error}).") from error
    try:
        return _build(Study, {"name": path.stem, **table}, "")
    except ValueError as error:
        raise UserError(f"{path}: {error}.") from error


KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list", dict: "a table"}


def _build(cls: type, table: Any, where: str):
    """The dataclass of a TOML table; names with dashes are fields with underscores."""
    _check(table, dict, where.rstrip("."))
    entries = {entry.name.replace("_", "-"): entry for entry in dataclasses.fields(cls)}
    for name in table:
        if name not in entries:
            raise ValueError(f"{where}{name} is not an entry of a declaration; known are {', '.join(entries)}")
    hints, values = typing.get_type_hints(cls), {}
    for name, entry in entries.items():
        if name in table:
            values[entry.name] = _value(table[name], hints[entry.name], f"{where}{name}")
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}{name} is missing")
    return cls(**values)


def _value(value: Any, hint: Any, name: str) -> Any:
    if isinstance(hint, types.UnionType):  # something that may be left out
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{name}.")
    kind = typing.get_origin(hint) or hint
    _check(value, kind, name)
    return [_value(one, typing.get_args(hint)[0], name) for one in value] if kind is list else value


def _check(value: Any, kind: type, name: str) -> None:
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} must be {KINDS[kind]}")
