"""The caller's end of a request."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Self

from qlora_infer.errors import RequestCancelledError
from qlora_infer.requests.pending import PendingRequest
from qlora_infer.requests.request import GenerationOutput


class RequestHandle:
    """The caller's end of a request, for any thread and any event loop.

    ``handle.result()`` waits in a thread and ``await handle`` in a coroutine. ``for part in handle`` and
    ``async for part in handle`` yield partial outputs as tokens come, each with all the text so far, and the finished
    one last. A reader that is slower than the engine gets the newest output and skips those between.

    A handle that nobody holds any more cancels its request, since nobody can hear of it.

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
    """

    def __init__(self, pending: PendingRequest, end: Callable[[PendingRequest], None]) -> None:
        self._pending = pending
        self._end = end  # makes the driver let go of the request; it neither locks nor waits

    @property
    def request_id(self) -> str:
        """The request's id, as in its outputs."""
        return self._pending.request.request_id

    def done(self) -> bool:
        """Whether the request has finished, failed or been cancelled."""
        return self._pending.done

    def cancel(self) -> bool:
        """Stop the request and free what it holds; the others go on.

        Returns:
            Whether it was still unfinished. ``result`` then raises ``RequestCancelledError``.
        """
        was_unfinished = self._pending.fail(RequestCancelledError(f"request {self.request_id} was cancelled"))
        if was_unfinished:
            self._end(self._pending)
        return was_unfinished

    def result(self, timeout: float | None = None) -> GenerationOutput:
        """Wait for the finished output.

        Args:
            timeout: Seconds to wait at most; ``None`` waits until the request ends. It always does: with an
                output, or with an error when it is cancelled, the engine is closed, or its core dies.

        Raises:
            TimeoutError: It has not ended in time; it goes on.
            RequestTimeoutError: The request's own ``timeout`` has passed; it was cancelled.
            RequestCancelledError: It was cancelled.
            RequestRejectedError: vLLM cannot run it.
            AdapterLoadError: Its adapter could not be loaded.
            EngineClosedError: The engine was closed first.
            EngineDeadError: The engine core died.
        """
        if not self._pending.wait(timeout=timeout):
            raise TimeoutError(f"request {self.request_id} has not ended within {timeout} s; it goes on")
        return self._pending.last_output()

    def __await__(self) -> Generator[Any, None, GenerationOutput]:
        return self._result().__await__()

    async def _result(self) -> GenerationOutput:
        await self._pending.wait_async()
        return self._pending.last_output()

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
        return output
