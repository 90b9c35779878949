"""The folder in which vLLM's processes leave the reason why an engine did not start.

vLLM logs the error in the process that failed, and raises elsewhere only that there was one ("See root cause above").
So the starting process makes a folder and names it in the environment, and each of vLLM's processes that fails leaves
its error there, unless another has. The first counts: what its neighbours log after it are its consequences.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

from attrs import frozen

from qlora_infer.files.scratch import scratch_folder
from qlora_infer.sources import secrets as _secrets

#: Where vLLM's processes find the folder's name.
FOLDER = "QLORA_INFER_START_FAULT"

#: What vLLM 0.32.0 logs with an error that ends a start: the first in ``v1/engine/core.py``, the others in
#: ``v1/executor/multiproc_executor.py``.
ENDINGS = frozenset({"EngineCore failed to start.", "WorkerProc failed to start.", "WorkerProc hit an exception."})

#: Characters of an error in a message, and in the file, where secrets that only the reader knows may still be.
LONGEST = 2_000
LONGEST_FILE = 64_000


@frozen
class FaultFolder:
    """The place where the processes of one start leave the first error."""

    path: Path

    def read(self) -> str | None:
        """Return the error, or ``None`` if none was left: a process was killed, or did not get as far."""
        try:
            return (self.path / "fault").read_text(encoding="utf-8")
        except FileNotFoundError:
            return None


@contextlib.contextmanager
def fault_folder() -> Iterator[FaultFolder]:
    """Make a folder for a start's first error; processes that are started meanwhile inherit its name."""
    with tempfile.TemporaryDirectory(prefix="start-", dir=scratch_folder()) as path:
        os.environ[FOLDER] = path
        try:
            yield FaultFolder(Path(path))
        finally:
            os.environ.pop(FOLDER, None)


def leave_fault() -> None:
    """Leave the first error that ends the start of this process, where the starting one made a folder for it."""
    folder, logger = os.environ.get(FOLDER), logging.getLogger("vllm")
    if folder and not any(isinstance(handler, _FaultWriter) for handler in logger.handlers):
        logger.addHandler(_FaultWriter(Path(folder) / "fault"))


def format_error(error: BaseException) -> str:
    """Return the type and the message of the error that began a chain of causes."""
    while error.__cause__ is not None:
        error = error.__cause__
    message = str(error)
    if hasattr(error, "errors") and callable(error.errors):
        # pydantic's own text ends with the arguments that it was given.
        message = " ".join(str(part["msg"]).removeprefix("Value error, ") for part in error.errors())
    return f"{type(error).__name__}: {message.strip() or _format_place(error)}"


def shorten(reason: str, secrets: Iterable[str | None] = ()) -> str:
    """Return the text as a message may hold it: without secrets, and of bounded length."""
    # vLLM lists all 300 of them.
    reason = _secrets.redacted(reason.partition(" Supported architectures:")[0], secrets)
    return reason if len(reason) <= LONGEST else reason[:LONGEST] + " ..."


def _format_place(error: BaseException) -> str:
    """Return the line that raised an error without a message, such as an assertion about a weight's shape."""
    for frame in traceback.extract_tb(error.__traceback__)[-1:]:
        return f"{frame.line} ({Path(frame.filename).name}, line {frame.lineno}, in {frame.name})"
    return "no message"


class _FaultWriter(logging.Handler):
    """A log handler that writes the first error that ends a start, and nothing once the folder is gone."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.ERROR)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg not in ENDINGS or not record.exc_info or record.exc_info[1] is None:
            return
        text = _secrets.redacted(format_error(record.exc_info[1]))[:LONGEST_FILE]
        # Where it exists, another process was first.
        with contextlib.suppress(OSError), self._path.open("x", encoding="utf-8") as file:
            file.write(text)
