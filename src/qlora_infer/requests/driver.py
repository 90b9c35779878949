"""The thread that drives the engine, and between its steps adds requests and loads adapters."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from qlora_infer.errors import (
    EngineClosedError,
    EngineDeadError,
    QLoRAInferError,
    QueueFullError,
    RequestCancelledError,
    RequestTimeoutError,
)
from qlora_infer.requests.ahead import LOOK_AHEAD, STEPS_AHEAD, num_spare, steps_ahead
from qlora_infer.requests.backend import Backend, StepOutput
from qlora_infer.requests.deadlines import Deadlines
from qlora_infer.requests.handle import RequestHandle
from qlora_infer.requests.pending import PendingRequest
from qlora_infer.requests.queue import RequestQueue
from qlora_infer.requests.request import GenerationOutput, GenerationRequest
from qlora_infer.requests.stats import EngineStats, StatsRecorder

if TYPE_CHECKING:
    from qlora_infer.adapters.memory import HostMemory
    from qlora_infer.adapters.version import AdapterVersion
    from qlora_infer.plan.engine_plan import EnginePlan

logger = logging.getLogger("qlora_infer")

T = TypeVar("T")

#: Seconds between two looks at requests that await their adapters, while there is nothing else to do.
AWAITING_POLL = 0.5

#: Seconds that a step or a load may still take when the engine is closed, before the engine is killed.
CLOSE_TIMEOUT = 10.0

#: Seconds between two looks at adapters that are being read, while there is no step to make.
READ_POLL = 0.002


class Driver:
    """Runs the backend in a thread of its own and is spoken to by all others.

    A turn of its loop runs the calls that other threads sent, lets go of requests that were cancelled or are too
    late, admits what the queue offers, and takes one step. Each request ends exactly once: with an output or with an
    error.

    Args:
        backend: The engine; only this object calls its driving methods.
        queue: Who runs next.
        memory: Which adapters are in host memory, and on their way there.
        release: Called with its adapter once for each request that has ended, whatever its end.
        max_waiting: Requests that the queue holds at most; ``None`` for no limit.
        restarts: Whether an engine that dies is started again.
    """

    def __init__(
        self,
        backend: Backend,
        queue: RequestQueue,
        memory: HostMemory,
        release: Callable[[AdapterVersion | None], None],
        *,
        max_waiting: int | None = None,
        restarts: bool = False,
    ) -> None:
        self._backend = backend
        self._queue = queue
        self._memory = memory
        self._release = release
        self._max_waiting = max_waiting
        self._restarts = restarts
        self._stats = StatsRecorder()
        self._deadlines = Deadlines(self._expire)
        self._running: dict[str, PendingRequest] = {}
        self._reading: deque[PendingRequest] = deque()  # of those that run, those whose adapters are being read
        self._awaiting: set[PendingRequest] = set()  # those whose adapters are not loaded yet
        self._num_spare = 0
        self._num_backlog = 0  # requests that the engine has taken and not begun
        self._ended_early: deque[PendingRequest] = deque()  # may be appended to at any moment, without the lock
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._closing = False
        self._end_error: Callable[[], QLoRAInferError] | None = None
        self._lock = threading.RLock()  # guards the queue, and every attribute from _calls on
        self._work = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="qlora-infer", daemon=True)
        self._plan: EnginePlan  # which start() gives

    # For other threads ------------------------------------------------------------------------------------------

    def start(self, plan: EnginePlan) -> None:
        """Start the engine and wait until it is ready; raises the error of a failed start."""
        self._plan = plan
        self._thread.start()
        self._started.result()

    def submit(self, request: GenerationRequest, *, block: bool = True) -> RequestHandle:
        """Queue a request, once there is room for it; one whose adapter is awaited, when ``complete`` brings it.

        Raises:
            QueueFullError: There is none, and ``block`` is false.
            RequestTimeoutError: There was none within the request's ``timeout``.
            EngineClosedError: The engine was closed.
            EngineDeadError: The engine core died.
        """
        pending = PendingRequest(request)
        with self._lock:
            try:
                self._wait_for_room(request, block=block)
            except (QueueFullError, RequestTimeoutError):
                self._stats.count_refusal(request)
                raise
            handle = RequestHandle(pending, self._let_go)  # now, because the request may end as soon as it is queued
            if request.awaited is None:
                self._queue.append(pending)
            else:
                self._awaiting.add(pending)
            self._stats.count_waiting(pending)
            self._work.notify()
        self._deadlines.add(pending)
        return handle

    def complete(self, pending: PendingRequest, request: GenerationRequest) -> None:
        """Queue a request that has awaited its adapter, unless it has ended meanwhile."""
        with self._lock:
            was_awaiting = pending in self._awaiting
            if was_awaiting:
                self._awaiting.remove(pending)
                pending.complete(request)
                self._queue.append(pending)
                self._work.notify()
        if not was_awaiting:
            self._release(request.adapter)
        elif pending.done:
            self._let_go(pending)  # again: it was not in the queue when that was done

    def refuse(self, pending: PendingRequest, error: Exception) -> None:
        """End a request whose adapter could not be loaded, or that cannot be run with it."""
        with self._lock:
            if pending not in self._awaiting:
                return
            self._awaiting.remove(pending)
            self._room.notify()
        self._stats.count_end(pending, None, pending.error or error, was_running=False)
        pending.fail(error)

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Run a function on the driving thread, between two steps, and return its result."""
        if threading.current_thread() is self._thread:
            return function(*args)
        return self.post(function, *args).result()

    def post(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Run a function on the driving thread, between two steps, without waiting for it."""
        future: Future[T] = Future()
        with self._lock:
            self.require_open()
            self._calls.append((future, partial(function, *args)))
            self._work.notify()
        return future

    def forget(self, name: str) -> None:
        """Drop the records of an unloaded adapter."""

        def drop() -> None:
            with self._lock:
                self._queue.forget(name)
            self._stats.forget(name)
            self._memory.recorder.forget(name)

        self.post(drop)

    def stats(self) -> EngineStats:
        """Return the current numbers, also after the end."""
        return self._stats.snapshot(
            num_adapters_waiting=self.num_adapters_waiting(),
            residency=self._memory.stats(),
            load_errors=self._memory.recorder.errors(),
            is_running=self._end_error is None and not self._closing,
        )

    def num_adapters_waiting(self) -> int:
        """Adapters that wait for a slot."""
        return self._queue.num_adapters_in_line

    def close(self) -> None:
        """Fail unfinished requests with ``EngineClosedError``, then end the engine; a second call does nothing."""
        with self._lock:
            self._closing = True
            self._work.notify_all()
            self._room.notify_all()
        self._deadlines.close()
        if self._thread.ident is None or threading.current_thread() is self._thread:
            return
        self._thread.join(CLOSE_TIMEOUT)
        if self._thread.is_alive():
            logger.warning("the engine has not answered for %.0f s and is killed", CLOSE_TIMEOUT)
            self._backend.kill()
            self._thread.join(CLOSE_TIMEOUT)
        self._end(lambda: EngineClosedError("the engine was closed"))

    @property
    def is_open(self) -> bool:
        """True if more requests are accepted."""
        return self._end_error is None and not self._closing

    def require_open(self) -> None:
        """Raise ``EngineClosedError`` or ``EngineDeadError`` when nothing more is accepted."""
        if self._end_error is not None:
            raise self._end_error()
        if self._closing:
            raise EngineClosedError("the engine was closed: make a new QuantizedLoRAEngine")

    def _wait_for_room(self, request: GenerationRequest, *, block: bool) -> None:
        self.require_open()
        while self._max_waiting is not None and self._num_waiting >= self._max_waiting:
            if not block or _in_event_loop():
                raise QueueFullError(
                    f"{self._num_waiting} requests wait already (max_waiting={self._max_waiting}): try again later"
                )
            remaining = None if request.timeout is None else request.queued + request.timeout - time.monotonic()
            if remaining is not None and remaining <= 0:
                raise _too_late(request)
            self._room.wait(None if remaining is None else min(remaining, threading.TIMEOUT_MAX))
            self.require_open()

    @property
    def _num_waiting(self) -> int:
        return len(self._queue) + len(self._awaiting)

    def _let_go(self, pending: PendingRequest) -> None:
        """Make the driving thread drop a request that has ended early, or whose handle is gone.

        It neither locks nor waits, because a handle that is thrown away calls it from wherever that happens. The
        driving thread need not be woken: while there are requests, it does not sleep.
        """
        self._ended_early.append(pending)

    def _expire(self, pending: PendingRequest) -> None:
        if pending.fail(_too_late(pending.request)):
            self._let_go(pending)

    # The driving thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._start_backend()
        except BaseException as error:
            self._end(lambda: EngineClosedError("the engine did not start"))
            self._backend.close()
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        try:
            while self._drive():
                pass
            self._end(lambda: EngineClosedError("the engine was closed: make a new QuantizedLoRAEngine"))
        except BaseException as error:
            cause = error
            logger.error("the engine died: %s", str(cause))  # a record that is kept must keep no frames
            self._end(lambda: _dead(cause))
        finally:
            self._backend.close()

    def _start_backend(self) -> None:
        self._backend.start(self._plan)
        with self._lock:
            self._queue.resize(self._backend.max_num_seqs)
        self._spare(0)

    def _spare(self, num_ending: int) -> None:
        """Add places beyond the batch for sequences that are about to end."""
        max_num_seqs = self._backend.max_num_seqs
        self._num_spare = num_spare(max_num_seqs, num_ending)
        with self._lock:
            self._queue.num_places = max_num_seqs + self._num_spare

    def _drive(self) -> bool:
        """Drive until the engine is closed, which gives ``False``, or has died and was started again."""
        try:
            while self._wait_for_work():
                self._turn()
        except EngineDeadError as death:
            if not self._restarts or self._closing:
                raise
            self._restart(death)
            return True
        return False

    def _wait_for_work(self) -> bool:
        with self._work:
            while not (self._closing or self._calls or self._running or len(self._queue) or self._memory.is_loading):
                if self._awaiting and self._ended_early:
                    break
                # Whoever ends one of those that await their adapters wakes nobody, and they take room.
                self._work.wait(AWAITING_POLL if self._awaiting else None)
            return not self._closing

    def _turn(self) -> None:
        self._run_calls()
        self._drop_ended()
        self._admit()
        self._look_ahead()
        self._memory.poll()
        self._hand_over_read()
        if len(self._running) > len(self._reading):
            began = time.monotonic()
            step = self._backend.step()
            self._take(step, time.monotonic() - began)
        elif self._reading or self._memory.is_loading:
            time.sleep(READ_POLL)

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
            finally:
                del future  # else a cycle: an error has this frame in its traceback, and the future has the error

    def _drop_ended(self) -> None:
        while self._ended_early:
            pending = self._ended_early.popleft()
            pending.fail(RequestCancelledError("nobody holds the request's handle any more"))
            if self._running.get(pending.request.request_id) is pending:
                self._backend.abort_request(pending.request.request_id)
                self._leave(pending, None)
                continue
            with self._lock:
                was_waiting = self._queue.remove(pending) or pending in self._awaiting
                self._awaiting.discard(pending)
                self._room.notify()
            if was_waiting:
                self._stats.count_end(pending, None, pending.error, was_running=False)
                self._release(pending.request.adapter)

    def _admit(self) -> None:
        if not self._running:
            self._num_backlog = 0
        # When the engine has many that it has not begun, its KV cache is full: who waits there waits unfairly.
        while self._num_backlog <= self._num_spare:
            with self._lock:
                pending = self._queue.admit()
                if pending is None:
                    return
                self._room.notify()
                self._running[pending.request.request_id] = pending
            pending.admitted = time.monotonic()
            self._stats.count_admission(pending, pending.admitted)
            self._memory.request(pending.request.adapter)
            self._reading.append(pending)

    def _hand_over_read(self) -> None:
        """Hand over the requests whose adapters are in memory; steps go on without the others."""
        for pending in list(self._reading):
            is_refused = pending.request.request_id not in self._running  # with one before it
            if not is_refused and self._memory.is_ready(pending.request.adapter):
                self._reading.remove(pending)
                self._hand_over(pending)

    def _hand_over(self, pending: PendingRequest) -> None:
        pending.num_starts += 1
        version = pending.request.adapter
        try:
            is_swap = self._memory.activate(version)
        except EngineDeadError:
            raise
        except Exception as error:
            # Those who wait for the same reading hear of it now; whoever comes later has it begun again.
            self._refuse([pending, *(other for other in self._reading if other.request.adapter is version)], error)
            return
        try:
            num_tokens = self._backend.add_request(pending.request)
        except EngineDeadError:
            raise
        except Exception as error:
            self._refuse([pending], error)
            return
        self._stats.count_prompt(pending, num_tokens, is_swap=is_swap)
        with self._lock:
            self._queue.charge(pending, num_tokens)

    def _refuse(self, refused: Sequence[PendingRequest], error: Exception) -> None:
        for pending in refused:
            self._leave(pending, None, error)
            pending.fail(error)

    def _look_ahead(self) -> None:
        with self._lock:
            upcoming = self._queue.upcoming(max(LOOK_AHEAD, self._queue.max_loras))
        for version in upcoming:
            self._memory.prefetch(version)

    def _take(self, step: StepOutput, seconds: float) -> None:
        """Pass on the outputs of a step, and count them."""
        self._num_backlog = step.num_waiting
        given: dict[str | None, int] = {}
        given_to: dict[str | None, PendingRequest] = {}  # one of each adapter's requests
        num_ending, ahead = 0, steps_ahead(self._backend.max_num_seqs, seconds)
        with self._lock:
            self._queue.count_step()
            for request_id, num_tokens in step.num_tokens.items():
                pending = self._running.get(request_id)
                if pending is None:
                    continue
                if num_tokens > pending.num_tokens:
                    name = pending.request.adapter_name
                    given[name] = given.get(name, 0) + num_tokens - pending.num_tokens
                    given_to[name] = pending
                    pending.num_tokens = num_tokens
                if num_tokens < pending.max_num_tokens and pending.ends_within(ahead):
                    num_ending += pending.num_seqs
            # Once for each adapter and not for each request: this runs at every step, for every token.
            for name, pending in given_to.items():
                self._queue.charge(pending, given[name])
        self._spare(num_ending)
        self._stats.count_step(seconds, step.kv_cache_usage, given)
        for output in step.outputs:
            pending = self._running.get(output.request_id)
            if pending is None:
                continue  # it was cancelled while the step ran
            if output.error is not None:
                self._leave(pending, None, output.error)
                pending.fail(output.error)
                continue
            if output.finished:
                self._leave(pending, None if pending.done else output)
            pending.advance(output)
        self._expect()

    def _expect(self) -> None:
        """While others wait for a slot, tell the queue whose requests in the engine are about to end."""
        if not self._queue.num_adapters_in_line:
            return
        being_read = set(self._reading)
        ending = Counter(
            version
            for pending in self._running.values()
            if (version := pending.request.adapter) is not None
            and pending.ends_within(STEPS_AHEAD)
            and pending not in being_read
        )
        with self._lock:
            self._queue.expect(ending, at_most=min(self._queue.max_loras, self._memory.num_spare))

    def _leave(
        self, pending: PendingRequest, output: GenerationOutput | None, error: BaseException | None = None
    ) -> None:
        del self._running[pending.request.request_id]
        if pending in self._reading:
            self._reading.remove(pending)
        with self._lock:
            self._queue.leave(pending)
        self._stats.count_end(pending, output, pending.error or error, was_running=True)
        self._release(pending.request.adapter)

    # The end ----------------------------------------------------------------------------------------------------

    def _restart(self, death: EngineDeadError) -> None:
        """Start a new engine with the same adapters, repeat requests without output, and fail the others."""
        # A record that is kept must keep no frames: the death's traceback has those of a caller whose call met it.
        logger.warning("the engine core died (%s): starting another", str(death))
        with self._lock:
            lost = list(self._running.values())
        self._reading.clear()
        for pending in lost:
            if pending.num_tokens or pending.num_starts > 1 or pending.done:
                error = _lost(pending, death)
                self._leave(pending, None, error)
                pending.fail(error)
                continue
            del self._running[pending.request.request_id]
            self._stats.count_requeue(pending)
            with self._lock:
                self._queue.leave(pending)
                self._queue.append(pending)
        versions = self._memory.clear(lambda: _lost_load(death))
        self._num_backlog = 0
        self._backend.close()
        self._start_backend()
        for version in versions:
            self._memory.prefetch(version)  # where that fails, its requests will get the error
        self._stats.count_restart()
        logger.warning("the engine runs again")

    def _end(self, make_error: Callable[[], QLoRAInferError]) -> None:
        """Accept nothing more, and fail whatever is unfinished; each with an error of its own."""
        with self._lock:
            if self._end_error is not None:
                return
            self._end_error = make_error
            running, waiting = list(self._running.values()), [*self._queue.drain(), *self._awaiting]
            futures = [future for future, _ in self._calls]
            self._running.clear()
            self._awaiting.clear()
            self._calls.clear()
            self._room.notify_all()
        # Whoever waits hears of it first, whatever may go wrong with the rest.
        for pending in (*running, *waiting):
            pending.fail(make_error())
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_exception(make_error())
        self._memory.clear(make_error)
        for pendings, was_running in ((running, True), (waiting, False)):
            for pending in pendings:
                self._stats.count_end(pending, None, pending.error, was_running=was_running)
                self._release(pending.request.adapter)


def _in_event_loop() -> bool:
    """Return whether the calling thread runs an event loop, which nothing may hold up."""
    asyncio = sys.modules.get("asyncio")  # whose import is slow, and who has a loop has it
    return asyncio is not None and asyncio._get_running_loop() is not None


def _dead(cause: BaseException) -> EngineDeadError:
    error = EngineDeadError(f"the engine core died ({cause or type(cause).__name__}): make a new QuantizedLoRAEngine")
    error.__cause__ = cause
    return error


def _lost(pending: PendingRequest, death: EngineDeadError) -> EngineDeadError:
    why = f"it had produced {pending.num_tokens} tokens" if pending.num_tokens else "it was run twice"
    error = EngineDeadError(f"the engine core died ({death}) and was started again; this request is not, because {why}")
    error.__cause__ = death
    return error


def _lost_load(death: EngineDeadError) -> EngineDeadError:
    error = EngineDeadError(f"the engine core died ({death}) during the load, and was started again: load it again")
    error.__cause__ = death
    return error


def _too_late(request: GenerationRequest) -> RequestTimeoutError:
    return RequestTimeoutError(f"request {request.request_id} has not finished within {request.timeout} s")
