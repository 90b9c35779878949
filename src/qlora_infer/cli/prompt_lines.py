"""Prompts as JSON lines: the fields of a line, and the fault of a wrong one."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from attrs import frozen

#: What a line may have.
FIELDS = ("prompt", "adapter", "sampling_params", "id")


@frozen
class PromptLine:
    """One line.

    Attributes:
        number: Its number in the file; the first is 1.
        prompt: Text, or a list of token ids.
        adapter: The adapter that answers; ``None`` for the base model.
        sampling_params: The line's own parameters.
        id: Whatever the line gives as its id.
        fault: Why it cannot be asked, if so.
    """

    number: int
    prompt: Any = None
    adapter: str | None = None
    sampling_params: Mapping[str, Any] | None = None
    id: Any = None
    fault: str | None = None

    def record(self, **fields: Any) -> dict[str, Any]:
        """Return the line's record, with the fields that are known so far."""
        return {"line": self.number, "id": self.id, "prompt": self.prompt, "adapter": self.adapter, **fields}

    @property
    def fingerprint(self) -> int:
        """A number that two lines share if they ask the same."""
        return fingerprint(self.record())


def fingerprint(record: Mapping[str, Any]) -> int:
    """Return the fingerprint of a line's record: the same for the same question."""
    asked = [record.get("id"), record.get("prompt"), record.get("adapter")]
    return zlib.crc32(json.dumps(asked, sort_keys=True).encode())


def read_lines(lines: Iterable[bytes], *, adapter: str | None) -> Iterator[PromptLine]:
    """Read lines one at a time; empty ones are passed over.

    Args:
        lines: The file.
        adapter: Answers the lines that have no ``adapter``; a line with ``null`` is the base model's.
    """
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _read(number, line, adapter)


def _read(number: int, line: bytes, adapter: str | None) -> PromptLine:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        return PromptLine(number, fault=f"it is no JSON: {error}")
    if not isinstance(fields, dict):
        return PromptLine(number, fault=f'it must be an object such as {{"prompt": "…"}}, not {type(fields).__name__}')
    read = PromptLine(
        number, fields.get("prompt"), fields.get("adapter", adapter), fields.get("sampling_params"), fields.get("id")
    )
    if unknown := [name for name in fields if name not in FIELDS]:
        return PromptLine(number, id=read.id, fault=f"it has {unknown[0]!r}; a line has {', '.join(FIELDS)}")
    if "prompt" not in fields:
        return PromptLine(number, id=read.id, fault="it has no prompt")
    if not isinstance(read.adapter, str | None) or not isinstance(read.sampling_params, dict | None):
        return PromptLine(number, id=read.id, fault="adapter must be a name, and sampling_params an object")
    return read
