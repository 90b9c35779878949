"""Build a replica's engine and find the source of its adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from qlora_infer.engine import QuantizedLoRAEngine
from qlora_infer.errors import AdapterNotLoadedError
from qlora_infer.sources.source import SourceLike

#: Makes a replica's engine, in the replica's own process; pickled on its way there.
EngineFactory: TypeAlias = Callable[[], QuantizedLoRAEngine]

#: Where adapters come from, by name; each replica loads those that it is asked for. Pickled, as the factory is.
Adapters: TypeAlias = Mapping[str, SourceLike]

_MOST_NAMES_TOLD = 20


def source_of(adapters: Adapters, name: str) -> SourceLike:
    """Return an adapter's source.

    Raises:
        AdapterNotLoadedError: No adapter has that name.
    """
    try:
        return adapters[name]
    except KeyError:
        names = list(adapters)
        told = ", ".join(names[:_MOST_NAMES_TOLD]) + (", …" if len(names) > _MOST_NAMES_TOLD else "")
        raise AdapterNotLoadedError(name, f"there is no adapter {name!r} here; there are: {told or 'none'}") from None
