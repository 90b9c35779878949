"""A renderer of vLLM's that writes conversations with the template that an adapter carries.

The model's template was chosen by the operator, and vLLM's renderer runs it in this process. An adapter's was written
by a stranger, and runs in a process of its own (``chat/``). Read in vLLM 0.32.0, ``vllm/renderers/hf.py``.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterable, Mapping
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.renderers.inputs.preprocess import parse_dec_only_prompt
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.tokenizers.registry import tokenizer_args_from_config

from qlora_infer._vllm.asking import chat
from qlora_infer._vllm.openai.choice import current_choice
from qlora_infer._vllm.openai.faults import served_errors
from qlora_infer._vllm.openai.pictures import check_pictures
from qlora_infer.adapters.version import AdapterVersion
from qlora_infer.chat.conversation import Conversation
from qlora_infer.chat.template import content_format, render

#: The tokens around a message's author in the format of gpt-oss (OpenAI's Harmony).
HARMONY = ("<|start|>", "<|message|>")

#: What vLLM gives ``apply_chat_template`` beside the variables of a template.
ARGUMENTS = {"chat_template", "return_dict", "tokenize", "add_generation_prompt", "continue_final_message"}


def make_renderer(vllm_config: Any) -> Any:
    """Create the server's own renderer, with a tokenizer of its own.

    The engine's belongs to the thread that drives it, and Hugging Face's tokenizers fail where two threads use one
    ("Already borrowed"). It is made as ``renderer_from_config`` makes one.
    """
    model_config = vllm_config.model_config
    tokenizer = copy.deepcopy(cached_tokenizer_from_config(model_config))
    mode, *_ = tokenizer_args_from_config(model_config)
    renderer = RENDERER_REGISTRY.load_renderer(mode, vllm_config, tokenizer)
    with_model_template = renderer.render_messages_async

    async def render_messages_async(messages: Any, params: Any) -> Any:
        messages = [_with_lists(message) for message in messages]
        check_pictures(renderer.model_config, messages)
        choice = current_choice()
        if choice is None or choice.version.extras.chat_template is None:
            return await with_model_template(messages, params)
        options = params.get_apply_chat_template_kwargs()
        return await asyncio.to_thread(_render, renderer, choice.version, messages, options)

    process_tokens = renderer._process_tokens_async

    async def process_tokens_async(prompt: Any, **options: Any) -> Any:
        media = prompt.pop("multi_modal_data", None)
        made = await process_tokens(prompt, **options)
        return made if media is None else {**made, "multi_modal_data": media}

    renderer.render_messages_async = render_messages_async
    # The engine's renderer processes pictures: its cache is in step with the core's, and a second one would not be.
    renderer._process_tokens_async = process_tokens_async
    return renderer


def require_harmony(online_renderer: Any) -> None:
    """Make the server of a gpt-oss refuse chats of adapters that were trained on another format than Harmony.

    vLLM writes and reads such chats in Harmony, without any template (``vllm/renderers/online_renderer.py``).
    """
    adjust = online_renderer.adjust_harmony_request

    def adjust_harmony_request(request: Any) -> None:
        choice = current_choice()
        template = choice.version.extras.chat_template if choice is not None else None
        if choice is not None and template is not None and any(token not in template for token in HARMONY):
            raise VLLMValidationError(
                f"adapter {choice.version.name!r} has a chat template that is not Harmony's, "
                "in which chats of gpt-oss are written here: write the prompt yourself and send it to /v1/completions",
                parameter="model",
            )
        adjust(request)

    online_renderer.adjust_harmony_request = adjust_harmony_request


def _with_lists(message: Any) -> Any:
    """Return a message whose parts and calls can be read twice: pydantic checks them as they are read."""
    if not isinstance(message, Mapping):
        return message
    return {
        name: list(value) if isinstance(value, Iterable) and not isinstance(value, str | Mapping) else value
        for name, value in message.items()
    }


def _render(renderer: Any, version: AdapterVersion, messages: list[Any], options: Mapping[str, Any]) -> Any:
    name, template = version.name, version.extras.chat_template or ""
    with served_errors():
        parsed, media = chat.parse(renderer, Conversation(messages), template, content_format(name, template))
        text = render(
            name,
            template,
            parsed,
            add_generation_prompt=options.get("add_generation_prompt", True),
            continue_final_message=options.get("continue_final_message", False),
            variables={key: value for key, value in options.items() if key not in ARGUMENTS},
            special_tokens={**renderer.get_tokenizer().special_tokens_map, **version.extras.special_tokens},
        )
    return parsed, parse_dec_only_prompt({"prompt": text, **media})
