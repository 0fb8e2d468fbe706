"""Progress bars with rate and time left: on the main rank only, and sparse when the output is a log file."""

import sys
from collections.abc import Iterable

from tqdm import tqdm


def progress(
    iterable: Iterable | None = None,
    *,
    description: str,
    total: int | None = None,
    unit: str = "it",
    done: int = 0,
    show: bool = True,
) -> tqdm:
    """A bar over `iterable`, or one to `update()` by hand; `done` units were finished by an earlier run."""
    return tqdm(
        iterable,
        desc=description,
        total=total,
        initial=done,
        unit=unit,
        disable=not show,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
    )
