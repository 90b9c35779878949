"""vLLM's environment variables, set while an engine starts and inherited by its processes."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

#: Where vLLM makes the sockets between its processes (``vllm/envs.py`` in 0.32.0). A socket's name has at most 107
#: bytes, and vLLM's part of it has 37.
SOCKETS, LONGEST_SOCKET_FOLDER = "VLLM_RPC_BASE_PATH", 70

_lock = threading.Lock()
#: The variables that are set here at the moment, and for how many engines.
_set_here: Counter[str] = Counter()


def users_variables() -> dict[str, str]:
    """Return vLLM's variables as you have set them, without those that ``applied`` sets at the moment."""
    with _lock:
        return {name: value for name, value in os.environ.items() if name.startswith("VLLM_") and not _set_here[name]}


@contextmanager
def applied(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables, unless you have, and remove them afterwards, so that other engines start as they would alone."""
    with _lock:
        ours = [name for name in variables if _set_here[name] or name not in os.environ]
        for name in ours:
            _set_here[name] += 1
            os.environ.setdefault(name, variables[name])
    try:
        yield
    finally:
        with _lock:
            for name in ours:
                _set_here[name] -= 1
                if not _set_here[name]:
                    os.environ.pop(name, None)


def sockets_in(folder: Path) -> Mapping[str, str]:
    """Return the variable for sockets in a folder; none if the folder's name is too long."""
    path = os.fspath(folder)
    return {SOCKETS: path} if len(path) <= LONGEST_SOCKET_FOLDER else {}
