"""Adapters of a server: named, loaded on first use, loaded and replaced over HTTP, and refused with every reason."""

import json
import threading

import pytest

pytest.importorskip("vllm.entrypoints.launchers")
pytest.importorskip("openai")

import openai
from served import HELLO, ByteEngine, admin, client, served, wait_until, wire

from qlora_infer.testing import TINY_MODEL, write_adapter

pytestmark = pytest.mark.usefixtures("byte_model")

TEMPLATE = "{% for message in messages %}<{{ message.role }}> {{ message.content }} {% endfor %}<answer>"


def write_broken_adapter(folder):
    """One whose files are sound, and which has a module and a rank that this model does not take."""
    modules = {
        "model.layers.0.mlp.down_proj": TINY_MODEL["model.layers.0.mlp.down_proj"],
        "model.layers.0.nowhere": (64, 64),
    }
    return write_adapter(folder, rank=100, modules=modules)


def test_models_are_listed_with_parent_and_version(tmp_path):
    """``/v1/models`` has the base model, and each loaded adapter with its parent, version, digest and source."""
    with served(tmp_path) as (url, engine), client(url) as ai:
        base, pirate = ai.models.list().data
        assert (base.id, base.parent, base.max_model_len) == ("base", None, 8192)
        assert (pirate.id, pirate.parent, pirate.version) == ("pirate", "base", 1)
        assert pirate.digest == engine.adapters["pirate"].digest
        assert pirate.root == str(tmp_path / "pirate")


def test_a_known_adapter_is_loaded_when_it_is_first_named(tmp_path):
    """A folder's adapter needs no load: its first request loads it, streamed or not, and several at once do so once."""
    backend = ByteEngine(load_seconds=0.1)
    with served(tmp_path, backend=backend, adapters=()) as (url, _), client(url) as ai:
        write_adapter(tmp_path / "late")
        write_adapter(tmp_path / "later")
        answers = []
        threads = [
            threading.Thread(target=lambda: answers.append(ai.chat.completions.create(model="late", messages=HELLO)))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {answer.choices[0].message.content for answer in answers} == {"late says: user: ahoy there\nassistant:"}
        assert backend.loads == ["late"]
        chunks = ai.completions.create(model="later", prompt="a", stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == "later says: a"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "name", ["parrot", "pirate@7", "../pirate", "/etc", "me", "http://127.0.0.1:1/x", "you/pirate", "a\0b"]
)
def test_an_unknown_name_is_404(one_server, name, stream):
    """Neither a name that nobody knows, nor a path, nor a source that is not allowed reaches anything."""
    reply = wire(one_server).post("/v1/completions", json={"model": name, "prompt": "a", "stream": stream})
    assert (reply.status_code, reply.json()["error"]["type"]) == (404, "AdapterNotLoadedError"), reply.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_broken_known_adapter_is_422_with_every_reason(tmp_path, stream):
    """Its request fails with all that is wrong, before the response begins, and the others go on."""
    with served(tmp_path) as (url, _), client(url) as ai:
        write_broken_adapter(tmp_path / "broken")
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            ai.completions.create(model="broken", prompt="a", stream=stream)
        assert caught.value.body["type"] == "IncompatibleAdapterError"
        assert len(caught.value.body["reasons"]) >= 2
        assert ai.completions.create(model="pirate", prompt="a").choices[0].text == "pirate says: a"


def test_vllm_s_routes_load_and_unload(tmp_path):
    """``/v1/load_lora_adapter`` does the checked load, and answers as vLLM's does."""
    with served(tmp_path) as (url, engine), admin(url) as http, client(url) as ai:
        write_adapter(tmp_path / "v2", seed=2)
        body = {"lora_name": "matey", "lora_path": "v2"}
        reply = http.post("/v1/load_lora_adapter", json=body)
        assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'matey' added successfully.")
        assert ai.completions.create(model="matey", prompt="a").choices[0].text == "matey says: a"
        again = http.post("/v1/load_lora_adapter", json=body)
        assert (again.status_code, "load_inplace" in again.text) == (400, True)
        replaced = http.post(
            "/v1/load_lora_adapter", json={**body, "lora_path": str(tmp_path / "pirate"), "load_inplace": True}
        )
        assert (replaced.status_code, engine.adapters["matey"].version) == (200, 2)
        conflict = http.post("/v1/load_lora_adapter", json={**body, "load_inplace": True, "expect": 1})
        assert (conflict.status_code, conflict.json()["error"]["type"]) == (409, "AdapterConflictError")
        reply = http.post("/v1/unload_lora_adapter", json={"lora_name": "matey"})
        assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'matey' removed successfully.")
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "matey"}).status_code == 404
        broken = write_broken_adapter(tmp_path / "broken")
        reply = http.post("/v1/load_lora_adapter", json={"lora_name": "broken", "lora_path": str(broken)})
        assert (reply.status_code, len(reply.json()["error"]["reasons"]) >= 2) == (422, True)
        reply = http.post("/v1/load_lora_adapter", json={"lora_name": "base", "lora_path": "v2"})
        assert (reply.status_code, set(engine.adapters)) == (400, {"pirate"})


def test_adapters_are_replaced_rolled_back_and_pinned(tmp_path):
    """This library's routes do what its engine does, with the version that is expected."""
    with served(tmp_path) as (url, engine), admin(url) as http, client(url) as ai:
        write_adapter(tmp_path / "v2", seed=2)
        reply = http.put("/adapters/pirate", json={"source": "v2", "expect": 1, "share": 2.0})
        assert (reply.status_code, reply.json()["version"], reply.json()["share"]) == (200, 2, 2.0)
        assert http.put("/adapters/pirate", json={"source": "v2", "expect": 1}).status_code == 409
        assert [one["version"] for one in http.get("/adapters/pirate/versions").json()] == [2, 1]
        assert ai.completions.create(model="pirate@1", prompt="a").model == "pirate@1"
        assert http.post("/adapters/pirate/rollback").json()["version"] == 1
        assert http.get("/adapters").json()["pirate"]["version"] == 1
        assert http.put("/adapters/pirate/pin").status_code == 204
        assert http.delete("/adapters/pirate/pin").status_code == 204
        assert http.delete("/adapters/pirate").status_code == 204
        assert http.delete("/adapters/pirate").status_code == 404
        assert http.put("/adapters/pirate", json={"source": "v2", "shares": 1}).status_code == 400
        assert engine.adapters == {}


@pytest.mark.parametrize(
    "source", ["..", "../outside", "/etc", "a/../../outside", "link", "you/pirate", "me/../you/x", "file:///etc", "."]
)
def test_nothing_leaves_the_folder(tmp_path, source):
    """Neither ``..``, nor a link, an absolute path or a source that is not allowed is read."""
    write_adapter(tmp_path / "outside")
    folder = tmp_path / "adapters"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "outside")
    with served(folder) as (url, engine), admin(url) as http:
        reply = http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": source})
        assert (reply.status_code, "x" in engine.adapters) in ((403, False), (422, False)), reply.text
        reply = wire(url).post("/v1/completions", json={"model": "link", "prompt": "a"})
        assert reply.status_code == 404
        assert set(engine.adapters) == {"pirate"}


def test_a_request_keeps_the_version_that_it_found(tmp_path):
    """An adapter that is replaced and unloaded while a request streams answers to its end."""
    backend = ByteEngine(reply=lambda prompt, adapter: " ".join(["word"] * 60), step_seconds=0.01)
    with served(tmp_path, backend=backend) as (url, engine), admin(url) as http, client(url) as ai:
        stream = ai.completions.create(model="pirate", prompt="a", max_tokens=60, stream=True)
        text = next(stream).choices[0].text
        assert http.delete("/adapters/pirate").status_code == 204
        text += "".join(chunk.choices[0].text for chunk in stream)
        assert text == " ".join(["word"] * 60)
        assert engine.adapters == {}
        version = backend.requests[0].adapter
        wait_until(lambda: version.freed)  # nothing holds it any more


def test_an_adapter_s_own_template_and_defaults(tmp_path):
    """A chat is written with the template that the adapter carries, in another process, and sampled as it says."""
    folder = write_adapter(tmp_path / "own")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.25, "top_k": 7}))
    backend = ByteEngine()
    with served(tmp_path, backend=backend) as (url, _), client(url) as ai:
        reply = ai.chat.completions.create(model="own", messages=HELLO)
        assert reply.choices[0].message.content == "own says: <user> ahoy there <answer>"
        params = backend.requests[-1].sampling_params
        assert (params.temperature, params.top_k) == (0.25, 7)
        ai.chat.completions.create(model="own", messages=HELLO, temperature=0.5)
        assert (backend.requests[-1].sampling_params.temperature, backend.requests[-1].sampling_params.top_k) == (
            0.5,
            7,
        )
        ai.chat.completions.create(model="pirate", messages=HELLO)
        assert backend.requests[-1].sampling_params.top_k != 7


def test_tools_in_an_adapter_s_own_template(tmp_path):
    """Tools, calls, their results, further variables and parts of a message reach the template that the adapter carries."""
    template = (
        "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}{{ mood }}|"
        "{% for message in messages %}{{ message.role }} {{ message.content or '' }}"
        "{% for call in message.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments.x }}){% endfor %}|"
        "{% endfor %}"
    )
    folder = write_adapter(tmp_path / "own")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 3}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "ask"}]},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "4"},
    ]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    asked = {"messages": messages, "tools": [tool], "tool_choice": "none"}
    more = {"chat_template_kwargs": {"mood": "glad"}}
    backend = ByteEngine()
    with served(tmp_path, backend=backend) as (url, _), client(url) as ai:
        reply = ai.chat.completions.create(model="own", **asked, extra_body=more)
        assert reply.choices[0].message.content == "own says: [f]glad|user ask|assistant f(3)|tool 4|"


def test_a_hostile_template_harms_its_own_request_only(tmp_path):
    """A template that never ends is stopped, its request is refused, and the next one is answered."""
    folder = write_adapter(tmp_path / "hostile")
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": endless}))
    with served(tmp_path) as (url, _), client(url) as ai:
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            ai.chat.completions.create(model="hostile", messages=HELLO)
        assert caught.value.body["type"] == "UnsafeAdapterError"
        assert ai.completions.create(model="pirate", prompt="a").choices[0].text == "pirate says: a"
