"""A user's own part of the method, named on the command line: `FILE.py:NAME` or `'FILE.py:NAME(key=value, …)'`.

    --loss examples/label_smoothing.py:label_smoothing
    --sampler 'my/minp.py:min_p(threshold=0.05)'

`NAME` is a function, whose last arguments the keywords fill, or a class. `package.module:NAME` works as well.
"""

import ast
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from utils.program import UserError


@dataclass(frozen=True)
class Component:
    """What a `--flag FILE.py:NAME(…)` names; `identity` is the spelling with a hash of the file's text."""

    spelling: str
    make: Callable[..., Any]  # the class, or the function, with the keywords filled in
    sha256: str

    @property
    def identity(self) -> str:
        return f"{self.spelling} sha256 {self.sha256[:16]}"


def identities(**spellings: str | None) -> dict[str, str]:
    """The identities of the components that flags name; nothing for flags that name none."""
    named = {name: text for name, text in spellings.items() if text is not None}
    return {name: load_component(text, f"--{name}").identity for name, text in named.items()}


def is_component(text: str | None) -> bool:
    """Whether a flag's value names a user's own part rather than a built-in one."""
    return text is not None and ":" in text


def load_component(text: str, flag: str, given: Sequence[str] | None = None) -> Component:
    """Import what `text` names. The file runs: it is the user's own, given on the command line.

    `given` names the arguments that the program itself passes by position. Raises `UserError`, naming `flag`, if there
    is no such file or name, if it does not take the keywords, or (where `given` is known) needs more than it gets.
    """
    place, _, call = _split_before_call(text)
    name, keywords = _parse_call(call, text, flag)
    module = _load_module(place, flag)
    found = getattr(module, name, None)
    if not callable(found):
        raise UserError(f"{flag}: {place} defines no function or class {name}.")
    _check_keywords(found, keywords, text, flag)
    if given is not None:
        _check_arguments(found, given, keywords, text, flag)
    sha256 = hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()
    return Component(text, functools.partial(found, **keywords) if keywords else found, sha256)


def call_of(text: str, flag: str) -> str:
    """`NAME(key=value)` of what `text` names, wherever its file lies; nothing is imported."""
    name, keywords = _parse_call(_split_before_call(text)[2], text, flag)
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in sorted(keywords.items()))})"


def short_name(text: str) -> str:
    """For names of files: `NAME` of a component's spelling or identity, other text as it is."""
    return _split_before_call(text)[2].partition("(")[0].split()[0] if is_component(text) else text


def placeless(identity: str) -> str:
    """An identity without the folder of its file, which may have moved: name, keywords and hash say what it is."""
    return identity.partition(".py:")[2] or identity


def _split_before_call(text: str) -> tuple[str, str, str]:
    head, parenthesis, arguments = text.partition("(")
    place, colon, name = head.rpartition(":")
    return place, colon, name + parenthesis + arguments


def _parse_call(call: str, text: str, flag: str) -> tuple[str, dict[str, Any]]:
    try:
        node = ast.parse(call.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, {}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
            return node.func.id, {word.arg: ast.literal_eval(word.value) for word in node.keywords if word.arg}
    except (SyntaxError, ValueError):
        pass
    raise UserError(f"{flag} {text} is not of the form FILE.py:NAME or 'FILE.py:NAME(key=value, …)' with plain values.")


def _load_module(place: str, flag: str) -> ModuleType:
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise UserError(f"{flag}: there is no module {place}; a file is named with its .py.") from error
    path = Path(place).resolve()
    if not path.is_file():
        raise UserError(f"{flag}: there is no file {place}.")
    name = f"component_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _check_keywords(found: Callable, keywords: dict[str, Any], text: str, flag: str) -> None:
    parameters = inspect.signature(found).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    unknown = [name for name in keywords if name not in parameters]
    if unknown:
        raise UserError(f"{flag} {text}: there is no parameter {unknown[0]}; it takes {', '.join(parameters)}.")


def _check_arguments(found: Callable, given: Sequence[str], keywords: dict[str, Any], text: str, flag: str) -> None:
    try:
        inspect.signature(found).bind(*given, **keywords)
    except TypeError as error:
        takes = f"it is called with ({', '.join(given)})"
        raise UserError(f"{flag} {text}: {error}; {takes}, and 'FILE.py:NAME(key=value)' gives it the rest.") from error
