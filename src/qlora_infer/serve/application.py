"""The application of a server: vLLM's own, with keys, limits, health, metrics and the routes for adapters."""

from __future__ import annotations

import os

from fastapi import FastAPI
from starlette.responses import JSONResponse, Response

from qlora_infer._vllm.openai.application import make_application
from qlora_infer.engine import QuantizedLoRAEngine
from qlora_infer.serve.access_log import AccessLog
from qlora_infer.serve.adapter_routes import AdapterRoutes
from qlora_infer.serve.body_limit import BodyLimit
from qlora_infer.serve.keys import Keys
from qlora_infer.serve.metrics import Metrics
from qlora_infer.serve.settings import Settings


async def make_app(engine: QuantizedLoRAEngine, settings: Settings) -> FastAPI:
    """Create the application of a running engine; the caller closes the engine.

    Raises:
        MissingDependencyError: vLLM is not installed, or is older than the supported server.
        ValueError: ``settings.server_args`` has a fixed argument, or ``VLLM_API_KEY`` is set and no ``api_key`` is.
    """
    if os.environ.get("VLLM_API_KEY") and not settings.api_key:
        raise ValueError("VLLM_API_KEY is set, and this server has no key: give it as api_key, or unset the variable")
    app = await make_application(
        engine, served_model_names=settings.model_names, timeout=settings.timeout, server_args=settings.server_args
    )
    app.state.is_draining = False
    app.include_router(AdapterRoutes(engine, settings).router())
    operation = Operation(app, engine, Metrics(engine, settings.model_names[0]))
    app.add_api_route("/health/live", operation.live)
    app.add_api_route("/health/ready", operation.ready)
    app.add_api_route("/metrics", operation.metrics)
    # The last one is the first that a request meets.
    app.add_middleware(Keys, api_key=settings.api_key, admin_key=settings.admin_key)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(AccessLog)
    return app


class Operation:
    """The routes for probes and Prometheus; ``/health`` is vLLM's, and is 503 when the engine is dead."""

    def __init__(self, app: FastAPI, engine: QuantizedLoRAEngine, numbers: Metrics) -> None:
        self._app = app
        self._engine = engine
        self._numbers = numbers

    async def live(self) -> Response:
        """Return 200 while the engine runs: with 503, start the server again."""
        return self._health(is_well=self._engine.is_running)

    async def ready(self) -> Response:
        """Return 200 while requests are welcome."""
        return self._health(is_well=self._engine.is_running and not self._app.state.is_draining)

    def metrics(self) -> Response:
        """Return the numbers for Prometheus."""
        return self._numbers.response()

    def _health(self, *, is_well: bool) -> Response:
        stats = self._engine.stats()
        content = {
            "running": self._engine.is_running,
            "num_waiting": stats.num_waiting,
            "num_running": stats.num_running,
        }
        return JSONResponse(content, 200 if is_well else 503)
