"""Many requests at once, with a bounded number of them in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from queue import SimpleQueue

from qlora_infer.requests.handle import RequestHandle
from qlora_infer.requests.request import GenerationOutput


def answered(
    handles: Iterable[RequestHandle], *, max_pending: int | None, in_order: bool
) -> Iterator[GenerationOutput]:
    """The finished outputs of requests that are made as they are taken from ``handles``.

    Args:
        handles: Makes the next request each time that it is asked for one.
        max_pending: So many requests are on their way, or finished and not yet yielded; ``None`` makes all at once.
        in_order: Whether outputs come in the order of the requests; otherwise as they finish.

    Raises:
        The error of the first request that failed; the others are cancelled then, as they are when the caller stops.
    """
    with closing(ended(handles, max_pending=max_pending, in_order=in_order)) as handles_that_ended:
        for handle in handles_that_ended:
            yield handle.result()


def ended(
    handles: Iterable[RequestHandle], *, max_pending: int | None, in_order: bool
) -> Generator[RequestHandle, None, None]:
    """The same, with each request's handle when it has ended, well or badly: one that failed stops no other."""
    window = _InOrder() if in_order else _AsFinished()
    source = iter(handles)
    try:
        for handle in islice(source, max_pending):
            window.add(handle)
        while window:
            handle_that_ended = window.next()
            for handle in islice(source, 1):
                window.add(handle)
            yield handle_that_ended
    finally:  # Ctrl-C too: nothing of this call may show up in the next one
        for handle in window:
            handle.cancel()


class _InOrder:
    """Requests on their way, the oldest first."""

    def __init__(self) -> None:
        self._handles: deque[RequestHandle] = deque()

    def add(self, handle: RequestHandle) -> None:
        self._handles.append(handle)

    def next(self) -> RequestHandle:
        self._handles[0]._pending.wait()
        return self._handles.popleft()

    def __len__(self) -> int:
        return len(self._handles)

    def __iter__(self) -> Iterator[RequestHandle]:
        return iter(self._handles)


class _AsFinished:
    """Requests on their way, the first that ends first."""

    def __init__(self) -> None:
        self._handles: dict[RequestHandle, None] = {}
        self._ended: SimpleQueue[RequestHandle] = SimpleQueue()

    def add(self, handle: RequestHandle) -> None:
        self._handles[handle] = None
        handle._pending.listen(partial(self._ended.put, handle))

    def next(self) -> RequestHandle:
        handle = self._ended.get()
        del self._handles[handle]
        return handle

    def __len__(self) -> int:
        return len(self._handles)

    def __iter__(self) -> Iterator[RequestHandle]:
        return iter(self._handles)
