"""vLLM's own OpenAI application, with this engine's requests, adapters and templates in the places of vLLM's.

Read in vLLM 0.32.0, ``vllm/entrypoints/launchers``; tests/serve/test_surface.py fails when vLLM changes a place.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qlora_infer.errors import MissingDependencyError, QLoRAInferError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from qlora_infer.engine import QuantizedLoRAEngine

#: The routes that this engine serves. vLLM's application has others, for pooling models, SageMaker, elastic experts
#: and disaggregated prefill, which would fail here, or pass by the keys.
ROUTES = (
    *("/version", "/health", "/load", "/tokenize", "/detokenize"),
    *("/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"),
    *("/v1/models", "/v1/chat/completions", "/v1/completions"),
    *("/v1/responses", "/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel"),
    *("/v1/messages", "/v1/messages/count_tokens"),
)

#: vLLM's middleware that is not taken: its key guards ``/v1`` alone, where operators have a key of their own here, and
#: its counts of HTTP requests would stay 0, because a process makes them once and the stack is made twice.
LEFT_OUT = ("AuthenticationMiddleware", "PrometheusInstrumentatorMiddleware")


def require_server() -> None:
    """Raise ``MissingDependencyError`` unless vLLM has the server that this library knows."""
    from qlora_infer._vllm.engine import require_vllm

    require_vllm()
    if importlib.util.find_spec("vllm.entrypoints.launchers") is None:
        raise MissingDependencyError(
            "serve needs the OpenAI server of vLLM 0.32, and an older vLLM is installed: "
            "pip install 'qlora-infer[cuda]', or 'qlora-infer[cpu]'"
        )


async def make_application(
    engine: QuantizedLoRAEngine,
    *,
    served_model_names: Sequence[str],
    timeout: float | None = None,
    server_args: Mapping[str, Any] | None = None,
) -> FastAPI:
    """Create vLLM's application on an engine; it has no keys, limits or routes for adapters yet.

    Args:
        engine: The engine, which the caller closes.
        served_model_names: The base model's names in requests; the first one is in responses.
        timeout: Seconds that a request may take, waiting included.
        server_args: Further arguments of vLLM's server.
    """
    require_server()
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    from qlora_infer._vllm.openai.arguments import server_arguments
    from qlora_infer._vllm.openai.choice import AdapterChooser, HeldAdapters
    from qlora_infer._vllm.openai.client import AdapterEngineClient
    from qlora_infer._vllm.openai.faults import ServedError, error_response

    config = vllm_config(engine)
    client = AdapterEngineClient(engine._client, config, timeout=timeout)
    parsers = {"tool_call_parser": engine.plan.tool_call_parser} if engine.plan.tool_call_parser is not None else {}
    arguments = server_arguments(
        config,
        model=engine._config.model,
        served_model_names=served_model_names,
        given={**parsers, **(server_args or {})},
    )
    tasks = await client.get_supported_tasks()
    level = logging.root.level
    app: FastAPI = build_app(arguments, tasks, client.model_config)
    # SageMaker's package, which vLLM imports there, leaves the root logger at ERROR: warnings would be gone.
    logging.root.setLevel(level)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]
    await init_app_state(client, app.state, arguments, tasks)
    _adopt(app, client, engine, AdapterChooser(engine._registry, engine._known))
    app.user_middleware = [made for made in app.user_middleware if made.cls.__name__ not in LEFT_OUT]
    # SageMaker's bootstrap has made the stack; it is made again when the server starts.
    app.middleware_stack = None
    app.add_exception_handler(ServedError, error_response)
    app.add_exception_handler(QLoRAInferError, error_response)
    app.add_middleware(HeldAdapters, registry=engine._registry)
    return app


def vllm_config(engine: QuantizedLoRAEngine) -> Any:
    """Return vLLM's configuration of a running engine; of one that is not vLLM's, the one that it would have."""
    from vllm import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    running = getattr(engine._backend, "vllm_config", None)
    if running is not None:
        return running
    return EngineArgs(**engine.plan.engine_args).create_engine_config(UsageContext.LLM_CLASS)


def _adopt(app: FastAPI, client: Any, engine: QuantizedLoRAEngine, chooser: Any) -> None:
    """Put this engine's models into everything that vLLM's application has made."""
    from vllm.entrypoints.serve.engine.serving import BaseServing

    from qlora_infer._vllm.openai.models import AdapterDefaults, AdapterModels
    from qlora_infer._vllm.openai.templates import require_harmony

    made = app.state.openai_serving_models
    models = AdapterModels(client, made.base_model_paths, engine._registry, chooser)
    app.state.openai_serving_models = models
    require_harmony(app.state.online_renderer)
    for serving in app.state._state.values():
        if isinstance(serving, BaseServing):
            serving.models = models
            serving._check_model = models.check_model
            if hasattr(serving, "default_sampling_params"):
                serving.default_sampling_params = AdapterDefaults(serving.default_sampling_params)
