"""A decision of a plan, with its reason, and the decisions that you made yourself."""

from __future__ import annotations

import logging
from typing import Any, Generic, TypeVar

from attrs import fields, frozen

from qlora_infer.config import EngineConfig

T = TypeVar("T")


@frozen
class Decision(Generic[T]):
    """One decision, with its reason.

    Attributes:
        name: The option, vLLM's argument or the environment variable.
        value: Its value.
        reason: A phrase.
        level: The level of its log line.
    """

    name: str
    value: T
    reason: str
    level: int = logging.DEBUG

    def __str__(self) -> str:
        return f"{self.name}={self.value!r}: {self.reason}"


def given(config: EngineConfig, name: str) -> Decision[Any]:
    """Return an option as you gave it, or its default."""
    value = getattr(config, name)
    is_default = value == getattr(fields(EngineConfig), name).default
    return Decision(name, value, "the default" if is_default else "given")
