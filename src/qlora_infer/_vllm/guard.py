"""The script of the guard process, which ends the processes that an engine leaves behind.

    python -I -S guard.py GROUP SCRATCH CALLER END

It sleeps until one of three things happens: the process CALLER, whose engine it is, ends (END is a pidfd of it, or -1),
the core ends (the end of its standard input), or the core says that it ended as it should (a byte there). In the first
two cases it kills the core's process group, in which all of the engine's processes are, and removes what they share in
memory; in the first also SCRATCH, the caller's folder of temporary files.

It must not import this package, so that it starts in some milliseconds and stays small.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import sys
import time
from pathlib import Path

CORE = 0

#: Times that the group is looked through: a process that was being started while the others were killed is found then.
LOOKS = 20


def main() -> None:
    """Wait, and clean up."""
    group, scratch, caller, end = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    poller = select.poll()
    poller.register(CORE, select.POLLIN)
    if end >= 0:
        poller.register(end, select.POLLIN)
    ready: list[tuple[int, int]] = []
    while not ready and is_alive(caller):
        ready = poller.poll(None if end >= 0 else 1000)
    if ready and ready[0][0] == CORE and os.read(CORE, 1):
        return
    kill(group)
    if not is_alive(caller):
        shutil.rmtree(scratch, ignore_errors=True)


def is_alive(pid: int) -> bool:
    """Return whether a process has not ended; one that waits for its parent to see its end has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def kill(group: int) -> None:
    """Kill a group's processes and those that they started outside it, and remove their shared memory."""
    shared: set[str] = set()
    for _ in range(LOOKS):
        left = members(group)
        if not left:
            break
        for pid in left:
            shared |= segments(pid)
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    for path in shared:
        with contextlib.suppress(OSError):
            Path(path).unlink()


def members(group: int) -> set[int]:
    """Return the processes of a group, and their descendants; not those that have ended and wait for their parents."""
    parents: dict[int, int] = {}
    found: set[int] = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent, its_group = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if state in "ZX":
                continue
            pid = int(stat.parent.name)
            parents[pid] = int(parent)
            if int(its_group) == group:
                found.add(pid)
    while more := {pid for pid, parent in parents.items() if parent in found and pid not in found}:
        found |= more
    return found - {os.getpid()}


def segments(pid: int) -> set[str]:
    """Return the files of ``multiprocessing.shared_memory`` that a process has mapped."""
    try:
        return set(re.findall(r" (/dev/shm/psm_\w+)", Path(f"/proc/{pid}/maps").read_text(errors="replace")))
    except OSError:
        return set()


if __name__ == "__main__":
    main()
