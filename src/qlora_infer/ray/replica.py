"""The function that makes a replica's engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from qlora_infer.engine import QuantizedLoRAEngine

#: Makes a replica's engine, with its ``known_adapters``, in the replica's own process; pickled on its way there.
EngineFactory: TypeAlias = Callable[[], QuantizedLoRAEngine]
