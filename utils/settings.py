"""Settings: frozen dataclasses beside the code that obeys them, from which command lines and identities are made.

    @settings("optimizer")
    class OptimizerSettings:
        lr: float = recipe(1e-4, "learning rate", at_least=0)

Every setting says once what it is: its default, its help text, the range it must lie in, and whether another value
gives another result. Range checks, flags (`parse`), the identity of a run (`identity`) and the refusal of another
continuation (`refuse_differences`) all follow from that.
"""

import argparse
import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

from utils.program import UserError

MAX_SEED = 2**64 - 1
MOST = 2**62  # of whole numbers without an upper bound of their own: sums of them stay 64-bit integers
REQUIRED = dataclasses.MISSING
FROM_NAME = "from the field's name"

S = TypeVar("S")


class SettingError(ValueError):
    """A setting has a value that it cannot have; `flag` is its name on the command line."""

    def __init__(self, name: str, flag: str | None, reason: str):
        super().__init__(f"{name} {reason}")
        self.flag, self.reason = flag, reason


@dataclasses.dataclass(frozen=True)
class Meaning:
    """What a setting says of itself beside its default."""

    help: str
    changes_result: bool
    choices: Collection[str] | None = None
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    flag: str | None = FROM_NAME
    aliases: tuple[str, ...] = ()

    def check(self, name: str, value: Any) -> None:
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, int | float) and not isinstance(one, bool) and not self._holds(one):
                bounds = (
                    f"{self.range}, and no astronomical number" if isinstance(one, int) and one > MOST else self.range
                )
                raise SettingError(name, self.flag, f"must be {bounds}, got {one}")
            if self.choices is not None and isinstance(one, str) and one not in self.choices:
                raise SettingError(name, self.flag, f"is one of {', '.join(self.choices)}, not {one}")

    def _holds(self, value: float) -> bool:
        most = MOST if self.at_most is None and isinstance(value, int) else self.at_most
        return (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (most is None or value <= most)
            and (self.below is None or value < self.below)
        )

    @property
    def range(self) -> str:
        """Such as `at least 0 and below 1`."""
        bounds = (("at least", self.at_least), ("above", self.above), ("at most", self.at_most), ("below", self.below))
        return " and ".join(
            f"{word} {bound:g}" if abs(bound) < 1e6 else f"{word} {bound}"
            for word, bound in bounds
            if bound is not None
        )


def recipe(default: Any, help: str, **more: Any) -> Any:
    """A field of a settings class that changes the result: another value gives other weights, codes or images.

    `default` may be `REQUIRED`. `more`: `choices`; bounds of numbers, which are finite and need a lower one
    (`at_least` or `above`) and may have an upper one (`at_most` or `below`); `flag`, None to keep the setting off the
    command line (fields of one class may share a flag); `aliases` of the flag.
    """
    return _field(default, Meaning(help, changes_result=True, **more))


def option(default: Any, help: str, **more: Any) -> Any:
    """A field that does not change the result, but where, how fast or how visibly it comes about; as `recipe`."""
    return _field(default, Meaning(help, changes_result=False, **more))


def _field(default: Any, meaning: "Meaning") -> Any:
    return dataclasses.field(default=default, metadata={"meaning": meaning})


@dataclass_transform(frozen_default=True, field_specifiers=(recipe, option))
def settings(title: str):
    """Class decorator: a frozen dataclass whose every field is a `recipe`, an `option`, or settings again.

    `title` heads its flags in `--help`. Raises `TypeError` when the class is defined, if a field does not say whether
    it changes the result, or a number lacks its range. Instances raise `SettingError` (a `ValueError`) for values out
    of range.
    """

    def decorate(cls):
        own_check = getattr(cls, "__post_init__", None)

        def __post_init__(self):
            for name, meaning in meanings(type(self)).items():
                meaning.check(name, getattr(self, name))
            if own_check is not None:
                own_check(self)

        cls.__post_init__ = __post_init__
        cls.settings_title = title
        cls = dataclasses.dataclass(frozen=True)(cls)
        meanings(cls)
        return cls

    return decorate


@functools.cache
def meanings(cls: type) -> dict[str, Meaning]:
    """What the settings of a class say of themselves, by field; nested settings are left out."""
    hints, found = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        if is_settings(hints[field.name]):
            continue
        meaning = field.metadata.get("meaning")
        if meaning is None:
            raise TypeError(
                f"{cls.__name__}.{field.name} must be a recipe(…) or an option(…): does it change the result?"
            )
        kinds = _kinds(hints[field.name])
        if {int, float} & kinds and meaning.at_least is None and meaning.above is None:
            raise TypeError(f"{cls.__name__}.{field.name} must declare its range")
        if meaning.flag == FROM_NAME:
            meaning = dataclasses.replace(meaning, flag="--" + field.name.replace("_", "-"))
        found[field.name] = meaning
    return found


def is_settings(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) and hasattr(kind, "settings_title")


def with_defaults(cls: type[S], **defaults: Any) -> type[S]:
    """The settings class `cls` with other defaults: the same settings in another program."""
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    body = {name: dataclasses.field(default=value, metadata=fields[name].metadata) for name, value in defaults.items()}
    annotations = {name: hints[name] for name in defaults}
    return settings(cls.settings_title)(type(cls.__name__, (cls,), body | {"__annotations__": annotations}))


def parse(cls: type[S], description: str, command: Sequence[str] | None = None, **parser_options: Any) -> S:
    """The settings of a command line (default: this program's); a group of flags for each nested settings class.

    Raises `UserError` for a command line that does not fit.
    """
    parser = make_parser(cls, description, **parser_options)
    values = vars(parser.parse_args(command))
    try:
        return _build(cls, values)
    except SettingError as error:
        raise UserError(f"{error.flag or error} {error.reason}.") from error


def make_parser(cls: type, description: str, **parser_options: Any) -> argparse.ArgumentParser:
    parser = _Parser(description=description, formatter_class=_HelpFormatter, allow_abbrev=False, **parser_options)
    _add_flags(parser, cls, cls.settings_title)
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; --help lists what {self.prog} takes.")


class _HelpFormatter(argparse.HelpFormatter):
    """Adds each default to its help, except where there is none to speak of."""

    def _get_help_string(self, action):
        is_switch = action.nargs == 0 and not isinstance(action, argparse.BooleanOptionalAction)
        if action.default in (None, (), argparse.SUPPRESS) or is_switch:
            return action.help
        return f"{action.help} (default: %(default)s)"


def _add_flags(parser: argparse.ArgumentParser, cls: type, title: str) -> None:
    hints, group, added = typing.get_type_hints(cls), None, set()
    for field in dataclasses.fields(cls):
        if is_settings(hints[field.name]):
            _add_flags(parser, hints[field.name], hints[field.name].settings_title)
            continue
        meaning = meanings(cls)[field.name]
        if meaning.flag is None or meaning.flag in added:
            continue
        added.add(meaning.flag)
        group = group or parser.add_argument_group(title)
        _add_flag(group, meaning, hints[field.name], field.default)


def _add_flag(group, meaning: Meaning, hint: Any, default: Any) -> None:
    options: dict[str, Any] = {"help": meaning.help.replace("%", "%%"), "default": default}
    kinds = _kinds(hint)
    positional, optional = not meaning.flag.startswith("-"), default is not REQUIRED
    if not optional:
        options |= {"default": None} if positional else {"default": None, "required": True}
    if bool in kinds:
        negatable = type(None) in kinds or default is True
        options["action"] = argparse.BooleanOptionalAction if negatable else "store_true"
    else:
        options["type"] = next(kind for kind in (int, float, Path, str) if kind in kinds)
        if typing.get_origin(hint) is tuple:
            options["nargs"] = "*" if positional and optional else "+"
        elif positional and optional:
            options["nargs"] = "?"
        if meaning.choices is not None:
            options["choices"] = list(meaning.choices)
    group.add_argument(meaning.flag, *meaning.aliases, **options)


def _build(cls: type[S], values: dict[str, Any]) -> S:
    hints, chosen = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        if is_settings(hints[field.name]):
            chosen[field.name] = _build(hints[field.name], values)
            continue
        flag = meanings(cls)[field.name].flag
        if flag is not None:
            value = values[destination(flag)]
            chosen[field.name] = tuple(value) if isinstance(value, list) else value
    return cls(**chosen)


def destination(flag: str) -> str:
    """The name of a flag's value: `--cfg-scale` -> `cfg_scale`."""
    return flag.lstrip("-").replace("-", "_")


def _kinds(hint: Any) -> set[type]:
    """The plain types that an annotation such as `int | None` or `tuple[int, ...]` allows."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) in (typing.Union, tuple):
        return set().union(*(_kinds(part) for part in typing.get_args(hint) if part is not Ellipsis))
    return {hint}


def values_of(instance: Any) -> dict[str, Any]:
    """Every setting that is on the command line, by the name of its flag, as JSON values."""
    return _collect(instance, lambda meaning: True)


def identity(instance: Any) -> dict[str, Any]:
    """The settings that change the result, by the name of their flag, as JSON values."""
    return _collect(instance, lambda meaning: meaning.changes_result)


def unusual(instance: Any) -> dict[str, Any]:
    """Those of `identity` that differ from their defaults: a setting added later leaves earlier results their name."""
    mine, usual = identity(instance), default_identity(type(instance))
    return {name: value for name, value in mine.items() if name not in usual or usual[name] != value}


def _collect(instance: Any, wanted) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if is_settings(type(value)):
            found |= _collect(value, wanted)
            continue
        meaning = meanings(type(instance))[field.name]
        if meaning.flag is not None and wanted(meaning):
            found[destination(meaning.flag)] = _json_value(value)
    return found


def default_identity(cls: type) -> dict[str, Any]:
    """What `identity` returns of a command line without flags; required settings are left out."""
    hints, found = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        if is_settings(hints[field.name]):
            found |= default_identity(hints[field.name])
            continue
        meaning = meanings(cls)[field.name]
        if field.default is not REQUIRED and meaning.flag is not None and meaning.changes_result:
            found[destination(meaning.flag)] = _json_value(field.default)
    return found


def _json_value(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def json_values(value: Any) -> Any:
    """`value` as it comes back from a JSON file: tuples become lists, keys strings."""
    return json.loads(json.dumps(value))


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """The names whose values differ, in the order of `here`; a value that one side does not say cannot differ."""
    return [name for name, value in here.items() if there.get(name, value) != value]


def refuse_differences(what: str, there: dict[str, Any], here: dict[str, Any], remedy: str) -> None:
    """Raise `UserError` if `there`, what was recorded, and `here` contradict each other; `what` begins the sentence.

    Both hold JSON values. The sentence names up to three differences and ends with `remedy`.
    """
    there, here = _flat(there), _flat(here)
    different = differences(there, here)
    if different:
        named = ", ".join(f"{name} ({_shown(there[name])} there, {_shown(here[name])} here)" for name in different[:3])
        raise UserError(f"{what} with other settings: {named}; {remedy}.")


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries as `outer.inner`, so that a sentence can name what in them differs."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= (
            {f"{name}.{key}": one for key, one in _flat(value).items()} if isinstance(value, dict) else {name: value}
        )
    return found


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def refuse_contradictions(path: str | Path, recorded: dict[str, Any], flags: dict[str, Any]) -> None:
    """Raise `UserError` if a flag that was given (not None) contradicts what the file at `path` says of itself."""
    for name, value in flags.items():
        if value is not None and recorded.get(name, value) != value:
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{path} was trained with {option} {recorded[name]}, not {value}; give {option} {recorded[name]} or "
                "another checkpoint."
            )
