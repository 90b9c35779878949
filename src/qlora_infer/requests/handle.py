"""The handle of a request: its future and its stream of partial outputs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, Self

from attrs import evolve
from typing_extensions import override

from qlora_infer.errors import RequestCancelledError
from qlora_infer.requests.pending import PendingRequest
from qlora_infer.requests.request import GenerationOutput


class RequestHandle(Future[GenerationOutput]):
    """A future of a request's output, for threads and event loops.

    ``handle.result()`` waits in a thread, ``await handle`` in a coroutine. ``for part in handle`` and ``async for part
    in handle`` yield partial outputs as tokens come, each with the whole text so far; the last one is finished. A slow
    reader gets the newest output and skips older ones. ``concurrent.futures.wait``, ``as_completed`` and
    ``asyncio.wrap_future`` accept handles.

    If you drop a handle, its request is cancelled. The engine holds a handle with a callback until its request ends.

    Example:
        >>> from qlora_infer.testing import fake_engine
        >>> with fake_engine() as engine:
        ...     handle = engine.add_request("one two", {"max_tokens": 8})
        ...     handle.result(timeout=10).text
        'You said: one two'

        In a coroutine:

        >>> import asyncio
        >>> async def answer(engine):
        ...     return (await engine.add_request("one two", {"max_tokens": 8})).text
        >>> with fake_engine() as engine:
        ...     asyncio.run(answer(engine))
        'You said: one two'

        Several, in the order in which they end:

        >>> from concurrent.futures import as_completed
        >>> with fake_engine() as engine:
        ...     handles = [engine.add_request(f"number {i}", {"max_tokens": 8}) for i in range(3)]
        ...     sorted(handle.result().text for handle in as_completed(handles))
        ['You said: number 0', 'You said: number 1', 'You said: number 2']
    """

    def __init__(self, pending: PendingRequest, end: Callable[[PendingRequest], None]) -> None:
        super().__init__()
        self._pending = pending
        self._end = end  # makes the driver let go of the request; it neither locks nor waits
        pending.attach(self)

    @property
    def request_id(self) -> str:
        """The request's id, as in its outputs."""
        return self._pending.request.request_id

    @override
    def done(self) -> bool:
        """Return True if the request has finished, failed or been cancelled."""
        return self._pending.done

    @override
    def running(self) -> bool:
        """Return True if the request has left the queue and not ended."""
        return self._pending.admitted is not None and not self._pending.done

    @override
    def cancelled(self) -> bool:
        """Return True if the request was cancelled before it ended."""
        return isinstance(self._pending.error, RequestCancelledError)

    @override
    def cancel(self) -> bool:
        """Stop the request and free its place; other requests continue.

        Returns:
            True if the request was unfinished. ``result`` then raises ``RequestCancelledError``.
        """
        if self._pending.done:
            return False
        was_unfinished = self._pending.fail(RequestCancelledError(f"request {self.request_id} was cancelled"))
        if was_unfinished:
            self._end(self._pending)
        return was_unfinished

    @override
    def result(self, timeout: float | None = None) -> GenerationOutput:
        """Wait for the finished output.

        Args:
            timeout: Seconds to wait at most; ``None`` waits until the request ends. It always ends, with an output or
                an error.

        Raises:
            TimeoutError: The request did not end in time; it continues.
            RequestTimeoutError: The request exceeded its own ``timeout``, and was cancelled.
            RequestCancelledError: The request was cancelled.
            RequestRejectedError: vLLM cannot run it.
            AdapterLoadError: Its adapter could not be loaded.
            EngineClosedError: The engine was closed first.
            EngineDeadError: The engine core died.
        """
        self._wait(timeout)
        return super().result()

    @override
    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end of the request, and return its error, or ``None``.

        Args:
            timeout: As in ``result``.

        Raises:
            TimeoutError: The request did not end in time; it continues.
        """
        self._wait(timeout)
        return super().exception()

    @override
    def add_done_callback(self, fn: Callable[[Future[GenerationOutput]], object]) -> None:
        """Call ``fn`` with this handle when the request ends, or at once if it has ended.

        The engine's thread calls it, so ``fn`` must be quick. The request continues even if you drop the handle.

        Args:
            fn: A function of one argument, the handle.
        """
        self._pending.hold(self)
        super().add_done_callback(fn)

    def _wait(self, timeout: float | None) -> None:
        self._pending.require_own_process()
        try:
            super().exception(None if timeout is None else min(timeout, threading.TIMEOUT_MAX))
        except TimeoutError:
            raise TimeoutError(f"request {self.request_id} has not ended within {timeout} s; it goes on") from None

    def __await__(self) -> Generator[Any, None, GenerationOutput]:
        return self._awaited().__await__()

    async def _awaited(self) -> GenerationOutput:
        await self._pending.wait_async()
        return self.result()

    def __iter__(self) -> PartialOutputs:
        return PartialOutputs(self)

    def __aiter__(self) -> PartialOutputs:
        return PartialOutputs(self)

    def __del__(self) -> None:
        # This may run in any thread, in the middle of anything: it must not lock.
        if not self._pending.done:
            self._end(self._pending)

    def __repr__(self) -> str:
        pending = self._pending
        state = "unfinished" if not pending.done else "failed" if pending.error else "finished"
        return f"<RequestHandle {self.request_id} {state}>"


class PartialOutputs:
    """The outputs of a request as its tokens come, for ``for`` and for ``async for``."""

    def __init__(self, handle: RequestHandle) -> None:
        self._handle = handle
        self._pending = handle._pending
        self._num_seen = 0
        self._num_characters = 0
        self._ended = False

    def __iter__(self) -> Self:
        return self

    def __aiter__(self) -> Self:
        return self

    def __next__(self) -> GenerationOutput:
        if self._ended:
            raise StopIteration
        self._pending.wait(self._num_seen)
        return self._newest()

    async def __anext__(self) -> GenerationOutput:
        if self._ended:
            raise StopAsyncIteration
        await self._pending.wait_async(self._num_seen)
        return self._newest()

    def close(self) -> None:
        """Cancel the request, if it is unfinished."""
        self._ended = True
        self._handle.cancel()

    def _newest(self) -> GenerationOutput:
        self._ended = True  # unless there is an output, and it is not the last
        output, self._num_seen, self._ended = self._pending.newest()
        delta = output.text[self._num_characters :]
        self._num_characters += len(delta)
        return evolve(output, delta=delta)
