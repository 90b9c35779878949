"""The example service on a real HTTP server, spoken to by OpenAI's own client and by httpx, on the fake engine."""

import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("openai")
pytest.importorskip("uvicorn")

import httpx
import openai

from qlora_infer.testing import FakeEngine, fake_engine, write_adapter

EXAMPLE = Path(__file__).parents[2] / "examples" / "fastapi_service.py"
TOKEN, KEY = "an-admin-s-secret", "a-client-s-secret"
ADMIN = {"Authorization": f"Bearer {TOKEN}"}
HELLO = [{"role": "user", "content": "ahoy there"}]
ENDLESS = " ".join(["word"] * 900)


def example():
    spec = importlib.util.spec_from_file_location("fastapi_service", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


service = example()


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextlib.contextmanager
def running(engine, *, drain=5.0, **settings):
    """The service on a port of its own; gives the server and its URL."""
    settings = service.Settings("fake/model", api_key=KEY, adapters_token=TOKEN, **settings)
    server = service.make_server(engine, settings, drain=drain, port=0, log_level="info")
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield server, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@contextlib.contextmanager
def served(tmp_path, *, backend=None, max_waiting=None, max_num_seqs=8, **settings):
    """The service with an adapter named pirate; gives its URL and its engine."""
    folder = tmp_path / "adapters"
    pirate = write_adapter(folder / "pirate")
    arguments = {"max_model_len": 2000, "engine_args": {"max_num_seqs": max_num_seqs}, "max_waiting": max_waiting}
    with (
        fake_engine(backend=backend or FakeEngine(), adapters={"pirate": pirate}, **arguments) as engine,
        running(engine, adapters_folder=folder, **settings) as (_, url),
    ):
        yield url, engine


def client(url, **options):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, **options)


def wire(url):
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30)


def test_openai_s_client_gets_answers_of_base_and_adapter(tmp_path):
    """``model`` is the base model, an adapter, or a version of it; text, usage and finish_reason are right."""
    with served(tmp_path) as (url, _), client(url) as ai:
        reply = ai.chat.completions.create(model="fake/model", messages=HELLO)
        assert (reply.object, reply.model) == ("chat.completion", "fake/model")
        assert reply.choices[0].message.role == "assistant"
        assert reply.choices[0].message.content == "You said: user: ahoy there"
        assert reply.choices[0].finish_reason == "stop"
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (3, 5, 8)
        reply = ai.completions.create(model="pirate@1", prompt="ahoy", max_tokens=2, temperature=0.0, stop=["x"])
        assert (reply.object, reply.choices[0].text, reply.choices[0].finish_reason) == (
            *("text_completion", "pirate says:", "length"),
        )
        parts = [{"role": "user", "content": [{"type": "text", "text": "ahoy "}, {"type": "text", "text": "there"}]}]
        reply = ai.chat.completions.create(
            model="pirate", messages=parts, max_completion_tokens=3, extra_body={"top_k": 5}
        )
        assert reply.choices[0].message.content == "pirate says: user:"
        assert [model.id for model in ai.models.list()] == ["fake/model", "pirate"]


def test_openai_s_client_streams(tmp_path):
    """Chunks add up to the text, the last one has the reason, and usage comes behind them when it is asked for."""
    with served(tmp_path, backend=FakeEngine(step_seconds=0.01)) as (url, _), client(url) as ai:
        chunks = list(
            ai.chat.completions.create(
                model="pirate", messages=HELLO, stream=True, stream_options={"include_usage": True}
            )
        )
        *words, last = chunks
        assert "".join(chunk.choices[0].delta.content for chunk in words) == "pirate says: user: ahoy there"
        assert len(words) > 1
        assert [chunk.choices[0].finish_reason for chunk in words] == [None] * (len(words) - 1) + ["stop"]
        assert (last.choices, last.usage.completion_tokens) == ([], 5)
        assert len({(chunk.id, chunk.created, chunk.object) for chunk in chunks}) == 1
        chunks = list(ai.completions.create(model="fake/model", prompt="a b", stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == "You said: a b"
        assert {chunk.usage for chunk in chunks} == {None}


def test_the_stream_is_server_sent_events(tmp_path):
    """Each event is one line ``data: {json}``, and the last one ``data: [DONE]``; no proxy is to hold them back."""
    with served(tmp_path) as (url, _), wire(url) as http:
        reply = http.post("/v1/completions", json={"model": "pirate", "prompt": "a", "stream": True})
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert (reply.headers["cache-control"], reply.headers["x-accel-buffering"]) == ("no-cache", "no")
        *events, done, end = reply.text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        texts = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events]
        assert "".join(texts) == "pirate says: a"


def test_many_asynchronous_clients_each_get_their_own_answer(tmp_path):
    """Fifty requests at once, streamed and not, of base and adapter, are not mixed up."""

    async def ask(ai, number):
        model = "pirate" if number % 2 else "fake/model"
        if number % 3:
            reply = await ai.completions.create(model=model, prompt=f"n {number}")
            return reply.choices[0].text
        stream = await ai.completions.create(model=model, prompt=f"n {number}", stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def main(url):
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as ai:
            return await asyncio.gather(*(ask(ai, number) for number in range(50)))

    with served(tmp_path) as (url, _):
        texts = asyncio.run(main(url))
    assert texts == [f"{'pirate says' if number % 2 else 'You said'}: n {number}" for number in range(50)]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"max_tokens": 5000}, "max_tokens is at most 1024"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": "x" * 100_001}, "the prompt is longer than 100000"),
        ({"prompt": "w " * 3000}, "3001 tokens of 2000"),
        ({"n": 2}, "n: "),
        ({"logprobs": 3}, "logprobs: Extra inputs are not permitted"),
        ({"temperature": "warm"}, "temperature: "),
        ({"extra_body": {"stop_token_ids": [10**9]}}, "stop_token_ids: Extra"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_done_is_a_bad_request(tmp_path, asked, words, stream):
    """A parameter out of range, a prompt that is too long and what is not supported: 400, with the reason."""
    with served(tmp_path) as (url, _), client(url) as ai:
        with pytest.raises(openai.BadRequestError, match=re.escape(words)) as caught:
            ai.completions.create(**{"model": "fake/model", "prompt": "a", "stream": stream, **asked})
        assert caught.value.type == "invalid_request_error"


def test_each_error_has_its_status(tmp_path):
    """An unknown model, no key, a long body, a path that is none: OpenAI's exceptions, and its shape on the wire."""
    with (
        served(tmp_path, max_body_bytes=10_000, max_prompt_chars=5_000) as (url, _),
        client(url) as ai,
        wire(url) as http,
    ):
        with pytest.raises(openai.NotFoundError, match="no adapter is loaded as 'parrot'") as caught:
            ai.chat.completions.create(model="parrot", messages=HELLO)
        assert caught.value.code == "AdapterNotLoadedError"
        with pytest.raises(openai.BadRequestError, match="longer than 5000: 5010"):
            ai.chat.completions.create(model="pirate", messages=[*HELLO, {"role": "user", "content": "x" * 5_000}])
        with pytest.raises(openai.AuthenticationError):
            client(url).with_options(api_key="guessed").chat.completions.create(model="pirate", messages=HELLO)
        with pytest.raises(openai.APIStatusError, match="10000 bytes") as caught:
            ai.completions.create(model="pirate", prompt="x" * 20_000)
        assert caught.value.status_code == 413
        chunked = http.post("/v1/completions", content=(b"x" * 1000 for _ in range(20)))
        assert chunked.status_code == 413
        assert http.get("/nothing").json()["error"]["message"] == "Not Found"
        broken = http.post("/v1/completions", content=b"{", headers={"Content-Type": "application/json"})
        assert (broken.status_code, broken.json()["error"]["type"]) == (400, "invalid_request_error")


def test_a_full_queue_is_told_with_a_time_to_wait(tmp_path):
    """When max_waiting requests wait, the next one is refused with 429 and Retry-After."""
    backend = FakeEngine(step_seconds=0.02)
    with served(tmp_path, backend=backend, max_waiting=2, max_num_seqs=1) as (url, engine), client(url) as ai:
        blockers = [engine.add_request(ENDLESS, {"max_tokens": 900}) for _ in range(2)]
        wait_until(lambda: engine.stats().num_running == 2)  # one runs, and one is there before its place is free
        waiting = [engine.add_request("a") for _ in range(2)]
        with pytest.raises(openai.RateLimitError, match="2 requests wait already") as caught:
            ai.completions.create(model="pirate", prompt="a")
        assert caught.value.response.headers["retry-after"] == "1"
        for handle in (*blockers, *waiting):
            handle.cancel()


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_ends(tmp_path, stream):
    """After the service's timeout: 504 where nothing was sent yet, else an event that the client raises."""
    with served(tmp_path, backend=FakeEngine(step_seconds=0.02), timeout=0.5) as (url, engine), client(url) as ai:
        with pytest.raises(openai.APIError, match="not finished within") as caught:
            list(ai.completions.create(model="pirate", prompt=ENDLESS, max_tokens=900, stream=stream))
        assert caught.value.code == "RequestTimeoutError"
        if not stream:
            assert caught.value.status_code == 504
            assert caught.value.response.headers["x-should-retry"] == "false"
        wait_until(lambda: engine.stats().num_running == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_cancels_its_request(tmp_path, stream):
    """Its request is dropped from the engine in the middle, streamed or not."""
    backend = FakeEngine(step_seconds=0.02)
    with served(tmp_path, backend=backend) as (url, engine):
        asked = {"model": "pirate", "prompt": ENDLESS, "max_tokens": 900, "stream": stream}
        if stream:
            with wire(url) as http, http.stream("POST", "/v1/completions", json=asked) as reply:
                next(reply.iter_lines())
        else:
            with wire(url) as http, pytest.raises(httpx.ReadTimeout):
                http.post("/v1/completions", json=asked, timeout=0.5)
        wait_until(lambda: engine.stats().num_running == backend.num_unfinished == 0)
        counts = engine.stats().adapters["pirate"]
        assert (counts.num_finished, counts.num_failed) == (0, 1)


def test_a_dead_engine_is_unavailable(tmp_path):
    """Requests get 503, a stream that had begun an event with the error, and /health says so."""
    backend = FakeEngine(step_seconds=0.02)
    with served(tmp_path, backend=backend) as (url, _), client(url) as ai, wire(url) as http:
        assert http.get("/health").json() == {"running": True, "num_waiting": 0, "num_running": 0}
        stream = ai.completions.create(model="pirate", prompt=ENDLESS, max_tokens=900, stream=True)
        next(stream)
        backend.die("out of memory")
        with pytest.raises(openai.APIError, match="out of memory") as caught:
            list(stream)
        assert caught.value.code == "EngineDeadError"
        with pytest.raises(openai.InternalServerError) as caught:
            ai.completions.create(model="pirate", prompt="a")
        assert (caught.value.status_code, caught.value.response.headers["retry-after"]) == (503, "5")
        health = http.get("/health")
        assert (health.status_code, health.json()["running"]) == (503, False)


def test_an_adapter_is_loaded_swapped_taken_back_and_unloaded(tmp_path):
    """PUT makes a version, which answers at once; a stale ``expect`` is a conflict; rollback and DELETE undo it."""
    with served(tmp_path) as (url, engine), client(url) as ai, httpx.Client(base_url=url, headers=ADMIN) as http:
        for number in (1, 2, 3):
            write_adapter(tmp_path / "adapters" / f"parrot-{number}", seed=number)
        first = http.put("/adapters/parrot", json={"source": "./parrot-1", "expect": 0})
        assert (first.status_code, first.json()["version"]) == (200, 1)
        assert ai.completions.create(model="parrot", prompt="a").choices[0].text == "parrot says: a"
        path = str(tmp_path / "adapters" / "parrot-2")
        second = http.put("/adapters/parrot", json={"source": path, "share": 2.0, "expect": first.json()["digest"]})
        assert (second.json()["version"], second.json()["share"]) == (2, 2.0)
        late = http.put("/adapters/parrot", json={"source": "./parrot-3", "expect": 1})
        assert (late.status_code, late.json()["error"]["code"]) == (409, "AdapterConflictError")
        assert http.get("/adapters").json()["parrot"] == second.json()
        assert http.post("/adapters/parrot/rollback").json()["digest"] == first.json()["digest"]
        assert http.delete("/adapters/parrot").status_code == 204
        assert http.delete("/adapters/parrot").status_code == 404
        assert list(engine.adapters) == ["pirate"]


def test_a_load_holds_up_nobody(tmp_path):
    """While an adapter is read, requests are answered."""
    backend = FakeEngine()
    with served(tmp_path, backend=backend) as (url, engine), client(url) as ai:
        release, entered = threading.Event(), threading.Event()
        load_adapter = engine.load_adapter

        def slow(*args, **options):
            entered.set()
            assert release.wait(20)
            return load_adapter(*args, **options)

        engine.load_adapter = slow
        write_adapter(tmp_path / "adapters" / "parrot")
        put = {"url": f"{url}/adapters/parrot", "json": {"source": "./parrot"}, "headers": ADMIN, "timeout": 30}
        replies = []
        thread = threading.Thread(target=lambda: replies.append(httpx.put(**put)))
        thread.start()
        assert entered.wait(10)
        assert ai.completions.create(model="pirate", prompt="a").choices[0].text == "pirate says: a"
        assert not replies
        release.set()
        thread.join(20)
        assert replies[0].status_code == 200


def test_adapters_come_from_where_the_operator_allows(tmp_path):
    """Whoever has the token cannot read other folders, by no spelling; nor other repositories, hosts or buckets."""
    secret = write_adapter(tmp_path / "secret")
    allowed = ("me/", "them/one@v1", "https://files.test/adapters/", "s3://bucket/adapters/")
    with served(tmp_path, allowed_sources=allowed) as (url, engine):
        (tmp_path / "adapters" / "link").symlink_to(secret)
        with httpx.Client(base_url=url, headers=ADMIN) as http:
            for source in (
                *(str(secret), "../secret", "./../secret", f"{tmp_path}/adapters/../secret", "./link", "/"),
                *(f"file://{secret}", f"local://{secret}", "memory://secret"),
                *("you/repo", "them/one", "them/one@v2", "them/one@v1:sub", "mean/repo"),
                *(
                    "https://files.test/other",
                    "https://files.test/adapters/../x",
                    "https://files.test/adapters/%2e%2e/x",
                ),
                *(
                    "http://files.test/adapters/x",
                    "https://evil.test/adapters/",
                    "https://evil.test/https://files.test/adapters/",
                ),
                *("https://files.test@evil.test/adapters/x", "https://files.test.evil.test/adapters/x"),
                "s3://bucket/other",
            ):
                reply = http.put("/adapters/parrot", json={"source": source})
                assert reply.status_code == 403, (source, reply.text)
            unsafe = http.put("/adapters/parrot", json={"source": "./missing"})
            assert (unsafe.status_code, unsafe.json()["error"]["code"]) == (422, "AdapterNotFoundError")
            home = http.put("/adapters/parrot", json={"source": "~/secret"})
            assert (home.status_code, f"{tmp_path}/adapters/~/secret" in home.text) == (422, True)
            assert http.put("/adapters/parrot", json={"source": "no source"}).status_code == 400
            assert http.put("/adapters/a@b", json={"source": "./pirate"}).status_code == 400
        assert list(engine.adapters) == ["pirate"]
    for source in ("me/pirate", "me/pirate@v1:sub", "them/one@v1", "s3://bucket/adapters/x"):
        with contextlib.suppress(ImportError):
            assert str(service.permitted(source, service.Settings("m", allowed_sources=allowed))) == source


def test_without_the_token_nothing_can_be_changed(tmp_path):
    """No token, a wrong one and the clients' key get 401; where none is set, the routes are not there."""
    with served(tmp_path) as (url, engine), wire(url) as http:
        for headers in ({"Authorization": ""}, {"Authorization": "Bearer x"}, {}, {"Authorization": f"Basic {TOKEN}"}):
            for method, path in (("PUT", "/pirate"), ("DELETE", "/pirate"), ("GET", ""), ("POST", "/pirate/rollback")):
                reply = http.request(method, f"/adapters{path}", headers=headers, json={"source": "./pirate"})
                assert reply.status_code == 401
        assert list(engine.adapters) == ["pirate"]
        app = service.create_app(engine, service.Settings("m", adapters_token=""))
        assert not [route.path for route in app.routes if getattr(route, "path", "").startswith("/adapters")]


def test_secrets_are_in_no_log(tmp_path, caplog, capsys):
    """Neither the tokens, right or wrong, nor a signed URL are in a log, a repr or an answer."""
    caplog.set_level(logging.DEBUG, logger="qlora_infer")
    answers = []
    with served(tmp_path, allowed_sources=["https://127.0.0.1:1/"]) as (url, _), wire(url) as http:
        answers.append(http.get("/v1/models"))
        answers.append(http.get("/v1/models", headers={"Authorization": "Bearer wrong-secret"}))
        allowed, other = (f"https://{host}/x?sig=signed-secret" for host in ("127.0.0.1:1", "evil.test"))
        for body in ({"source": allowed}, {"source": other}, {"sauce": "signed-secret"}):
            answers += [http.put("/adapters/x", json=body, headers=ADMIN)]
    assert [answer.status_code for answer in answers] == [200, 401, 502, 403, 400]
    settings = service.Settings("m", api_key=KEY, adapters_token=TOKEN)
    shown = f"{caplog.text} {capsys.readouterr()} {settings} {[answer.text for answer in answers]}"
    assert "GET /v1/models" in shown
    for secret in (TOKEN, KEY, "wrong-secret", "signed-secret"):
        assert secret not in shown


def test_the_end_lets_requests_finish_and_then_ends_them(tmp_path):
    """Told to end, the service finishes what it can in ``drain`` seconds; the rest gets an error, not a cut line."""
    backend = FakeEngine(step_seconds=0.02)
    with fake_engine(backend=backend) as engine, running(engine, drain=1.0) as (server, url), client(url) as ai:
        short = ai.completions.create(model="fake/model", prompt="a b c d e", stream=True)
        long = ai.completions.create(model="fake/model", prompt=ENDLESS, max_tokens=900, stream=True)
        next(long)
        first = next(short).choices[0].text
        server.should_exit = True
        assert first + "".join(chunk.choices[0].text for chunk in short) == "You said: a b c d e"
        with pytest.raises(openai.APIError, match="closed") as caught:
            list(long)
        assert caught.value.code == "EngineClosedError"
    assert not backend.is_running


def test_the_command_serves_until_it_is_told_to_end(tmp_path):
    """The file is run as a user runs it, with a port, an adapter and a token, and ends with SIGTERM."""
    pirate = write_adapter(tmp_path / "pirate")
    # vLLM's place is taken as in docs/testing.md; everything else is the file as it is.
    code = (
        "import runpy, sys, qlora_infer.engine as e; from qlora_infer.testing import FakeEngine;"
        f"e._vllm_backend = FakeEngine; sys.argv = [{str(EXAMPLE)!r}, '--model', 'org/model', '--served-model-name', 'base', '--port', '0',"
        f" '--adapter', 'pirate={pirate}']; runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    )
    environment = {**os.environ, "QLORA_INFER_ADAPTERS_TOKEN": TOKEN}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        log = []
        while not (found := re.search(r"running on (http://\S+)", log[-1] if log else "")):
            log.append(process.stderr.readline())
            assert log[-1], "".join(log)
        with client(found[1]) as ai:
            assert [model.id for model in ai.models.list()] == ["base", "pirate"]
            assert ai.completions.create(model="pirate", prompt="a").choices[0].text == "pirate says: a"
        assert list(httpx.get(f"{found[1]}/adapters", headers=ADMIN).json()) == ["pirate"]
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=30)[1]
        assert "Application shutdown complete" in rest
        assert TOKEN not in "".join(log) + rest
    finally:
        process.kill()
        process.communicate()


def test_the_code_of_the_page_runs(tmp_path):
    """Every Python block of docs/service.md runs, against the service with an adapter named pirate."""
    blocks = re.findall(r"```python\n(.*?)```", (EXAMPLE.parents[1] / "docs" / "service.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    with served(tmp_path) as (url, _):
        for block in blocks:
            exec(compile(block.replace("http://127.0.0.1:8000", url), "docs/service.md", "exec"), {**vars(service)})
