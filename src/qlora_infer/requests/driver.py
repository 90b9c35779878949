"""The one thread that drives the engine: between its steps, requests come and go and adapters are loaded."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from qlora_infer.backend import Backend
from qlora_infer.errors import EngineClosedError, EngineDeadError, QLoRAInferError, RequestCancelledError
from qlora_infer.requests.queue import RequestQueue
from qlora_infer.requests.request import GenerationRequest, RequestHandle

if TYPE_CHECKING:
    from qlora_infer.adapters.cache import AdapterVersion
    from qlora_infer.adapters.residency import Residency

logger = logging.getLogger("qlora_infer")

T = TypeVar("T")

#: Seconds that a step or a load may still take when the engine is closed, before the engine is killed.
CLOSE_TIMEOUT = 10.0


class Driver:
    """Runs the backend in a thread of its own and is spoken to by all others.

    A turn of its loop runs the calls that other threads sent, drops what was cancelled, admits what the queue
    offers, and takes one step. Each request ends exactly once: with an output or with an error.

    Args:
        backend: The engine; only this object calls its driving methods.
        queue: Who runs next.
        residency: Which adapters are in host memory.
        release: Called with its adapter once for each request that has ended, whatever its end.
    """

    def __init__(
        self,
        backend: Backend,
        queue: RequestQueue,
        residency: Residency,
        release: Callable[[AdapterVersion | None], None],
    ) -> None:
        self._backend = backend
        self._queue = queue
        self._residency = residency
        self._release = release
        self._running: dict[str, RequestHandle] = {}
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._cancelled: deque[RequestHandle] = deque()
        self._closing = False
        self._ended: Callable[[], QLoRAInferError] | None = None
        self._wakeup = threading.Condition()  # guards the queue and every attribute from _calls on
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="qlora-infer", daemon=True)
        self._engine_args: Mapping[str, Any] = {}

    def start(self, engine_args: Mapping[str, Any]) -> None:
        """Start the engine and wait until it is ready; raises what kept it from starting."""
        self._engine_args = engine_args
        self._thread.start()
        self._started.result()

    def submit(self, request: GenerationRequest) -> RequestHandle:
        """Queue a request; raises ``EngineClosedError`` or ``EngineDeadError``."""
        handle = RequestHandle(request, self._cancel)
        with self._wakeup:
            self.require_open()
            self._queue.append(handle)
            self._wakeup.notify()
        return handle

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Run a function on the driving thread, between two steps, and return what it returns."""
        if threading.current_thread() is self._thread:
            return function(*args)
        return self.post(function, *args).result()

    def post(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Run a function on the driving thread, between two steps, without waiting for it."""
        future: Future[T] = Future()
        with self._wakeup:
            self.require_open()
            self._calls.append((future, partial(function, *args)))
            self._wakeup.notify()
        return future

    def close(self) -> None:
        """End what is unfinished with ``EngineClosedError``, then the engine; harmless a second time."""
        with self._wakeup:
            self._closing = True
            self._wakeup.notify()
        if self._thread.ident is None or threading.current_thread() is self._thread:
            return
        self._thread.join(CLOSE_TIMEOUT)
        if self._thread.is_alive():
            logger.warning("the engine has not answered for %.0f s and is killed", CLOSE_TIMEOUT)
            self._backend.kill()
            self._thread.join(CLOSE_TIMEOUT)
        self._end(lambda: EngineClosedError("the engine was closed"))

    def require_open(self) -> None:
        """Raise ``EngineClosedError`` or ``EngineDeadError`` when nothing more is accepted."""
        if self._ended is not None:
            raise self._ended()
        if self._closing:
            raise EngineClosedError("the engine was closed: make a new QuantizedLoRAEngine")

    def _cancel(self, handle: RequestHandle) -> None:
        with self._wakeup:
            was_waiting = self._queue.remove(handle)
            if not was_waiting:
                self._cancelled.append(handle)
                self._wakeup.notify()
        handle._fail(RequestCancelledError(f"request {handle.request_id} was cancelled"))
        if was_waiting:
            self._release(handle.request.adapter)

    def _run(self) -> None:
        try:
            self._backend.start(self._engine_args)
        except BaseException as error:
            self._end(lambda: EngineClosedError("the engine did not start"))
            self._backend.close()
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        try:
            while self._wait_for_work():
                self._turn()
            self._end(lambda: EngineClosedError("the engine was closed: make a new QuantizedLoRAEngine"))
        except BaseException as error:
            cause = error
            logger.error("the engine died: %s", cause)
            self._end(lambda: _dead(cause))
        finally:
            self._backend.close()

    def _wait_for_work(self) -> bool:
        with self._wakeup:
            self._wakeup.wait_for(
                lambda: self._closing or self._calls or self._cancelled or self._running or len(self._queue)
            )
            return not self._closing

    def _turn(self) -> None:
        self._run_calls()
        self._drop_cancelled()
        self._admit()
        if self._running:
            for output in self._backend.step():
                handle = self._running.get(output.request_id)
                if handle is None:
                    continue  # it was cancelled while the step ran
                if output.finished:
                    self._leave(handle)
                handle._advance(output)

    def _run_calls(self) -> None:
        while self._calls:
            future, function = self._calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except EngineDeadError as error:
                future.set_exception(error)
                raise
            except BaseException as error:
                future.set_exception(error)

    def _drop_cancelled(self) -> None:
        while self._cancelled:
            handle = self._cancelled.popleft()
            if handle.request_id in self._running:
                self._backend.abort_request(handle.request_id)
                self._leave(handle)

    def _admit(self) -> None:
        while True:
            with self._wakeup:
                handle = self._queue.pop(self._residency.has_room_for)
                if handle is None:
                    return
                self._running[handle.request_id] = handle
            try:
                self._residency.enter(handle.request.adapter)
                self._backend.add_request(handle.request)
            except EngineDeadError:
                raise
            except Exception as error:
                self._leave(handle)
                handle._fail(error)

    def _leave(self, handle: RequestHandle) -> None:
        del self._running[handle.request_id]
        self._residency.leave(handle.request.adapter)
        self._release(handle.request.adapter)

    def _end(self, make_error: Callable[[], QLoRAInferError]) -> None:
        """Accept nothing more, and fail whatever is unfinished; each with an error of its own."""
        with self._wakeup:
            if self._ended is not None:
                return
            self._ended = make_error
            handles = [*self._running.values(), *self._queue.drain()]
            futures = [future for future, _ in self._calls]
            self._running.clear()
            self._calls.clear()
        for handle in handles:
            handle._fail(make_error())
            self._release(handle.request.adapter)
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_exception(make_error())


def _dead(cause: BaseException) -> EngineDeadError:
    error = EngineDeadError(f"the engine core died ({cause or type(cause).__name__}): make a new QuantizedLoRAEngine")
    error.__cause__ = cause
    return error
