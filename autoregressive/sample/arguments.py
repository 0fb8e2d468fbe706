"""Arguments of the Python interface: settings by the names of their fields, and refusals that speak of arguments."""

import dataclasses
import re
import typing
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from utils.program import UserError
from utils.settings import SettingError

S = TypeVar("S")
KINDS = {str: "text", int: "a whole number", float: "a number", bool: "True or False"}
NAMES = {"gpt-ckpt": "model", "vq-ckpt": "tokenizer"}  # of flags that are called otherwise here


def settings_from(cls: type[S], values: dict[str, Any]) -> S:
    """The settings class `cls` with those of `values` that are not None.

    Raises `UserError` for names it does not have, and for values of another type or out of range.
    """
    hints, chosen = typing.get_type_hints(cls), {}
    refuse_unknown(values, [cls])
    for name, value in values.items():
        if value is None:
            continue
        kinds = typing.get_args(hints[name]) or (hints[name],)
        value = value.item() if isinstance(value, np.generic) else str(value) if isinstance(value, Path) else value
        value = float(value) if float in kinds and type(value) is int else value
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(KINDS.get(kind, kind.__name__) for kind in kinds if kind is not type(None))
            raise UserError(f"{name} must be {wanted}, not {value!r}.")
        chosen[name] = value
    try:
        return cls(**chosen)
    except SettingError as error:
        raise UserError(f"{error}.") from error


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


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device that is named, or a GPU if there is one. Raises `UserError` for one that is not here."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, TypeError) as error:
        raise UserError(f"there is no device {device!r}; give 'cpu', 'cuda' or 'cuda:1'.") from error
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(f"device must be 'cpu' or 'cuda', not {chosen.type!r}.")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(f"PyTorch finds no GPU for the device {str(chosen)!r}; give device='cpu'.")
    return chosen


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
