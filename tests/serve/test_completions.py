"""vLLM's own OpenAI application on this engine's requests, spoken to by OpenAI's client, on the fake engine."""

import contextlib
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("vllm.entrypoints.launchers")
pytest.importorskip("openai")

import anthropic
import openai
from served import ENDLESS, HELLO, KEY, ByteEngine, client, served, wait_until, wire

pytestmark = pytest.mark.usefixtures("byte_model")


def test_openai_s_client_gets_answers_of_base_and_adapter(tmp_path):
    """``model`` is the base model, an adapter, or a version of it; text, usage and finish_reason are right."""
    with served(tmp_path) as (url, _), client(url) as ai:
        reply = ai.chat.completions.create(model="base", messages=HELLO)
        assert (reply.object, reply.model) == ("chat.completion", "base")
        assert reply.choices[0].message.role == "assistant"
        assert reply.choices[0].message.content == "You said: user: ahoy there\nassistant:"
        assert reply.choices[0].finish_reason == "stop"
        assert reply.usage.prompt_tokens == len("user: ahoy there\nassistant:")
        assert reply.usage.completion_tokens == len(reply.choices[0].message.content)
        reply = ai.completions.create(model="pirate@1", prompt="ahoy", max_tokens=2, temperature=0.0, stop=["x"])
        assert (reply.object, reply.choices[0].text, reply.choices[0].finish_reason) == (
            *("text_completion", "pirate says:", "length"),
        )
        assert reply.model == "pirate@1"


def test_openai_s_client_streams(tmp_path):
    """Chunks add up to the text, the last one has the reason, and usage comes behind them when it is asked for."""
    with served(tmp_path, backend=ByteEngine(step_seconds=0.01)) as (url, _), client(url) as ai:
        chunks = list(
            ai.chat.completions.create(
                model="pirate", messages=HELLO, stream=True, stream_options={"include_usage": True}
            )
        )
        *words, last = chunks
        text = "".join(chunk.choices[0].delta.content or "" for chunk in words)
        assert text == "pirate says: user: ahoy there\nassistant:"
        assert len(words) > 2
        assert [chunk.choices[0].finish_reason for chunk in words] == [None] * (len(words) - 1) + ["stop"]
        assert (last.choices, last.usage.completion_tokens) == ([], len(text))
        chunks = list(ai.completions.create(model="base", prompt="a b", stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == "You said: a b"


def test_several_completions_and_prompts_in_one_request(tmp_path):
    """``n``, lists of prompts and prompts of token ids have their own choices, streamed or not, in one batch."""
    with served(tmp_path) as (url, _), client(url) as ai:
        reply = ai.completions.create(model="base", prompt=["a b", "c d"], n=2)
        assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
        assert [choice.text for choice in reply.choices] == ["You said: a b"] * 2 + ["You said: c d"] * 2
        texts = {}
        for chunk in ai.completions.create(model="pirate", prompt=["a b", "c d"], n=2, stream=True):
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
        assert texts == dict(enumerate(["pirate says: a b"] * 2 + ["pirate says: c d"] * 2))
        tokens = wire(url).post("/tokenize", json={"model": "pirate", "prompt": "ahoy"}).json()["tokens"]
        reply = ai.completions.create(model="base", prompt=tokens)
        assert (reply.choices[0].text, reply.usage.prompt_tokens) == ("You said: ahoy", 4)


def test_log_probabilities(tmp_path):
    """Each token has its own, in chats and completions, and a stream's add up to those of the whole."""
    with served(tmp_path) as (url, _), client(url) as ai:
        asked = {"model": "pirate", "messages": HELLO, "logprobs": True, "top_logprobs": 1, "max_tokens": 2}
        content = ai.chat.completions.create(**asked).choices[0].logprobs.content
        assert "".join(token.token for token in content) == "pirate says:"
        assert {token.logprob for token in content} == {0.0}
        parts = ai.chat.completions.create(**asked, stream=True)
        streamed = [
            token for part in parts for choice in part.choices if choice.logprobs for token in choice.logprobs.content
        ]
        assert [token.token for token in streamed] == [token.token for token in content]
        reply = ai.completions.create(model="base", prompt="a", logprobs=1, echo=True, max_tokens=2)
        assert reply.choices[0].text == "aYou said:"
        assert len(reply.choices[0].logprobs.tokens) == len("aYou said:")


def test_a_client_that_hangs_up_frees_its_request(tmp_path):
    """The request of a closed connection is cancelled, streamed or not, queued or running."""
    backend = ByteEngine(reply=lambda prompt, adapter: ENDLESS, step_seconds=0.01)
    with served(tmp_path, backend=backend, max_num_seqs=1) as (url, engine):
        with client(url) as ai:
            stream = ai.completions.create(model="pirate", prompt="x", max_tokens=800, stream=True)
            next(stream)
            assert engine.stats().num_running == 1
            stream.close()
            wait_until(lambda: engine.stats().num_running == 0)
        for _ in range(2):
            with pytest.raises(openai.APITimeoutError), client(url, timeout=0.3) as ai:
                ai.completions.create(model="base", prompt="x", max_tokens=800)
        wait_until(lambda: engine.stats().num_running == engine.stats().num_waiting == 0)
        counts = engine.stats().adapters
        assert (counts["pirate"].errors, counts[None].errors) == (
            {"RequestCancelledError": 1},
            {"RequestCancelledError": 2},
        )


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_429_also_for_a_stream(tmp_path, stream):
    """A request that finds no room is refused before its response begins, with the time to stay away."""
    backend = ByteEngine(reply=lambda prompt, adapter: ENDLESS, step_seconds=0.01)
    with (
        served(tmp_path, backend=backend, max_num_seqs=1, engine_options={"max_waiting": 1}) as (url, engine),
        client(url) as ai,
        contextlib.ExitStack() as open_streams,
    ):
        for _ in range(20):
            if engine.stats().num_waiting:
                break
            part = ai.completions.create(model="base", prompt="x", max_tokens=800, stream=True)
            open_streams.callback(part.close)
            time.sleep(0.05)
        with pytest.raises(openai.RateLimitError) as caught:
            ai.completions.create(model="pirate", prompt="x", stream=stream)
        assert caught.value.response.headers["retry-after"] == "1"
        assert caught.value.body["type"] == "QueueFullError"


def test_a_request_that_finds_room_for_some_of_its_prompts_leaves_nothing(tmp_path):
    """What was queued of it before the queue was full is cancelled."""
    backend = ByteEngine(reply=lambda prompt, adapter: ENDLESS, step_seconds=0.01)
    options = {"max_waiting": 2}
    with served(tmp_path, backend=backend, max_num_seqs=1, engine_options=options) as (url, engine), client(url) as ai:
        with pytest.raises(openai.RateLimitError):
            ai.completions.create(model="pirate", prompt=["x"] * 40, max_tokens=800)
        wait_until(lambda: engine.stats().num_running == engine.stats().num_waiting == 0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n": 9}, "n is at most 8"),
        ({"priority": -1}, "priority must be at least 0"),
        ({"cache_salt": "x"}, "cache_salt"),
        ({"temperature": -3}, "temperature"),
        ({"prompt": "x" * 9000}, "context length"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_cannot_be_run_is_400(one_server, fields, words, stream):
    """What this server does not do is refused before the response begins, and not ignored."""
    reply = wire(one_server).post("/v1/completions", json={"model": "base", "prompt": "a", "stream": stream, **fields})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, 400), reply.text
    assert words in reply.json()["error"]["message"]


def test_requests_go_through_this_library_s_queue(tmp_path):
    """A request of a rare adapter is not served behind a flood of another's, as it is in plain vLLM."""
    backend = ByteEngine(reply=lambda prompt, adapter: "a b c d e", step_seconds=0.02)
    options = {"max_loras": 1}
    with (
        served(tmp_path, backend=backend, adapters=("busy", "rare"), max_num_seqs=2, engine_options=options) as (
            url,
            _,
        ),
        client(url) as ai,
        ThreadPoolExecutor(41) as pool,
    ):
        ended = []

        def ask(name):
            ai.completions.create(model=name, prompt="x")
            ended.append(name)

        flood = [pool.submit(ask, "busy") for _ in range(40)]
        wait_until(lambda: ended)
        rare = pool.submit(ask, "rare")
        for future in [*flood, rare]:
            future.result()
    assert ended.index("rare") < 30


def test_other_apis_of_vllm_s_server(one_server):
    """OpenAI's responses, Anthropic's messages, and vLLM's own tokens answer with the adapter that is named."""
    with client(one_server) as ai:
        reply = ai.responses.create(model="pirate", input="ahoy")
        assert reply.output_text == "pirate says: user: ahoy\nassistant:"
        assert reply.model == "pirate"
    with anthropic.Anthropic(base_url=one_server, api_key=KEY, max_retries=0) as claude:
        message = claude.messages.create(model="pirate", max_tokens=64, messages=HELLO)
        assert message.content[0].text == "pirate says: user: ahoy there\nassistant:"
    with wire(one_server) as http:
        tokens = http.post("/tokenize", json={"model": "pirate", "messages": HELLO}).json()
        assert tokens["count"] == len("user: ahoy there\nassistant:")
        assert http.post("/detokenize", json={"model": "base", "tokens": tokens["tokens"]}).json()["prompt"] == (
            "user: ahoy there\nassistant:"
        )


def test_a_dead_engine_is_503_and_comes_back(tmp_path):
    """A request whose engine dies is told so; with restart="on-failure", later ones are answered."""
    backend = ByteEngine(reply=lambda prompt, adapter: ENDLESS, step_seconds=0.01)
    with (
        served(tmp_path, backend=backend, engine_options={"restart": "on-failure"}) as (url, engine),
        client(url) as ai,
    ):
        stream = ai.completions.create(model="pirate", prompt="x", max_tokens=800, stream=True)
        next(stream)
        backend.die()
        with pytest.raises(openai.APIError, match="killed"):
            list(stream)
        assert ai.completions.create(model="pirate", prompt="x", max_tokens=2).choices[0].text == "word word"
        assert engine.stats().num_restarts == 1
        assert wire(url).get("/health").status_code == 200


def test_the_code_of_the_page_runs(one_server, capsys):
    """The client's code of docs/service.md runs, against a server with an adapter named pirate."""
    page = (Path(__file__).parents[2] / "docs" / "service.md").read_text()
    code = re.search(r"```python\n(import openai.*?)```", page, re.DOTALL)[1]
    exec(compile(code.replace("http://127.0.0.1:8000", one_server), "docs/service.md", "exec"), {})
    assert "pirate says: user: Where is the treasure?" in capsys.readouterr().out


@pytest.mark.parametrize("choice", ["auto", {"type": "function", "function": {"name": "greet"}}])
def test_tools_are_called(tmp_path, choice):
    """A call in the answer is one in the response, streamed or not, and a strict tool's schema reaches the engine."""
    schema = {"type": "object", "properties": {"age": {"type": "integer", "maximum": 99}}, "required": ["age"]}
    tool = {"type": "function", "function": {"name": "greet", "parameters": schema, "strict": True}}
    reply = '<tool_call>\n{"name": "greet", "arguments": {"age": 7}}\n</tool_call>'
    backend = ByteEngine(reply=lambda prompt, adapter: reply)
    asked = {"model": "pirate", "messages": HELLO, "tools": [tool], "tool_choice": choice}
    with served(tmp_path, backend=backend, server_args={"tool_call_parser": "hermes"}) as (url, _), client(url) as ai:
        (call,) = ai.chat.completions.create(**asked).choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("greet", {"age": 7})
        pieces = [
            piece.function
            for chunk in ai.chat.completions.create(**asked, stream=True)
            for piece in chunk.choices[0].delta.tool_calls or ()
        ]
        assert "".join(piece.name or "" for piece in pieces) == "greet"
        assert json.loads("".join(piece.arguments or "" for piece in pieces)) == {"age": 7}
    for request in backend.requests:
        assert '"maximum": 99' in request.sampling_params.structured_outputs.structural_tag


def test_a_json_schema_reaches_the_engine(tmp_path):
    """A response's format is in the sampling parameters, whichever adapter answers."""
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}}
    backend = ByteEngine()
    with served(tmp_path, backend=backend) as (url, _), client(url) as ai:
        for name in ("base", "pirate"):
            form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
            ai.chat.completions.create(model=name, messages=HELLO, response_format=form)
            assert backend.requests[-1].sampling_params.structured_outputs.json == schema
