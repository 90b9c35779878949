"""Locks of adapter names, each of which exists while a thread holds it or waits for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from attrs import define, field


@define
class _NameLock:
    lock: threading.Lock = field(factory=threading.Lock)
    num_users: int = 0  # threads that hold it or wait for it


class NameLocks:
    """The locks of those names that threads hold or wait for.

    The users of each lock are counted, and the last one deletes it. A weak reference does not do: an exception keeps
    the frames of its traceback alive, and with them a lock that is a local variable there.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[str, _NameLock] = {}

    def __len__(self) -> int:
        return len(self._locks)

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Hold the lock of a name, after the threads that hold it already."""
        with self._guard:
            entry = self._locks.setdefault(name, _NameLock())
            entry.num_users += 1
        try:
            with entry.lock:
                yield
        finally:
            with self._guard:
                entry.num_users -= 1
                if not entry.num_users:
                    del self._locks[name]
