"""The command ``serve``, which is an OpenAI server."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora_infer.cli import start

API_KEY, ADMIN_KEY, VLLM_API_KEY = "QLORA_INFER_API_KEY", "QLORA_INFER_ADMIN_KEY", "VLLM_API_KEY"


@start.engine_options
def serve(
    ctx: typer.Context,
    model: start.Model,
    adapter: start.Adapters = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="The base model's name in requests; may be repeated. By default MODEL itself."),
    ] = None,
    adapters_folder: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="A folder of adapters that requests and operators can load."),
    ] = None,
    allow_source: Annotated[
        list[str] | None,
        typer.Option(metavar="PREFIX/", help="Hub ids and URLs that requests and operators can load; may be repeated."),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=[API_KEY, VLLM_API_KEY], show_envvar=True, help="The key for requests; better set the variable."
        ),
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(
            envvar=ADMIN_KEY,
            show_envvar=True,
            help="The key for routes that change adapters; better set the variable.",
        ),
    ] = None,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that can wait; others get status 429.")] = 256,
    timeout: Annotated[float | None, typer.Option(help="Seconds for each request.")] = None,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Bytes of a request body.")] = 4 << 20,
    drain: Annotated[float, typer.Option(min=0, help="Seconds for requests to finish after SIGTERM.")] = 30.0,
    server_args: Annotated[
        Any,
        typer.Option(
            metavar="JSON",
            parser=start.json_object,
            help='Further arguments of `vllm serve`, such as \'{"response_role": "helper"}\'.',
        ),
    ] = None,
    *,
    options: Mapping[str, Any],
) -> None:
    """Serve a model and its adapters over HTTP, with OpenAI's API.

    `model` in a request names the base model, an adapter, or a version of it (name@2). GET /health/ready is for probes,
    GET /metrics for Prometheus. A core that dies is started again. After SIGTERM, requests can finish.
    """
    from qlora_infer._vllm.openai.application import require_server

    names = tuple(served_model_name or [model])
    if taken := [name for name, _ in adapter or () if name in names]:
        raise typer.BadParameter(
            f"adapter {taken[0]!r} has the name of the base model: give --served-model-name another"
        )
    start.log_to_stderr(ctx)  # before vLLM is imported, which logs where it is told then
    require_server()
    from qlora_infer.serve.allowed import AllowedSources
    from qlora_infer.serve.server import run
    from qlora_infer.serve.settings import Settings

    allowed = AllowedSources(adapters_folder, tuple(allow_source or ()))
    settings = Settings(
        model_names=names,
        api_key=api_key,
        admin_key=admin_key,
        allowed=allowed,
        max_body_bytes=max_body_bytes,
        timeout=timeout,
        drain=drain,
        server_args=server_args or {},
    )
    given: dict[str, Any] = {"known_adapters": allowed.find} if adapters_folder or allow_source else {}
    options = {"restart": "on-failure", **options}
    for key in (API_KEY, ADMIN_KEY, VLLM_API_KEY):
        os.environ.pop(key, None)  # the engine's processes need no keys
    signal.signal(signal.SIGTERM, _end)
    opening = start.start_engine(ctx, model, adapter, options, max_waiting=max_waiting, **given)
    with opening as engine, start.usage_errors():
        run(engine, settings, host=host, port=port)


def _end(*_: object) -> None:
    """End as Ctrl-C does, so that the engine is closed: before the server runs, and when it has let requests finish."""
    sys.exit(0)
