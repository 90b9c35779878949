"""A conversation, and the other inputs of a template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from attrs import frozen

Message = Mapping[str, Any]

_ARGUMENTS = {"messages", "tools", "add_generation_prompt", "continue_final_message"}
_RESERVED = {"chat_template", "tokenize"}
_NO_VARIABLES: Mapping[str, Any] = {}


@frozen(eq=False)
class Conversation:
    """A conversation with the arguments that ``vllm.LLM.chat`` has for its prompt.

    Attributes:
        messages: Mappings with ``role`` and ``content``, in OpenAI's form.
        tools: The tools that the model may call, in OpenAI's form.
        chat_template_kwargs: Further variables of the template, such as ``enable_thinking`` or ``documents``.
        add_generation_prompt: Whether the prompt ends where the assistant's answer begins.
        continue_final_message: Whether the answer goes on where the last message ends.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] = _NO_VARIABLES
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @classmethod
    def of(
        cls,
        messages: Any,
        *,
        tools: Any = None,
        chat_template_kwargs: Any = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
    ) -> Self:
        """Check a conversation; ``add_generation_prompt`` is true by default, unless its last message is continued.

        Raises:
            TypeError: The messages or tools are no list of mappings, or ``chat_template_kwargs`` is no mapping.
            ValueError: The arguments contradict each other, or a variable has an argument of its own.
        """
        if not is_conversation(messages):
            raise TypeError(
                f"a conversation must be a list of messages with 'role' and 'content', got {_cut(messages)}"
            )
        for message in messages:
            if not isinstance(message.get("role"), str):
                raise ValueError(f"a message needs a 'role', such as \"user\", got {_cut(message)}")  # noqa: TRY004
        if tools is not None and not (_is_list(tools) and all(isinstance(tool, Mapping) for tool in tools)):
            raise TypeError(
                f'tools must be a list of mappings such as {{"type": "function", "function": {{…}}}}, got {_cut(tools)}'
                "; transformers.utils.get_json_schema makes one of a Python function"
            )
        variables = {} if chat_template_kwargs is None else chat_template_kwargs
        if not isinstance(variables, Mapping):
            raise TypeError(f"chat_template_kwargs must be a mapping, got {_cut(variables)}")
        for name in sorted(_ARGUMENTS & set(variables)):
            raise ValueError(f"chat_template_kwargs has {name!r}, which is an argument of its own")
        for name in sorted(_RESERVED & set(variables)):
            raise ValueError(f"chat_template_kwargs has {name!r}: the template is the adapter's, or else the model's")
        if add_generation_prompt and continue_final_message:
            raise ValueError("continue_final_message=True needs add_generation_prompt=False: the answer has begun")
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        return cls(messages, tools, variables, bool(add_generation_prompt), bool(continue_final_message))

    @property
    def variables(self) -> Mapping[str, Any]:
        """The variables that a template gets beside the messages."""
        return self.chat_template_kwargs if self.tools is None else {**self.chat_template_kwargs, "tools": self.tools}


def is_conversation(value: Any) -> bool:
    """Return whether a value is a list of messages."""
    return _is_list(value) and bool(value) and all(isinstance(message, Mapping) for message in value)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _cut(value: object) -> str:
    return repr(str(value)[:80])
