"""Conversations as vLLM reads them: its renderer for the model's template, its parser of messages for an adapter's.

Read in vLLM 0.32.0 (``renderers/hf.py``, ``renderers/chat_utils.py``). ``tests/_vllm/test_chat.py`` compares the
prompts with those of vLLM's own chat.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qlora_infer.chat.conversation import Conversation
from qlora_infer.chat.template import ContentFormat
from qlora_infer.requests.arguments import PromptInput

#: The fields of OpenAI's and vLLM's content parts that are not text (``MM_PARSER_MAP`` in ``chat_utils.py``).
_ADDRESSES = ("image_url", "audio_url", "video_url")
_MEDIA = ("image_pil", "image_embeds", "audio_embeds", "video_embeds", "input_audio")
_KINDS = {"image": "an image", "audio": "audio", "input": "audio", "video": "a video"}


def render(renderer: Any, conversation: Conversation) -> PromptInput:
    """Write a conversation with the model's own template, as ``vllm.LLM.chat`` does.

    Args:
        renderer: The engine's ``BaseRenderer``.
        conversation: Its messages, and what the template gets beside them.

    Raises:
        ValueError: The template cannot write the messages, or they hold media that may not be read.
    """
    from vllm.renderers.params import ChatParams
    from vllm.utils.mistral import is_mistral_tokenizer

    config = renderer.model_config
    variables = {
        **plain(conversation.chat_template_kwargs),
        "add_generation_prompt": conversation.add_generation_prompt,
        "continue_final_message": conversation.continue_final_message,
        # Templates of mistral-common write tokens, and no text.
        "tokenize": is_mistral_tokenizer(renderer.tokenizer) or config.enable_prompt_embeds,
    }
    if conversation.tools is not None:
        variables["tools"] = plain(conversation.tools)
    messages = _messages(config, conversation)
    try:
        _, prompt = renderer.render_messages(messages, ChatParams(chat_template_kwargs=variables))
    except Exception as error:
        raise ValueError(f"the model's chat template cannot write these messages: {error}") from error
    return PromptInput.of(prompt)


def parse(
    renderer: Any, conversation: Conversation, template: str, content_format: ContentFormat
) -> tuple[list[Any], Mapping[str, Any]]:
    """Return the messages as an adapter's template gets them, and the media in them.

    vLLM's own rendering is not used here, because it compiles the template in this process.
    """
    from vllm.renderers import hf

    config = renderer.model_config
    messages = _messages(config, conversation)
    try:
        parsed, data, uuids = hf.parse_chat_messages(messages, config, content_format=content_format)
        parsed = with_known_roles(parsed, template)
    except Exception as error:
        raise ValueError(f"these messages cannot be read: {error}") from error
    media = {"multi_modal_data": data, "multi_modal_uuids": uuids}
    return parsed, {name: value for name, value in media.items() if value is not None}


def with_known_roles(messages: list[Any], template: str) -> list[Any]:
    """Return parsed messages, those of a developer as the system's where the template has no such role."""
    from vllm.renderers import hf

    if any(message["role"] == "developer" for message in messages) and not hf._detect_developer_role_support(template):
        return list(hf._consolidate_system_messages(hf._convert_developer_to_system(messages)))
    return messages


def _messages(config: Any, conversation: Conversation) -> Any:
    """Return a copy of the messages, in which vLLM may write, when all media in them may be read."""
    check_media(config, conversation.messages)
    return plain(conversation.messages)


def check_media(config: Any, messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise ``ValueError`` if the model cannot read media in the messages, or they would have to be downloaded."""
    for name, value in _media(messages):
        if name in _ADDRESSES:
            _check_url(config, value.get("url") if isinstance(value, Mapping) else value)
        check_senses(config, name.partition("_")[0])


def _media(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield the fields of parts that stand for something other than text, such as ``image_url``, and their values."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, Sequence) else ():
            for name in part if isinstance(part, Mapping) else ():
                if (name in _ADDRESSES or name in _MEDIA) and part[name] is not None:
                    yield name, part[name]


def check_senses(config: Any, kind: str) -> None:
    """Raise ``ValueError`` if a model that reads text only is given something else."""
    if not config.is_multimodal_model:
        raise ValueError(f"{config.model} reads text only: it cannot be given {_KINDS.get(kind, kind)}")


def _check_url(config: Any, url: Any) -> None:
    """Refuse to download; vLLM takes an empty ``allowed_media_domains`` for a permission."""
    if not isinstance(url, str) or url[:5].lower() in ("data:", "file:") or config.allowed_media_domains:
        return
    raise ValueError(
        f'{url[:80]!r} would be downloaded: give a data: URL or a PIL image ({{"type": "image_pil", "image_pil": …}}), '
        'or allow hosts with engine_args={"allowed_media_domains": […]}'
    )


def plain(value: Any) -> Any:
    """Copy mappings and sequences as dicts and lists, which is what vLLM looks for, and leave the rest as it is."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview):
        return [plain(item) for item in value]
    return value
