"""What `config.json` in the hub's form says: types of the values that readers rely on. Other names are free."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

from utils.program import UserError, first_line

CONFIG_KINDS = {
    "model": dict,
    "gpt_model": str,
    "image_size": int,
    "downsample_size": int,
    "grid": tuple[int, int],
    "conditioning": str,
    "tokenizer": dict[str, str],
    "class_names": list[str],
    "vq_model": str,
    "vq_model_identity": str,
    "codebook_size": int,
    "codebook_embed_dim": int,
}
EXPORT_KINDS = {
    "weights": typing.Literal["ema", "raw"],
    "steps": int,
    "training": dict,
    "origin": dict[str, str],
    "code": str,
    "license": str,
    "metrics": dict,
}
MODEL_KINDS = {"grid": tuple[int, int]}  # of the part "model"; its readers check the rest by its fields
WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


def check_kinds(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Raise `TypeError`, which names what it is about, for one of `values` that is not of its kind; None is.

    `kinds` are annotations, by name; those of tuples mean lists, as JSON has them.
    """
    for name, kind in kinds.items():
        value = values.get(name)
        if value is not None and not _is(value, kind):
            raise TypeError(f"{name} must be {_words(kind)}, not {str(value)[:60]!r}")


def check_fields(values: Mapping[str, Any], cls: type, path: Any) -> None:
    """Raise `UserError` unless `values`, recorded at `path`, have the types of the fields of the dataclass `cls`."""
    hints = typing.get_type_hints(cls)
    try:
        check_kinds(values, {field.name: hints[field.name] for field in dataclasses.fields(cls)})
    except TypeError as error:
        raise UserError(damaged(path, error)) from error


def damaged(path: Any, error: Exception) -> str:
    return f"{path} is damaged or no model's ({first_line(error)}); copy or download it again."


def _is(value: Any, kind: Any) -> bool:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return isinstance(value, str) and value in parts
    if origin is list:
        return isinstance(value, list) and all(_is(one, parts[0]) for one in value)
    if origin is tuple:
        return isinstance(value, list | tuple) and len(value) == len(parts) and all(map(_is, value, parts))
    if origin is dict:
        return isinstance(value, dict) and all(one is None or _is(one, parts[1]) for one in value.values())
    if parts:  # a union
        return any(_is(value, part) for part in parts)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _words(kind: Any) -> str:
    origin, parts = typing.get_origin(kind), [part for part in typing.get_args(kind) if part is not type(None)]
    if origin is typing.Literal:
        return " or ".join(parts)
    if origin is tuple:
        return f"a list of {len(parts)}, each {_words(parts[0])}"
    if origin in (list, dict):
        return f"{WORDS[origin]}, each entry {_words(parts[-1])}"
    return _words(parts[0]) if parts else WORDS[kind]
