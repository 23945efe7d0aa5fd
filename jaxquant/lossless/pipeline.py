"""Work on the chunks of a file: in several threads, in order, a bounded number at a time."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
AHEAD = 2  # chunks in memory beyond one for each thread


def in_order(work: Callable[[T], R], items: Iterable[T], threads: int | None = None) -> Iterator[R]:
    """Yield `work(item)` of every item, in order.

    Items are taken as they are needed, so only `threads` + `AHEAD` of them are in memory.

    Args:
      work: the function; it should release Python's lock, as NumPy, zlib and native code do.
      items: the items.
      threads: number of threads; by default, that of the processors.

    Raises:
      ValueError: `threads` is below 1.

    >>> list(in_order(lambda n: n * n, range(5), threads=2))
    [0, 1, 4, 9, 16]
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be 1 or more, got {threads}")
    threads = threads or os.cpu_count() or 1
    if threads == 1:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(threads)
    waiting = deque()  # type: ignore[var-annotated]
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= threads + AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
