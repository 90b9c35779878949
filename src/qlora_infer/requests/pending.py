"""A request between its creation and its end, as the engine's side sees it."""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

from qlora_infer._forked import forked_engine_error
from qlora_infer.errors import ForkedEngineError
from qlora_infer.requests.request import GenerationOutput, GenerationRequest

#: More outputs than any request has: whoever waits for more waits for the end.
END = math.inf


class PendingRequest:
    """A request's state, which the queue and the driver hold and its handle reads.

    It ends exactly once, with a finished output or with an error, and then wakes everything that waits: threads,
    and tasks of any event loop. It refers to its handle weakly, so that a handle that its caller drops is gone.

    Attributes:
        request: The request.
        num_seqs: The places in the engine's batch that it takes: ``n`` of its sampling parameters.
        max_num_tokens: The most tokens that it can be given.
        number: Its place in the order of arrival, given by the queue.
        num_tokens: The tokens that it has been given so far.
        admitted: When it last left the queue, in seconds of ``time.monotonic()``; ``None`` before that.
        num_starts: How often it was handed to an engine; twice when the first one died.
        output: The newest output.
        num_outputs: How many there have been.
        done: Whether it has ended.
        error: Its error; ``None`` unless it failed.
    """

    def __init__(self, request: GenerationRequest) -> None:
        self.complete(request)
        self.number: int | None = None
        self.num_tokens = 0
        self.admitted: float | None = None
        self.num_starts = 0
        self.output: GenerationOutput | None = None
        self.num_outputs = 0
        self.done = False
        self.error: BaseException | None = None
        self._pid = os.getpid()
        self._lock = threading.RLock()  # no condition: one more for each request would be a cost
        self._listeners: list[tuple[float, Callable[[], None]]] = []
        self._future: Callable[[], Future[GenerationOutput] | None] = lambda: None
        self._held: Future[GenerationOutput] | None = None

    def complete(self, request: GenerationRequest) -> None:
        """Take the request itself, or the whole of one whose adapter had still to be loaded."""
        self.request = request
        self.num_seqs: int = getattr(request.sampling_params, "n", None) or 1
        max_tokens: int | None = getattr(request.sampling_params, "max_tokens", None)
        self.max_num_tokens = math.inf if max_tokens is None else self.num_seqs * max_tokens

    def attach(self, future: Future[GenerationOutput]) -> None:
        """Settle this future when the request ends, if anybody still holds it then."""
        self._future = weakref.ref(future)

    def hold(self, future: Future[GenerationOutput]) -> None:
        """Keep the future until the request has ended, because a callback waits."""
        with self._lock:
            self._held = None if self.done else future

    def ends_within(self, num_steps: int) -> bool:
        """Return whether it reaches its ``max_tokens`` within a number of steps."""
        return self.max_num_tokens - self.num_tokens <= num_steps * self.num_seqs

    def advance(self, output: GenerationOutput) -> None:
        """Take the next output, unless the request has ended."""
        with self._lock:
            if self.done:
                return
            self.output, self.done = output, output.finished
            self.num_outputs += 1
            self._notify()
        if output.finished:
            self._settle()

    def fail(self, error: BaseException) -> bool:
        """End with an error, unless the request has ended; whether it did so now."""
        with self._lock:
            if self.done:
                return False
            self.error, self.done = error, True
            self._notify()
        self._settle()
        return True

    def newest(self) -> tuple[GenerationOutput, int, bool]:
        """Return the newest output, how many there have been, and whether it is the last; or raise the error."""
        self._end_if_forked()
        with self._lock:
            if self.error is not None:
                raise self.error
            if self.output is None:
                raise RuntimeError(f"request {self.request.request_id} has no output")
            return self.output, self.num_outputs, self.done

    def wait(self, num_seen: float) -> None:
        """Block this thread until there are more outputs than ``num_seen``, or the end."""
        arrived = threading.Event()
        listener = arrived.set
        self.listen(listener, num_seen)
        try:
            arrived.wait()
        finally:
            self._unlisten(listener)

    async def wait_async(self, num_seen: float = END) -> None:
        """Wait in an event loop until there are more outputs than ``num_seen``, or the end."""
        import asyncio  # whoever awaits has it already, and who does not is spared a slow import

        loop = asyncio.get_running_loop()
        future = loop.create_future()

        def resolve() -> None:
            if not future.done():
                future.set_result(None)

        def wake() -> None:
            with suppress(RuntimeError):  # the loop was closed; nobody waits there any more
                loop.call_soon_threadsafe(resolve)

        self.listen(wake, num_seen)
        try:
            await future
        finally:
            self._unlisten(wake)

    def listen(self, listener: Callable[[], None], num_seen: float = END) -> None:
        """Call ``listener`` once when there are more outputs than ``num_seen``, or the end; it must not block."""
        self._end_if_forked()
        with self._lock:
            if not self._has_news(num_seen):
                self._listeners.append((num_seen, listener))
                return
        listener()

    def _unlisten(self, listener: Callable[[], None]) -> None:
        with self._lock:
            self._listeners = [entry for entry in self._listeners if entry[1] is not listener]

    def require_own_process(self) -> None:
        """Raise ``ForkedEngineError`` in a process that was forked from its own while the request ran."""
        self._end_if_forked()
        if isinstance(self.error, ForkedEngineError):
            raise self.error

    def _settle(self) -> None:
        """Pass the end on to the handle, outside of all locks: its callbacks may be anybody's."""
        future, self._held = self._future(), None
        if future is not None and self.error is not None:
            future.set_exception(self.error)
        elif future is not None:
            future.set_result(self.output)  # type: ignore[arg-type]  # a request that ends has one

    def _end_if_forked(self) -> None:
        """Fail in a process that was forked from the one where the request runs: no output comes here any more."""
        if not self.done and os.getpid() != self._pid:
            self._lock, self._listeners = threading.RLock(), []
            self.error, self.done = forked_engine_error(self._pid), True

    def _has_news(self, num_seen: float) -> bool:
        return self.done or self.num_outputs > num_seen

    def _notify(self) -> None:
        if self._listeners:
            due = [listener for num_seen, listener in self._listeners if self._has_news(num_seen)]
            self._listeners = [entry for entry in self._listeners if not self._has_news(entry[0])]
            for listener in due:
                listener()
