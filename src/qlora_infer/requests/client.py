"""The client of the driver, which turns prompts into requests and collects their outputs."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import as_completed
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from attrs import field, frozen

from qlora_infer.chat.conversation import Conversation
from qlora_infer.chat.template import content_format, render
from qlora_infer.errors import AdapterError, AdapterNotLoadedError, EngineDeadError, RequestError
from qlora_infer.requests.arguments import (
    AnyPrompt,
    PromptInput,
    check_priority,
    check_prompt,
    check_timeout,
    one_per_prompt,
    value_per_prompt,
)
from qlora_infer.requests.backend import Backend
from qlora_infer.requests.batch import as_ended, with_progress
from qlora_infer.requests.driver import Driver
from qlora_infer.requests.handle import RequestHandle
from qlora_infer.requests.pending import PendingRequest
from qlora_infer.requests.request import GenerationOutput, GenerationOutputs, GenerationRequest
from qlora_infer.tracing import RequestTracer

if TYPE_CHECKING:
    from qlora_infer.adapters.registry import AdapterRegistry
    from qlora_infer.adapters.version import AdapterVersion


#: What a batch does with a row that fails.
OnError = Literal["raise", "return"]

#: What fails one row and not the others.
ROW_FAULTS = (AdapterError, RequestError, ValueError, TypeError)


class KnownNames(Protocol):
    """The names whose adapters are loaded on first use."""

    def knows(self, name: str) -> bool:
        """Return whether an adapter may be loaded by this name."""
        ...

    def unknown(self, error: AdapterNotLoadedError) -> AdapterNotLoadedError:
        """Return the error of a name that is neither loaded nor known."""
        ...

    def request(self, name: str, waiter: Callable[[AdapterVersion | Exception], None]) -> None:
        """Load an adapter, and call ``waiter`` with its version, in use meanwhile, or with the error."""
        ...


class _ToBeLoaded(Exception):  # noqa: N818
    """The adapter is known, and not loaded yet."""


@frozen(eq=False)
class _Row:
    """One prompt of a call, checked as far as it can be before its adapter is there."""

    prompt: AnyPrompt
    params: Any
    adapter: str | AdapterVersion | None  # a version that the caller holds needs no loading
    priority: int
    timeout: float | None
    queued: float = field(factory=time.monotonic)
    index: int = 0
    stream: bool = False
    add_special_tokens: bool = True

    @property
    def conversation(self) -> Conversation | None:
        return self.prompt if isinstance(self.prompt, Conversation) else None


_Made: TypeAlias = "dict[tuple[int, AdapterVersion | None], Any]"


class Client:
    """Turns prompts into requests, hands them to the driver, and collects their outputs.

    Args:
        backend: Reads sampling parameters and conversations.
        adapters: Turns adapters' names into versions.
        known: Loads adapters that are known and not loaded.
        driver: Runs requests.
        model: The model's name, for traces.
    """

    def __init__(
        self, backend: Backend, adapters: AdapterRegistry, known: KnownNames, driver: Driver, *, model: str
    ) -> None:
        self._backend = backend
        self._adapters = adapters
        self._known = known
        self._driver = driver
        self._id_prefix = uuid.uuid4().hex[:8]
        self._numbers = itertools.count()
        self._tracer = RequestTracer.find(model)

    def add_request(
        self,
        prompt: Any,
        sampling_params: Any,
        adapter: str | AdapterVersion | None,
        priority: int,
        timeout: float | None,
        *,
        add_special_tokens: bool = True,
        block: bool,
        stream: bool = True,
    ) -> RequestHandle:
        """Queue one prompt, or one conversation; its partial outputs may be read, unless ``stream`` is false."""
        row = _Row(
            check_prompt(prompt),
            sampling_params,
            adapter,
            check_priority(priority),
            check_timeout(timeout),
            stream=stream,
            add_special_tokens=add_special_tokens,
        )
        return self._take(row, block=block)

    @property
    def is_open(self) -> bool:
        """True if requests are accepted."""
        return self._driver.is_open

    def generate(
        self,
        prompts: Sequence[AnyPrompt],
        sampling_params: Any,
        adapter: Any,
        priority: Any,
        timeout: float | None,
        *,
        add_special_tokens: bool = True,
        use_tqdm: bool,
    ) -> list[GenerationOutput]:
        """Answer a list of prompts, or of conversations.

        An error of any of them is raised before the first is queued, except for those whose adapters are still to
        be loaded.
        """
        number, limit, queued = len(prompts), check_timeout(timeout), time.monotonic()
        columns = zip(
            prompts,
            one_per_prompt("sampling_params", sampling_params, number),
            one_per_prompt("adapter", adapter, number),
            map(check_priority, one_per_prompt("priority", priority, number)),
            strict=True,
        )
        rows = [
            _Row(*column, limit, queued=queued, index=index, add_special_tokens=add_special_tokens)
            for index, column in enumerate(columns)
        ]
        handles: list[RequestHandle] = []
        with self._in_use(row.adapter for row in rows) as versions:
            made: _Made = {}
            requests = [
                self._request(row, versions[row.adapter], made) if row.adapter in versions else None for row in rows
            ]
            try:
                for row, request in zip(rows, requests, strict=True):
                    handles.append(self._await_adapter(row) if request is None else self._queue(request))
                outputs = (handle.result() for handle in as_completed(handles))
                for _ in self._with_progress(outputs, number, use_tqdm=use_tqdm):
                    pass  # the first that fails ends it here
                return GenerationOutputs(handle.result() for handle in handles)
            finally:  # Ctrl-C too: nothing of this call may show up in the next one
                for handle in handles:
                    handle.cancel()

    def generate_iter(
        self,
        prompts: Iterable[Any],
        sampling_params: Any,
        adapter: Any,
        priority: int,
        timeout: float | None,
        *,
        add_special_tokens: bool = True,
        in_order: bool,
        max_pending: int | None,
        on_error: OnError,
        use_tqdm: bool,
    ) -> Iterator[GenerationOutput]:
        """Answer any number of prompts, reading them as the outputs are taken."""
        if isinstance(prompts, str):
            raise TypeError("prompts must be an iterable of prompts, got one string: generate and stream take one")
        if on_error not in ("raise", "return"):
            raise ValueError(f'on_error must be "raise" or "return", got {on_error!r}')
        value, limit = check_priority(priority), check_timeout(timeout)
        if max_pending is not None and max_pending < 1:
            raise ValueError(f"max_pending must be at least 1, got {max_pending}")
        rows = zip(prompts, value_per_prompt("sampling_params", sampling_params), value_per_prompt("adapter", adapter))  # noqa: B905
        faults = ROW_FAULTS if on_error == "return" else ()

        def handles() -> Iterator[RequestHandle]:
            for index, (prompt, params, name) in enumerate(rows):
                try:
                    asked = check_prompt(prompt)
                    row = _Row(asked, params, name, value, limit, index=index, add_special_tokens=add_special_tokens)
                    yield self._take(row)
                except faults as fault:
                    yield self._failed(index, prompt, name, fault)

        def outputs() -> Iterator[GenerationOutput]:
            pending = max_pending or 4 * self._backend.max_num_seqs
            with closing(as_ended(handles(), max_pending=pending, in_order=in_order)) as ended:
                for handle in ended:
                    yield self._output(handle, faults)

        total = len(prompts) if isinstance(prompts, Sized) else None
        return self._with_progress(outputs(), total, use_tqdm=use_tqdm)

    def _failed(self, index: int, prompt: Any, name: Any, fault: Exception) -> RequestHandle:
        """Return the handle of a row that could not be asked."""
        request = GenerationRequest(
            self._new_id(),
            prompt if isinstance(prompt, str) else (),
            None,
            index=index,
            awaited=name if isinstance(name, str) else None,
        )
        pending = PendingRequest(request)
        handle = RequestHandle(pending, lambda _: None)
        pending.fail(fault)
        return handle

    def _output(self, handle: RequestHandle, faults: tuple[type[Exception], ...]) -> GenerationOutput:
        """Return the output of a row; raise errors that are not the row's alone."""
        try:
            return handle.result()
        except faults as fault:
            return GenerationOutput.failed(handle._pending.request, fault)
        except EngineDeadError as death:
            if not (faults and self._driver.is_open):
                raise
            return GenerationOutput.failed(handle._pending.request, death)  # another core has been started

    def _with_progress(
        self, outputs: Iterator[GenerationOutput], total: int | None, *, use_tqdm: bool
    ) -> Iterator[GenerationOutput]:
        if not use_tqdm:
            return outputs
        return with_progress(outputs, total=total, num_adapters_waiting=self._driver.num_adapters_waiting)

    @contextmanager
    def _in_use(
        self, names: Iterable[str | AdapterVersion | None]
    ) -> Iterator[dict[str | AdapterVersion | None, AdapterVersion | None]]:
        """Yield the versions of those names that are loaded, and keep them from being freed meanwhile."""
        versions: dict[str | AdapterVersion | None, AdapterVersion | None] = {}
        try:
            for name in dict.fromkeys(names):
                with suppress(_ToBeLoaded):
                    versions[name] = self._acquire(name)
            yield versions
        finally:
            for version in versions.values():
                self._adapters.release(version)

    def _acquire(self, name: str | AdapterVersion | None) -> AdapterVersion | None:
        """Return the version that answers; raise ``_ToBeLoaded`` where the adapter is known and not loaded."""
        try:
            return self._adapters.acquire(name)
        except AdapterNotLoadedError as error:
            if isinstance(name, str) and self._known.knows(name):
                raise _ToBeLoaded from None
            raise self._known.unknown(error) from None

    def _sampling(self, params: Any, version: AdapterVersion | None) -> Any:
        return self._backend.sampling_params(params, version.extras if version else None)

    def _write(self, prompt: AnyPrompt, version: AdapterVersion | None) -> PromptInput:
        if isinstance(prompt, PromptInput):
            return prompt
        if version is None or version.extras.chat_template is None:
            return self._backend.render_chat(prompt)
        name, template = version.name, version.extras.chat_template
        messages, media = self._backend.parse_chat(prompt, template, content_format(name, template))
        text = render(
            name,
            template,
            messages,
            add_generation_prompt=prompt.add_generation_prompt,
            continue_final_message=prompt.continue_final_message,
            variables=prompt.variables,
            special_tokens={**self._backend.special_tokens(), **version.extras.special_tokens},
        )
        return PromptInput(text, media)

    def _queue(self, request: GenerationRequest) -> RequestHandle:
        """Queue a request of a version that its caller holds, too."""
        self._adapters.acquire(request.adapter)
        try:
            return self._submit(request)
        except BaseException:
            self._adapters.release(request.adapter)
            raise

    def _take(self, row: _Row, *, block: bool = True) -> RequestHandle:
        """Queue one row, now or when its adapter has been loaded."""
        try:
            version = self._acquire(row.adapter)
        except _ToBeLoaded:
            return self._await_adapter(row, block=block)
        try:
            return self._submit(self._request(row, version, {}), block=block)
        except BaseException:
            self._adapters.release(version)
            raise

    def _request(
        self, row: _Row, version: AdapterVersion | None, made: _Made, request_id: str | None = None
    ) -> GenerationRequest:
        """Make the request of a row whose adapter is there."""
        key = (id(row.params), version)
        if key not in made:  # usually they are the same for many prompts; what is made once is shared
            made[key] = self._sampling(row.params, version)
        written = self._write(row.prompt, version)
        return GenerationRequest(
            request_id or self._new_id(),
            written.prompt,
            made[key],
            media=written.media,
            conversation=row.conversation,
            adapter=version,
            stream=row.stream,
            # A template writes the special tokens itself.
            add_special_tokens=row.add_special_tokens and isinstance(row.prompt, PromptInput),
            priority=row.priority,
            timeout=row.timeout,
            queued=row.queued,
            index=row.index,
        )

    def _await_adapter(self, row: _Row, *, block: bool = True) -> RequestHandle:
        """Take a request whose adapter is still to be loaded."""
        assert isinstance(row.adapter, str)
        request = GenerationRequest(
            self._new_id(),
            row.prompt.prompt if isinstance(row.prompt, PromptInput) else "",
            None,
            stream=row.stream,
            priority=row.priority,
            timeout=row.timeout,
            queued=row.queued,
            index=row.index,
            awaited=row.adapter,
            conversation=row.conversation,
        )
        handle = self._submit(request, block=block)
        self._known.request(row.adapter, partial(self._complete, handle._pending, row))
        return handle

    def _complete(self, pending: PendingRequest, row: _Row, found: AdapterVersion | Exception) -> None:
        """Queue a request whose adapter has been loaded, or end it with the error."""
        if isinstance(found, Exception):
            self._driver.refuse(pending, found)
            return
        try:
            request = self._request(row, found, {}, pending.request.request_id)
        except Exception as error:
            self._driver.refuse(pending, error)
            return
        self._adapters.acquire(found)
        self._driver.complete(pending, request)

    def _new_id(self) -> str:
        return f"{self._id_prefix}-{next(self._numbers)}"

    def _submit(self, request: GenerationRequest, *, block: bool = True) -> RequestHandle:
        """Queue a request, which releases its version when it has ended; if it cannot be queued, the caller does."""
        trace = self._tracer.start(request) if self._tracer is not None else None
        try:
            handle = self._driver.submit(request, block=block)
        except BaseException as error:
            if trace is not None:
                trace.fail(error)
            raise
        if trace is not None:
            trace.follow(handle._pending)
        return handle
