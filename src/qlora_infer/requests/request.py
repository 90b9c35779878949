"""A request and its output."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from attrs import field, frozen

from qlora_infer.chat.answer import Parsed, ToolCall
from qlora_infer.display import BASE_MODEL, Cell, Displayed, DisplayedCollection, Table, cut

if TYPE_CHECKING:
    from qlora_infer.adapters.version import AdapterVersion
    from qlora_infer.chat.conversation import Conversation

#: Text, token ids, or one of vLLM's mappings: ``{"prompt": …, "multi_modal_data": {"image": …}}``.
Prompt = str | Sequence[int] | Mapping[str, Any]


@frozen(eq=False)
class GenerationRequest:
    """One prompt with everything that decides its answer.

    Attributes:
        request_id: Unique in its engine.
        prompt: Text, or token ids.
        sampling_params: vLLM's ``SamplingParams``.
        adapter: The exact version that answers, ``None`` for the base model.
        stream: Whether partial outputs can be read; the engine need not make them otherwise.
        add_special_tokens: Whether the tokenizer adds its own; a chat template has written them already.
        priority: Lower goes first.
        timeout: Seconds from ``queued`` in which it must finish; ``None`` for no limit.
        queued: When the request was made, in seconds of ``time.monotonic()``.
        index: The prompt's place among those of one call.
        awaited: The name of the adapter where ``adapter`` is not there: it is being loaded, or cannot be.
        media: Further fields of vLLM's mapping, such as ``multi_modal_data``.
        conversation: The conversation that the prompt was written from, if it was.
    """

    request_id: str
    prompt: str | tuple[int, ...]
    sampling_params: Any = field(repr=False)
    adapter: AdapterVersion | None = None
    stream: bool = False
    add_special_tokens: bool = True
    priority: int = 0
    timeout: float | None = None
    queued: float = field(factory=time.monotonic)
    index: int = 0
    awaited: str | None = None
    media: Mapping[str, Any] = field(factory=dict, repr=False)
    conversation: Conversation | None = field(default=None, repr=False)

    @property
    def adapter_name(self) -> str | None:
        """The adapter's name; ``None`` for the base model."""
        return self.adapter.name if self.adapter is not None else self.awaited

    @property
    def share(self) -> float:
        """The adapter's share of the engine beside others; the base model has that of one adapter."""
        return self.adapter.share if self.adapter is not None else 1.0


@frozen
class RequestTimes:
    """The times of a request's events, in seconds of ``time.monotonic()``.

    Attributes:
        queued: When the request was made.
        admitted: When vLLM got it; ``None`` before that.
        first_token: When its first token came; ``None`` before that.
        finished: When it finished; ``None`` before that.
    """

    queued: float
    admitted: float | None = None
    first_token: float | None = None
    finished: float | None = None

    @property
    def waiting(self) -> float | None:
        """Seconds in the queue."""
        return None if self.admitted is None else self.admitted - self.queued

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from the request to its first token."""
        return None if self.first_token is None else self.first_token - self.queued

    @property
    def total(self) -> float | None:
        """Seconds from the request to its last token."""
        return None if self.finished is None else self.finished - self.queued


@frozen
class Completion:
    """One answer to a prompt; a request with ``n > 1`` has several.

    Attributes:
        index: The position among the ``n``.
        text: The generated text so far.
        token_ids: The generated tokens so far.
        finish_reason: ``"stop"``, ``"length"``, or ``None`` while it runs.
        stop_reason: The stop string or token id that ended it; ``None`` if none did.
        logprobs: For each generated token, vLLM's mapping of token id to ``Logprob``; ``None`` unless requested.
        cumulative_logprob: The sum of the tokens' log-probabilities; ``None`` unless requested.
        parsed: The parsed parts of a finished answer, if the engine has a ``reasoning_parser`` or ``tool_call_parser``.
        token_logprobs: The log-probability of each generated token; ``None`` unless requested.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: Sequence[Any] | None = field(default=None, repr=False)
    cumulative_logprob: float | None = None
    parsed: Parsed | None = None

    @property
    def content(self) -> str:
        """The text without reasoning and tool calls; the whole text without a parser."""
        return self.text if self.parsed is None else self.parsed.content

    @property
    def reasoning(self) -> str | None:
        """The model's reasoning; ``None`` without any, or without a ``reasoning_parser``."""
        return None if self.parsed is None else self.parsed.reasoning

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The model's tool calls; empty without a ``tool_call_parser``."""
        return () if self.parsed is None else self.parsed.tool_calls

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON; values that were not requested are left out."""
        plain = {
            "index": self.index,
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
        }
        if self.logprobs is not None:
            plain["token_logprobs"] = list(self.token_logprobs or ())
        if self.parsed is not None:
            calls = [call.to_message() for call in self.tool_calls]
            plain |= {"content": self.content, "reasoning": self.reasoning, "tool_calls": calls}
        return plain

    @property
    def token_logprobs(self) -> tuple[float, ...] | None:
        """The log-probability of each generated token; ``None`` unless requested."""
        if self.logprobs is None:
            return None
        return tuple(float(each[token].logprob) for each, token in zip(self.logprobs, self.token_ids, strict=True))


@frozen
class GenerationOutput(Displayed):
    """The output of a request: all of it if ``finished``, else the beginning.

    ``text``, ``token_ids``, ``finish_reason`` and ``logprobs`` belong to the first completion. If the request failed
    (``on_error="return"``), they raise its ``error``.

    Attributes:
        request_id: The request's id.
        prompt: The prompt's text; ``None`` for a prompt of token ids.
        prompt_token_ids: The prompt's tokens.
        completions: The answers, ``n`` of them.
        adapter: The name of the adapter that answered; ``None`` for the base model.
        adapter_id: The integer id of that adapter's version; 0 for the base model.
        prompt_logprobs: For each prompt token but the first, vLLM's mapping of token id to ``Logprob``; ``None`` unless
            requested.
        finished: True for the last output of the request.
        times: The times of the request, its first token, and its end.
        adapter_version: The number of that version, as in ``"name@2"``; ``None`` for the base model.
        index: The prompt's position in the call, from 0.
        delta: In a stream, the text since the previous part; otherwise ``""``.
        error: The error of a failed request, else ``None``.

    Example:
        >>> from qlora_infer.testing import fake_engine
        >>> with fake_engine() as engine:
        ...     (output,) = engine.generate("ahoy", {"max_tokens": 8})
        >>> output.text, output.finish_reason, output.num_tokens
        ('You said: ahoy', 'stop', 3)
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    adapter: str | None
    adapter_id: int
    prompt_logprobs: Sequence[Any] | None
    finished: bool
    times: RequestTimes
    adapter_version: int | None = None
    index: int = 0
    delta: str = ""
    error: Exception | None = None

    @classmethod
    def of(cls, request: GenerationRequest, **produced: Any) -> Self:
        """Make the output of a request from its completions."""
        version = request.adapter
        return cls(
            request_id=request.request_id,
            prompt=request.prompt if isinstance(request.prompt, str) else None,
            adapter=request.adapter_name,
            adapter_id=version.int_id if version else 0,
            adapter_version=version.number if version else None,
            index=request.index,
            **produced,
        )

    @classmethod
    def failed(cls, request: GenerationRequest, error: Exception) -> Self:
        """Make the output of a failed request."""
        token_ids = () if isinstance(request.prompt, str) else request.prompt
        return cls.of(
            request,
            prompt_token_ids=token_ids,
            completions=(),
            prompt_logprobs=None,
            finished=True,
            times=RequestTimes(request.queued, finished=time.monotonic()),
            error=error,
        )

    @property
    def _first(self) -> Completion:
        if self.error is not None:
            raise self.error
        return self.completions[0]

    @property
    def text(self) -> str:
        """The first completion's text."""
        return self._first.text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The first completion's tokens."""
        return self._first.token_ids

    @property
    def outputs(self) -> tuple[Completion, ...]:
        """The completions, under their name in vLLM's ``RequestOutput``."""
        return self.completions

    @property
    def content(self) -> str:
        """The first completion's text without reasoning and tool calls."""
        return self._first.content

    @property
    def reasoning(self) -> str | None:
        """The first completion's reasoning; ``None`` without any, or without a ``reasoning_parser``."""
        return self._first.reasoning

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The first completion's tool calls."""
        return self._first.tool_calls

    @property
    def num_prompt_tokens(self) -> int:
        """The number of tokens of the prompt."""
        return len(self.prompt_token_ids)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        plain: dict[str, Any] = {
            "request_id": self.request_id,
            "index": self.index,
            "adapter": self.adapter,
            "adapter_version": self.adapter_version,
            "prompt": self.prompt,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_tokens": self.num_tokens,
            "finished": self.finished,
            "seconds": self.times.total,
            "completions": [completion.to_dict() for completion in self.completions],
        }
        if self.error is not None:
            plain |= {"error": str(self.error), "error_type": type(self.error).__name__}
        return plain

    @property
    def num_tokens(self) -> int:
        """The number of generated tokens, over all completions."""
        return sum(len(completion.token_ids) for completion in self.completions)

    @property
    def finish_reason(self) -> str | None:
        """The end of the first completion: ``"stop"`` or ``"length"``; ``None`` while it runs."""
        return self._first.finish_reason

    @property
    def logprobs(self) -> Sequence[Any] | None:
        """The first completion's log-probabilities; ``None`` unless requested."""
        return self._first.logprobs

    def __repr__(self) -> str:
        prompt = self.prompt if self.prompt is None else cut(self.prompt, 60)
        if self.error is not None:
            produced = f"error={self.error!r}"
        else:
            text = cut(self.text, 60)
            produced = f"text={text!r}, num_tokens={self.num_tokens}, finish_reason={self.finish_reason!r}"
        return (
            f"GenerationOutput(request_id={self.request_id!r}, adapter={self.adapter!r}, prompt={prompt!r}, {produced})"
        )

    def _tables(self) -> Sequence[Table]:
        one = len(self.completions) == 1
        texts = [("text" if one else f"text {each.index + 1}", each.text) for each in self.completions]
        reasons = [each.finish_reason or "unfinished" for each in self.completions]
        adapter = BASE_MODEL if self.adapter is None else self.adapter
        if self.adapter_version is not None:
            adapter = f"{adapter}@{self.adapter_version}"
        if self.error is not None:
            return [Table([("adapter", adapter), ("prompt", self._format_prompt()), ("error", repr(self.error))])]
        first_token = _format_seconds(self.times.time_to_first_token)
        rows = [
            ("adapter", adapter),
            ("prompt", self._format_prompt()),
            *texts,
            ("finish reason", ", ".join(reasons)),
            ("tokens", f"{len(self.prompt_token_ids)} in the prompt, {self.num_tokens} generated"),
            ("seconds", f"{first_token} to the first token, {_format_seconds(self.times.total)} in all"),
        ]
        return [Table(rows)]

    def _format_prompt(self) -> str:
        return f"{len(self.prompt_token_ids)} token ids" if self.prompt is None else self.prompt


class GenerationOutputs(DisplayedCollection, list[GenerationOutput]):
    """Outputs in the order of their prompts; a ``list``, but for how it looks."""

    def _tables(self) -> Sequence[Table]:
        header = ("adapter", "prompt", "text", "finish reason", "tokens", "seconds")
        rows: list[tuple[Cell, ...]] = []
        for output in self:
            first = (BASE_MODEL if output.adapter is None else output.adapter, output._format_prompt())
            seconds = None if output.times.total is None else round(output.times.total, 2)
            if output.error is not None:
                rows.append((*first, None, repr(output.error), 0, seconds))
            rows += [
                (*first, each.text, each.finish_reason, len(each.token_ids), seconds) for each in output.completions
            ]
        return [Table(rows, header, empty="no outputs")]


def _format_seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f}"
