"""The application of Ray Serve, with an engine in each replica and routing by adapter."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qlora_infer import errors
from qlora_infer.adapters.version import LoadedAdapter
from qlora_infer.engine import QuantizedLoRAEngine
from qlora_infer.ray.replica import EngineFactory
from qlora_infer.requests.handle import RequestHandle
from qlora_infer.requests.request import GenerationOutput
from qlora_infer.serve.settings import Settings


def build_app(
    engine: EngineFactory,
    *,
    timeout: float | None = None,
    http: Settings | None = None,
    **options: Any,
) -> serve.Application:
    """Return an application for ``ray.serve.run``.

    Requests name their adapter as Serve's multiplexed model id: ``handle.options(multiplexed_model_id="pirate")``, or
    the HTTP header ``serve_multiplexed_model_id``. Without an id, the base model answers. Serve prefers replicas that
    have the adapter, then those with the fewest adapters. ``AdapterServer`` lists the calls.

    Over HTTP, a replica is the server of ``qlora-infer serve``, whose requests name their adapter as ``model``; with
    the header beside it, Serve chooses a replica that has the adapter.

    Args:
        engine: A function that returns a replica's engine. The engine loads its ``known_adapters`` on first use, at
            most ``max_loaded_adapters`` of them.
        timeout: Seconds for a request of a handle, waiting included; ``None`` for no limit.
        http: The settings of the OpenAI server that each replica is over HTTP; ``None`` for handles only. It needs
            vLLM 0.32.
        **options: Options of ``serve.deployment``: ``num_replicas``, ``ray_actor_options``, ``autoscaling_config`` and
            so on. ``max_ongoing_requests`` defaults to 256, vLLM's batch size, instead of Serve's 5.

    Raises:
        ValueError: ``http`` has an admin key.

    Example:
        >>> from qlora_infer.ray import build_app
        >>> from qlora_infer.testing import fake_engine
        >>> app = build_app(lambda: fake_engine(known_adapters={"pirate": "me/pirate-lora"}), num_replicas=2)

        Then ``handle = serve.run(app)``.
    """
    if http is not None and http.admin_key is not None:
        raise ValueError(
            "http has an admin key, but a load over HTTP would reach one replica: "
            "leave it out, and give the engine known_adapters"
        )
    deployment = serve.deployment(AdapterServer).options(**{"max_ongoing_requests": 256, **options})
    return deployment.bind(engine, timeout=timeout, http=http)


class AdapterServer:
    """The deployment of ``build_app``: ``generate`` and ``stream`` for handles, OpenAI's API for HTTP.

    Args:
        engine: A function that returns the engine.
        timeout: As in ``build_app``.
        http: As in ``build_app``.
    """

    def __init__(self, engine: EngineFactory, *, timeout: float | None = None, http: Settings | None = None) -> None:
        self._timeout = timeout
        self._engine = engine()
        # Made in Serve's loop, which runs already; check_health awaits it before the first request.
        self._http = None if http is None else asyncio.ensure_future(_make_http(self._engine, http))
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

    async def __call__(self, _: Request) -> Response:
        """Answer over HTTP."""
        if self._http is None:
            message = "this application has no HTTP: give build_app(http=...) the settings of a server"
            return JSONResponse({"error": {"message": message, "type": "NotFoundError", "code": 404}}, 404)
        return _Forwarded(await asyncio.shield(self._http), self._announce_loaded)

    async def check_health(self) -> None:
        """Raise an error if the engine has ended; Serve then replaces the replica.

        Raises:
            EngineDeadError: The engine has ended.
            Exception: The settings of ``http`` are wrong, or it needs another vLLM; Serve does not start the replica.
        """
        if self._http is not None:
            await asyncio.shield(self._http)
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

    async def _announce_loaded(self) -> None:
        """Announce the adapter of the current request, if the request was allowed and the adapter has been loaded."""
        name = serve.get_multiplexed_model_id()
        if name in self._engine.adapters:
            await asyncio.shield(self._announce(name))

    async def _announce(self, name: str) -> None:
        """Load an adapter unless it is loaded, and make Serve know that it is here."""
        # Of several first requests at once, Serve 2.60 would believe for ever that the adapter is being loaded.
        async with self._loading[name]:
            await self._load(name)


async def _make_http(engine: QuantizedLoRAEngine, settings: Settings) -> ASGIApp:
    from qlora_infer.serve.application import make_app  # which needs vLLM's server

    return await make_app(engine, settings)


class _Forwarded(Response):  # type: ignore[misc]
    """The response of an application to the request that Serve has received.

    Args:
        app: The application, which reads the request and writes the response.
        before: Awaited before the response begins.
    """

    def __init__(self, app: ASGIApp, before: Callable[[], Awaitable[None]]) -> None:
        self._app, self._before = app, before

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application."""

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                await self._before()
            await send(message)

        await self._app(scope, receive, sending)
