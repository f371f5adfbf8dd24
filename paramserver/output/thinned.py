"""Any number of values in bounded memory: neighbours become one where they are too many. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Thinned(Generic[T]):
    """At most `most` items, each of `stride` values that follow each other.

    Where there would be more, each two neighbours become one item and the stride doubles: the items
    are spread evenly over all values, however many there are. `merge` makes one value of two
    neighbours; it may change the first of them.
    """

    def __init__(self, most: int, merge: Callable[[T, T], T]) -> None:
        self._most, self._merge = most, merge
        self.items: list[T] = []
        """In their order; the last one may still grow."""
        self.stride = 1
        self._in_last = 0  # values
        self.changed = 0
        """How often items before the last one have changed."""

    def add(self, value: T) -> None:
        """Take in the next value."""
        if len(self.items) == self._most and self._in_last == self.stride:
            self._halve()
        if self.items and self._in_last < self.stride:
            self.items[-1] = self._merge(self.items[-1], value)
            self._in_last += 1
        else:
            self.items.append(value)
            self._in_last = 1

    def drop_last(self, unwanted: Callable[[T], bool]) -> None:
        """Remove the last items for which this holds."""
        before = len(self.items)
        while self.items and unwanted(self.items[-1]):
            self.items.pop()
        if len(self.items) < before:
            self._in_last = self.stride
            self.changed += 1

    def clear(self) -> None:
        self.items.clear()
        self.stride, self._in_last = 1, 0
        self.changed += 1

    def _halve(self) -> None:
        items = self.items
        if len(items) % 2 == 0:
            self._in_last *= 2
        for place in range(len(items) // 2):
            items[place] = self._merge(items[2 * place], items[2 * place + 1])
        if len(items) % 2:
            items[len(items) // 2] = items[-1]
        del items[(len(items) + 1) // 2 :]
        self.stride *= 2
        self.changed += 1
