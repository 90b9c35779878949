"""A server's keys, limits, probes, metrics, log and end."""

import asyncio
import json
import logging
import re
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("vllm.entrypoints.launchers")
pytest.importorskip("openai")

import httpx
import openai
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from served import ADMIN_KEY, ENDLESS, HELLO, KEY, ByteEngine, admin, client, running, served, wait_until, wire

from qlora_infer.testing import fake_engine

pytestmark = pytest.mark.usefixtures("byte_model")

CLIENTS = (
    *("/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"),
    *("/tokenize", "/detokenize", "/load", "/adapters", "/adapters/pirate", "/v1/load_lora_adapter"),
)


def test_keys_open_their_routes_alone(one_server):
    """Without a key only probes and metrics are open; a client's key changes no adapter; the operator's opens all."""
    with httpx.Client(base_url=one_server) as stranger, wire(one_server) as http, admin(one_server) as operator:
        assert {stranger.post(path, json={}).status_code for path in CLIENTS} == {401}
        assert {
            stranger.get(path).status_code for path in ("/health", "/health/live", "/health/ready", "/metrics")
        } == {200}
        assert wire(one_server, "wrong").get("/v1/models").status_code == 401
        assert http.get("/adapters").status_code == 401
        assert http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "pirate"}).status_code == 401
        assert operator.get("/v1/models").status_code == operator.get("/adapters").status_code == 200
        # vLLM's application has these, and would pass by the keys, or fail.
        assert {
            operator.post(path, json={}).status_code
            for path in ("/invocations", "/scale_elastic_ep", "/inference/v1/generate", "/ping")
        } == {404}


def test_without_an_admin_key_nobody_changes_adapters(tmp_path):
    """The routes are closed, and the adapters in the folder are still loaded on first use."""
    with served(tmp_path, admin_key=None, api_key=None) as (url, _), httpx.Client(base_url=url) as http:
        assert http.get("/adapters").status_code == 403
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "pirate"}).status_code == 403
        assert http.get("/v1/models").status_code == 200


def test_a_body_that_is_too_long_is_413(tmp_path):
    """Whatever its headers say, no more of it is read."""
    with served(tmp_path, max_body_bytes=1000) as (url, _), wire(url) as http:
        body = json.dumps({"model": "base", "prompt": "x" * 2000}).encode()
        headers = {"Content-Type": "application/json"}
        assert http.post("/v1/completions", content=body, headers=headers).status_code == 413
        assert http.post("/v1/completions", content=iter([body[:900], body[900:]]), headers=headers).status_code == 413
        assert http.post("/v1/completions", json={"model": "base", "prompt": "x"}).status_code == 200


def test_a_router_reads_its_metrics(tmp_path):
    """llm-d and the Gateway API Inference Extension find the load and the adapters of a replica under vLLM's names."""
    backend = ByteEngine(reply=lambda prompt, adapter: ENDLESS, step_seconds=0.01)
    adapters = ("pirate", "parrot")
    options = {"max_loras": 1}
    with (
        served(tmp_path, backend=backend, adapters=adapters, max_num_seqs=1, engine_options=options) as (url, engine),
        client(url) as ai,
    ):
        first = ai.completions.create(model="pirate", prompt="x", max_tokens=800, stream=True)
        next(first)
        second = ai.completions.create(model="parrot", prompt="x", max_tokens=800, stream=True)
        wait_until(lambda: engine.stats().num_waiting)
        began = time.time()
        text = httpx.get(f"{url}/metrics").text
        samples = {sample.name: sample for family in text_string_to_metric_families(text) for sample in family.samples}
        labels = {"model_name": "base", "engine": "0"}
        for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
            assert (samples[name].labels, samples[name].value) == (labels, 1)
        assert 0 < samples["vllm:kv_cache_usage_perc"].value <= 1
        info = samples["vllm:lora_requests_info"]
        assert info.labels == {"max_lora": "1", "running_lora_adapters": "pirate", "waiting_lora_adapters": "parrot"}
        assert began <= info.value <= time.time()
        assert samples["qlora_infer_up"].labels == {"engine": "base"}
        assert samples["process_resident_memory_bytes"].value > 0
        first.close()
        second.close()


def test_the_log_has_requests_and_no_prompts(tmp_path, caplog, monkeypatch):
    """A request is a line of JSON with its adapter, tokens and times; neither prompt, answer nor key is in any log."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with served(tmp_path) as (url, _), client(url) as ai:
        ai.chat.completions.create(model="pirate", messages=HELLO)
        list(ai.completions.create(model="base", prompt="ahoy there", stream=True))
        with pytest.raises(openai.NotFoundError):
            ai.completions.create(model="parrot", prompt="ahoy there")
        wire(url).get("/health")
    lines = [json.loads(record.message) for record in caplog.records if record.name == "qlora_infer.access"]
    chat, stream, unknown = lines
    assert (chat["path"], chat["status"], chat["adapter"]) == ("/v1/chat/completions", 200, "pirate@1")
    assert (chat["prompt_tokens"], chat["completion_tokens"]) == (27, 40)
    assert 0 < stream["seconds_to_first_byte"] <= stream["seconds"]
    assert (stream["adapter"], stream["prompt_tokens"]) == (None, 10)
    assert unknown["status"] == 404
    written = "\n".join(
        record.getMessage() for record in caplog.records if record.name.startswith(("qlora", "vllm", "uvicorn"))
    )
    assert not [secret for secret in ("ahoy", "says", KEY, ADMIN_KEY) if secret in written]


def test_requests_finish_when_the_server_is_told_to_end(tmp_path):
    """A stream that runs gets its last token, no new connection is taken, and readiness says so."""
    backend = ByteEngine(reply=lambda prompt, adapter: " ".join(["word"] * 50), step_seconds=0.02)
    with (
        fake_engine(backend=backend, engine_args={"max_num_seqs": 8}) as engine,
        running(engine) as (server, url),
        client(url) as ai,
        httpx.Client(base_url=url) as probe,
    ):
        assert probe.get("/health/ready").json() == {"running": True, "num_waiting": 0, "num_running": 0}
        stream = ai.completions.create(model="base", prompt="x", max_tokens=50, stream=True)
        text = next(stream).choices[0].text
        server.should_exit = True
        text += "".join(chunk.choices[0].text for chunk in stream)
        assert text == " ".join(["word"] * 50)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


def test_requests_that_do_not_finish_in_time_end_with_an_error(tmp_path):
    """After ``drain`` seconds the engine ends what is left, and its clients read why."""
    backend = ByteEngine(reply=lambda prompt, adapter: ENDLESS, step_seconds=0.02)
    with (
        fake_engine(backend=backend, engine_args={"max_num_seqs": 8}) as engine,
        running(engine, drain=0.3) as (server, url),
        client(url) as ai,
    ):
        stream = ai.completions.create(model="base", prompt="x", max_tokens=800, stream=True)
        next(stream)
        threading.Timer(0.1, lambda: setattr(server, "should_exit", True)).start()
        with pytest.raises(openai.APIError, match="closed"):
            list(stream)


def test_probes_tell_a_dead_engine(tmp_path):
    """``/health`` and both probes are 503 when the engine has died and is not started again."""
    backend = ByteEngine(reply=lambda prompt, adapter: ENDLESS, step_seconds=0.01)
    with served(tmp_path, backend=backend) as (url, _), client(url) as ai, wire(url) as http:
        stream = ai.completions.create(model="base", prompt="x", max_tokens=800, stream=True)
        next(stream)
        backend.die()
        with pytest.raises(openai.APIError):
            list(stream)
        assert {http.get(path).status_code for path in ("/health", "/health/live", "/health/ready")} == {503}
        with pytest.raises(openai.InternalServerError) as caught:
            ai.completions.create(model="base", prompt="x")
        assert caught.value.status_code == 503


def test_a_request_that_takes_too_long_is_504(tmp_path):
    """Its time includes waiting, and OpenAI's client does not try again."""
    backend = ByteEngine(reply=lambda prompt, adapter: ENDLESS, step_seconds=0.02)
    with served(tmp_path, backend=backend, timeout=0.3) as (url, _), client(url) as ai:
        with pytest.raises(openai.APIStatusError) as caught:
            ai.completions.create(model="base", prompt="x", max_tokens=800)
        assert (caught.value.status_code, caught.value.response.headers["x-should-retry"]) == (504, "false")


def test_arguments_of_vllm_s_server(tmp_path):
    """Further ones are vLLM's; those that would log prompts, trust requests or open other doors are refused."""
    with served(tmp_path, server_args={"enable_force_include_usage": True}) as (url, _), client(url) as ai:
        *_, last = ai.completions.create(model="base", prompt="a", stream=True)
        assert last.usage.prompt_tokens == 1
    from qlora_infer._vllm.openai.arguments import server_arguments

    for refused in ("enable_log_requests", "trust_request_chat_template", "api_key", "no_such_argument"):
        with pytest.raises(ValueError, match=refused):
            server_arguments(ByteEngine.vllm_config, model="m", served_model_names=["m"], given={refused: True})


def test_a_server_in_an_application_of_one_s_own(tmp_path):
    """The page's code mounts it below a path, where each route still needs its own key."""
    page = (Path(__file__).parents[2] / "docs" / "service.md").read_text()
    names = {}
    exec(re.search(r"```python\n(from qlora_infer.serve.application.*?)```", page, re.DOTALL)[1], names)

    async def ask(engine):
        app = FastAPI()
        await names["mount"](app, engine)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://host/llm") as http:
            http.headers["Authorization"] = f"Bearer {KEY}"
            answer = await http.post("/v1/completions", json={"model": "base", "prompt": "a"})
            refused = [(await http.get("/adapters")).status_code, (await http.delete("/adapters/x")).status_code]
            del http.headers["Authorization"]
            return (
                answer.json(),
                refused,
                [(await http.get(path)).status_code for path in ("/health/ready", "/v1/models")],
            )

    with fake_engine(backend=ByteEngine()) as engine:
        answer, refused, opened = asyncio.run(ask(engine))
    assert answer["choices"][0]["text"] == "You said: a"
    assert refused == [403, 403]
    assert opened == [200, 401]
