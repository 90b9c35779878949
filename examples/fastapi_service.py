"""A service that the OpenAI client speaks to, with adapters that are loaded, swapped and taken back over HTTP.

    pip install 'qlora-infer[cuda]' fastapi uvicorn
    export QLORA_INFER_ADAPTERS_TOKEN=...   # without it, adapters cannot be changed over HTTP
    export QLORA_INFER_API_KEY=...          # without it, anybody who reaches the port may ask
    python examples/fastapi_service.py --model org/model-AWQ --adapter pirate=me/pirate-lora --allow-source me/

docs/service.md tells the rest. Copy this file and change it.
"""

import argparse
import asyncio
import contextlib
import hmac
import json
import logging
import os
import re
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote

import uvicorn
from attrs import asdict, field, frozen
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import qlora_infer as ql


@frozen
class Settings:
    """The settings that an operator decides; the secrets are in no ``repr``."""

    model: str  # what clients call the base model
    api_key: str | None = field(default=None, repr=False)
    adapters_token: str | None = field(default=None, repr=False)
    adapters_folder: Path | None = None  # local adapters come from here, and from nowhere else
    allowed_sources: Sequence[str] = ()  # "me/" or "s3://bucket/adapters/" for all below it, "me/pirate" for itself
    max_body_bytes: int = 1 << 20
    max_prompt_chars: int = 100_000  # vLLM has the last word, in tokens
    max_tokens: int = 1024
    timeout: float = 120.0  # seconds from a request's arrival to its last token


class Body(BaseModel):
    """A request's body: unknown fields are refused, not ignored; ``null`` is the same as nothing."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


class Sampling(Body):
    """The fields of vLLM's ``SamplingParams`` that clients may set; vLLM checks their ranges."""

    max_tokens: int | None = Field(None, validation_alias=AliasChoices("max_tokens", "max_completion_tokens"))
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None


class Generation(Sampling):
    model: str
    stream: bool = False
    stream_options: dict[str, bool] = {}
    n: Literal[1] = 1
    user: str | None = None


class Completion(Generation):
    prompt: str | Annotated[list[int], Field(min_length=1)]


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    role: str
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class Chat(Generation):
    messages: list[ChatMessage] = Field(min_length=1)


class Adapter(Body):
    source: str
    share: float = 1.0
    expect: int | str | None = None  # the version that is replaced, by number or digest; 0 for none


# The nearest class counts.
STATUSES: Mapping[type[Exception], int] = {
    ql.RequestRejectedError: 400,
    ql.AdapterNotLoadedError: 404,
    ql.AdapterConflictError: 409,
    ql.AdapterError: 422,
    ql.QueueFullError: 429,
    ql.AdapterLoadError: 500,
    ql.QLoRAInferError: 500,
    ql.AdapterDownloadError: 502,
    ql.EngineClosedError: 503,
    ql.EngineDeadError: 503,
    ql.RequestCancelledError: 503,
    ql.RequestTimeoutError: 504,
}
# OpenAI's client tries again after any 5xx; a request that took too long is likely to do so again.
HEADERS = {429: {"Retry-After": "1"}, 503: {"Retry-After": "5"}, 504: {"x-should-retry": "false"}}


def status_of(error: Exception) -> int:
    return next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)


def error_body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


async def own_error(_: Request, error: ql.QLoRAInferError) -> Response:
    status = status_of(error)
    return JSONResponse(error_body(status, str(error), type(error).__name__), status, HEADERS.get(status))


async def http_error(_: Request, error: AnyHTTPException) -> Response:
    return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code, error.headers)


async def invalid(_: Request, error: RequestValidationError) -> Response:
    # Without the input, which pydantic would add: it may be long, or secret.
    faults = (f"{'.'.join(map(str, fault['loc'][1:]))}: {fault['msg']}" for fault in error.errors())
    return JSONResponse(error_body(400, "; ".join(faults)), 400)


class BodyLimit:
    """Stops reading where a body is longer than allowed, whatever its headers say."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        num_bytes = 0

        async def limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_bytes:
                raise HTTPException(413, f"the body is longer than {self.max_bytes} bytes", {"Connection": "close"})
            return message

        await self.app(scope, limited, send)


def bearer(secret: str) -> Any:
    def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]) -> None:
        if given is None or not hmac.compare_digest(given.credentials.encode(), secret.encode()):
            raise HTTPException(401, "a valid bearer token is needed", {"WWW-Authenticate": "Bearer"})

    return Depends(check)


@contextlib.contextmanager
def arguments_checked():
    """Turn the library's ValueError and TypeError into client errors."""
    try:
        yield
    except ql.QLoRAInferError:
        raise
    except (ValueError, TypeError) as error:
        raise HTTPException(400, str(error)) from error


async def while_connected(request: Request, handle: ql.RequestHandle, answer: Awaitable[Any]) -> Any:
    """Wait for an answer; a client that hangs up meanwhile cancels its request."""

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering, hanging_up = asyncio.ensure_future(answer), asyncio.ensure_future(hang_up())
    try:
        await asyncio.wait({answering, hanging_up}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise HTTPException(499, "the client has hung up")
        return answering.result()
    finally:
        hanging_up.cancel()
        if not answering.done():
            answering.cancel()
            handle.cancel()


def choice(body: Generation, text: str, finish_reason: str | None) -> dict[str, Any]:
    said = {"role": "assistant", "content": text}
    words = {"text": text} if isinstance(body, Completion) else {"delta" if body.stream else "message": said}
    return {"index": 0, **words, "logprobs": None, "finish_reason": finish_reason}


def usage(output: ql.GenerationOutput) -> dict[str, int]:
    prompt, answer = len(output.prompt_token_ids), output.num_tokens
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def events(
    body: Generation, head: Mapping[str, Any], part: ql.GenerationOutput, parts: ql.PartialOutputs
) -> AsyncIterator[str]:
    """Yield the text that each part adds to the one before; an error ends the stream as a last event."""
    try:
        while True:
            yield event({**head, "choices": [choice(body, part.delta, part.finish_reason)]})
            if part.finished:
                break
            part = await anext(parts)
        if body.stream_options.get("include_usage"):
            yield event({**head, "choices": [], "usage": usage(part)})
        yield "data: [DONE]\n\n"
    except ql.QLoRAInferError as error:
        yield event(error_body(status_of(error), str(error), type(error).__name__))
    finally:
        parts.close()  # cancels the request, if the client has gone before its end


def openai_routes(engine: ql.QuantizedLoRAEngine, settings: Settings) -> APIRouter:
    """Return the part of OpenAI's API that generates text; ``model`` is the base model or an adapter."""
    router = APIRouter(prefix="/v1", dependencies=[bearer(settings.api_key)] if settings.api_key else [])
    started = int(time.time())

    async def add(body: Generation, prompt: str | list[int] | list[dict[str, str]]) -> ql.RequestHandle:
        size = sum(len(part["content"]) if isinstance(part, dict) else 1 for part in prompt)
        if size > settings.max_prompt_chars:
            raise HTTPException(400, f"the prompt is longer than {settings.max_prompt_chars}: {size}")
        params = body.model_dump(include=set(Sampling.model_fields), exclude_none=True)
        if params.setdefault("max_tokens", settings.max_tokens) > settings.max_tokens:
            raise HTTPException(400, f"max_tokens is at most {settings.max_tokens}, got {body.max_tokens}")
        adapter = None if body.model == settings.model else body.model
        with arguments_checked():
            # In a thread, because an adapter's chat template may take its time.
            return await asyncio.to_thread(
                engine.add_request, prompt, params, adapter=adapter, timeout=settings.timeout, block=False
            )

    async def answer(request: Request, body: Generation, prompt: Any, kind: str) -> Any:
        handle = await add(body, prompt)
        head = {"id": handle.request_id, "object": kind, "created": int(time.time()), "model": body.model}
        if not body.stream:
            output = await while_connected(request, handle, handle)
            return {**head, "choices": [choice(body, output.text, output.finish_reason)], "usage": usage(output)}
        parts = aiter(handle)
        # An error before the first token still has a status of its own.
        first = await while_connected(request, handle, anext(parts))
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(events(body, head, first, parts), headers=headers, media_type="text/event-stream")

    @router.post("/chat/completions")
    async def chat(request: Request, body: Chat) -> Any:
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        return await answer(request, body, [message.plain() for message in body.messages], kind)

    @router.post("/completions")
    async def complete(request: Request, body: Completion) -> Any:
        return await answer(request, body, body.prompt, "text_completion")

    @router.get("/models")
    async def models() -> Any:
        entry = {"object": "model", "created": started, "owned_by": "qlora_infer"}
        adapters = [{"id": name, **entry, "parent": settings.model} for name in engine.adapters]
        return {"object": "list", "data": [{"id": settings.model, **entry}, *adapters]}

    return router


def permitted(source: str, settings: Settings) -> ql.Source | Path:
    """Return the source if the operator allows it; the place that it leads to decides, not its spelling."""
    parsed = ql.parse_source(source)
    text = str(parsed)
    if isinstance(parsed, ql.FolderSource):
        folder = settings.adapters_folder.resolve() if settings.adapters_folder else None
        if folder and (path := (folder / parsed.path).resolve()).is_relative_to(folder):
            return path
    elif ".." not in re.split(r"[/\\:@]", unquote(text)):
        for allowed in settings.allowed_sources:
            if text == allowed or (allowed.endswith("/") and text.startswith(allowed)):
                return parsed
    raise HTTPException(403, f"adapters may not come from {text}: ask the operator to allow it")


def adapter_routes(engine: ql.QuantizedLoRAEngine, settings: Settings, token: str) -> APIRouter:
    """Adapters come and go. Plain ``def``: FastAPI runs these in threads, so that a download stops nobody."""
    router = APIRouter(prefix="/adapters", dependencies=[bearer(token)])
    name_in_path = Annotated[str, InPath(pattern=r"^[\w.-]{1,100}$")]

    @router.get("")
    def adapters() -> Any:
        return {name: asdict(loaded) for name, loaded in engine.adapters.items()}

    @router.put("/{name}")
    def load(name: name_in_path, body: Adapter) -> Any:
        with arguments_checked():
            if name == settings.model:
                raise ValueError(f"{name!r} is what the base model is called")
            source = permitted(body.source, settings)
            return asdict(engine.load_adapter(name, source, share=body.share, expect=body.expect))

    @router.delete("/{name}", status_code=204)
    def unload(name: name_in_path) -> None:
        engine.unload_adapter(name)

    @router.post("/{name}/rollback")
    def rollback(name: name_in_path) -> Any:
        return asdict(engine.rollback_adapter(name))

    return router


def create_app(engine: ql.QuantizedLoRAEngine, settings: Settings) -> FastAPI:
    """Create the service around an engine, and close the engine when the service ends."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="qlora_infer", lifespan=lifespan)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_exception_handler(ql.QLoRAInferError, own_error)
    app.add_exception_handler(AnyHTTPException, http_error)
    app.add_exception_handler(RequestValidationError, invalid)
    app.include_router(openai_routes(engine, settings))
    if settings.adapters_token:
        app.include_router(adapter_routes(engine, settings, settings.adapters_token))

    @app.get("/health")
    async def health() -> Response:
        stats = engine.stats()
        content = {"running": engine.is_running, "num_waiting": stats.num_waiting, "num_running": stats.num_running}
        return JSONResponse(content, 200 if engine.is_running else 503)

    return app


class Server(uvicorn.Server):
    """Told to end, it gives requests ``drain`` seconds; the engine then ends the rest, with an error."""

    def __init__(self, config: uvicorn.Config, close: Callable[[], None], drain: float) -> None:
        super().__init__(config)
        self.close, self.drain = close, drain

    async def shutdown(self, sockets: Any = None) -> None:
        asyncio.get_running_loop().call_later(self.drain, threading.Thread(target=self.close).start)
        await super().shutdown(sockets)


def make_server(engine: ql.QuantizedLoRAEngine, settings: Settings, *, drain: float = 30.0, **config: Any) -> Server:
    # Closing takes some 20 seconds at most.
    config = {"timeout_graceful_shutdown": int(drain) + 30, **config}
    return Server(uvicorn.Config(create_app(engine, settings), **config), engine.close, drain)


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hub id or a folder")
    parser.add_argument("--served-model-name", help="what clients call it; by default as --model does")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=SOURCE", help="loaded at the start")
    parser.add_argument("--adapters-folder", type=Path, help="from where local adapters may be loaded over HTTP")
    parser.add_argument("--allow-source", action="append", default=[], metavar="PREFIX/", help="and from where others")
    parser.add_argument("--max-waiting", type=int, default=256, help="more requests are refused with 429")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    settings = Settings(
        given.served_model_name or given.model,
        api_key=os.environ.get("QLORA_INFER_API_KEY"),
        adapters_token=os.environ.get("QLORA_INFER_ADAPTERS_TOKEN"),
        adapters_folder=given.adapters_folder,
        allowed_sources=given.allow_source,
    )
    adapters = dict(adapter.split("=", 1) for adapter in given.adapter)
    with ql.QuantizedLoRAEngine(
        given.model, adapters=adapters, max_waiting=given.max_waiting, restart="on-failure"
    ) as engine:
        make_server(engine, settings, host=given.host, port=given.port).run()


if __name__ == "__main__":
    main()
