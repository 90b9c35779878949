"""vLLM's engine core, started with a guard, so that nothing of it outlives the process whose engine it is.

A plain core lives on when its caller is killed, and holds all of the GPU's memory (read and seen in vLLM 0.32.0,
``v1/engine/core.py``). Linux's parent-death signal would end it when the *thread* that started it ends, and a pipe that
the caller holds open would be held open by the caller's forks; a pidfd has neither fault.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_infer._scratch import VARIABLE

#: A guard that is not scheduled for so long is left to itself; it ends when it is.
SECONDS_TO_DISMISS = 2.0

_GUARD = Path(__file__).with_name("_guard.py")
_lock = threading.Lock()
_starting = 0
_vllms_own: Any = None


@contextlib.contextmanager
def guarded_cores() -> Iterator[None]:
    """Start vLLM's cores with guards: their processes run ``run_engine_core`` of this file in place of vLLM's.

    ``CoreEngineProcManager`` (``v1/engine/utils.py`` in vLLM 0.32.0) takes ``EngineCoreProc.run_engine_core`` when it
    makes the process. Several engines may start at once.
    """
    from vllm.v1.engine.core import EngineCoreProc

    global _starting, _vllms_own
    with _lock:
        if not _starting:
            _vllms_own, EngineCoreProc.run_engine_core = EngineCoreProc.run_engine_core, staticmethod(run_engine_core)
        _starting += 1
    try:
        yield
    finally:
        with _lock:
            _starting -= 1
            if not _starting:
                EngineCoreProc.run_engine_core = staticmethod(_vllms_own)


def run_engine_core(*args: Any, **kwargs: Any) -> None:
    """Run vLLM's core in this process, with a guard beside it."""
    guard = _start_guard()
    from vllm.v1.engine.core import EngineCoreProc

    try:
        # A process that was forked has the exchanged one in memory.
        (_vllms_own or EngineCoreProc.run_engine_core)(*args, **kwargs)
    finally:
        _dismiss(guard)


def _start_guard() -> subprocess.Popen[bytes]:
    """Give this process a group of its own, and start the group's guard."""
    caller = multiprocessing.parent_process()
    assert caller is not None
    assert caller.pid is not None
    os.setpgid(0, 0)
    try:
        caller_ends = os.pidfd_open(caller.pid)
    except OSError:  # the caller is dead, or the kernel older than 5.3, and this pipe is the next best
        caller_ends = int(caller.sentinel)
    if os.getppid() != caller.pid:
        os._exit(1)
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(_GUARD), str(os.getpgid(0)), os.environ[VARIABLE], str(caller_ends)],
        stdin=subprocess.PIPE,
        pass_fds=(caller_ends,),
        env={},
        start_new_session=True,  # what is sent to the group, or typed in the terminal, is not for the guard
    )


def _dismiss(guard: subprocess.Popen[bytes]) -> None:
    """Tell the guard that the engine ended as it should."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        guard.communicate(b".", timeout=SECONDS_TO_DISMISS)
