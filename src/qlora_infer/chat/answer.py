"""The parts of an answer to a conversation: thoughts, content, calls of tools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen


@frozen
class ToolCall:
    """A call of a tool that a model has written.

    Attributes:
        name: The tool's name.
        text: The arguments as the model wrote them, JSON as a rule.
        arguments: The arguments; ``None`` where the text is no JSON object.
        id: The call's id, by which a ``tool`` message answers it.
    """

    name: str
    text: str
    arguments: Mapping[str, Any] | None = None
    id: str | None = None

    def to_message(self) -> dict[str, Any]:
        """Return it as an assistant message has it in ``tool_calls``."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.text}}


@frozen
class Parsed:
    """The parts of an answer, as vLLM's parsers find them.

    Attributes:
        content: The text for the reader.
        reasoning: The text of the model's thoughts; ``None`` where there are none.
        tool_calls: The calls of tools.
    """

    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
