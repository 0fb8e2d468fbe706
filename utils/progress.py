"""Progress bars with rate and time left: on the main rank only, and sparse when the output is a log file."""

import sys
import threading
import weakref
from collections.abc import Iterable

from tqdm import tqdm

# tqdm's own lock is shared with forked processes: one that is killed while it holds it would stop all the others. Its
# monitor thread takes the lock, too; nothing needs it where bars are redrawn by time alone (miniters=1).
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0
_bars: "weakref.WeakSet[tqdm]" = weakref.WeakSet()


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
    bar = tqdm(
        iterable,
        desc=description,
        total=total,
        initial=done,
        unit=unit,
        unit_scale=unit == "B",
        disable=not show,
        dynamic_ncols=True,
        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]" if own_time_left else None,
        miniters=1,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
    )
    _bars.add(bar)
    return bar


def close_bars() -> None:
    """End the lines of all bars: what is said next begins a new one."""
    for bar in list(_bars):
        bar.close()
