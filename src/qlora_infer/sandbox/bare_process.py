"""The start of a process that runs one file of this package on untrusted input, isolated from this process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Beside these the process gets nothing of the environment, where tokens and keys are.
_ENVIRONMENT_NAMES = ("LD_LIBRARY_PATH", "PYTHONHOME", "TZ")


def bare_process(script: Path, *arguments: str, import_path: Sequence[str] = ()) -> dict[str, Any]:
    """Return the arguments of ``subprocess.Popen`` for a Python that runs a script.

    Args:
        script: A file that limits its own time and memory.
        arguments: The script's arguments.
        import_path: Folders that it imports from beside Python's own; packages that are installed are not among those.
    """
    environment = {name: os.environ[name] for name in _ENVIRONMENT_NAMES if name in os.environ}
    if import_path:
        environment["PYTHONPATH"] = os.pathsep.join(import_path)
    return {
        "args": [sys.executable, "-s", "-S", "-P", "-B", str(script), *arguments],
        "stdout": subprocess.PIPE,
        "stderr": subprocess.DEVNULL,
        "env": environment,
        "cwd": "/",
        "start_new_session": True,  # Ctrl-C is for this process, which then ends it
    }
