"""The check for packages that only some calls need and that an installation without vLLM may lack."""

from __future__ import annotations

import importlib.util

from qlora_infer.errors import MissingDependencyError


def require(purpose: str, *packages: str) -> None:
    """Check that packages are installed, without importing them.

    Args:
        purpose: The purpose, for the message: "an adapter from memory is written".
        packages: Their names, which those of their modules are.

    Raises:
        MissingDependencyError: One is not there; the message has the command that installs all that are missing.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingDependencyError(f"{purpose} with {' and '.join(missing)}: pip install {' '.join(missing)}")
