"""The folder of this process's temporary files: copies of adapters, vLLM's sockets, the error of a start.

All of them are in one folder, so that what a killed process leaves is removed at once: by ``_guard.py``, or, where
there was no engine yet, by the next process that makes such a folder.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
from pathlib import Path

from qlora_infer.errors import StorageError

#: Where the processes that this one starts find the folder's name.
VARIABLE = "QLORA_INFER_SCRATCH"

_PREFIX, _LOCK = "qlora-infer-", "in-use"

_making = threading.Lock()
_folders: dict[int, Path] = {}  # by process id: a forked process has one of its own


def scratch_folder() -> Path:
    """Return the folder, made when it is first asked for and removed when this process ends.

    Raises:
        StorageError: No temporary folder can be written.
    """
    pid = os.getpid()
    with _making:
        if pid not in _folders or not _folders[pid].is_dir():
            try:
                _remove_left()
                _folders[pid] = folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
                _hold(folder / _LOCK)
            except OSError as error:
                raise StorageError(
                    f"no folder for temporary files can be written ({error.strerror}), and adapters are copied into "
                    "one: set TMPDIR to a folder that can, with room for your adapters"
                ) from error
            os.environ[VARIABLE] = str(folder)
            atexit.register(_remove, pid, folder)
        return _folders[pid]


def new_folder(prefix: str) -> Path:
    """Return a new, empty folder in the one of this process."""
    return Path(tempfile.mkdtemp(prefix=prefix, dir=scratch_folder()))


def _hold(lock: Path) -> None:
    """Lock a file until this process ends, whatever ends it; processes that are executed do not inherit the lock."""
    fcntl.flock(os.open(lock, os.O_CREAT | os.O_WRONLY, 0o600), fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_left() -> None:
    """Remove this user's folders that no process holds any more.

    A lock says so, and no process id: containers that share the folder of temporary files do not share those.
    """
    for lock in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError):
            file = os.open(lock, os.O_WRONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(file).st_uid == os.getuid():
                    shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(file)


def _remove(pid: int, folder: Path) -> None:
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)
