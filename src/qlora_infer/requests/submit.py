"""What callers write, made into requests: one, a list, or any number."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from qlora_infer.chat.template import render
from qlora_infer.requests.arguments import (
    along,
    checked_priority,
    checked_prompt,
    checked_timeout,
    is_conversation,
    one_per_prompt,
)
from qlora_infer.requests.driver import Driver
from qlora_infer.requests.handle import RequestHandle
from qlora_infer.requests.progress import with_progress
from qlora_infer.requests.request import GenerationOutput, GenerationOutputs, GenerationRequest, Prompt
from qlora_infer.requests.window import answered
from qlora_infer.tracing import RequestTracer

if TYPE_CHECKING:
    from qlora_infer.adapters.version import AdapterVersion
    from qlora_infer.files.carried import Carried


class AdapterNames(Protocol):
    """Where a name is turned into the version that answers."""

    def acquire(self, adapter: str | AdapterVersion | None) -> AdapterVersion | None:
        """The version that a new request runs on; raises ``AdapterNotLoadedError``."""
        ...

    def release(self, version: AdapterVersion | None) -> None:
        """Count a request that has ended."""
        ...


class RequestReader(Protocol):
    """What reads sampling parameters and conversations, and knows how much fits a batch: the engine underneath."""

    @property
    def max_num_seqs(self) -> int:
        """The sequences that one batch holds."""
        ...

    def sampling_params(self, params: object, carried: Carried | None = None) -> Any:
        """Turn a mapping of fields into sampling parameters; raises ``ValueError`` and ``TypeError``."""
        ...

    def special_tokens(self) -> Mapping[str, str]:
        """The tokens that have a role in chat templates."""
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
        ids: list[str] = []

        def handles() -> Iterator[RequestHandle]:
            for prompt, key, value in zip(prompts, keys, priorities, strict=True):
                version = self._adapters.acquire(key[1])
                handle = self._submit(
                    prompt, made[key], version, value, limit, queued=queued, add_special_tokens=add_special_tokens
                )
                ids.append(handle.request_id)
                yield handle

        outputs = answered(handles(), max_pending=None, in_order=False)
        by_id = {output.request_id: output for output in self._shown(outputs, len(prompts), use_tqdm=use_tqdm)}
        return GenerationOutputs(by_id[request_id] for request_id in ids)

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
        use_tqdm: bool,
    ) -> Iterator[GenerationOutput]:
        """Answer any number of prompts, reading them as the outputs are taken."""
        if isinstance(prompts, str):
            raise TypeError("prompts must be an iterable of prompts, got one string: generate and stream take one")
        value, limit = checked_priority(priority), checked_timeout(timeout)
        if max_pending is not None and max_pending < 1:
            raise ValueError(f"max_pending must be at least 1, got {max_pending}")
        rows = zip(prompts, along("sampling_params", sampling_params), along("adapter", adapter))  # noqa: B905
        handles = (self._take(checked_prompt(prompt), params, name, value, limit) for prompt, params, name in rows)
        total = len(prompts) if isinstance(prompts, Sized) else None
        outputs = answered(handles, max_pending=max_pending or 4 * self._reader.max_num_seqs, in_order=in_order)
        return self._shown(outputs, total, use_tqdm=use_tqdm)

    def _shown(
        self, outputs: Iterator[GenerationOutput], total: int | None, *, use_tqdm: bool
    ) -> Iterator[GenerationOutput]:
        if not use_tqdm:
            return outputs
        return with_progress(outputs, total=total, num_adapters_waiting=self._driver.num_adapters_waiting)

    @contextmanager
    def _in_use(self, names: Sequence[str | None]) -> Iterator[list[AdapterVersion | None]]:
        """The versions of some names, one for each name, which are not freed meanwhile."""
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
        **how: bool,
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

    def _submit(
        self,
        prompt: str | tuple[int, ...],
        params: Any,
        version: AdapterVersion | None,
        priority: int,
        timeout: float | None,
        *,
        queued: float | None = None,
        stream: bool = False,
        add_special_tokens: bool = True,
        block: bool = True,
    ) -> RequestHandle:
        """Queue a request, which releases the version when it has ended, or now if it cannot be queued."""
        request = GenerationRequest(
            request_id=f"{self._id_prefix}-{next(self._numbers)}",
            prompt=prompt,
            sampling_params=params,
            adapter=version,
            stream=stream,
            add_special_tokens=add_special_tokens,
            priority=priority,
            timeout=timeout,
            queued=time.monotonic() if queued is None else queued,
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
