"""Working ahead of whoever takes the results: the one prefetcher and background writer."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")


def work_ahead(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    ahead: int,
    threads: int = 1,
    start_thread: Callable[[], None] = lambda: None,
) -> Iterator[Result]:
    """`work(item)` of every item, in order, done by background threads for `ahead` items more than were asked for.

    An exception of `work` is raised where its result is taken. Whoever stops taking results ends the threads, after
    the items that they are at.
    """
    waiting = deque()
    pool = ThreadPoolExecutor(threads, initializer=start_thread)
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
