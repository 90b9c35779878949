"""The engine inside a web service: coroutines of a real HTTP server, with real clients, on the fake engine."""

import asyncio
import contextlib
import json
import threading
import time

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

import httpx
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse

from qlora_infer import QueueFullError, RequestTimeoutError
from qlora_infer.testing import FakeEngine, fake_engine, write_adapter

LONG = {"max_tokens": 1000}
ENDLESS = " ".join(["word"] * 900)


def make_app(engine):
    app = FastAPI()

    @app.get("/answer")
    async def answer(prompt: str, adapter: str | None = None, timeout: float | None = None) -> dict:
        try:
            output = await engine.add_request(prompt, LONG, adapter=adapter, timeout=timeout, block=False)
        except QueueFullError as error:
            raise HTTPException(503, str(error)) from error
        except RequestTimeoutError as error:
            raise HTTPException(504, str(error)) from error
        return {"text": output.text}

    @app.get("/stream")
    async def stream(prompt: str) -> StreamingResponse:
        async def parts():
            async for part in engine.stream(prompt, LONG):
                yield json.dumps({"text": part.text}) + "\n"

        return StreamingResponse(parts())

    return app


@contextlib.contextmanager
def served(engine):
    server = uvicorn.Server(uvicorn.Config(make_app(engine), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 10
        while not server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def service(tmp_path):
    backend = FakeEngine(step_seconds=0.002)
    adapters = {"pirate": write_adapter(tmp_path / "pirate")}
    with (
        fake_engine(backend=backend, adapters=adapters, max_waiting=60, engine_args={"max_num_seqs": 4}) as engine,
        served(engine) as url,
    ):
        yield backend, engine, url


def test_handlers_await_answers_beside_each_other(service):
    """Many clients at once each get their own answer, with and without an adapter."""
    _, _, url = service

    async def main():
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            asked = [{"prompt": f"n {i}", **({"adapter": "pirate"} if i % 2 else {})} for i in range(50)]
            replies = await asyncio.gather(*(client.get("/answer", params=params) for params in asked))
        return [reply.json()["text"] for reply in replies]

    assert asyncio.run(main()) == [f"{'pirate says' if i % 2 else 'You said'}: n {i}" for i in range(50)]


def test_a_stream_comes_in_parts_and_ends_with_its_client(service):
    """A client reads growing text; when it hangs up in the middle, the request is freed."""
    backend, engine, url = service
    with httpx.stream("GET", f"{url}/stream", params={"prompt": "a b c d"}) as reply:
        texts = [json.loads(line)["text"] for line in reply.iter_lines()]
    assert texts[-1] == "You said: a b c d"
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:]))
    with httpx.stream("GET", f"{url}/stream", params={"prompt": ENDLESS}) as reply:
        next(reply.iter_lines())
    deadline = time.monotonic() + 10
    while backend.num_unfinished or engine.stats().num_running:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_full_or_slow_engine_is_an_answer_too(service):
    """A full queue and a timeout become statuses of their own, and the service goes on."""
    _, _, url = service

    async def main():
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            params = {"prompt": ENDLESS, "timeout": 0.5}
            replies = await asyncio.gather(*(client.get("/answer", params=params) for _ in range(100)))
            last = await client.get("/answer", params={"prompt": "a"})
        return {reply.status_code for reply in replies}, last.json()

    assert asyncio.run(main()) == ({503, 504}, {"text": "You said: a"})
