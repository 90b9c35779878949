"""OpenTelemetry spans of requests, where opentelemetry-api is installed and an SDK is configured.

Names follow OpenTelemetry's semantic conventions for generative AI. No span contains prompts or answers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, Self

from attrs import frozen

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

    from qlora_infer.requests.pending import PendingRequest
    from qlora_infer.requests.request import GenerationOutput, GenerationRequest

logger = logging.getLogger("qlora_infer")

#: The sampling parameters that the conventions know, and that say nothing of what is asked.
_NUMBERS = ("max_tokens", "temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty", "seed")


@frozen
class RequestTracer:
    """Starts a span for each request, as a child of its caller's span.

    Attributes:
        model: The base model's name.
    """

    model: str
    _api: ModuleType
    _tracer: Tracer

    @classmethod
    def find(cls, model: str) -> Self | None:
        """Return a tracer of the global provider, or ``None`` if opentelemetry-api is not installed."""
        try:
            from opentelemetry import trace
        except ImportError:
            return None
        return cls(model, trace, trace.get_tracer("qlora_infer"))

    def start(self, request: GenerationRequest) -> RequestTrace | None:
        """Start the span of a request that its caller's thread or coroutine makes now; ``None`` where nobody records.

        Never raises: a fault in an exporter is logged, and the request goes on without a span.
        """
        if isinstance(self._api.get_tracer_provider(), self._api.ProxyTracerProvider):
            return None  # no SDK is configured, yet
        try:
            epoch = time.time() - time.monotonic()
            operation = "text_completion" if request.conversation is None else "chat"
            attributes = {"gen_ai.operation.name": operation, **self._attributes(request)}
            span = self._tracer.start_span(
                f"{operation} {self.model}", attributes=attributes, start_time=_ns(request.queued + epoch)
            )
        except Exception:
            logger.exception("the span of request %s could not be started", request.request_id)
            return None
        return RequestTrace(span, epoch) if span.is_recording() else None

    def _attributes(self, request: GenerationRequest) -> dict[str, Any]:
        params = request.sampling_params
        attributes = {
            "gen_ai.provider.name": "qlora_infer",
            "gen_ai.request.model": self.model,
            "gen_ai.request.choice.count": getattr(params, "n", None),
            "gen_ai.response.id": request.request_id,
            "qlora_infer.priority": request.priority,
            "qlora_infer.timeout": request.timeout,
            **{f"gen_ai.request.{name}": getattr(params, name, None) for name in _NUMBERS},
        }
        if request.adapter_name is not None:
            attributes["qlora_infer.adapter.name"] = request.adapter_name
        if request.adapter is not None:
            attributes["qlora_infer.adapter.version"] = request.adapter.number
        return {name: value for name, value in attributes.items() if value is not None}


@frozen
class RequestTrace:
    """The span of one request, until the request ends.

    Attributes:
        span: The span.
        epoch: What makes the request's times, which are of ``time.monotonic()``, seconds since 1970. It is measured
            once, so that times of one span fit each other when the clock is set.
    """

    span: Span
    epoch: float

    def follow(self, pending: PendingRequest) -> None:
        """End the span when the request ends, in the thread that ends it."""
        pending.listen(lambda: self._end(pending))

    def fail(self, error: BaseException) -> None:
        """End the span of a request that could not be queued."""
        self._close(error, {}, {}, None)

    def _end(self, pending: PendingRequest) -> None:
        output = pending.output
        first_token = output.times.first_token if output else None
        events = {"qlora_infer.admitted": pending.admitted, "qlora_infer.first_token": first_token}
        finished = output.times.finished if output else None
        self._close(pending.error, dict(_usage(pending, output)), events, finished)

    def _close(
        self,
        error: BaseException | None,
        attributes: dict[str, Any],
        events: dict[str, float | None],
        end: float | None,
    ) -> None:
        from opentelemetry.trace import StatusCode

        try:
            self.span.set_attributes(attributes)
            for name, moment in events.items():
                if moment is not None:
                    self.span.add_event(name, timestamp=_ns(moment + self.epoch))
            if error is not None:
                # Not its message: vLLM's may quote what was asked.
                self.span.set_attribute("error.type", type(error).__name__)
                self.span.set_status(StatusCode.ERROR)
            self.span.end(_ns((time.monotonic() if end is None else end) + self.epoch))
        except Exception:  # of an exporter; the thread that drives the engine must live on
            logger.exception("a span could not be ended")


def _usage(pending: PendingRequest, output: GenerationOutput | None) -> Iterator[tuple[str, Any]]:
    if output is not None:
        yield "gen_ai.usage.input_tokens", len(output.prompt_token_ids)
        if output.finished:
            yield "gen_ai.response.finish_reasons", [completion.finish_reason for completion in output.completions]
    yield "gen_ai.usage.output_tokens", output.num_tokens if output is not None else pending.num_tokens


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
