"""The torchvision for the installed torch: its release, and the command that installs it.

vLLM's models that see pictures import it, also when they are given text only; transformers imports it wherever it is
installed. Each release and each build is made for one torch, and does not load beside another.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re

TORCH_INDEX = "https://download.pytorch.org/whl"

#: What is at stake, for messages.
NEEDED_BY = "Gemma 3, Mistral 3, Qwen-VL and other multimodal models, and Qwen3.5, do not start without the right one"


def is_installed() -> bool:
    """Return whether Python finds one, of whatever build."""
    return importlib.util.find_spec("torchvision") is not None


def matching_release(torch_version: str) -> str | None:
    """Return the release for a torch, such as ``"0.28"`` for 2.13, or ``None`` where that is not known."""
    release = re.match(r"2\.(\d+)\.", torch_version)
    return f"0.{int(release[1]) + 15}" if release else None


def install_command(torch_version: str | None = None) -> str:
    """Return the command that installs the torchvision for a torch: its release, and its build.

    PyPI's and that of the CPU index have one version number, so that pip would take the installed one for the other.

    Args:
        torch_version: Such as ``"2.13.0+cpu"``; ``None`` for the installed one.
    """
    if torch_version is None:
        try:
            torch_version = importlib.metadata.version("torch")
        except importlib.metadata.PackageNotFoundError:
            return "pip install torchvision"
    release, build = matching_release(torch_version), torch_version.partition("+")[2]
    what = f"'torchvision=={release}.*'" if release else "torchvision"
    index = f" --index-url {TORCH_INDEX}/{build}" if build else ""
    return f"pip install --force-reinstall --no-deps {what}{index}"
