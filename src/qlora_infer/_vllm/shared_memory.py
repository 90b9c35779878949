"""What processes share by ``multiprocessing.shared_memory``, and leave behind when they are killed.

Python's resource tracker removes it too, but only when the whole program ends, and with a warning.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path


def segments_of(pids: Iterable[int]) -> set[str]:
    """The names of the segments that processes have mapped; none of a process that has ended."""
    names: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            names.update(re.findall(r" /dev/shm/(psm_\w+)", Path(f"/proc/{pid}/maps").read_text()))
    return names


def remove(names: Iterable[str]) -> None:
    """Remove segments that nobody uses any more; those that are gone already are left alone."""
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            segment = SharedMemory(name)
            segment.close()
            segment.unlink()
