"""A shorter thread switch interval for a time, so that a waiting thread gets Python's lock sooner.

Python waits 5 ms before it takes the lock away. A worker's loop that makes the steps would wait so long, many times,
for a thread that reads an adapter; where nobody reads, shorter turns only make those who tell of tokens interrupt it.
"""

from __future__ import annotations

import sys
import threading


class ShortTurns:
    """While any thread is within, each waits ``seconds`` for Python's lock, at most; then it is as it was before.

    Example:
        >>> turns, before = ShortTurns(0.0005), sys.getswitchinterval()
        >>> with turns, turns:  # as by two threads
        ...     round(sys.getswitchinterval(), 6)
        0.0005
        >>> sys.getswitchinterval() == before
        True
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._num_within = 0
        self._before = seconds

    def __enter__(self) -> None:
        with self._lock:
            if not self._num_within:
                self._before = sys.getswitchinterval()
                sys.setswitchinterval(self._seconds)
            self._num_within += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_within -= 1
            if not self._num_within:
                sys.setswitchinterval(self._before)
