"""Overlaps the preparation of the next item with work on the current one."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def one_ahead(started: Iterable[T]) -> Iterator[T]:
    """Yields the items of an iterable, each after the next one was drawn.

    With items that start work when they are drawn (futures, JAX arrays that are still being
    computed) that work overlaps with what the caller does with the current item.

    Args:
      started: drawing an item starts its work.
    """
    items = iter(started)
    for current in items:
        for following in items:
            yield current
            current = following
        yield current
