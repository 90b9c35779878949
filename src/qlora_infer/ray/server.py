"""An application of Ray Serve: an engine in each replica, and requests go to a replica that has their adapter."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from qlora_infer import errors
from qlora_infer.engine import QuantizedLoRAEngine
from qlora_infer.ray.replica import Adapters, EngineFactory, source_of
from qlora_infer.requests.handle import PartialOutputs, RequestHandle
from qlora_infer.requests.request import GenerationOutput

#: The HTTP status of an error; the nearest class counts.
STATUSES: Mapping[type[Exception], int] = {
    ValueError: 400,
    TypeError: 400,
    errors.RequestRejectedError: 400,
    errors.AdapterNotLoadedError: 404,
    errors.AdapterError: 422,
    errors.QueueFullError: 429,
    errors.AdapterLoadError: 500,
    errors.QLoRAInferError: 500,
    errors.AdapterDownloadError: 502,
    errors.EngineClosedError: 503,
    errors.EngineDeadError: 503,
    errors.RequestCancelledError: 503,
    errors.RequestTimeoutError: 504,
}


def build_app(
    engine: EngineFactory,
    adapters: Adapters | None = None,
    *,
    max_adapters_per_replica: int = 64,
    timeout: float | None = None,
    **options: Any,
) -> serve.Application:
    """Return an application for ``ray.serve.run``.

    Requests name their adapter as Serve's multiplexed model id: ``handle.options(multiplexed_model_id="pirate")``, or
    the HTTP header ``serve_multiplexed_model_id``; without one the base model answers. Serve prefers replicas that
    have the adapter, and then those that have the fewest. See ``AdapterServer`` for what may be called.

    Args:
        engine: Makes a replica's engine.
        adapters: Where the adapters come from, by name.
        max_adapters_per_replica: Of more than these, a replica unloads the least recently used.
        timeout: Seconds that a request may take, waiting included; ``None`` for no limit.
        **options: Of ``serve.deployment``: ``num_replicas``, ``ray_actor_options``, ``autoscaling_config`` and so on.
            ``max_ongoing_requests`` is 256 here, as many as vLLM has in a batch; Serve's own default is 5.

    Example:
        >>> from qlora_infer.ray import build_app
        >>> from qlora_infer.testing import fake_engine
        >>> app = build_app(fake_engine, {"pirate": "me/pirate-lora"}, num_replicas=2)

        Then ``handle = serve.run(app)``.
    """
    deployment = serve.deployment(AdapterServer).options(**{"max_ongoing_requests": 256, **options})
    return deployment.bind(engine, adapters or {}, max_adapters_per_replica=max_adapters_per_replica, timeout=timeout)


class AdapterServer:
    """The deployment behind ``build_app``: ``generate`` and ``stream`` for handles, JSON for HTTP.

    Over HTTP, a POST of ``{"prompt": …, "sampling_params": {…}, "stream": false}`` is answered with ``text``,
    ``finish_reason``, ``num_prompt_tokens``, ``num_tokens`` and ``adapter``; with ``"stream": true``, by server-sent
    events of which each has the text that was added. What is wrong is ``{"error": …, "error_type": …}`` with a status,
    or an event when it comes after the first token.

    Args:
        engine: Makes the engine.
        adapters: Where the adapters come from, by name.
        max_adapters_per_replica: As in ``build_app``.
        timeout: As in ``build_app``.
    """

    def __init__(
        self,
        engine: EngineFactory,
        adapters: Adapters,
        *,
        max_adapters_per_replica: int,
        timeout: float | None,
    ) -> None:
        self._adapters = adapters
        self._timeout = timeout
        self._engine = engine()

        async def load_adapter(name: str) -> _Loaded:
            return await asyncio.to_thread(_Loaded, self._engine, name, adapters)

        self._load = serve.multiplexed(max_num_models_per_replica=max_adapters_per_replica)(load_adapter)
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
            AdapterNotLoadedError: The model id names none of ``adapters``.
            Exception: What ``QuantizedLoRAEngine.load_adapter`` and ``QuantizedLoRAEngine.generate`` raise.
        """
        return await (await self._ask(prompt, sampling_params, priority))

    async def stream(
        self, prompt: Any, sampling_params: Mapping[str, Any] | None = None, *, priority: int = 0
    ) -> AsyncIterator[GenerationOutput]:
        """Answer one prompt and yield partial outputs as the tokens come, each with all the text so far.

        For ``handle.options(stream=True)``. Arguments and errors are those of ``generate``.
        """
        parts = aiter(await self._ask(prompt, sampling_params, priority))
        with contextlib.closing(parts):  # cancels the request when its reader has gone
            async for part in parts:
                yield part

    async def __call__(self, request: Request) -> Response:
        """Answer over HTTP."""
        try:
            prompt, sampling_params, streamed = _read(await request.body())
            handle = await self._ask(prompt, sampling_params, 0)
            if not streamed:
                return JSONResponse(_told(output := await handle, output.text))
            parts = aiter(handle)
            # What goes wrong before the first token still has a status of its own.
            first = await anext(parts)
        except tuple(STATUSES) as error:
            return JSONResponse(_error(error), _status(error))
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(_events(first, parts), headers=headers, media_type="text/event-stream")

    def check_health(self) -> None:
        """For Serve, which replaces a replica whose engine has ended.

        Raises:
            EngineDeadError: It has.
        """
        if not self._engine.is_running:
            raise errors.EngineDeadError("the engine of this replica has ended; Serve starts another")

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # there is none when the factory has raised
            self._engine.close()

    async def _ask(self, prompt: Any, sampling_params: Mapping[str, Any] | None, priority: int) -> RequestHandle:
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
        # In threads, because a chat template may take its time.
        if name is None:
            return await asyncio.to_thread(add_request)
        # Whoever hangs up in the middle does not undo what others wait for.
        return await asyncio.shield(self._with_adapter(name, add_request))

    async def _with_adapter(self, name: str, add_request: Callable[[], RequestHandle]) -> RequestHandle:
        """Load an adapter unless it is loaded, count it as used, and keep it until the request has it."""
        if name not in self._engine.adapters:
            # Serve would unload another adapter first, and then find that there is none of this name.
            await asyncio.to_thread(source_of, self._adapters, name)
        # Of several first requests at once, Serve 2.60 would believe for ever that the adapter is being loaded.
        async with self._loading[name]:
            loaded = await self._load(name)
        # Nothing has run in between, so that Serve cannot have unloaded it.
        with loaded:
            return await asyncio.to_thread(add_request)


class _Loaded:
    """A loaded adapter as Serve holds it; Serve unloads it with ``__del__``, which waits for the requests within."""

    def __init__(self, engine: QuantizedLoRAEngine, name: str, adapters: Adapters) -> None:
        self._engine: QuantizedLoRAEngine | None = None
        self._name = name
        self._num_uses = 0
        self._changed = threading.Condition()
        engine.load_adapter(name, source_of(adapters, name))
        self._engine = engine

    def __enter__(self) -> None:
        with self._changed:
            self._num_uses += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._num_uses -= 1
            self._changed.notify_all()

    def __del__(self) -> None:
        # Serve calls this, and Python does once more, when the adapter may be loaded again: only the first counts.
        engine, self._engine = self._engine, None
        if engine is None:
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._num_uses)
        with contextlib.suppress(errors.AdapterNotLoadedError):
            engine.unload_adapter(self._name)


def _read(body: bytes) -> tuple[Any, Mapping[str, Any] | None, bool]:
    try:
        fields = json.loads(body)
        prompt = fields.pop("prompt")
        sampling_params, streamed = fields.pop("sampling_params", None), fields.pop("stream", False)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("the body must be a JSON object with the field 'prompt'") from None
    if fields:
        raise ValueError(f"the body has unknown fields: {', '.join(sorted(fields))}")
    return prompt, sampling_params, bool(streamed)


def _told(output: GenerationOutput, text: str) -> dict[str, Any]:
    return {
        "text": text,
        "finish_reason": output.finish_reason,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_tokens": output.num_tokens,
        "adapter": output.adapter,
    }


def _error(error: Exception) -> dict[str, str]:
    return {"error": str(error), "error_type": type(error).__name__}


def _status(error: Exception) -> int:
    return next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)


async def _events(part: GenerationOutput, parts: PartialOutputs) -> AsyncIterator[str]:
    """Yield the text that each part adds to the one before; an error ends the stream as a last event."""
    with contextlib.closing(parts):  # cancels the request when its reader has gone
        try:
            while True:
                yield f"data: {json.dumps(_told(part, part.delta))}\n\n"
                if part.finished:
                    return
                part = await anext(parts)
        except errors.QLoRAInferError as error:
            yield f"data: {json.dumps(_error(error))}\n\n"
