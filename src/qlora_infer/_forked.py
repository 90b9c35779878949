"""The error that a forked process gets when it uses its parent's engine, which would otherwise block forever.

Nothing of an engine runs in a process that was forked from the one that made it: the thread that drives vLLM stays
behind, and locks stay as they were. And what the parent has must be left alone: its processes and its files.
"""

from __future__ import annotations

import os
import weakref
from typing import Any

from qlora_infer.errors import ForkedEngineError


class Forked:
    """Stands in a forked process for each part of an engine, and answers whatever it is asked with the error."""

    is_open = False

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def __getattr__(self, name: str) -> Any:
        raise forked_engine_error(self._pid)


class LivingEngines:
    """The engines of this process, which are not those of the processes that are forked from it."""

    def __init__(self, parts: tuple[str, ...]) -> None:
        self._parts = parts
        self._pid = os.getpid()
        self._engines: weakref.WeakSet[Any] = weakref.WeakSet()
        os.register_at_fork(after_in_child=self._leave)

    def add(self, engine: Any) -> None:
        """Take in an engine that this process makes."""
        self._engines.add(engine)

    def _leave(self) -> None:
        for engine in self._engines:
            engine._close.detach()
            for part in self._parts:
                setattr(engine, part, Forked(self._pid))
        self._engines, self._pid = weakref.WeakSet(), os.getpid()


def forked_engine_error(pid: int) -> ForkedEngineError:
    """Return the error for a process that was forked from the one with this id."""
    return ForkedEngineError(
        f"the engine belongs to process {pid}, and this one, {os.getpid()}, was forked from it: ask it there, or start "
        'processes with multiprocessing.get_context("spawn") and make the engine in one of them'
    )
