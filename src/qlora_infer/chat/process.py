"""The processes that render chat templates, as the server starts, calls and ends them."""

from __future__ import annotations

import atexit
import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from qlora_infer.errors import MissingDependencyError
from qlora_infer.sandbox.bare_process import bare_process

#: The most of a processor's time that one template may take.
RENDER_SECONDS = 2.0
#: Templates rendered at a time: one that takes all its seconds holds up nobody while there is another place.
MAX_PROCESSES = 4
#: What a process may hold between two conversations; it begins with 20 MiB, and a template can leave some behind.
MAX_IDLE_BYTES = 128 << 20

# A process ends itself in time; this is for one that does not even start or listen, or gets no processor.
_GRACE_SECONDS = 30.0
_WORKER = Path(__file__).with_name("worker.py")


class TemplateProcess:
    """One process that renders templates, one at a time."""

    def __init__(self) -> None:
        installed = [path for path in sys.path if Path(path).is_absolute()]
        arguments = bare_process(_WORKER, str(RENDER_SECONDS), import_path=installed)
        self._popen: subprocess.Popen[bytes] = subprocess.Popen(**arguments, stdin=subprocess.PIPE)
        if self._exchange(b"", 1) != b"R":
            reason = self.end_reason()
            self.stop()
            raise MissingDependencyError(
                f"a process for chat templates {reason}; it needs jinja2: pip install 'jinja2>=3.1'"
            )

    def call(self, request: bytes, *, max_bytes: int) -> bytes | None:
        """Return the answer, or ``None`` if it took too long, ended, or wrote more than it may."""
        return self._exchange(len(request).to_bytes(4, "big") + request, max_bytes)

    def _exchange(self, content: bytes, max_bytes: int) -> bytes | None:
        writer, reader = self._popen.stdin, self._popen.stdout
        assert writer is not None
        assert reader is not None
        watchdog = threading.Timer(RENDER_SECONDS + _GRACE_SECONDS, self._popen.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            writer.write(content)
            writer.flush()
            length = int.from_bytes(reader.read(4), "big")
            answer = reader.read(length) if length <= max_bytes else b""
        except BrokenPipeError:
            return None
        finally:
            watchdog.cancel()
        return answer if answer and len(answer) == length else None

    def is_fit(self) -> bool:
        """Return whether it lives and is small.

        The kernel may have ended it, or a template left something behind.
        """
        if self._popen.poll() is not None:
            return False
        try:
            pages = int(Path(f"/proc/{self._popen.pid}/statm").read_text().split()[1])
        except OSError:
            return True
        return pages * resource.getpagesize() <= MAX_IDLE_BYTES

    def end_reason(self) -> str:
        """Why there was no answer."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(1.0)  # its pipe is closed before its status is known
        return {
            None: "wrote what is no answer",
            -signal.SIGPROF: f"took longer than {RENDER_SECONDS} s",
            -signal.SIGKILL: f"was killed: out of memory, or silent for {RENDER_SECONDS + _GRACE_SECONDS} s",
        }.get(self._popen.returncode, f"ended its process (exit status {self._popen.returncode})")

    def stop(self) -> None:
        """End it and wait for its end."""
        self._popen.kill()
        self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


class TemplateProcesses:
    """The processes that there are: started when one is needed, kept for the next."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew in a forked child, which must not talk to its parent's processes."""
        self._places = threading.BoundedSemaphore(MAX_PROCESSES)
        self._idle: list[TemplateProcess] = []

    @contextlib.contextmanager
    def borrow(self) -> Iterator[TemplateProcess]:
        """Lend a process; after an error it is ended, for something may still be under way in it."""
        with self._places:
            process = self._take_idle() or TemplateProcess()
            try:
                yield process
            except BaseException:
                process.stop()
                raise
            self._idle.append(process)

    def _take_idle(self) -> TemplateProcess | None:
        while self._idle:
            with contextlib.suppress(IndexError):  # another thread was faster
                process = self._idle.pop()
                if process.is_fit():
                    return process
                process.stop()
        return None

    def stop(self) -> None:
        """End those that have nothing to do."""
        while (process := self._take_idle()) is not None:
            process.stop()


processes = TemplateProcesses()
atexit.register(processes.stop)
os.register_at_fork(after_in_child=processes.forget)
