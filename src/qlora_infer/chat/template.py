"""The rendering of a conversation with an adapter's own chat template, bounded in time and memory.

Templates are rendered as transformers does it, but in processes of their own (``worker.py``), because what
a template spends inside of one call into C can be stopped by no check in Python and no watchdog thread:
``tokenizer.apply_chat_template(chat_template=...)`` would hang or fill the memory of the whole server. A process takes
some 0.1 s to start and stays for the next conversations, which then take less than a millisecond.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, TypeAlias, cast

from qlora_infer.chat.process import processes
from qlora_infer.errors import CorruptAdapterError, UnsafeAdapterError

#: Real templates have up to some 25,000 characters.
MAX_TEMPLATE_BYTES = 1 << 17
MAX_MESSAGES_BYTES = 1 << 24
#: A template repeats what it is content once or twice; it may write this much and four times what it is content.
MAX_EXTRA_CHARACTERS = 1 << 20

#: How a template reads the content of messages: as text, or as a list of parts.
ContentFormat: TypeAlias = Literal["string", "openai"]

_NO_VARIABLES: Mapping[str, Any] = {}
# What transformers 5.19 marks the end of the last message with (``utils/chat_template_utils.py``), to find it again.
_END_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


def template_field(value: object) -> str | None:
    """Take the template from ``chat_template`` of tokenizer_config.json.

    It is a text, or a list of named ones; transformers takes an object of them, too.

    Raises:
        ValueError: It is something else, or no template that ``check_template_text`` takes.
    """
    if value is None:
        return None
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        value = {item["name"]: item.get("template") for item in value if isinstance(item.get("name"), str)}
    if isinstance(value, dict):
        value = value.get("default")
    if not isinstance(value, str):
        raise ValueError(  # noqa: TRY004
            "'chat_template' must be a text, or a list of {name, template} with one that is named 'default'"
        )
    return check_template_text(value)


def check_template_text(text: str) -> str:
    """Return the template if it is Unicode and not too large.

    Raises:
        ValueError: It is not.
    """
    num_bytes = len(text.encode())  # half of a surrogate pair, which JSON can hold, is a ValueError
    if not text.strip():
        raise ValueError("its chat template is empty")
    if num_bytes > MAX_TEMPLATE_BYTES:
        raise ValueError(f"its chat template has {num_bytes} bytes, {MAX_TEMPLATE_BYTES} are allowed")
    return text


def render(
    adapter: str,
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] = _NO_VARIABLES,
    special_tokens: Mapping[str, str] = _NO_VARIABLES,
) -> str:
    """Write a conversation as a prompt.

    Args:
        adapter: The adapter's name, for messages.
        template: Its chat template.
        messages: The conversation, of JSON's types.
        add_generation_prompt: Whether the prompt ends where the assistant's answer begins.
        continue_final_message: Whether it ends where the last message does, without the template's ending.
        variables: Further variables of the template: ``tools``, ``documents``, and any of its own.
        special_tokens: The template's ``bos_token``, ``eos_token`` and so on; those that are missing are
            undefined in it. It is a tokenizer's ``special_tokens_map`` in transformers.

    Raises:
        ValueError: The template refuses these messages or fails on them, or they are too long.
        TypeError: The messages contain a type that JSON does not have.
        CorruptAdapterError: The template is malformed.
        UnsafeAdapterError: The template takes too much time or memory, or accesses forbidden attributes.
        MissingDependencyError: No process for templates can be started.
    """
    final = ""
    if continue_final_message:
        messages, final = _with_end_tag(messages)
    text = _call(
        adapter,
        template,
        {
            **special_tokens,
            "tools": None,
            "documents": None,
            **variables,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        },
    )
    return _until_end_tag(adapter, text, final) if continue_final_message else text


def _with_end_tag(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], str]:
    """Mark the end of the last message's text, as transformers does it (``render_jinja_template`` of 5.19)."""
    *others, last = messages
    content = copy.deepcopy(last.get("content"))
    if isinstance(content, str):
        return [*others, {**last, "content": content + _END_TAG}], content
    for part in reversed(content if isinstance(content, list) else []):
        if isinstance(text := part.get("text"), str):
            part["text"] += _END_TAG
            return [*others, {**last, "content": content}], text
    raise ValueError("continue_final_message needs a last message with text, to which the answer is added")


def _until_end_tag(adapter: str, text: str, final: str) -> str:
    before, tag, after = text.rpartition(_END_TAG.strip())
    if not tag or final.strip() not in text:
        raise ValueError(
            f"the chat template of adapter {adapter!r} leaves out a part of the last message: it cannot be continued"
        )
    # Where the template has trimmed the message, the space of the tag is gone, and so is what stood before it.
    return before if after.startswith(" ") else before.rstrip()


@lru_cache(maxsize=64)
def content_format(adapter: str, template: str) -> ContentFormat:
    """Return how a template reads the content of messages; raises as ``check_template``."""
    return cast(ContentFormat, _call(adapter, template, None))


def check_template(adapter: str, template: str) -> None:
    """Compile a template, so that a malformed one is found when its adapter is loaded.

    Raises:
        CorruptAdapterError: The template is malformed.
        UnsafeAdapterError: It takes too much time or memory.
        MissingDependencyError: No process for templates can be started.
    """
    _call(adapter, template, None)


def _call(adapter: str, template: str, variables: Mapping[str, Any] | None) -> str:
    try:
        check_template_text(template)
    except ValueError as error:
        raise CorruptAdapterError(adapter, str(error)) from error
    request = _request(template, variables)
    with processes.borrow() as process:
        # Characters take up to four bytes each.
        answer = process.call(request, max_bytes=4 * (MAX_EXTRA_CHARACTERS + 4 * len(request)))
        if answer is None:
            raise UnsafeAdapterError(adapter, f"its chat template {process.end_reason()}: this adapter may be hostile")
    kind, text = answer[:1], answer[1:].decode()
    if kind == b"S":
        raise CorruptAdapterError(adapter, f"its chat template is malformed: {text}")
    if kind == b"U":
        raise UnsafeAdapterError(adapter, f"its chat template was stopped: {text}")
    if kind != b"T":
        raise ValueError(f"the chat template of adapter {adapter!r} cannot write these messages: {text}")
    return text


def _request(template: str, variables: Mapping[str, Any] | None) -> bytes:
    try:
        content = json.dumps(variables, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"messages must hold texts, numbers, lists and mappings only: {error}") from error
    if len(content) > MAX_MESSAGES_BYTES:
        raise ValueError(f"these messages have {len(content)} bytes as JSON; a template takes {MAX_MESSAGES_BYTES}")
    max_characters = MAX_EXTRA_CHARACTERS + 4 * len(content)
    return f'{{"template":{json.dumps(template)},"max_characters":{max_characters},"variables":{content}}}'.encode()


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview)):
        return list(value)
    raise TypeError(f"{type(value).__name__} is none of them")
