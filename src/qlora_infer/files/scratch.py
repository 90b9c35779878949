"""The folder of this process's temporary files: copies of adapters, vLLM's sockets, start errors.

All of them are in one folder, so that what a killed process leaves is removed at once: by ``_vllm/guard.py``, or, where
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
import time
from pathlib import Path

from qlora_infer.errors import StorageError

#: Where the processes that this one starts find the folder's name.
VARIABLE = "QLORA_INFER_SCRATCH"

_PREFIX = "qlora-infer-run-"

#: Seconds within which a folder that is new may not be locked yet.
_NEW = 60

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
                folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
                _lock(folder)
            except OSError as error:
                raise StorageError(
                    f"no folder for temporary files can be written ({error.strerror}), and adapters are copied into "
                    "one: set TMPDIR to a folder that can, with room for your adapters"
                ) from error
            _folders[pid] = folder
            os.environ[VARIABLE] = str(folder)
            atexit.register(_remove, pid, folder)
        return _folders[pid]


def new_folder(prefix: str) -> Path:
    """Return a new, empty folder in the one of this process."""
    return Path(tempfile.mkdtemp(prefix=prefix, dir=scratch_folder()))


def _lock(folder: Path) -> None:
    """Lock a folder until this process ends, whatever ends it; programs that it executes do not inherit the lock.

    systemd-tmpfiles, which removes what is old from /tmp, passes over folders that are locked, too (tmpfiles.d(5)).
    """
    fcntl.flock(os.open(folder, os.O_RDONLY | os.O_DIRECTORY), fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_left() -> None:
    """Remove this user's folders that no process holds any more.

    A lock says so, and no process id: containers that share the folder of temporary files do not share those.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                status = os.fstat(opened)
                if status.st_uid == os.getuid() and time.time() - status.st_mtime > _NEW:
                    fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(opened)


def _remove(pid: int, folder: Path) -> None:
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)
