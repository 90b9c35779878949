"""A priority queue from which you can remove any entry, not only the first."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
Key = tuple[int, ...]


class Heap(Generic[T]):
    """Items in the order of their keys; each method takes logarithmic time, amortized."""

    def __init__(self) -> None:
        self._entries: list[tuple[Key, int, T]] = []
        self._live: dict[T, tuple[Key, int]] = {}  # the others among the entries are dropped when they come up
        self._stamps = itertools.count()

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, item: object) -> bool:
        return item in self._live

    def __iter__(self) -> Iterator[T]:
        return iter(self._live)

    def push(self, key: Key, item: T) -> None:
        """Add an item, or move it to another place."""
        current = self._live.get(item)
        if current is not None and current[0] == key:
            return
        stamp = next(self._stamps)
        self._live[item] = key, stamp
        heapq.heappush(self._entries, (key, stamp, item))
        if len(self._entries) > 2 * len(self._live) + 16:
            self._entries = [(key, stamp, item) for item, (key, stamp) in self._live.items()]
            heapq.heapify(self._entries)

    def remove(self, item: T) -> bool:
        """Take an item out; whether it was there."""
        was_there = self._live.pop(item, None) is not None
        if not self._live:
            self._entries.clear()
        return was_there

    def head(self) -> T:
        """Return the first in order."""
        while True:
            key, stamp, item = self._entries[0]
            if self._live.get(item) == (key, stamp):
                return item
            heapq.heappop(self._entries)

    def pop(self) -> T:
        """Take out the first in order."""
        item = self.head()
        heapq.heappop(self._entries)
        del self._live[item]
        return item

    def first(self, number: int) -> list[T]:
        """Return the first few, in order."""
        entries: list[tuple[Key, int, T]] = []
        while self._live and len(entries) < min(number, len(self._live)):
            self.head()
            entries.append(heapq.heappop(self._entries))
        for entry in entries:
            heapq.heappush(self._entries, entry)
        return [item for _, _, item in entries]
