"""The file of answers: reading it, and repairing it after an interruption."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import typer

from qlora_infer.cli.prompt_lines import PromptLine, fingerprint

_BEGINNING = b'{"line": '


def read_answers(path: Path) -> dict[int, int]:
    """Return the lines that a file of answers has answers to, each with the fingerprint of its question.

    Afterwards the file holds whole answers only: a torn last line is cut off, and errors are taken out, so that these
    lines are asked again. A file that is none of ours is not touched.

    Raises:
        typer.BadParameter: It is none of ours.
    """
    if not path.exists():
        return {}
    answered: dict[int, int] = {}
    num_errors = whole = 0
    with path.open("rb") as file:
        for line in file:
            record = _read(path, line)
            if record is None:
                break
            whole += len(line)
            if "error" in record:
                num_errors += 1
            else:
                answered[record["line"]] = fingerprint(record)
    if num_errors:
        _keep_answers(path)
    elif whole < path.stat().st_size:
        os.truncate(path, whole)
    return answered


def skip_answered(lines: Iterable[PromptLine], answered: dict[int, int]) -> Iterator[PromptLine]:
    """Yield the lines that are left.

    Raises:
        typer.BadParameter: A line is answered, but it asked something else then.
    """
    for line in lines:
        if line.number not in answered:
            yield line
        elif answered[line.number] != line.fingerprint:
            raise typer.BadParameter(
                f"the output answers another prompt, adapter or id in line {line.number}: name another --output, or "
                "delete it"
            )


def write_record(file: BinaryIO, record: dict[str, Any]) -> None:
    """Write one line and hand it to the system, where it outlives this process."""
    file.write(json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
    file.flush()


def _read(path: Path, line: bytes) -> dict[str, Any] | None:
    """Return a line's record; ``None`` for the last one, torn by an interruption."""
    if not line.endswith(b"\n") and (line.startswith(_BEGINNING) or _BEGINNING.startswith(line)):
        return None
    with contextlib.suppress(ValueError):
        record = json.loads(line)
        if line.endswith(b"\n") and isinstance(record, dict) and isinstance(record.get("line"), int):
            return record
    raise typer.BadParameter(f"{path} holds something that qlora-infer generate has not written: name another --output")


def _keep_answers(path: Path) -> None:
    target = path.resolve()
    kept = target.with_name(f"{target.name}.part")
    with target.open("rb") as old, kept.open("wb") as new:
        for line in old:
            record = _read(path, line)
            if record is not None and "error" not in record:
                new.write(line)
    shutil.copymode(target, kept)
    kept.replace(target)
