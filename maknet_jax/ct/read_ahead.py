"""Reads one item ahead, so that the disk and the accelerator work at the same time."""

import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Content = TypeVar("Content")


def read_ahead(
    read: Callable[[Item], Content], items: Iterable[Item]
) -> Iterator[tuple[Item, concurrent.futures.Future[Content]]]:
    """Calls `read` on each item in a thread, one item ahead of the caller.

    Yields:
      (item, future) in order; `future.result()` returns read(item) or raises its exception.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        previous = None
        for item in items:
            current = item, reader.submit(read, item)
            if previous is not None:
                yield previous
            previous = current
        if previous is not None:
            yield previous
