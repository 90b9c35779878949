"""The cleaning of shared memory that killed processes leave behind (``multiprocessing.shared_memory``).

Python's resource tracker removes it too, but only when the whole program ends, and with a warning.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path


def segments_of(pids: Iterable[int]) -> set[str]:
    """Return the names of the segments that processes have mapped; an ended process has none."""
    names: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            names.update(re.findall(r" /dev/shm/(psm_\w+)", Path(f"/proc/{pid}/maps").read_text()))
    return names


def remove(names: Iterable[str]) -> None:
    """Remove unused segments; missing ones are ignored."""
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            segment = SharedMemory(name)
            segment.close()
            segment.unlink()
