"""``serve`` on the real vLLM: one engine, spoken to by OpenAI's own client."""

import json

import httpx
import openai
import pytest

pytest.importorskip("vllm.entrypoints.launchers")

from other_clients import ask_in_node, langchain, litellm
from served import ADMIN_KEY, KEY, running, wait_until

from engine.conftest import unload_others
from qlora_infer.demo import demo_adapters
from qlora_infer.serve.allowed import AllowedSources

GREEDY = {"temperature": 0.0, "max_tokens": 24}
PROMPT = "my name is"
HELLO = [{"role": "user", "content": PROMPT}]
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
#: "strict" makes vLLM hold the model to the schema; a model of this size writes no sound JSON by itself.
TOOL = {
    "type": "function",
    "function": {"name": "greet", "description": "Greet somebody.", "parameters": SCHEMA, "strict": True},
}


@pytest.fixture(scope="module")
def url(engines):
    """The URL of a server on the shared engine."""
    engine = engines.get("awq")
    allowed = AllowedSources(demo_adapters()["pirate"].parent)
    with running(engine, allowed=allowed, server_args={"tool_call_parser": "hermes"}) as (_, url):
        yield url


@pytest.fixture
def ai(awq, url):
    """OpenAI's client of that server."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
        yield client


@pytest.mark.parametrize("name", ["pirate", "json", None])
def test_the_server_answers_as_the_engine_does(awq, ai, name):
    """Texts, token counts and streams over HTTP are those of generate and chat, for the base and for adapters."""
    (completed,) = awq.generate(PROMPT, GREEDY, adapter=name, use_tqdm=False)
    (chatted,) = awq.chat(HELLO, GREEDY, adapter=name, use_tqdm=False)
    reply = ai.completions.create(model=name or "base", prompt=PROMPT, **GREEDY)
    assert reply.choices[0].text == completed.text
    assert reply.usage.prompt_tokens == len(completed.prompt_token_ids)
    assert reply.usage.completion_tokens == completed.num_tokens
    chat = ai.chat.completions.create(model=name or "base", messages=HELLO, **GREEDY)
    assert chat.choices[0].message.content == chatted.text
    assert chat.usage.prompt_tokens == len(chatted.prompt_token_ids)
    chunks = list(ai.chat.completions.create(model=name or "base", messages=HELLO, stream=True, **GREEDY))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == chatted.text
    assert chunks[-1].choices[0].finish_reason == chatted.finish_reason


def test_other_clients_get_the_engine_s_answers(awq, ai, url):
    """LiteLLM, LangChain and OpenAI's client in Node read the adapter's text, whole and as a stream."""
    (chatted,) = awq.chat(HELLO, GREEDY, adapter="pirate", use_tqdm=False)
    asked = {"model": "openai/pirate", "messages": HELLO, "api_base": f"{url}/v1", "api_key": KEY, **GREEDY}
    assert litellm().completion(**asked).choices[0].message.content == chatted.text
    model = langchain(url, "pirate", temperature=0.0, max_tokens=GREEDY["max_tokens"])
    assert model.invoke(PROMPT).content == chatted.text
    assert "".join(chunk.content for chunk in model.stream(PROMPT)) == chatted.text
    found = ask_in_node(url, "pirate", PROMPT, GREEDY["max_tokens"])
    assert found["text"] == found["streamed"] == chatted.text
    assert found["usage"] == chatted.num_tokens


def test_several_completions_with_log_probabilities(awq, ai):
    """``n`` completions differ, and the log-probabilities are those of the engine."""
    reply = ai.completions.create(model="base", prompt="Once upon a time", n=3, temperature=1.5, seed=1, max_tokens=12)
    assert len({choice.text for choice in reply.choices}) > 1
    (output,) = awq.generate(PROMPT, {**GREEDY, "logprobs": 2}, adapter="pirate", use_tqdm=False)
    reply = ai.completions.create(model="pirate", prompt=PROMPT, logprobs=2, **GREEDY)
    assert reply.choices[0].logprobs.token_logprobs == pytest.approx(output.completions[0].token_logprobs, abs=1e-4)
    chat = ai.chat.completions.create(model="pirate", messages=HELLO, logprobs=True, top_logprobs=3, **GREEDY)
    content = chat.choices[0].logprobs.content
    assert "".join(token.token for token in content).startswith(chat.choices[0].message.content)
    assert {len(token.top_logprobs) for token in content} == {3}


@pytest.mark.parametrize("name", ["base", "pirate"])
def test_a_json_schema_is_followed(ai, name):
    """An answer with a schema is JSON of it, whatever the adapter was trained on, streamed or not."""
    asked = {
        "model": name,
        "messages": [{"role": "user", "content": "Write a name and an age as JSON."}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}},
        "temperature": 0.0,
        "max_tokens": 80,
    }
    person = json.loads(ai.chat.completions.create(**asked).choices[0].message.content)
    assert set(person) == {"name", "age"}
    chunks = ai.chat.completions.create(**asked, stream=True)
    assert json.loads("".join(chunk.choices[0].delta.content or "" for chunk in chunks)) == person


def test_a_tool_is_called(ai):
    """A named tool is called with arguments of its schema, streamed or not."""
    asked = {
        "model": "base",
        "messages": [{"role": "user", "content": "Greet Ann, who is 7."}],
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "greet"}},
        "temperature": 0.0,
        "max_tokens": 200,
    }
    (call,) = ai.chat.completions.create(**asked).choices[0].message.tool_calls
    assert call.function.name == "greet"
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"name", "age"}
    pieces = [
        piece.function
        for chunk in ai.chat.completions.create(**asked, stream=True)
        for piece in chunk.choices[0].delta.tool_calls or ()
    ]
    assert json.loads("".join(piece.arguments or "" for piece in pieces)) == arguments


def test_a_prompt_that_is_too_long_is_400(ai):
    """Before its response begins, streamed or not."""
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="context length"):
            ai.completions.create(model="base", prompt="word " * 600, stream=stream)


def test_a_load_and_a_hang_up_over_http(awq, ai, url):
    """An adapter that is loaded over HTTP answers as the engine's; a client that leaves its stream frees the request."""
    loaded = httpx.post(
        f"{url}/v1/load_lora_adapter", json={"lora_name": "matey", "lora_path": "pirate"}, headers=ADMIN, timeout=120
    )
    assert loaded.status_code == 200, loaded.text
    texts = [
        ai.completions.create(model=name, prompt=PROMPT, **GREEDY).choices[0].text for name in ("pirate", "matey@1")
    ]
    assert texts[0] == texts[1]
    stream = ai.completions.create(model="matey", prompt="Once upon a time", max_tokens=400, stream=True)
    next(stream)
    stream.close()
    wait_until(lambda: awq.stats().num_running == awq.stats().num_waiting == 0, 60)
    unload_others(awq)


def test_a_router_reads_vllm_s_names_and_no_others_of_vllm_s(awq, ai, url):
    """The gauges of vLLM's own engine, which stay 0 here, are not beside ours."""
    ai.completions.create(model="pirate", prompt=PROMPT, **GREEDY)
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    names = [line.split()[2] for line in lines if line.startswith("# TYPE vllm:")]
    assert len(names) == len(set(names)) == 7
    (generated,) = [line for line in lines if line.startswith("vllm:generation_tokens_total")]
    assert float(generated.split()[-1]) > 0
