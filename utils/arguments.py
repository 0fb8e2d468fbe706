"""Arguments of Python functions: settings by the names of their fields, and refusals that speak of arguments."""

import dataclasses
import re
import typing
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from utils.program import UserError
from utils.settings import SettingError

S = TypeVar("S")
KINDS = {str: "text", int: "a whole number", float: "a number", bool: "True or False", Path: "a path"}
# of flags that are called otherwise here; the first two are a model's, the others of what is exported
NAMES = {"gpt-ckpt": "model", "vq-ckpt": "tokenizer", "source": "gpt", "target": "folder"}


def settings_from(cls: type[S], values: dict[str, Any]) -> S:
    """The settings class `cls` with those of `values` that are not None.

    Raises `UserError` for names it does not have, and for values of another type or out of range.
    """
    hints = typing.get_type_hints(cls)
    refuse_unknown(values, [cls])
    chosen = {name: _of_kind(name, value, hints[name]) for name, value in values.items() if value is not None}
    try:
        return cls(**chosen)
    except SettingError as error:
        raise UserError(f"{error}.") from error


def _of_kind(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type that the annotation `hint` names. Raises `UserError` for what is of no such type."""
    kinds = typing.get_args(hint) or (hint,)
    value = value.item() if isinstance(value, np.generic) else value
    if Path in kinds and isinstance(value, str):
        value = Path(value)
    elif str in kinds and isinstance(value, Path):
        value = str(value)
    elif float in kinds and type(value) is int:
        value = float(value)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(KINDS.get(kind, kind.__name__) for kind in kinds if kind is not type(None))
        raise UserError(f"{NAMES.get(name.replace('_', '-'), name)} must be {wanted}, not {value!r}.")
    return value


def refuse_unknown(values: Collection[str], classes: Collection[type]) -> None:
    """Raise `UserError` for a name that is a field of none of the settings `classes`."""
    known = {field.name for cls in classes for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - known):
        offered = sorted(known - {name.replace("-", "_") for name in NAMES})
        raise UserError(f"there is no argument {unknown[0]}; there are {', '.join(offered)}.")


def whole_number(name: str, value: Any, least: int, most: int) -> int:
    """`value` as an int. Raises `UserError` unless it is one from `least` to `most`."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not least <= value <= most:
        raise UserError(f"{name} must be a whole number from {least} to {most}, not {value!r}.")
    return int(value)


def spoken(items: Iterator[S]) -> Iterator[S]:
    """`items`, whose refusals speak of arguments, too."""
    with speaking_of_arguments():
        yield from items


@contextmanager
def speaking_of_arguments() -> Iterator[None]:
    """Sentences of a `UserError` name arguments of the Python interface where programs name their flags."""
    try:
        yield
    except UserError as error:
        told = re.sub(r"--([a-z][a-z-]*)", lambda flag: NAMES.get(flag[1], flag[1].replace("-", "_")), str(error))
        raise UserError(told) from error
