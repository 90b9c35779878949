"""Turn the callers' input into requests: one, a list, or any number."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import as_completed
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol

from qlora_infer.chat.template import render
from qlora_infer.errors import AdapterError, EngineDeadError, RequestError
from qlora_infer.requests.batch import as_ended, with_progress
from qlora_infer.requests.driver import Driver
from qlora_infer.requests.handle import RequestHandle
from qlora_infer.requests.pending import PendingRequest
from qlora_infer.requests.request import GenerationOutput, GenerationOutputs, GenerationRequest, Prompt
from qlora_infer.tracing import RequestTracer

if TYPE_CHECKING:
    from qlora_infer.adapters.version import AdapterVersion
    from qlora_infer.files.carried import Carried


# Sequences of whole numbers, which are no token ids.
_BYTES = (bytes, bytearray, memoryview)

#: What a batch does with a row that fails.
OnError = Literal["raise", "return"]

#: What fails one row and not the others.
ROW_FAULTS = (AdapterError, RequestError, ValueError, TypeError)


class AdapterNames(Protocol):
    """The registry that turns a name into the version that answers."""

    def acquire(self, adapter: str | AdapterVersion | None) -> AdapterVersion | None:
        """Return the version that a new request runs on; raise ``AdapterNotLoadedError`` if it is not loaded."""
        ...

    def release(self, version: AdapterVersion | None) -> None:
        """Count a request that has ended."""
        ...


class RequestReader(Protocol):
    """The engine underneath, which reads sampling parameters and conversations and has the size of a batch."""

    @property
    def max_num_seqs(self) -> int:
        """The sequences that one batch holds."""
        ...

    def sampling_params(self, params: object, carried: Carried | None = None) -> Any:
        """Turn a mapping of fields into sampling parameters; raises ``ValueError`` and ``TypeError``."""
        ...

    def special_tokens(self) -> Mapping[str, str]:
        """Return the tokens that have a role in chat templates."""
        ...

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Write one conversation as a prompt, with the model's chat template."""
        ...


class Intake:
    """Checks what callers ask for, and hands it to the driver.

    Args:
        reader: Reads sampling parameters and conversations.
        adapters: Turns adapters' names into versions.
        driver: Runs requests.
        model: The model's name, for traces.
    """

    def __init__(self, reader: RequestReader, adapters: AdapterNames, driver: Driver, *, model: str) -> None:
        self._reader = reader
        self._adapters = adapters
        self._driver = driver
        self._id_prefix = uuid.uuid4().hex[:8]
        self._numbers = itertools.count()
        self._tracer = RequestTracer.find(model)

    def take_one(
        self,
        prompt: Any,
        sampling_params: Any,
        adapter: str | None,
        priority: int,
        timeout: float | None,
        *,
        block: bool,
    ) -> RequestHandle:
        """Queue one prompt, or one conversation, whose partial outputs may be read."""
        limit = checked_timeout(timeout)
        return self._take(
            prompt if is_conversation(prompt) else checked_prompt(prompt),
            sampling_params,
            adapter,
            checked_priority(priority),
            limit,
            stream=True,
            block=block,
        )

    def answer_all(
        self,
        prompts: Sequence[str | tuple[int, ...]],
        sampling_params: Any,
        adapter: Any,
        priority: Any,
        timeout: float | None,
        *,
        use_tqdm: bool,
    ) -> list[GenerationOutput]:
        """Answer a list of prompts; what is wrong with any of them is raised before the first is queued."""
        names = one_per_prompt("adapter", adapter, len(prompts))
        with self._in_use(names) as versions:
            return self._answer(
                prompts, sampling_params, versions, priority, timeout, add_special_tokens=True, use_tqdm=use_tqdm
            )

    def answer_chats(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: Any,
        adapter: Any,
        priority: Any,
        timeout: float | None,
        *,
        use_tqdm: bool,
    ) -> list[GenerationOutput]:
        """Answer conversations, each written with its adapter's chat template, or else the model's."""
        names = one_per_prompt("adapter", adapter, len(conversations))
        with self._in_use(names) as versions:
            prompts = [
                self._write(messages, version) for messages, version in zip(conversations, versions, strict=True)
            ]
            # The template writes the special tokens itself.
            return self._answer(
                prompts, sampling_params, versions, priority, timeout, add_special_tokens=False, use_tqdm=use_tqdm
            )

    def _answer(
        self,
        prompts: Sequence[str | tuple[int, ...]],
        sampling_params: Any,
        versions: Sequence[AdapterVersion | None],
        priority: Any,
        timeout: float | None,
        *,
        add_special_tokens: bool,
        use_tqdm: bool,
    ) -> list[GenerationOutput]:
        priorities = [checked_priority(value) for value in one_per_prompt("priority", priority, len(prompts))]
        limit, queued = checked_timeout(timeout), time.monotonic()
        given = one_per_prompt("sampling_params", sampling_params, len(prompts))
        keys = [(id(params), version) for params, version in zip(given, versions, strict=True)]
        # Usually they are the same for many prompts; what is made once is shared.
        made = {key: self._sampling(params, key[1]) for key, params in dict(zip(keys, given, strict=True)).items()}
        handles: list[RequestHandle] = []
        try:
            for index, (prompt, key) in enumerate(zip(prompts, keys, strict=True)):
                version, value = self._adapters.acquire(key[1]), priorities[index]
                how: dict[str, Any] = {"queued": queued, "index": index, "add_special_tokens": add_special_tokens}
                handles.append(self._submit(prompt, made[key], version, value, limit, **how))
            outputs = (handle.result() for handle in as_completed(handles))
            for _ in self._shown(outputs, len(prompts), use_tqdm=use_tqdm):
                pass  # the first that fails ends it here
            return GenerationOutputs(handle.result() for handle in handles)
        finally:  # Ctrl-C too: nothing of this call may show up in the next one
            for handle in handles:
                handle.cancel()

    def answer_each(
        self,
        prompts: Iterable[Prompt],
        sampling_params: Any,
        adapter: Any,
        priority: int,
        timeout: float | None,
        *,
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
        value, limit = checked_priority(priority), checked_timeout(timeout)
        if max_pending is not None and max_pending < 1:
            raise ValueError(f"max_pending must be at least 1, got {max_pending}")
        rows = zip(prompts, along("sampling_params", sampling_params), along("adapter", adapter))  # noqa: B905
        faults = ROW_FAULTS if on_error == "return" else ()

        def handles() -> Iterator[RequestHandle]:
            for index, (prompt, params, name) in enumerate(rows):
                try:
                    yield self._take(checked_prompt(prompt), params, name, value, limit, index=index)
                except faults as fault:
                    yield self._failed(index, prompt, fault)

        def outputs() -> Iterator[GenerationOutput]:
            pending = max_pending or 4 * self._reader.max_num_seqs
            with closing(as_ended(handles(), max_pending=pending, in_order=in_order)) as ended:
                for handle in ended:
                    yield self._output(handle, faults)

        total = len(prompts) if isinstance(prompts, Sized) else None
        return self._shown(outputs(), total, use_tqdm=use_tqdm)

    def _failed(self, index: int, prompt: Any, fault: Exception) -> RequestHandle:
        """Return the handle of a row that could not be asked."""
        known = prompt if isinstance(prompt, str) else ()
        pending = PendingRequest(GenerationRequest(self._new_id(), known, None, index=index))
        handle = RequestHandle(pending, lambda _: None)
        pending.fail(fault)
        return handle

    def _output(self, handle: RequestHandle, faults: tuple[type[Exception], ...]) -> GenerationOutput:
        """Return what came of a row; raise what is no fault of the row alone."""
        try:
            return handle.result()
        except faults as fault:
            return GenerationOutput.failed(handle._pending.request, fault)
        except EngineDeadError as death:
            if not (faults and self._driver.is_open):
                raise
            return GenerationOutput.failed(handle._pending.request, death)  # another core has been started

    def _shown(
        self, outputs: Iterator[GenerationOutput], total: int | None, *, use_tqdm: bool
    ) -> Iterator[GenerationOutput]:
        if not use_tqdm:
            return outputs
        return with_progress(outputs, total=total, num_adapters_waiting=self._driver.num_adapters_waiting)

    @contextmanager
    def _in_use(self, names: Sequence[str | None]) -> Iterator[list[AdapterVersion | None]]:
        """Yield the versions of some names, one for each name, and keep them from being freed meanwhile."""
        versions: dict[str | None, AdapterVersion | None] = {}
        try:
            for name in names:
                if name not in versions:
                    versions[name] = self._adapters.acquire(name)
            yield [versions[name] for name in names]
        finally:
            for version in versions.values():
                self._adapters.release(version)

    def _sampling(self, params: Any, version: AdapterVersion | None) -> Any:
        return self._reader.sampling_params(params, version.carried if version else None)

    def _write(self, messages: Sequence[Mapping[str, Any]], version: AdapterVersion | None) -> str:
        if version is None or version.carried.chat_template is None:
            return self._reader.render_chat(messages)
        special_tokens = {**self._reader.special_tokens(), **version.carried.special_tokens}
        return render(version.name, version.carried.chat_template, messages, special_tokens=special_tokens)

    def _take(
        self,
        prompt: Any,
        params: Any,
        name: str | None,
        priority: int,
        timeout: float | None,
        **how: Any,
    ) -> RequestHandle:
        version = self._adapters.acquire(name)
        try:
            params = self._sampling(params, version)
            if is_conversation(prompt):  # whose template writes the special tokens itself
                prompt, how = self._write(prompt, version), {**how, "add_special_tokens": False}
        except BaseException:
            self._adapters.release(version)
            raise
        return self._submit(prompt, params, version, priority, timeout, **how)

    def _new_id(self) -> str:
        return f"{self._id_prefix}-{next(self._numbers)}"

    def _submit(
        self,
        prompt: str | tuple[int, ...],
        params: Any,
        version: AdapterVersion | None,
        priority: int,
        timeout: float | None,
        *,
        queued: float | None = None,
        index: int = 0,
        stream: bool = False,
        add_special_tokens: bool = True,
        block: bool = True,
    ) -> RequestHandle:
        """Queue a request, which releases the version when it has ended, or now if it cannot be queued."""
        request = GenerationRequest(
            request_id=self._new_id(),
            prompt=prompt,
            sampling_params=params,
            adapter=version,
            stream=stream,
            add_special_tokens=add_special_tokens,
            priority=priority,
            timeout=timeout,
            queued=time.monotonic() if queued is None else queued,
            index=index,
        )
        trace = self._tracer.start(request) if self._tracer is not None else None
        try:
            handle = self._driver.submit(request, block=block)
        except BaseException as error:
            self._adapters.release(version)
            if trace is not None:
                trace.fail(error)
            raise
        if trace is not None:
            trace.follow(handle._pending)
        return handle


def checked_prompt(prompt: Any) -> str | tuple[int, ...]:
    """One prompt: text, or token ids; raises ``TypeError``."""
    if isinstance(prompt, str):
        return prompt
    if (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, _BYTES)
        and prompt
        and set(map(type, prompt)) == {int}  # not isinstance: True is no token
    ):
        return tuple(prompt)
    raise TypeError(f"a prompt must be a string or a list of token ids, got {str(prompt)[:80]!r}")


def is_conversation(prompt: Any) -> bool:
    """Return whether a prompt is a list of messages."""
    return isinstance(prompt, Sequence) and bool(prompt) and all(isinstance(message, Mapping) for message in prompt)


def prompt_list(prompts: Any) -> list[str | tuple[int, ...]]:
    """Prompts as a list, whether one was given or several; raises ``TypeError``."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, _BYTES):
        raise TypeError(f"prompts must be a string, token ids, or a list of them, got {type(prompts).__name__}")
    if prompts and type(prompts[0]) is int:
        return [checked_prompt(prompts)]
    return [checked_prompt(prompt) for prompt in prompts]


def conversation_list(messages: Any) -> Sequence[Sequence[Mapping[str, Any]]]:
    """Conversations as a list, whether one was given or several; raises ``TypeError``."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise TypeError(f"messages must be a conversation or a list of them, got {str(messages)[:80]!r}")
    return [messages] if isinstance(messages[0], Mapping) else messages


def one_per_prompt(argument: str, value: Any, num_prompts: int) -> list[Any]:
    """One value for each prompt, of one or a list; raises ``ValueError`` for a list of another length."""
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        return [value] * num_prompts
    if len(value) != num_prompts:
        raise ValueError(f"{argument} has {len(value)} entries for {num_prompts} prompts: give one, or one per prompt")
    return list(value)


def along(argument: str, value: Any) -> Iterator[Any]:
    """One value for each of a number of prompts that is not known: one for all, or from an iterable.

    Raises:
        ValueError: The iterable ends before the prompts do; raised when that is seen.
    """
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        yield from itertools.repeat(value)
    yield from value
    raise ValueError(f"{argument} has fewer entries than there are prompts: give one, or one per prompt")


def checked_priority(priority: Any) -> int:
    """Return a request's priority; raise ``TypeError`` if it is not a whole number."""
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise TypeError(f"priority must be a whole number, lower goes first, got {priority!r}")
    return priority


def checked_timeout(timeout: Any) -> float | None:
    """Return a request's timeout in seconds; raise ``TypeError`` or ``ValueError`` if it is invalid."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise TypeError(f"timeout must be a number of seconds or None, got {timeout!r}")
    if not timeout > 0:
        raise ValueError(f"timeout must be more than 0 seconds, got {timeout!r}")
    return float(timeout)
