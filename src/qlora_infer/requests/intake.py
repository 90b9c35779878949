"""What callers write, made into requests: one, a list, or any number."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import TYPE_CHECKING, Any, Protocol

from qlora_infer.requests.arguments import (
    along,
    checked_priority,
    checked_prompt,
    checked_timeout,
    one_per_prompt,
)
from qlora_infer.requests.driver import Driver
from qlora_infer.requests.handle import RequestHandle
from qlora_infer.requests.progress import with_progress
from qlora_infer.requests.request import GenerationOutput, GenerationRequest, Prompt
from qlora_infer.requests.window import answered

if TYPE_CHECKING:
    from qlora_infer.adapters.cache import AdapterVersion


class AdapterNames(Protocol):
    """Where a name is turned into the version that answers."""

    def acquire(self, name: str | None) -> AdapterVersion | None:
        """The version that a new request runs on; raises ``AdapterNotLoadedError``."""
        ...

    def release(self, version: AdapterVersion | None) -> None:
        """Count a request that has ended."""
        ...

    def require(self, names: Iterable[str]) -> None:
        """Raise ``AdapterNotLoadedError`` for the first name that is not loaded."""
        ...


class SamplingReader(Protocol):
    """What reads sampling parameters, and knows how much fits a batch: the engine underneath."""

    @property
    def max_num_seqs(self) -> int:
        """The sequences that one batch holds."""
        ...

    def sampling_params(self, params: object) -> Any:
        """Turn a mapping of fields into sampling parameters; raises ``ValueError`` and ``TypeError``."""
        ...


class Intake:
    """Checks what callers ask for, and hands it to the driver.

    Args:
        reader: Reads sampling parameters.
        adapters: Turns adapters' names into versions.
        driver: Runs requests.
    """

    def __init__(self, reader: SamplingReader, adapters: AdapterNames, driver: Driver) -> None:
        self._reader = reader
        self._adapters = adapters
        self._driver = driver
        self._id_prefix = uuid.uuid4().hex[:8]
        self._numbers = itertools.count()

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
        """Queue one prompt whose partial outputs may be read."""
        return self._submit(
            checked_prompt(prompt),
            self._reader.sampling_params(sampling_params),
            adapter,
            checked_priority(priority),
            checked_timeout(timeout),
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
        add_special_tokens: bool = True,
        use_tqdm: bool,
    ) -> list[GenerationOutput]:
        """Answer a list of prompts; what is wrong with any of them is raised before the first is queued."""
        names = one_per_prompt("adapter", adapter, len(prompts))
        priorities = [checked_priority(value) for value in one_per_prompt("priority", priority, len(prompts))]
        all_params = one_per_prompt("sampling_params", sampling_params, len(prompts))
        params = {id(given): self._reader.sampling_params(given) for given in all_params}
        limit = checked_timeout(timeout)
        self._adapters.require(name for name in names if name is not None)
        ids: list[str] = []

        def handles() -> Iterator[RequestHandle]:
            for prompt, given, name, value in zip(prompts, all_params, names, priorities, strict=True):
                handle = self._submit(
                    prompt, params[id(given)], name, value, limit, add_special_tokens=add_special_tokens
                )
                ids.append(handle.request_id)
                yield handle

        outputs = answered(handles(), max_pending=None, in_order=False)
        by_id = {output.request_id: output for output in self._shown(outputs, len(prompts), use_tqdm=use_tqdm)}
        return [by_id[request_id] for request_id in ids]

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
        handles = (
            self._submit(checked_prompt(prompt), self._reader.sampling_params(params), name, value, limit)
            for prompt, params, name in rows
        )
        total = len(prompts) if isinstance(prompts, Sized) else None
        outputs = answered(handles, max_pending=max_pending or 4 * self._reader.max_num_seqs, in_order=in_order)
        return self._shown(outputs, total, use_tqdm=use_tqdm)

    def _shown(
        self, outputs: Iterator[GenerationOutput], total: int | None, *, use_tqdm: bool
    ) -> Iterator[GenerationOutput]:
        if not use_tqdm:
            return outputs
        return with_progress(outputs, total=total, num_adapters_waiting=self._driver.num_adapters_waiting)

    def _submit(
        self,
        prompt: str | tuple[int, ...],
        params: Any,
        adapter: str | None,
        priority: int,
        timeout: float | None,
        *,
        stream: bool = False,
        add_special_tokens: bool = True,
        block: bool = True,
    ) -> RequestHandle:
        version = self._adapters.acquire(adapter)
        request = GenerationRequest(
            request_id=f"{self._id_prefix}-{next(self._numbers)}",
            prompt=prompt,
            sampling_params=params,
            adapter=version,
            stream=stream,
            add_special_tokens=add_special_tokens,
            priority=priority,
            timeout=timeout,
        )
        try:
            return self._driver.submit(request, block=block)
        except BaseException:
            self._adapters.release(version)
            raise
