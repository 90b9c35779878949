"""The snapshot of an adapter, one immutable content, and the names of its files."""

from __future__ import annotations

from pathlib import Path

from attrs import frozen

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
#: Weights as old versions of PEFT wrote them, by the order in which they are looked for.
PICKLE_NAMES = ("adapter_model.bin", "adapter_model.pt")

#: The folder in a private copy that has the adapter in the running model's names (``served.py``).
SERVED_NAME = "served"


@frozen
class Snapshot:
    """One immutable content of an adapter.

    Attributes:
        folder: The copy: ``adapter_config.json``, ``adapter_model.safetensors``, and what else the adapter carries.
        digest: SHA-256 over these files, in hexadecimal digits.
    """

    folder: Path
    digest: str


def where_else(adapters: list[str]) -> str:
    """Return the next step for somebody who named the folder above these adapters."""
    if not adapters:
        return "is it an adapter?"
    more = f" and {len(adapters) - 5} more" if len(adapters) > 5 else ""
    return f"there are adapters inside it: name {', '.join(adapters[:5])}{more}"
