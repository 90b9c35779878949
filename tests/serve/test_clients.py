"""LiteLLM, LangChain and OpenAI's client in Node speak to the server, on the fake engine."""

import json

import pytest

pytest.importorskip("vllm.entrypoints.launchers")
pytest.importorskip("openai")

import openai
from other_clients import ask_in_node, langchain, litellm
from served import ENDLESS, HELLO, KEY, ByteEngine, served

pytestmark = pytest.mark.usefixtures("byte_model")

ANSWER = "pirate says: user: ahoy there\nassistant:"
TOOL = {
    "type": "function",
    "function": {
        "name": "greet",
        "description": "Greet somebody.",
        "parameters": {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]},
    },
}
CALL = '<tool_call>\n{"name": "greet", "arguments": {"age": 7}}\n</tool_call>'


@pytest.fixture
def calling(tmp_path):
    """The URL of a server whose answers are tool calls."""
    backend = ByteEngine(reply=lambda prompt, adapter: CALL)
    with served(tmp_path, backend=backend, server_args={"tool_call_parser": "hermes"}) as (url, _):
        yield url


def test_litellm_gets_answers_streams_and_errors(one_server):
    """Text, usage and chunks are those of the adapter, and an unknown adapter is LiteLLM's own NotFoundError."""
    client = litellm()
    asked = {"messages": HELLO, "api_base": f"{one_server}/v1", "api_key": KEY, "num_retries": 0, "timeout": 60}
    reply = client.completion(model="openai/pirate@1", **asked)
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == (ANSWER, "stop")
    assert reply.usage.completion_tokens == len(ANSWER)
    chunks = client.completion(model="openai/pirate", stream=True, **asked)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    with pytest.raises(client.NotFoundError, match="no adapter is loaded as 'parrot'"):
        client.completion(model="openai/parrot", **asked)


def test_litellm_calls_tools(calling):
    """A tool call in the answer is one in LiteLLM's response."""
    asked = {"api_base": f"{calling}/v1", "api_key": KEY, "tools": [TOOL], "timeout": 60}
    reply = litellm().completion(model="openai/pirate", messages=HELLO, **asked)
    (call,) = reply.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("greet", {"age": 7})


def test_litellm_s_router_knows_a_full_queue(tmp_path):
    """A 429 is LiteLLM's RateLimitError, by which its router tries another replica."""
    client = litellm()
    backend = ByteEngine(reply=lambda prompt, adapter: ENDLESS, step_seconds=0.01)
    options = {"max_num_seqs": 1, "engine_options": {"max_waiting": 1}}
    with served(tmp_path, backend=backend, **options) as (url, _), pytest.raises(client.RateLimitError):
        client.text_completion(
            model="text-completion-openai/base",
            prompt=["x"] * 40,
            max_tokens=800,
            api_base=f"{url}/v1",
            api_key=KEY,
            num_retries=0,
            max_retries=0,
        )


def test_langchain_gets_answers_streams_and_errors(one_server):
    """``ChatOpenAI`` has text and usage, streamed or not, and raises OpenAI's own errors."""
    pirate = langchain(one_server, "pirate")
    message = pirate.invoke("ahoy there")
    assert (message.content, message.usage_metadata["output_tokens"]) == (ANSWER, len(ANSWER))
    assert message.response_metadata["finish_reason"] == "stop"
    assert "".join(chunk.content for chunk in pirate.stream("ahoy there")) == ANSWER
    assert [each.content for each in pirate.batch(["ahoy there"] * 3)] == [ANSWER] * 3
    with pytest.raises(openai.NotFoundError):
        langchain(one_server, "parrot").invoke("ahoy")


def test_langchain_calls_tools_and_follows_schemas(calling, tmp_path):
    """``bind_tools`` returns calls with parsed arguments, and ``with_structured_output`` the object of a JSON schema."""
    (call,) = langchain(calling, "pirate").bind_tools([TOOL]).invoke("ahoy").tool_calls
    assert (call["name"], call["args"]) == ("greet", {"age": 7})
    schema = {"title": "person", **TOOL["function"]["parameters"]}
    backend = ByteEngine(reply=lambda prompt, adapter: '{"age": 7}')
    with served(tmp_path / "other", backend=backend) as (url, _):
        person = langchain(url, "pirate").with_structured_output(schema, method="json_schema").invoke("ahoy")
        assert person == {"age": 7}
        assert backend.requests[-1].sampling_params.structured_outputs.json == TOOL["function"]["parameters"]


def test_openai_s_client_in_node_gets_answers_streams_and_errors(one_server):
    """Text, usage, chunks, the list of models and the class of an error are the same in JavaScript."""
    found = ask_in_node(one_server, "pirate", "ahoy there", 200)
    assert found == {
        "text": ANSWER,
        "usage": len(ANSWER),
        "streamed": ANSWER,
        "models": ["base", "pirate"],
        "error": {"class": "NotFoundError", "status": 404, "type": "AdapterNotLoadedError"},
    }
