"""One request: what is asked and what comes back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from qlora_infer.display import BASE_MODEL, Displayed, DisplayedCollection, Table, cut

if TYPE_CHECKING:
    from qlora_infer.adapters.version import AdapterVersion

#: Text, or token ids.
Prompt = str | Sequence[int]


@frozen(eq=False)
class GenerationRequest:
    """One prompt with everything that decides its answer.

    Attributes:
        request_id: Unique in its engine.
        prompt: Text, or token ids.
        sampling_params: vLLM's ``SamplingParams``.
        adapter: The exact version that answers, ``None`` for the base model.
        stream: Whether somebody may read partial outputs; the engine need not make them otherwise.
        add_special_tokens: Whether the tokenizer adds its own; a chat template has written them already.
        priority: Lower goes first.
        timeout: Seconds from ``queued`` in which it must finish; ``None`` for no limit.
        queued: When the request was made, in seconds of ``time.monotonic()``.
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

    @property
    def adapter_name(self) -> str | None:
        """The adapter's name; ``None`` for the base model."""
        return self.adapter.name if self.adapter is not None else None

    @property
    def weight(self) -> float:
        """The adapter's share of the engine beside others; the base model has that of one adapter."""
        return self.adapter.weight if self.adapter is not None else 1.0


@frozen
class RequestTimes:
    """When things happened to a request, in seconds of ``time.monotonic()``.

    Attributes:
        queued: The request was made.
        admitted: It was handed to vLLM; ``None`` before that.
        first_token: Its first token came; ``None`` before that.
        finished: It finished; ``None`` before that.
    """

    queued: float
    admitted: float | None = None
    first_token: float | None = None
    finished: float | None = None

    @property
    def waiting(self) -> float | None:
        """Seconds that it waited in the queue."""
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
        index: Its place among the ``n``.
        text: The generated text so far.
        token_ids: The generated tokens so far.
        finish_reason: ``"stop"``, ``"length"``, or ``None`` while it runs.
        stop_reason: The stop string or token id that ended it, if one did.
        logprobs: For each generated token, vLLM's mapping of token id to ``Logprob``; ``None`` unless asked for.
        cumulative_logprob: The sum of the tokens' log-probabilities; ``None`` unless asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: Sequence[Any] | None = field(default=None, repr=False)
    cumulative_logprob: float | None = None


@frozen
class GenerationOutput(Displayed):
    """What a request has produced: all of it when ``finished``, the beginning of it before.

    ``text``, ``token_ids``, ``finish_reason`` and ``logprobs`` are those of the first completion.

    Attributes:
        request_id: The request's id.
        prompt: The prompt's text; ``None`` where token ids were given.
        prompt_token_ids: The prompt's tokens.
        completions: The answers, ``n`` of them.
        adapter: The name of the adapter that answered; ``None`` for the base model.
        adapter_id: The integer id of that adapter's version; 0 for the base model.
        prompt_logprobs: For each prompt token but the first, vLLM's mapping of token id to ``Logprob``;
            ``None`` unless asked for.
        finished: Whether this is the last output of the request.
        times: When the request was made, had its first token, and finished.
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

    @property
    def text(self) -> str:
        """The first completion's text."""
        return self.completions[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The first completion's tokens."""
        return self.completions[0].token_ids

    @property
    def num_tokens(self) -> int:
        """The generated tokens of all completions."""
        return sum(len(completion.token_ids) for completion in self.completions)

    @property
    def finish_reason(self) -> str | None:
        """Why the first completion ended: ``"stop"`` or ``"length"``; ``None`` while it runs."""
        return self.completions[0].finish_reason

    @property
    def logprobs(self) -> Sequence[Any] | None:
        """The first completion's log-probabilities; ``None`` unless asked for."""
        return self.completions[0].logprobs

    def __repr__(self) -> str:
        prompt = self.prompt if self.prompt is None else cut(self.prompt, 60)
        return (
            f"GenerationOutput(request_id={self.request_id!r}, adapter={self.adapter!r}, prompt={prompt!r}, "
            f"text={cut(self.text, 60)!r}, num_tokens={self.num_tokens}, finish_reason={self.finish_reason!r})"
        )

    def _tables(self) -> Sequence[Table]:
        one = len(self.completions) == 1
        texts = [("text" if one else f"text {each.index + 1}", each.text) for each in self.completions]
        reasons = [each.finish_reason or "unfinished" for each in self.completions]
        rows = [
            ("adapter", BASE_MODEL if self.adapter is None else f"{self.adapter} (id {self.adapter_id})"),
            ("prompt", self._shown_prompt()),
            *texts,
            ("finish reason", ", ".join(reasons)),
            ("tokens", f"{len(self.prompt_token_ids)} in the prompt, {self.num_tokens} generated"),
            ("seconds", f"{_say(self.times.time_to_first_token)} to the first token, {_say(self.times.total)} in all"),
        ]
        return [Table(rows)]

    def _shown_prompt(self) -> str:
        return f"{len(self.prompt_token_ids)} token ids" if self.prompt is None else self.prompt


class GenerationOutputs(DisplayedCollection, list[GenerationOutput]):
    """Outputs in the order of their prompts; a ``list``, but for how it looks."""

    def _tables(self) -> Sequence[Table]:
        header = ("adapter", "prompt", "text", "finish reason", "tokens", "seconds")
        rows = [
            (
                BASE_MODEL if output.adapter is None else output.adapter,
                output._shown_prompt(),
                each.text,
                each.finish_reason,
                len(each.token_ids),
                None if output.times.total is None else round(output.times.total, 2),
            )
            for output in self
            for each in output.completions
        ]
        return [Table(rows, header, empty="no outputs")]


def _say(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f}"
