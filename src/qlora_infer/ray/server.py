"""The application of Ray Serve, with an engine in each replica and routing by adapter."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from qlora_infer import errors
from qlora_infer.adapters.version import LoadedAdapter
from qlora_infer.http_status import http_status
from qlora_infer.ray.replica import EngineFactory
from qlora_infer.requests.arguments import MEDIA_FIELDS
from qlora_infer.requests.handle import PartialOutputs, RequestHandle
from qlora_infer.requests.request import GenerationOutput


def build_app(
    engine: EngineFactory,
    *,
    timeout: float | None = None,
    **options: Any,
) -> serve.Application:
    """Return an application for ``ray.serve.run``.

    Requests name their adapter as Serve's multiplexed model id: ``handle.options(multiplexed_model_id="pirate")``, or
    the HTTP header ``serve_multiplexed_model_id``. Without an id, the base model answers. Serve prefers replicas that
    have the adapter, then those with the fewest adapters. ``AdapterServer`` lists the calls.

    Args:
        engine: A function that returns a replica's engine. The engine loads its ``known_adapters`` on first use, at
            most ``max_loaded_adapters`` of them.
        timeout: Seconds for a request, waiting included; ``None`` for no limit.
        **options: Options of ``serve.deployment``: ``num_replicas``, ``ray_actor_options``, ``autoscaling_config`` and
            so on. ``max_ongoing_requests`` defaults to 256, vLLM's batch size, instead of Serve's 5.

    Example:
        >>> from qlora_infer.ray import build_app
        >>> from qlora_infer.testing import fake_engine
        >>> app = build_app(lambda: fake_engine(known_adapters={"pirate": "me/pirate-lora"}), num_replicas=2)

        Then ``handle = serve.run(app)``.
    """
    deployment = serve.deployment(AdapterServer).options(**{"max_ongoing_requests": 256, **options})
    return deployment.bind(engine, timeout=timeout)


class AdapterServer:
    """The deployment of ``build_app``: ``generate`` and ``stream`` for handles, JSON for HTTP.

    POST ``{"prompt": …, "sampling_params": {…}, "stream": false}``. The response has ``text``, ``finish_reason``,
    ``num_prompt_tokens``, ``num_tokens`` and ``adapter``. With ``"stream": true``, the response consists of server-sent
    events with the text since the previous event. An error is ``{"error": …, "error_type": …}`` with a status, or an
    event after the first token.

    Args:
        engine: A function that returns the engine.
        timeout: As in ``build_app``.
    """

    def __init__(self, engine: EngineFactory, *, timeout: float | None) -> None:
        self._timeout = timeout
        self._engine = engine()
        # What Serve knows of a replica's adapters serves its routers: the engine loads and unloads on its own.
        max_loaded = self._engine._config.max_loaded_adapters or -1

        # Serve sets an attribute on it, which a bound method cannot have.
        async def load_adapter(name: str) -> LoadedAdapter:
            return await asyncio.to_thread(self._engine.load_adapter, name)

        self._load = serve.multiplexed(max_num_models_per_replica=max_loaded)(load_adapter)
        self._loading: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def generate(
        self, prompt: Any, sampling_params: Mapping[str, Any] | None = None, *, priority: int = 0
    ) -> GenerationOutput:
        """Answer one prompt.

        Args:
            prompt: A text, a list of token ids, or a conversation as in ``QuantizedLoRAEngine.chat``.
            sampling_params: As in ``QuantizedLoRAEngine.generate``.
            priority: As in ``QuantizedLoRAEngine.generate``.

        Raises:
            AdapterNotLoadedError: The engine has no adapter for the model id.
            Exception: The errors of ``QuantizedLoRAEngine.load_adapter`` and ``QuantizedLoRAEngine.generate``.
        """
        return await (await self._submit(prompt, sampling_params, priority))

    async def stream(
        self, prompt: Any, sampling_params: Mapping[str, Any] | None = None, *, priority: int = 0
    ) -> AsyncIterator[GenerationOutput]:
        """Answer one prompt, and yield partial outputs as tokens come, each with the whole text so far.

        Call it with ``handle.options(stream=True)``.

        Args:
            prompt: As in ``generate``.
            sampling_params: As in ``generate``.
            priority: As in ``generate``.
        """
        parts = aiter(await self._submit(prompt, sampling_params, priority))
        with contextlib.closing(parts):  # cancels the request when its reader has gone
            async for part in parts:
                yield part

    async def __call__(self, request: Request) -> Response:
        """Answer over HTTP."""
        try:
            prompt, sampling_params, streamed = _parse(await request.body())
            handle = await self._submit(prompt, sampling_params, 0)
            if not streamed:
                return JSONResponse(_format_output(output := await handle, output.text))
            parts = aiter(handle)
            # What goes wrong before the first token still has a status of its own.
            first = await anext(parts)
        except (errors.QLoRAInferError, ValueError, TypeError) as error:
            return JSONResponse(_format_error(error), http_status(type(error)))
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(_events(first, parts), headers=headers, media_type="text/event-stream")

    def check_health(self) -> None:
        """Raise an error if the engine has ended; Serve then replaces the replica.

        Raises:
            EngineDeadError: The engine has ended.
        """
        if not self._engine.is_running:
            raise errors.EngineDeadError("the engine of this replica has ended; Serve starts another")

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # there is none when the factory has raised
            self._engine.close()

    async def _submit(self, prompt: Any, sampling_params: Mapping[str, Any] | None, priority: int) -> RequestHandle:
        name = serve.get_multiplexed_model_id() or None
        add_request = functools.partial(
            self._engine.add_request,
            prompt,
            sampling_params,
            adapter=name,
            priority=priority,
            timeout=self._timeout,
            block=False,
        )
        if name is not None:
            # Whoever hangs up in the middle does not undo what others wait for.
            await asyncio.shield(self._announce(name))
        # In a thread, because a chat template may take its time.
        return await asyncio.to_thread(add_request)

    async def _announce(self, name: str) -> None:
        """Load an adapter unless it is loaded, and make Serve know that it is here."""
        # Of several first requests at once, Serve 2.60 would believe for ever that the adapter is being loaded.
        async with self._loading[name]:
            await self._load(name)


def _parse(body: bytes) -> tuple[Any, Mapping[str, Any] | None, bool]:
    try:
        fields = json.loads(body)
        prompt = fields.pop("prompt")
        sampling_params, streamed = fields.pop("sampling_params", None), fields.pop("stream", False)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("the body must be a JSON object with the field 'prompt'") from None
    if isinstance(prompt, dict) and (media := sorted(set(MEDIA_FIELDS) & set(prompt))):
        raise ValueError(
            f"the prompt has {media[0]!r}, which is for callers in Python: send images as parts of messages"
        )
    if fields:
        raise ValueError(f"the body has unknown fields: {', '.join(sorted(fields))}")
    return prompt, sampling_params, bool(streamed)


def _format_output(output: GenerationOutput, text: str) -> dict[str, Any]:
    return {
        "text": text,
        "finish_reason": output.finish_reason,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_tokens": output.num_tokens,
        "adapter": output.adapter,
    }


def _format_error(error: Exception) -> dict[str, str]:
    return {"error": str(error), "error_type": type(error).__name__}


async def _events(part: GenerationOutput, parts: PartialOutputs) -> AsyncIterator[str]:
    """Yield the text that each part adds to the one before; an error ends the stream as a last event."""
    with contextlib.closing(parts):  # cancels the request when its reader has gone
        try:
            while True:
                yield f"data: {json.dumps(_format_output(part, part.delta))}\n\n"
                if part.finished:
                    return
                part = await anext(parts)
        except errors.QLoRAInferError as error:
            yield f"data: {json.dumps(_format_error(error))}\n\n"
