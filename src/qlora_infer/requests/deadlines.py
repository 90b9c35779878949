"""The deadlines of requests, and the thread that ends them."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
import weakref
from collections.abc import Callable

from qlora_infer.requests.pending import PendingRequest

#: Deadlines that are kept before those of ended requests are looked for.
MIN_PRUNED = 1024


class Deadlines:
    """Calls back when a request's time is up.

    A thread of its own does, because the driving thread may be inside a long step just then. It is started by the
    first request that has a deadline.

    Args:
        on_expired: Called with each request that has not ended in time.
    """

    def __init__(self, on_expired: Callable[[PendingRequest], None]) -> None:
        self._on_expired = on_expired
        self._heap: list[tuple[float, int, weakref.ref[PendingRequest]]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._closed = False
        self._prune_at = MIN_PRUNED
        self._thread: threading.Thread | None = None

    def add(self, pending: PendingRequest) -> None:
        """Watch a request, if it has a timeout."""
        request = pending.request
        if request.timeout is None:
            return
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="qlora-infer-deadlines", daemon=True)
                self._thread.start()
            if len(self._heap) >= self._prune_at:
                self._prune()
            heapq.heappush(self._heap, (request.queued + request.timeout, next(self._numbers), weakref.ref(pending)))
            self._changed.notify()

    def close(self) -> None:
        """End the thread; harmless a second time."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _prune(self) -> None:
        """Drop the requests that have ended, long before their time as a rule."""
        self._heap = [entry for entry in self._heap if (pending := entry[2]()) is not None and not pending.done]
        heapq.heapify(self._heap)
        self._prune_at = max(MIN_PRUNED, 2 * len(self._heap))

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                remaining = self._heap[0][0] - time.monotonic() if self._heap else None
                if remaining is None or remaining > 0:
                    self._changed.wait(None if remaining is None else min(remaining, threading.TIMEOUT_MAX))
                    continue
                _, _, reference = heapq.heappop(self._heap)
            pending = reference()
            if pending is not None and not pending.done:
                self._on_expired(pending)
            del pending  # nothing may be kept alive by a thread that waits
