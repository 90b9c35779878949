"""A stage of Ray Data that answers the prompts of a dataset, each with the adapter that its row names."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa
from attrs import asdict, frozen

from qlora_infer.errors import AdapterError, RequestError
from qlora_infer.ray.replica import Adapters, EngineFactory, source_of
from qlora_infer.requests.handle import RequestHandle

#: What is wrong with a row, and not with the engine.
ROW_FAULTS = (AdapterError, RequestError, ValueError, TypeError)


@frozen
class _Answer:
    """The columns that the stage adds to a row."""

    text: str | None = None
    num_prompt_tokens: int | None = None
    num_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    error_type: str | None = None


# Written down, because a batch in which nothing fails, or everything, would be given other types.
_COLUMNS = {
    "text": pa.string(),
    "num_prompt_tokens": pa.int64(),
    "num_tokens": pa.int64(),
    "finish_reason": pa.string(),
    "error": pa.string(),
    "error_type": pa.string(),
}


class GenerationStage:
    """Answers batches of a Ray Data dataset: one engine in each actor, adapters loaded when a row first names them.

    For ``Dataset.map_batches`` with ``batch_format="pyarrow"``. It reads the columns ``prompt`` (a text, token ids or a
    conversation), ``adapter`` (a name; null or empty for the base model) and ``sampling_params`` (a struct; nulls in it
    are left out), of which only ``prompt`` has to be there. It adds, or replaces, ``text``, ``num_prompt_tokens``,
    ``num_tokens``, ``finish_reason``, ``error`` and ``error_type``; of ``n > 1`` answers, ``text`` is the first.

    Ray Data gives each actor several batches at a time. Their requests meet in the engine's queue, which keeps those
    of one adapter together, so rows need not be sorted; adapters that are loaded already begin while others are read.

    Args:
        engine: Makes an actor's engine.
        adapters: Where the adapters come from, by name.
        sampling_params: For all rows; a row's own go over them.
        timeout: Seconds that each row may take from the moment its batch begins, waiting included; ``None`` for no
            limit.
        on_error: ``"row"`` writes what is wrong with a row into its ``error`` and ``error_type``, with nulls for the
            rest. ``"raise"`` raises the first. An engine that dies is raised either way.

    Example:
        >>> import pyarrow as pa
        >>> from qlora_infer.ray import GenerationStage
        >>> from qlora_infer.testing import fake_engine, write_adapter
        >>> stage = GenerationStage(fake_engine, {"pirate": write_adapter("pirate")})
        >>> rows = pa.table({"prompt": ["ahoy", "hello", "hi"], "adapter": ["pirate", None, "parrot"]})
        >>> answered = stage.answer(rows)
        >>> answered["text"].to_pylist()
        ['pirate says: ahoy', 'You said: hello', None]
        >>> answered["error_type"].to_pylist()
        [None, None, 'AdapterNotLoadedError']
    """

    def __init__(
        self,
        engine: EngineFactory,
        adapters: Adapters | None = None,
        *,
        sampling_params: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        on_error: Literal["row", "raise"] = "row",
    ) -> None:
        if on_error not in ("row", "raise"):
            raise ValueError(f'on_error must be "row" or "raise", got {on_error!r}')
        self._adapters = adapters or {}
        self._sampling_params = sampling_params or {}
        self._timeout = timeout
        self._faults = ROW_FAULTS if on_error == "row" else ()
        self._loading: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._engine = engine()

    async def __call__(self, batch: pa.Table) -> pa.Table:
        """Answer one batch; a coroutine, so that Ray Data runs several at a time."""
        return await asyncio.to_thread(self.answer, batch)

    def answer(self, batch: pa.Table) -> pa.Table:
        """Answer one batch and wait for it.

        Returns:
            The batch, its rows in their order, with the columns that the stage adds.

        Raises:
            TypeError: The batch is no Arrow table.
            ValueError: It has no column ``prompt``.
            EngineDeadError: The engine core died.
        """
        if not isinstance(batch, pa.Table):
            raise TypeError(f'GenerationStage needs map_batches(..., batch_format="pyarrow"), got a {type(batch)}')
        if "prompt" not in batch.column_names:
            raise ValueError(f"the dataset needs a column 'prompt', it has: {', '.join(batch.column_names)}")
        asked = self._ask_all(_column(batch, "prompt"), _column(batch, "adapter"), _column(batch, "sampling_params"))
        return _with_answers(batch, [self._answer(handle) for handle in asked])

    def _ask_all(
        self, prompts: Sequence[Any], adapters: Sequence[str | None], sampling_params: Sequence[Any]
    ) -> list[RequestHandle | Exception]:
        """Submit each row, and return its handle or the error that it raised."""
        rows_by_adapter = defaultdict(list)
        for row, name in enumerate(adapters):
            rows_by_adapter[name or None].append(row)
        asked: dict[int, RequestHandle | Exception] = {}
        ready = self._engine.adapters
        for name in sorted(rows_by_adapter, key=lambda name: name is not None and name not in ready):
            fault = self._load(name) if name is not None and name not in ready else None
            for row in rows_by_adapter[name]:
                asked[row] = fault or self._ask(prompts[row], sampling_params[row], name)
        return [asked[row] for row in range(len(prompts))]

    def _load(self, name: str) -> Exception | None:
        try:
            source = source_of(self._adapters, name)
            with self._loading[name]:  # another batch may have begun to
                if name not in self._engine.adapters:
                    self._engine.load_adapter(name, source)
        except self._faults as fault:
            return fault
        return None

    def _ask(self, prompt: Any, params: Mapping[str, Any] | None, name: str | None) -> RequestHandle | Exception:
        try:
            return self._engine.add_request(
                prompt, {**self._sampling_params, **_without_nulls(params)}, adapter=name, timeout=self._timeout
            )
        except self._faults as fault:
            return fault

    def _answer(self, asked: RequestHandle | Exception) -> _Answer:
        if isinstance(asked, Exception):
            return _Answer(error=str(asked), error_type=type(asked).__name__)
        try:
            output = asked.result()
        except self._faults as fault:
            return self._answer(fault)
        return _Answer(output.text, len(output.prompt_token_ids), output.num_tokens, output.finish_reason)


def _column(batch: pa.Table, name: str) -> list[Any]:
    return batch[name].to_pylist() if name in batch.column_names else [None] * batch.num_rows


def _without_nulls(params: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the sampling parameters of one row without nulls: Arrow gives every row the fields that any row has."""
    return {name: value for name, value in (params or {}).items() if value is not None}


def _with_answers(batch: pa.Table, answers: Iterable[_Answer]) -> pa.Table:
    columns = pa.Table.from_pylist([asdict(answer) for answer in answers], schema=pa.schema(_COLUMNS))
    kept = [name for name in batch.column_names if name not in _COLUMNS]
    batch = batch.select(kept)
    for name in _COLUMNS:
        batch = batch.append_column(name, columns[name])
    return batch
