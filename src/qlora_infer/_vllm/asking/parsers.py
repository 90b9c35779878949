"""Answers parsed into reasoning, content and tool calls by vLLM's own parsers.

Read in vLLM 0.32.0 (``parser/parser_manager.py``, and its use in ``entrypoints/openai/chat_completion/serving.py``).
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Sequence
from typing import Any, Self

from attrs import frozen

from qlora_infer._vllm.asking.chat import plain
from qlora_infer.chat.answer import Parsed, ToolCall
from qlora_infer.chat.conversation import Conversation

logger = logging.getLogger("qlora_infer")


def check_names(reasoning_parser: str | None, tool_call_parser: str | None) -> None:
    """Raise ``ValueError`` for a parser that vLLM does not have; before the model is loaded."""
    if reasoning_parser is None and tool_call_parser is None:
        return  # vLLM's parsers take a second to import
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    for option, name, known in (
        ("reasoning_parser", reasoning_parser, ReasoningParserManager.list_registered()),
        ("tool_call_parser", tool_call_parser, ToolParserManager.list_registered()),
    ):
        if name is not None and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"vLLM has no {option} {name!r}: {hint}It has {', '.join(sorted(known))}")


@frozen
class AnswerParser:
    """Parses the answers of one engine.

    Attributes:
        parser_class: vLLM's ``Parser``, made for a pair of names.
        tokenizer: The model's tokenizer.
        model_config: vLLM's ``ModelConfig``.
    """

    parser_class: Any
    tokenizer: Any
    model_config: Any

    @classmethod
    def of(cls, vllm_config: Any, tokenizer: Any, tool_call_parser: str | None) -> Self | None:
        """Return the engine's parser; ``None`` if neither name is given.

        Raises:
            ValueError: The model's tokenizer lacks the tokens that the parser looks for.
        """
        reasoning_parser = vllm_config.structured_outputs_config.reasoning_parser or None
        if reasoning_parser is None and tool_call_parser is None:
            return None
        from vllm.parser.parser_manager import ParserManager

        config = vllm_config.model_config
        try:
            parser_class = ParserManager.get_parser(
                tool_parser_name=tool_call_parser,
                reasoning_parser_name=reasoning_parser,
                enable_auto_tools=tool_call_parser is not None,
                model_name=config.model,
                is_harmony=config.hf_config.model_type == "gpt_oss",
                tokenizer=tokenizer,
            )
        except TypeError as error:
            raise ValueError(str(error)) from error
        return cls(parser_class, tokenizer, config) if parser_class is not None else None

    def keeps_special_tokens(self, conversation: Conversation) -> bool:
        """Return whether the parser finds its marks among special tokens, which an answer's text must then have."""
        request = _chat_request(conversation)
        adjusted = self._parser(request, conversation).adjust_request(request)
        return adjusted.skip_special_tokens is False

    def parse(
        self, text: str, token_ids: Sequence[int], prompt_token_ids: Sequence[int], conversation: Conversation
    ) -> Parsed:
        """Parse a whole answer; one that the parser fails on is all content."""
        request = _chat_request(conversation)
        try:
            parser = self._parser(request, conversation)
            parser.set_prompt_token_ids(list(prompt_token_ids))
            reasoning, content, calls = parser.parse(
                text, request, enable_auto_tools=True, model_output_token_ids=list(token_ids)
            )
        except Exception as error:
            logger.warning("vLLM's parser failed on an answer, which is left as it is: %s", error)
            return Parsed(content=text)
        return Parsed(content or "", reasoning or None, tuple(_tool_call(call) for call in calls or ()))

    def _parser(self, request: Any, conversation: Conversation) -> Any:
        variables = plain(conversation.chat_template_kwargs)
        return self.parser_class(
            self.tokenizer, request.tools, chat_template_kwargs=variables, model_config=self.model_config
        )


def _chat_request(conversation: Conversation) -> Any:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    # Of the messages, parsers read nothing; what vLLM's protocol would refuse in them is no matter here.
    fields: dict[str, Any] = {"messages": [{"role": "user", "content": ""}]}
    if conversation.tools:
        fields |= {"tools": plain(conversation.tools), "tool_choice": "auto"}
    return ChatCompletionRequest(**fields)


def _tool_call(call: Any) -> ToolCall:
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, TypeError):
        arguments = None
    return ToolCall(call.name, call.arguments, arguments if isinstance(arguments, dict) else None, call.id)
