"""Ray Data and Ray Serve, on a real Ray of this machine, with two replicas of the fake engine."""

import asyncio
import os
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("httpx")
pytest.importorskip("ray.data")
pytest.importorskip("ray.serve")

import httpx
import pyarrow as pa
import ray
from doc_blocks import run_python
from ray import serve
from ray.data import ActorPoolStrategy
from ray_cluster import cluster

from qlora_infer import (
    AdapterNotFoundError,
    AdapterNotLoadedError,
    EngineDeadError,
    IncompatibleAdapterError,
    RequestRejectedError,
    errors,
)
from qlora_infer.http_status import http_status
from qlora_infer.ray import AdapterServer, GenerationStage, build_app
from qlora_infer.ray.stage import _without_nulls
from qlora_infer.serve.settings import Settings
from qlora_infer.testing import FakeEngine, fake_engine, write_adapter

pytestmark = pytest.mark.timeout(300)

SMALL = {"num_cpus": 0.4}
HEADER = "serve_multiplexed_model_id"


@pytest.fixture(scope="module")
def url():
    with cluster(num_gpus=2) as url:  # in name only: the page asks for them
        yield url


@pytest.fixture
def adapters(tmp_path):
    return {name: write_adapter(tmp_path / name, seed=seed) for seed, name in enumerate(["pirate", "poet", "chef"])}


def factory(known_adapters, **how):
    """A factory of engines whose answers say which adapter spoke; pickled by value, as users' own are."""

    def make_engine():
        return fake_engine(backend=FakeEngine(**how), max_model_len=50, known_adapters=known_adapters)

    return make_engine


# Ray Data ---------------------------------------------------------------------------------------------------------


def answered(dataset, engine, *, num_actors=1, batch_size=4, **how):
    """The rows of a dataset after the stage."""
    return dataset.map_batches(
        GenerationStage,
        fn_constructor_args=(engine,),
        fn_constructor_kwargs=how,
        batch_format="pyarrow",
        batch_size=batch_size,
        compute=ActorPoolStrategy(size=num_actors),
        **SMALL,
    ).take_all()


def test_a_dataset_is_answered_row_by_row_with_its_adapters(url, adapters, tmp_path):
    """Each row gets the text of its adapter and its own sampling parameters, in its place, and both replicas answer."""
    seen = tmp_path / "seen"
    seen.mkdir()

    def make_engine():
        def reply(prompt, adapter):
            # The first replica waits for the other, so that it cannot answer everything before that has started.
            (seen / str(os.getpid())).touch()
            while len(list(seen.iterdir())) < 2:
                time.sleep(0.01)
            return f"{adapter} says: {prompt}"

        return fake_engine(backend=FakeEngine(reply=reply), known_adapters=adapters)

    names = [None, "pirate", "poet", ""]
    rows = [
        {
            "id": i,
            "prompt": f"number {i}",
            "adapter": names[i % 4],
            "sampling_params": {"max_tokens": 3 if i % 5 else 9},
        }
        for i in range(64)
    ]
    rows[7]["sampling_params"] = None
    dataset = ray.data.from_items(rows, override_num_blocks=16)
    found = sorted(answered(dataset, make_engine, num_actors=2), key=lambda row: row["id"])
    assert [row["prompt"] for row in found] == [row["prompt"] for row in rows]
    for i, row in enumerate(found):
        text = f"{names[i % 4] or None} says: number {i}"
        whole = i % 5 == 0 or i == 7
        assert row["text"] == (text if whole else text.rpartition(" ")[0])
        assert (row["num_prompt_tokens"], row["num_tokens"]) == (2, 4 if whole else 3)
        assert (row["finish_reason"], row["error"], row["error_type"]) == ("stop" if whole else "length", None, None)
    assert len(list(seen.iterdir())) == 2


def test_a_row_that_fails_has_its_error_and_the_others_their_answers(url, adapters, tmp_path):
    """What is wrong with one row, or with one adapter, is in the rows' columns; the job goes on."""
    adapters["dora"] = write_adapter(tmp_path / "dora", use_dora=True)
    adapters["gone"] = tmp_path / "gone"
    rows = [
        {"prompt": "ahoy", "adapter": "pirate", "sampling_params": {"max_tokens": 9}},
        {"prompt": "ahoy", "adapter": "parrot", "sampling_params": None},
        {"prompt": "ahoy", "adapter": "dora", "sampling_params": None},
        {"prompt": "ahoy", "adapter": "gone", "sampling_params": None},
        {"prompt": "ahoy", "adapter": None, "sampling_params": {"max_tokens": 0}},
        {"prompt": "word " * 60, "adapter": None, "sampling_params": None},
        {"prompt": None, "adapter": None, "sampling_params": None},
    ]
    found = answered(ray.data.from_items(rows), factory(adapters), batch_size=len(rows))
    assert (found[0]["text"], found[0]["error"]) == ("pirate says: ahoy", None)
    assert [row["error_type"] for row in found[1:]] == [
        *("AdapterNotLoadedError", "IncompatibleAdapterError", "AdapterNotFoundError"),
        *("ValueError", "RequestRejectedError", "TypeError"),
    ]
    assert found[1]["error"] == (
        "no adapter is loaded as 'parrot', and known_adapters has none of that name "
        "(known: 'chef', 'dora', 'gone', 'pirate', 'poet')"
    )
    assert {(row["text"], row["num_tokens"], row["finish_reason"]) for row in found[1:]} == {(None, None, None)}


def test_a_failing_row_ends_the_job_if_asked(adapters):
    """With on_error="raise", the error of a row is raised, whether it shows before the row is asked or after."""
    stage = GenerationStage(factory(adapters), on_error="raise")
    with pytest.raises(AdapterNotLoadedError):
        stage.answer(pa.table({"prompt": ["ahoy"], "adapter": ["parrot"]}))
    with pytest.raises(RequestRejectedError):
        stage.answer(pa.table({"prompt": ["word " * 60]}))


def test_columns_have_their_types_whatever_is_in_them(adapters):
    """A batch without errors, one of errors only and an empty one have the same columns; earlier answers are replaced."""
    stage = GenerationStage(factory(adapters))
    tables = [
        stage.answer(pa.table({"prompt": ["ahoy"]})),
        stage.answer(pa.table({"prompt": ["ahoy"], "adapter": ["parrot"]})),
        stage.answer(pa.table({"prompt": pa.array([], pa.string())})),
    ]
    added = [table.schema.field(name) for name in ("text", "num_tokens", "error") for table in tables]
    assert [str(field.type) for field in added] == ["string"] * 3 + ["int64"] * 3 + ["string"] * 3
    again = stage.answer(tables[0])
    assert again.column_names == tables[0].column_names


def test_conversations_and_token_ids_are_prompts_too():
    """A prompt column may hold what add_request takes."""
    stage = GenerationStage(fake_engine, sampling_params={"max_tokens": 9})
    chats = pa.table({"prompt": [[{"role": "user", "content": "ahoy"}]]})
    assert stage.answer(chats)["text"].to_pylist() == ["You said: user: ahoy"]
    assert stage.answer(pa.table({"prompt": [[1, 2]]}))["num_prompt_tokens"].to_pylist() == [2]


def test_a_structure_of_one_row_has_no_nulls_of_others():
    """Arrow gives each row the fields of all, also inside of structured_outputs and its schema."""
    schemas = [{"type": "object", "properties": {"a": {"type": "string"}}}, {"enum": [1, None]}]
    params = pa.array([{"structured_outputs": {"json": schema}, "seed": None} for schema in schemas]).to_pylist()
    assert params[1]["structured_outputs"]["json"]["type"] is None
    assert [_without_nulls(each) for each in params] == [{"structured_outputs": {"json": schema}} for schema in schemas]


def test_the_stage_refuses_what_it_cannot_read():
    """A batch in another format, and a dataset without prompts, are told what is missing."""
    stage = GenerationStage(fake_engine)
    with pytest.raises(TypeError, match='batch_format="pyarrow"'):
        stage.answer({"prompt": ["ahoy"]})
    with pytest.raises(ValueError, match="needs a column 'prompt', it has: question"):
        stage.answer(pa.table({"question": ["ahoy"]}))
    with pytest.raises(ValueError, match="on_error"):
        GenerationStage(fake_engine, on_error="skip")


def test_an_engine_that_dies_is_no_rows_fault():
    """Its error is raised, which ends the job, and no row is marked as wrong."""
    backend = FakeEngine()
    stage = GenerationStage(lambda: fake_engine(backend=backend))
    backend.die()
    with pytest.raises(EngineDeadError):
        stage.answer(pa.table({"prompt": ["ahoy"]}))


# Ray Serve --------------------------------------------------------------------------------------------------------


@pytest.fixture
def serving(url):
    """Runs an application, whose HTTP is at ``url``, and ends it."""

    def run(*arguments, **options):
        small = {"ray_actor_options": SMALL, "graceful_shutdown_wait_loop_s": 0.1}
        return serve.run(build_app(*arguments, **{**small, **options}))

    yield run
    serve.delete("default")


def test_requests_go_to_the_replica_that_has_their_adapter(serving, adapters, tmp_path):
    """Of two replicas each serves the adapters that it loaded, and a new adapter goes to the one that has fewer."""
    adapters["bard"] = write_adapter(tmp_path / "bard")

    def make_engine():
        backend = FakeEngine(reply=lambda prompt, adapter: f"{os.getpid()} {adapter} {prompt}")
        return fake_engine(backend=backend, known_adapters=adapters)

    handle = serving(make_engine, num_replicas=2)

    def ask(name, prompt):
        """Which replica answered; and the text is right."""
        output = handle.options(multiplexed_model_id=name).generate.remote(prompt).result()
        replica, _, text = output.text.partition(" ")
        assert text == f"{name} {prompt}"
        return replica

    homes = {}
    for name in adapters:
        homes[name] = ask(name, "first")
        wait_until_routed(handle, name)
    assert sorted(list(homes.values()).count(replica) for replica in set(homes.values())) == [2, 2]
    found = {name: {ask(name, f"number {i}") for i in range(8)} for name in adapters}
    assert found == {name: {home} for name, home in homes.items()}


def wait_until_routed(handle, name):
    """A replica tells routers a moment later what it has loaded, and only Ray's own insides show when they know."""
    router = handle._router._asyncio_router._request_router
    while not router._multiplexed_model_id_to_replica_ids.get(name):
        time.sleep(0.05)
    time.sleep(0.1)


def test_answers_streams_and_errors_of_a_replica(serving, url, adapters, tmp_path):
    """Handles give outputs, partial outputs and our exceptions; without settings there is no HTTP."""
    adapters["dora"] = write_adapter(tmp_path / "dora", use_dora=True)
    adapters["gone"] = tmp_path / "gone"
    handle = serving(factory(adapters))
    pirate = handle.options(multiplexed_model_id="pirate")

    output = handle.generate.remote("ahoy there").result()
    assert (output.text, output.adapter, output.finished) == ("You said: ahoy there", None, True)
    assert pirate.generate.remote("ahoy", {"max_tokens": 2}).result().text == "pirate says:"
    parts = list(pirate.options(stream=True).stream.remote("one two three"))
    assert parts[-1].text == "pirate says: one two three" and parts[-1].finished
    assert all(parts[-1].text.startswith(part.text) for part in parts)

    with pytest.raises(
        AdapterNotLoadedError, match="no adapter is loaded as 'parrot', and known_adapters has none of that name"
    ):
        handle.options(multiplexed_model_id="parrot").generate.remote("ahoy").result()
    with pytest.raises(IncompatibleAdapterError) as caught:
        handle.options(multiplexed_model_id="dora").generate.remote("ahoy").result()
    assert any("DoRA" in reason for reason in caught.value.reasons)
    with pytest.raises(AdapterNotFoundError):
        list(handle.options(multiplexed_model_id="gone", stream=True).stream.remote("ahoy"))
    with pytest.raises(RequestRejectedError):
        handle.generate.remote("word " * 60).result()

    answer = httpx.post(f"{url}/v1/completions", json={"model": "pirate", "prompt": "ahoy"}, timeout=120)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, 404)
    assert "build_app(http=...)" in answer.json()["error"]["message"]


def test_http_is_the_openai_server_s(serving, url, adapters, tmp_path):
    """OpenAI's client gets answers, streams and errors; the header makes its adapter's replica known to Serve."""
    openai = pytest.importorskip("openai")
    pytest.importorskip("vllm.entrypoints.launchers")
    from served import KEY, write_model

    model, here = str(write_model(tmp_path / "bytes")), str(Path(__file__).parents[1] / "serve")
    adapters["dora"] = write_adapter(tmp_path / "dora", use_dora=True, alpha_pattern={"x": 1})

    def make_engine():
        sys.path.append(here)
        from served import ByteEngine
        from tokenizers import Tokenizer
        from vllm import EngineArgs
        from vllm.usage.usage_lib import UsageContext

        ByteEngine.vllm_config = EngineArgs(model=model).create_engine_config(UsageContext.LLM_CLASS)
        ByteEngine.tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
        return fake_engine(model, backend=ByteEngine(), known_adapters=adapters)

    handle = serving(make_engine, http=Settings(("base",), api_key=KEY, max_body_bytes=10_000))
    ai = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120)
    asked = {"model": "pirate", "messages": [{"role": "user", "content": "ahoy"}], "extra_headers": {HEADER: "pirate"}}
    reply = ai.chat.completions.create(**asked)
    assert reply.choices[0].message.content == "pirate says: user: ahoy\nassistant:"
    wait_until_routed(handle, "pirate")
    chunks = ai.chat.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == reply.choices[0].message.content
    assert ai.completions.create(model="base", prompt="ahoy").choices[0].text == "You said: ahoy"
    assert [card.id for card in ai.models.list()] == ["base", "pirate"]
    with pytest.raises(openai.NotFoundError, match="no adapter is loaded as 'parrot'"):
        ai.completions.create(model="parrot", prompt="ahoy", extra_headers={HEADER: "parrot"})
    with pytest.raises(openai.UnprocessableEntityError, match="DoRA"):
        ai.completions.create(model="dora", prompt="ahoy")
    with pytest.raises(openai.APIStatusError) as caught:
        ai.completions.create(model="base", prompt="a" * 20_000)
    assert caught.value.status_code == 413
    with pytest.raises(openai.AuthenticationError):
        ai.with_options(api_key="wrong").completions.create(model="chef", prompt="x", extra_headers={HEADER: "chef"})
    assert [card.id for card in ai.models.list()] == ["base", "pirate"]


def test_adapters_are_not_loaded_over_the_http_of_one_replica():
    """An admin key is refused: a load would reach one replica of several."""
    with pytest.raises(ValueError, match="known_adapters"):
        build_app(fake_engine, http=Settings(("base",), admin_key="a-secret"))


def test_the_least_recently_used_adapter_is_unloaded(serving, adapters):
    """With room for one, an adapter that has no requests is unloaded for the next one, and comes back when asked."""

    def make_engine():
        def reply(prompt, adapter):
            return f"{adapter} of {'+'.join(engine.adapters)}: {prompt}"

        backend = FakeEngine(reply=reply, step_seconds=0.02)
        engine = fake_engine(backend=backend, known_adapters=adapters, max_loaded_adapters=1)
        return engine

    handle = serving(make_engine)

    def ask(name, prompt):
        return handle.options(multiplexed_model_id=name).generate.remote(prompt, {"max_tokens": 999})

    story = " ".join(["arrr"] * 100)
    streaming = handle.options(multiplexed_model_id="pirate", stream=True)
    running = iter(streaming.stream.remote(story, {"max_tokens": 999}))
    assert not next(running).finished
    assert ask("poet", "ode").result().text == "poet of pirate+poet: ode"
    assert list(running)[-1].text.startswith("pirate of pirate")
    assert ask("chef", "soup").result().text.endswith("chef: soup")
    assert ask("pirate", "ahoy").result().text.endswith("pirate: ahoy")
    # In each other's way, all the same all are answered.
    names = [*adapters] * 6
    texts = [response.result().text for response in [ask(name, str(i)) for i, name in enumerate(names)]]
    assert [(text.split()[0], text.split()[-1]) for text in texts] == [(name, str(i)) for i, name in enumerate(names)]


def test_a_client_that_hangs_up_during_a_load_harms_no_other(serving, adapters, tmp_path):
    """The load that it began goes on for those who ask next, and the adapter stays."""
    begun, left = tmp_path / "begun", tmp_path / "left"

    class Registry(dict):
        """Takes its time once."""

        num_asked = 0

        def __getitem__(self, name):
            self.num_asked += 1
            if self.num_asked == 1:
                begun.touch()
                while not left.exists():
                    time.sleep(0.01)
            return super().__getitem__(name)

    handle = serving(factory(Registry(adapters)))
    pirate = handle.options(multiplexed_model_id="pirate")
    first = pirate.generate.remote("one")
    while not begun.exists():
        time.sleep(0.01)
    first.cancel()
    second = pirate.generate.remote("two")
    time.sleep(0.5)  # the replica hears that the first client has left
    left.touch()
    assert second.result().text == "pirate says: two"
    time.sleep(0.5)  # whatever that client's load leaves behind is over
    assert pirate.generate.remote("three").result().text == "pirate says: three"


def test_every_error_has_a_status():
    """Whatever the library raises on its own account is an HTTP status of its own, and an engine's death is no client's fault."""
    raised = [
        error for error in vars(errors).values() if isinstance(error, type) and error.__module__ == errors.__name__
    ]
    statuses = {error.__name__: http_status(error) for error in raised}
    assert statuses["AdapterAccessError"] == statuses["UnsafeAdapterError"] == 422
    assert (statuses["QueueFullError"], statuses["RequestTimeoutError"], statuses["EngineDeadError"]) == (429, 504, 503)


def test_a_replica_whose_engine_has_ended_is_not_healthy():
    """Serve asks, and replaces it."""
    engine = fake_engine()
    server = AdapterServer(lambda: engine)
    asyncio.run(server.check_health())
    engine.close()
    with pytest.raises(EngineDeadError):
        asyncio.run(server.check_health())


# The page ---------------------------------------------------------------------------------------------------------


def test_the_page_runs(url, tmp_path, monkeypatch):
    """The Python of docs/ray.md, with the fake engine in vLLM's place, prints what is shown."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qlora_infer.QuantizedLoRAEngine", fake_engine)
    for name in ("pirate", "poet"):
        write_adapter(tmp_path / "adapters" / name)
    try:
        ran = run_python("docs/ray.md")
    finally:
        serve.delete("default")
    assert sorted(by_the_page(ran[0].printed)) == [
        *("ahoy -> pirate says: ahoy None", "hello -> You said: hello None", "hi -> None AdapterNotLoadedError")
    ]
    assert [by_the_page(each.printed) for each in ran[1:]] == [(each.shown or "").splitlines() for each in ran[1:]]


def by_the_page(printed):
    """Without what Ray's own threads print meanwhile, of workers that it ended."""
    return [line for line in printed.splitlines() if "(raylet)" not in line]
