"""One request: what is asked, what comes back, and the handle that its caller holds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

if TYPE_CHECKING:
    from qlora_infer.adapters.cache import AdapterVersion

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
        queued: When the request was made, in seconds of ``time.monotonic()``.
    """

    request_id: str
    prompt: str | tuple[int, ...]
    sampling_params: Any = field(repr=False)
    adapter: AdapterVersion | None = None
    stream: bool = False
    add_special_tokens: bool = True
    queued: float = field(factory=time.monotonic)


@frozen
class RequestTimes:
    """When things happened to a request, in seconds of ``time.monotonic()``.

    Attributes:
        queued: The request was made.
        first_token: Its first token came; ``None`` before that.
        finished: It finished; ``None`` before that.
    """

    queued: float
    first_token: float | None = None
    finished: float | None = None

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
class GenerationOutput:
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
    prompt_token_ids: tuple[int, ...] = field(repr=False)
    completions: tuple[Completion, ...]
    adapter: str | None
    adapter_id: int
    prompt_logprobs: Sequence[Any] | None = field(repr=False)
    finished: bool
    times: RequestTimes = field(repr=False)

    @property
    def text(self) -> str:
        """The first completion's text."""
        return self.completions[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The first completion's tokens."""
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        """Why the first completion ended: ``"stop"`` or ``"length"``; ``None`` while it runs."""
        return self.completions[0].finish_reason

    @property
    def logprobs(self) -> Sequence[Any] | None:
        """The first completion's log-probabilities; ``None`` unless asked for."""
        return self.completions[0].logprobs


class RequestHandle:
    """The caller's end of a request; any thread may use it.

    Iterating yields partial outputs as tokens come, each with all the text so far, and the finished one last. A
    reader that is slower than the engine gets the newest output and skips those between.

    Example:
        >>> from qlora_infer.testing import fake_engine
        >>> with fake_engine() as engine:
        ...     handle = engine.add_request("one two", {"max_tokens": 8})
        ...     handle.result(timeout=10).text
        'You said: one two'
    """

    def __init__(self, request: GenerationRequest, cancel: Callable[[RequestHandle], None]) -> None:
        self.request = request
        self._cancel = cancel
        self._changed = threading.Condition()
        self._output: GenerationOutput | None = None
        self._num_outputs = 0
        self._error: BaseException | None = None
        self._done = False

    @property
    def request_id(self) -> str:
        """The request's id, as in its outputs."""
        return self.request.request_id

    def done(self) -> bool:
        """Whether the request has finished, failed or been cancelled."""
        return self._done

    def cancel(self) -> bool:
        """Stop the request and free what it holds; the others go on.

        Returns:
            Whether it was still unfinished. ``result`` then raises ``RequestCancelledError``.
        """
        if self._done:
            return False
        self._cancel(self)
        return True

    def result(self, timeout: float | None = None) -> GenerationOutput:
        """Wait for the finished output.

        Args:
            timeout: Seconds to wait at most; ``None`` waits until the request ends. It always does: with an
                output, or with an error when it is cancelled, the engine is closed, or its core dies.

        Raises:
            TimeoutError: It has not ended in time; it goes on.
            RequestCancelledError: It was cancelled.
            RequestRejectedError: vLLM cannot run it.
            AdapterLoadError: Its adapter could not be loaded.
            EngineClosedError: The engine was closed first.
            EngineDeadError: The engine core died.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._done, timeout):
                raise TimeoutError(f"request {self.request_id} has not ended within {timeout} s; it goes on")
            return self._last_output()

    def __iter__(self) -> Iterator[GenerationOutput]:
        num_seen = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda seen=num_seen: self._done or self._num_outputs > seen)  # type: ignore[misc]
                output, num_seen, done = self._output, self._num_outputs, self._done
                if done:
                    output = self._last_output()
            if output is not None:
                yield output
            if done:
                return

    def __repr__(self) -> str:
        state = "unfinished" if not self._done else "failed" if self._error else "finished"
        return f"<RequestHandle {self.request_id} {state}>"

    def _last_output(self) -> GenerationOutput:
        if self._error is not None:
            raise self._error
        if self._output is None:
            raise RuntimeError(f"request {self.request_id} has ended without an output or an error")
        return self._output

    def _advance(self, output: GenerationOutput) -> None:
        """Take the next output; the driver's side."""
        with self._changed:
            if self._done:
                return
            self._output, self._done = output, output.finished
            self._num_outputs += 1
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        """End with an error unless it has ended already; the driver's side."""
        with self._changed:
            if not self._done:
                self._error, self._done = error, True
                self._changed.notify_all()
