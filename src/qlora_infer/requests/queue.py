"""The requests that wait, and which of them runs next."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from qlora_infer.requests.request import RequestHandle


class RequestQueue:
    """First come, first served: the oldest request runs next, and while it cannot, nothing does.

    It is not locked; the driver is.
    """

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, RequestHandle] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    def append(self, handle: RequestHandle) -> None:
        """Add a request at the end."""
        self._waiting[handle.request_id] = handle

    def remove(self, handle: RequestHandle) -> bool:
        """Take a request out; whether it was waiting."""
        return self._waiting.pop(handle.request_id, None) is not None

    def pop(self, admissible: Callable[[RequestHandle], bool]) -> RequestHandle | None:
        """Take out the request that runs next; ``None`` when none waits or the next one is not admissible yet."""
        head = next(iter(self._waiting.values()), None)
        if head is None or not admissible(head):
            return None
        del self._waiting[head.request_id]
        return head

    def drain(self) -> list[RequestHandle]:
        """Take out all of them, the oldest first."""
        handles = list(self._waiting.values())
        self._waiting.clear()
        return handles
