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
    own_time_left: bool = False,
) -> tqdm:
    """A bar over `iterable`, or one to `update()` by hand; `done` units were finished by an earlier run.

    `own_time_left`: the caller shows the time left, because units differ in cost.
    """
    return tqdm(
        iterable,
        desc=description,
        total=total,
        initial=done,
        unit=unit,
        disable=not show,
        dynamic_ncols=True,
        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]" if own_time_left else None,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
    )
