"""Commands that programs print for their user to run next: they run as printed, from any folder."""

import os
import shlex
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def command(script: str, *operands: str | Path, **flags: str | Path | float | bool | None) -> str:
    """The shell command that starts `scripts/{script}`: every `Path` absolute, everything quoted.

    A flag at None or False is left out, one at True stands alone.
    """
    words = ["bash", SCRIPTS / script, *operands]
    for name, value in flags.items():
        if value is not None and value is not False:
            words += ["--" + name.replace("_", "-")] + ([] if value is True else [value])
    return shlex.join(os.path.abspath(word) if isinstance(word, Path) else str(word) for word in words)


def absolute_component(spelling: str) -> str:
    """`FILE.py:NAME(…)`, a part of the user's own, with its file's absolute path; `package.module:NAME` as it is."""
    file, suffix, rest = spelling.partition(".py:")
    return os.path.abspath(file + ".py") + ":" + rest if suffix else spelling
