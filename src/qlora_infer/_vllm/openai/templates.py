"""A renderer of vLLM's that writes conversations with the template that an adapter carries.

The model's template was chosen by the operator, and vLLM's renderer runs it in this process. An adapter's was written
by a stranger, and runs in a process of its own (``chat/``). Read in vLLM 0.32.0, ``vllm/renderers/hf.py``.
"""

from __future__ import annotations

import asyncio
import copy
from functools import partial
from typing import Any

from vllm.renderers.chat_utils import parse_chat_messages_async
from vllm.renderers.inputs.preprocess import parse_dec_only_prompt
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.tokenizers.registry import tokenizer_args_from_config

from qlora_infer._vllm.openai.choice import current_choice
from qlora_infer._vllm.openai.faults import served_errors
from qlora_infer.adapters.version import AdapterVersion
from qlora_infer.chat.template import render


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

    async def render_messages_async(messages: list[Any], params: Any) -> Any:
        choice = current_choice()
        if choice is None or choice.version.extras.chat_template is None:
            return await with_model_template(messages, params)
        return await _render(renderer, choice.version, messages, params.get_apply_chat_template_kwargs())

    renderer.render_messages_async = render_messages_async
    return renderer


async def _render(renderer: Any, version: AdapterVersion, messages: list[Any], options: dict[str, Any]) -> Any:
    # "string" joins the texts of a message: to choose a form by the template, vLLM would parse it in this process.
    conversation, pictures, _ = await parse_chat_messages_async(
        messages, renderer.model_config, content_format="string"
    )
    if pictures or options.get("tools") or options.get("continue_final_message"):
        raise ValueError(
            f"adapter {version.name!r} carries a chat template, with which this server writes texts alone: leave out "
            "tools, pictures and continue_final_message, or name the base model"
        )
    special_tokens = {**renderer.get_tokenizer().special_tokens_map, **version.extras.special_tokens}
    write = partial(
        render,
        version.name,
        version.extras.chat_template or "",
        conversation,
        add_generation_prompt=options.get("add_generation_prompt", True),
        special_tokens=special_tokens,
    )
    with served_errors():
        text = await asyncio.to_thread(write)
    return conversation, parse_dec_only_prompt(text)
