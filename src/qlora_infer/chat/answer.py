"""The parts of an answer to a conversation: thoughts, content, calls of tools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen


@frozen
class ToolCall:
    """A tool call in a model's answer.

    Attributes:
        name: The tool's name.
        text: The arguments as the model wrote them, usually JSON.
        arguments: The arguments; ``None`` if the text is not a JSON object.
        id: The call's id, for the ``tool`` message that answers it.
    """

    name: str
    text: str
    arguments: Mapping[str, Any] | None = None
    id: str | None = None

    def to_message(self) -> dict[str, Any]:
        """Return the call's form in ``tool_calls`` of an assistant message."""
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
