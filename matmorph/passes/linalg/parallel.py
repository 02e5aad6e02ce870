"""Independent matrices on several cores: one thread per matrix, because LAPACK on several threads gains little and loses much on a busy
machine (see `svd.one_thread`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

from matmorph.passes.linalg.svd import one_thread

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None) -> Iterator[Result]:
    """`function(item)` for each item, in order; at most `workers` at a time and no more results waiting than that.

    workers: None = torch's number of threads, which is 1 for the caller and each worker until the iterator is exhausted or closed.
    A result does not depend on the number of workers. An exception is raised in the place of its result; what was not begun is not run.
    """
    count = torch.get_num_threads() if workers is None else workers
    if count <= 1:
        yield from map(function, items)
        return
    rest = iter(items)
    with one_thread(), ThreadPoolExecutor(count, thread_name_prefix="matmorph") as pool:
        waiting: deque[Future[Result]] = deque(pool.submit(function, item) for item in islice(rest, count))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in islice(rest, 1))
                yield result
        finally:
            for future in waiting:
                future.cancel()
