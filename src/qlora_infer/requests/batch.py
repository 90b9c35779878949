"""Many requests at once, with a bounded number of them in memory."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from concurrent.futures import wait
from itertools import islice
from queue import SimpleQueue
from typing import TypeVar

from qlora_infer.requests.handle import RequestHandle

T = TypeVar("T", bound=RequestHandle)


def as_ended(handles: Iterable[T], *, max_pending: int, in_order: bool) -> Generator[T, None, None]:
    """Yield handles whose requests have ended, while requests that ``handles`` has not made yet are made.

    Args:
        handles: Makes the next request each time that it is asked for one.
        max_pending: So many requests are on their way, or have ended and are not yet yielded.
        in_order: Whether handles come in the order of the requests; otherwise as they end.

    Raises:
        Exception: What ``handles`` raises. The requests on their way are cancelled then, as they are when the caller
            stops.
    """
    source, pending = iter(handles), dict[T, None]()  # in the order of the requests
    ended = SimpleQueue[T]()

    def begin(number: int) -> None:
        for handle in islice(source, number):
            pending[handle] = None
            if not in_order:
                handle.add_done_callback(ended.put)  # type: ignore[arg-type]  # it is called with the handle

    try:
        begin(max_pending)
        while pending:
            handle = next(iter(pending)) if in_order else ended.get()
            wait([handle])
            del pending[handle]
            begin(1)
            yield handle
    finally:  # Ctrl-C too: nothing of this call may show up in the next one
        for handle in pending:
            handle.cancel()
