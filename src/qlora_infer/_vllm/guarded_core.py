"""vLLM's engine core with a guard, so that none of its processes outlives the engine's own process.

A plain core lives on when its caller is killed, and holds all of the GPU's memory (read and seen in vLLM 0.32.0,
``v1/engine/core.py``). Linux's parent-death signal would end it when the *thread* that started it ends, and a pipe that
the caller holds open would be held open by the caller's forks; a pidfd has neither fault.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qlora_infer.files.scratch import VARIABLE

#: A guard that is not scheduled for so long is left to itself; it ends when it is.
SECONDS_TO_DISMISS = 2.0

_GUARD = Path(__file__).with_name("guard.py")
_lock = threading.Lock()
_starting = 0
_vllms_own: Any = None


@contextlib.contextmanager
def guarded_cores() -> Iterator[None]:
    """Start vLLM's cores with guards inside this context.

    ``CoreEngineProcManager`` (``v1/engine/utils.py`` in vLLM 0.32.0) takes ``EngineCoreProc.run_engine_core`` when it
    makes a core's process. Several engines may start at once.
    """
    from vllm.v1.engine.core import EngineCoreProc

    global _starting, _vllms_own
    with _lock:
        if not _starting:
            _vllms_own, EngineCoreProc.run_engine_core = EngineCoreProc.run_engine_core, _GuardedCore(os.getpid())
        _starting += 1
    try:
        yield
    finally:
        with _lock:
            _starting -= 1
            if not _starting:
                EngineCoreProc.run_engine_core = staticmethod(_vllms_own)


class _GuardedCore:
    """Run vLLM's core in its process, with a guard beside it.

    A process that is spawned unpickles this before its arguments, which import vLLM, and has its guard from then on.
    The imports can take longer than an orphan may live.
    """

    def __init__(self, caller: int, guard: subprocess.Popen[bytes] | None = None) -> None:
        self._caller, self._guard = caller, guard

    def __reduce__(self) -> tuple[Callable[[int], _GuardedCore], tuple[int]]:
        return _with_guard, (self._caller,)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        guard = self._guard or _start_guard(self._caller)  # a process that was forked has none yet
        from vllm.v1.engine.core import EngineCoreProc

        try:
            (_vllms_own or EngineCoreProc.run_engine_core)(*args, **kwargs)
        finally:
            _dismiss(guard)


def _with_guard(caller: int) -> _GuardedCore:
    return _GuardedCore(caller, _start_guard(caller))


def _start_guard(caller: int) -> subprocess.Popen[bytes]:
    """Give this process, a child of the caller's, a group of its own, and start the group's guard."""
    os.setpgid(0, 0)
    scratch = os.environ[VARIABLE]
    try:
        end = os.pidfd_open(caller)
    except OSError:  # the caller is dead, or Linux older than 5.3, where the guard looks for it each second
        end = -1
    if os.getppid() != caller:
        shutil.rmtree(scratch, ignore_errors=True)
        os._exit(1)
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(_GUARD), str(os.getpgid(0)), scratch, str(caller), str(end)],
        stdin=subprocess.PIPE,
        pass_fds=() if end < 0 else (end,),
        env={},
        start_new_session=True,  # what is sent to the group, or typed in the terminal, is not for the guard
    )


def _dismiss(guard: subprocess.Popen[bytes]) -> None:
    """Tell the guard that the engine ended as it should."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        guard.communicate(b".", timeout=SECONDS_TO_DISMISS)
