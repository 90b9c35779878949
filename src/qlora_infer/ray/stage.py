"""A stage of Ray Data that answers the prompts of a dataset, each with the adapter that its row names."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any, Self

import pyarrow as pa
from attrs import asdict, frozen

from qlora_infer.ray.replica import EngineFactory
from qlora_infer.requests.client import OnError
from qlora_infer.requests.request import GenerationOutput


@frozen
class _Answer:
    """The columns that the stage adds to a row."""

    text: str | None = None
    num_prompt_tokens: int | None = None
    num_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    error_type: str | None = None

    @classmethod
    def of(cls, output: GenerationOutput) -> Self:
        if output.error is not None:
            return cls(error=str(output.error), error_type=type(output.error).__name__)
        return cls(output.text, len(output.prompt_token_ids), output.num_tokens, output.finish_reason)


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
    """A stage that answers batches of a Ray Data dataset, with one engine in each actor.

    Use it with ``Dataset.map_batches`` and ``batch_format="pyarrow"``. It reads three columns: ``prompt`` (a text,
    token ids or a conversation), and optionally ``adapter`` (a name; null or empty for the base model) and
    ``sampling_params`` (a struct, without its nulls). It adds or replaces ``text``, ``num_prompt_tokens``,
    ``num_tokens``, ``finish_reason``, ``error`` and ``error_type``. With ``n > 1``, ``text`` is the first answer.

    Ray Data gives each actor several batches at a time. The engine's queue groups their requests by adapter, so you
    need not sort the rows. Give the engine ``known_adapters``: it loads an adapter when a row first names it, while
    other rows are answered.

    Args:
        engine: A function that returns an actor's engine.
        sampling_params: The parameters of all rows; those of a row override them.
        timeout: Seconds for each row from the start of its batch, waiting included; ``None`` for no limit.
        on_error: ``"return"`` writes a row's error into ``error`` and ``error_type``, with nulls for the rest;
            ``"raise"`` raises the first error.

    Example:
        >>> import pyarrow as pa
        >>> from qlora_infer.ray import GenerationStage
        >>> from qlora_infer.testing import fake_engine, write_adapter
        >>> adapters = {"pirate": write_adapter("pirate")}
        >>> stage = GenerationStage(lambda: fake_engine(known_adapters=adapters))
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
        *,
        sampling_params: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        on_error: OnError = "return",
    ) -> None:
        if on_error not in ("raise", "return"):
            raise ValueError(f'on_error must be "raise" or "return", got {on_error!r}')
        self._sampling_params = sampling_params or {}
        self._timeout = timeout
        self._on_error = on_error
        self._engine = engine()

    async def __call__(self, batch: pa.Table) -> pa.Table:
        """Answer one batch; a coroutine, so that Ray Data runs several at a time."""
        return await asyncio.to_thread(self.answer, batch)

    def answer(self, batch: pa.Table) -> pa.Table:
        """Answer one batch, and wait for it.

        Args:
            batch: The batch, an Arrow table.

        Returns:
            The batch, its rows in their order, with the stage's columns.

        Raises:
            TypeError: The batch is not an Arrow table.
            ValueError: It has no column ``prompt``.
            EngineDeadError: The engine core died.
        """
        if not isinstance(batch, pa.Table):
            raise TypeError(f'GenerationStage needs map_batches(..., batch_format="pyarrow"), got a {type(batch)}')
        if "prompt" not in batch.column_names:
            raise ValueError(f"the dataset needs a column 'prompt', it has: {', '.join(batch.column_names)}")
        outputs = self._engine.generate_iter(
            _column(batch, "prompt"),
            [{**self._sampling_params, **_without_nulls(params)} for params in _column(batch, "sampling_params")],
            adapter=[name or None for name in _column(batch, "adapter")],
            timeout=self._timeout,
            max_pending=max(1, batch.num_rows),
            on_error=self._on_error,
            use_tqdm=False,
        )
        return _with_answers(batch, map(_Answer.of, outputs))


def _column(batch: pa.Table, name: str) -> list[Any]:
    return batch[name].to_pylist() if name in batch.column_names else [None] * batch.num_rows


def _without_nulls(params: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the sampling parameters of one row without nulls: Arrow gives every row the fields that any row has."""
    return {
        name: _without_nulls(value) if isinstance(value, Mapping) else value
        for name, value in (params or {}).items()
        if value is not None
    }


def _with_answers(batch: pa.Table, answers: Iterable[_Answer]) -> pa.Table:
    columns = pa.Table.from_pylist([asdict(answer) for answer in answers], schema=pa.schema(_COLUMNS))
    kept = [name for name in batch.column_names if name not in _COLUMNS]
    batch = batch.select(kept)
    for name in _COLUMNS:
        batch = batch.append_column(name, columns[name])
    return batch
