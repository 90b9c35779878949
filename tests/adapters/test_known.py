"""Adapters that are known by name and loaded on first use, on the fake engine."""

import asyncio
import gc
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from qlora_infer import FolderSource
from qlora_infer.adapters import known
from qlora_infer.errors import (
    AdapterNotFoundError,
    AdapterNotLoadedError,
    AdapterSourceError,
    CorruptAdapterError,
    EngineClosedError,
    IncompatibleAdapterError,
    QueueFullError,
    RequestCancelledError,
    RequestTimeoutError,
)
from qlora_infer.testing import FakeEngine, fake_engine, write_adapter

NAMES = ["pirate", "poet", "chef", "bard"]


@pytest.fixture
def folder(tmp_path):
    """A folder with an adapter in each of its folders."""
    for seed, name in enumerate(NAMES):
        write_adapter(tmp_path / name, seed=seed)
    return tmp_path


class Resolver:
    """A function from names to sources that counts how often it is asked, and waits while it is held."""

    def __init__(self, folder):
        self.folder = folder
        self.asked = []
        self.may_go = threading.Event()
        self.may_go.set()

    def __call__(self, name):
        self.asked.append(name)
        assert self.may_go.wait(30)
        return self.folder / name if name in NAMES else None


@pytest.fixture
def resolver(folder):
    return Resolver(folder)


def wait_for(condition, seconds=30):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def text(engine, name, prompt="ahoy"):
    (output,) = engine.generate(prompt, adapter=name)
    return output.text


# What is known ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mapping", "folder", "function"])
def test_an_adapter_is_loaded_when_a_request_first_names_it(folder, kind):
    """From a mapping, a folder and a function: nothing is loaded before, and everything is answered by its adapter."""
    sources = {
        "mapping": {name: folder / name for name in NAMES},
        "folder": folder,
        "function": lambda name: FolderSource(folder / name) if name in NAMES else None,
    }
    with fake_engine(known_adapters=sources[kind]) as engine:
        assert not engine.adapters
        outputs = engine.generate(["ahoy", "hello", "ode"], adapter=["pirate", None, "poet"])
        assert [each.text for each in outputs] == ["pirate says: ahoy", "You said: hello", "poet says: ode"]
        assert [(each.adapter, each.adapter_version) for each in outputs] == [("pirate", 1), (None, None), ("poet", 1)]
        assert sorted(engine.adapters) == ["pirate", "poet"]
        assert engine.add_request("hi", adapter="chef").result(30).text == "chef says: hi"
        assert list(engine.stream("hi", adapter="bard"))[-1].text == "bard says: hi"


def test_a_name_that_nobody_knows_is_an_error_that_lists_those_that_are_known(folder):
    """At the door where that can be told, and with the handle where a function says so; other requests go on."""
    with fake_engine(known_adapters={name: folder / name for name in NAMES}) as engine:
        for call in (engine.generate, engine.add_request):
            with pytest.raises(
                AdapterNotLoadedError, match=r"has none of that name \(known: 'bard', 'chef', 'pirate', 'poet'\)"
            ):
                call("ahoy", adapter="parrot")
        with pytest.raises(AdapterNotLoadedError, match="no adapter is loaded as 'pirate@2'"):
            engine.add_request("ahoy", adapter="pirate@2")
    with fake_engine(known_adapters=folder) as engine:
        for name in ("parrot", "../secret", "..", ".", "a" * 300, "a\0b"):
            with pytest.raises(AdapterNotLoadedError):
                engine.add_request("ahoy", adapter=name)
    with fake_engine(known_adapters={}.__getitem__) as engine:
        handle = engine.add_request("ahoy", adapter="parrot")
        with pytest.raises(AdapterNotLoadedError, match="known_adapters has none of that name"):
            handle.result(30)
        assert text(engine, None) == "You said: ahoy"
        assert "parrot" not in engine.stats().adapters


def test_what_is_no_source_of_adapters_is_refused(tmp_path):
    """A list, and a folder that is not there, before anything starts."""
    with pytest.raises(TypeError, match="known_adapters must map names to sources"):
        fake_engine(known_adapters=["pirate"])
    with pytest.raises(ValueError, match="is no folder"):
        fake_engine(known_adapters=tmp_path / "gone")


def test_a_mapping_may_change_while_the_engine_runs(folder):
    """It is asked at each first use: what comes later is known then."""
    adapters = {}
    with fake_engine(known_adapters=adapters) as engine:
        with pytest.raises(AdapterNotLoadedError):
            engine.add_request("ahoy", adapter="pirate")
        adapters["pirate"] = folder / "pirate"
        assert text(engine, "pirate") == "pirate says: ahoy"


# Loads beside requests ----------------------------------------------------------------------------------------------


def test_others_are_answered_while_an_adapter_is_loaded(resolver):
    """Base requests and those of loaded adapters go on, in the same call too; one load serves all who ask meanwhile."""
    with fake_engine(known_adapters=resolver) as engine:
        assert text(engine, "poet") == "poet says: ahoy"
        resolver.may_go.clear()
        cold = [engine.add_request(f"cold {i}", adapter="pirate") for i in range(3)]
        outputs = engine.generate_iter(["one", "two", "three"], adapter=["pirate", "poet", None], in_order=False)
        assert sorted([next(outputs).text, next(outputs).text]) == ["You said: three", "poet says: two"]
        assert not any(handle.done() for handle in cold)
        assert engine.stats().adapters["pirate"].num_waiting == 4
        resolver.may_go.set()
        assert [handle.result(30).text for handle in cold] == [f"pirate says: cold {i}" for i in range(3)]
        assert next(outputs).text == "pirate says: one"
        assert resolver.asked == ["poet", "pirate"]


def test_several_adapters_are_loaded_at_once(folder):
    """Four of them: each waits for the three others."""
    together = threading.Barrier(4, timeout=30)

    def resolver(name):
        together.wait()
        return folder / name

    with fake_engine(known_adapters=resolver) as engine:
        outputs = engine.generate(["ahoy"] * 4, adapter=NAMES)
        assert [each.text for each in outputs] == [f"{name} says: ahoy" for name in NAMES]


def test_a_coroutine_is_not_held_up_by_a_load(resolver):
    """Its event loop turns while the adapter is loaded."""
    resolver.may_go.clear()

    async def ask(engine):
        handle = engine.add_request("ahoy", adapter="pirate")
        for _ in range(3):
            await asyncio.sleep(0.001)
        resolver.may_go.set()
        return (await handle).text

    with fake_engine(known_adapters=resolver) as engine:
        assert asyncio.run(ask(engine)) == "pirate says: ahoy"


def test_requests_that_await_an_adapter_count_as_waiting(resolver):
    """``max_waiting`` holds for them, and one that is cancelled makes room."""
    resolver.may_go.clear()
    with fake_engine(known_adapters=resolver, max_waiting=1) as engine:
        first = engine.add_request("ahoy", adapter="pirate")
        with pytest.raises(QueueFullError, match="1 requests wait already"):
            engine.add_request("ahoy", block=False)
        first.cancel()
        assert engine.add_request("ahoy").result(30).text == "You said: ahoy"
        assert engine.stats().adapters["pirate"].num_waiting == 0
        resolver.may_go.set()


def test_a_request_may_end_before_its_adapter_is_there(resolver):
    """By its timeout, by cancelling, or because nobody holds its handle; the load goes on for the others."""
    resolver.may_go.clear()
    with fake_engine(known_adapters=resolver) as engine:
        late = engine.add_request("late", adapter="pirate", timeout=0.01)
        cancelled = engine.add_request("cancelled", adapter="pirate")
        engine.add_request("dropped", adapter="pirate")
        kept = engine.add_request("kept", adapter="pirate")
        gc.collect()
        cancelled.cancel()
        with pytest.raises(RequestTimeoutError):
            late.result(30)
        with pytest.raises(RequestCancelledError):
            cancelled.result(30)
        resolver.may_go.set()
        assert kept.result(30).text == "pirate says: kept"
        wait_for(lambda: engine.stats().num_waiting == 0)
        assert engine.stats().adapters["pirate"].errors == {"RequestTimeoutError": 1, "RequestCancelledError": 2}


def test_closing_the_engine_ends_those_that_await_an_adapter(resolver):
    """At once, though the load cannot be stopped."""
    resolver.may_go.clear()
    engine = fake_engine(known_adapters=resolver)
    handle = engine.add_request("ahoy", adapter="pirate")
    loading = ThreadPoolExecutor(1).submit(engine.load_adapter, "pirate")
    wait_for(lambda: resolver.asked)
    time.sleep(0.05)
    engine.close()
    for each in (handle, loading):
        with pytest.raises(EngineClosedError):
            each.result(10)
    resolver.may_go.set()
    with pytest.raises(EngineClosedError):
        engine.add_request("ahoy", adapter="poet").result(10)


# Errors -------------------------------------------------------------------------------------------------------------


def test_an_error_goes_to_those_who_asked_and_is_remembered_for_a_while(folder, monkeypatch):
    """It is not tried again within ``RETRY_AFTER`` seconds, then it is; requests for others are answered."""
    write_adapter(folder / "dora", use_dora=True)
    asked = []

    def resolver(name):
        asked.append(name)
        return folder / name

    with fake_engine(known_adapters=resolver) as engine:
        outputs = list(
            engine.generate_iter(
                ["one", "two", "three"], adapter=["dora", "pirate", "dora"], on_error="return", use_tqdm=False
            )
        )
        assert [type(each.error) for each in outputs] == [
            IncompatibleAdapterError,
            type(None),
            IncompatibleAdapterError,
        ]
        assert [each.adapter for each in outputs] == ["dora", "pirate", "dora"]
        assert outputs[1].text == "pirate says: two"
        with pytest.raises(IncompatibleAdapterError) as caught:
            engine.generate("four", adapter="dora")
        assert any("DoRA" in reason for reason in caught.value.reasons)
        assert asked.count("dora") == 1
        monkeypatch.setattr(known, "RETRY_AFTER", -1.0)
        write_adapter(folder / "dora")
        monkeypatch.setattr(engine._known, "_failures", {})
        assert text(engine, "dora") == "dora says: ahoy"


def test_whatever_a_function_raises_is_an_error_of_the_adapter(folder):
    """Its own error is chained, and not quoted: it may hold what nobody should read."""

    def resolver(name):
        raise ConnectionError("postgres://admin:secret@db")

    with fake_engine(known_adapters=resolver) as engine:
        handle = engine.add_request("ahoy", adapter="pirate")
        with pytest.raises(AdapterSourceError, match="known_adapters was asked for adapter 'pirate'") as caught:
            handle.result(30)
        assert "secret" not in str(caught.value)
        assert isinstance(caught.value.__cause__, ConnectionError)


class StubbornError(AdapterSourceError):
    """An error that cannot be copied."""

    def __reduce__(self):
        raise TypeError("no")


@pytest.mark.parametrize("error", [SystemExit(), StubbornError("pirate", "no")], ids=["exit", "stubborn"])
def test_no_error_of_a_function_leaves_anybody_waiting(error):
    """Whatever it raises, the request ends, and so does the next one."""

    def resolver(name):
        raise error

    with fake_engine(known_adapters=resolver) as engine:
        for _ in range(2):
            with pytest.raises(AdapterSourceError):
                engine.add_request("ahoy", adapter="pirate").result(10)
        assert text(engine, None) == "You said: ahoy"


def test_a_source_that_is_gone_or_broken_says_so(folder):
    """With the error that ``load_adapter`` raises."""
    (folder / "poet" / "adapter_model.safetensors").write_bytes(b"broken")
    with fake_engine(known_adapters={"gone": folder / "gone", "poet": folder / "poet"}) as engine:
        with pytest.raises(AdapterNotFoundError):
            engine.generate("ahoy", adapter="gone")
        with pytest.raises(CorruptAdapterError):
            engine.load_adapter("poet")
        assert engine.stats().load_errors == {"AdapterNotFoundError": 1, "CorruptAdapterError": 1}
        assert not engine.adapters


def test_what_is_wrong_with_a_request_shows_when_its_adapter_is_there(folder):
    """A parameter out of range fails that request alone; what needs no adapter is raised at the door."""
    with fake_engine(known_adapters=folder) as engine:
        with pytest.raises(TypeError, match="a prompt must be"):
            engine.add_request(7, adapter="pirate")
        wrong = engine.add_request("ahoy", {"max_tokens": 0}, adapter="pirate")
        right = engine.add_request("ahoy", adapter="pirate")
        with pytest.raises(ValueError, match="max_tokens"):
            wrong.result(30)
        assert right.result(30).text == "pirate says: ahoy"


# The limit ----------------------------------------------------------------------------------------------------------


def test_over_the_limit_the_least_recently_used_adapter_is_unloaded(folder):
    """And loaded again when it is asked for; those loaded by name, or pinned, stay."""
    with fake_engine(known_adapters=folder, max_loaded_adapters=2) as engine:
        engine.load_adapter("mine", folder / "bard")
        for name in ("pirate", "poet", "pirate", "chef"):
            assert text(engine, name) == f"{name} says: ahoy"
        wait_for(lambda: sorted(engine.adapters) == ["chef", "mine", "pirate"])
        engine.pin_adapter("pirate")
        for name in ("poet", "bard", "chef"):
            assert text(engine, name) == f"{name} says: ahoy"
        wait_for(lambda: sorted(engine.adapters) == ["bard", "chef", "mine", "pirate"])


def test_an_adapter_with_requests_is_not_unloaded(folder):
    """Another one leaves, when its own requests have ended."""
    backend = FakeEngine(step_seconds=0.005)
    with fake_engine(backend=backend, known_adapters=folder, max_loaded_adapters=1) as engine:
        running = engine.add_request(" ".join(["word"] * 400), {"max_tokens": 1000}, adapter="pirate")
        next(iter(running))
        assert text(engine, "poet") == "poet says: ahoy"
        wait_for(lambda: list(engine.adapters) == ["pirate"])
        assert not running.done()
        running.cancel()


def test_many_threads_asking_for_more_adapters_than_may_be_loaded_are_all_answered_rightly(folder):
    """Whatever is loaded and unloaded in between, each answer is its adapter's."""
    with fake_engine(known_adapters=folder, max_loaded_adapters=2) as engine:

        def ask(seed):
            chance = random.Random(seed)
            for i in range(30):
                name = chance.choice([None, *NAMES])
                output = engine.add_request(f"{seed} {i}", {"max_tokens": 9}, adapter=name).result(60)
                said = f"{name} says: {seed} {i}" if name else f"You said: {seed} {i}"
                assert (output.text, output.adapter) == (said, name)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, range(8)))
        wait_for(lambda: len(engine.adapters) <= 2)


# Everything else that names an adapter ------------------------------------------------------------------------------


def test_a_known_adapter_may_be_loaded_pinned_prefetched_and_verified_by_name(folder):
    """Each loads it first; ``load_adapter`` without a source returns the one that is loaded."""
    with fake_engine(known_adapters=folder) as engine:
        loaded = engine.load_adapter("pirate")
        assert (loaded.name, loaded.version) == ("pirate", 1)
        assert engine.load_adapter("pirate") == loaded
        engine.pin_adapter("poet")
        engine.prefetch_adapters(["pirate", "chef"])
        wait_for(lambda: "chef" in engine.adapters)
        assert engine.verify_adapter("bard", ["ahoy my hearties"]).share_changed == 0.0
        with pytest.raises(AdapterNotLoadedError, match="known_adapters has none of that name"):
            engine.load_adapter("parrot")
        with pytest.raises(AdapterNotLoadedError):
            engine.prefetch_adapters(["parrot"])
        engine.unload_adapter("pirate")
        assert text(engine, "pirate") == "pirate says: ahoy"
        assert engine.adapters["pirate"].version == 2
    with fake_engine() as engine, pytest.raises(AdapterNotLoadedError, match="no adapter is loaded as 'pirate'"):
        engine.load_adapter("pirate")


def test_a_conversation_on_first_use_is_written_with_the_adapters_own_template(folder):
    """And its generation defaults hold, as for an adapter that was there."""
    (folder / "pirate" / "chat_template.jinja").write_text("{{ messages[0].content }} by {{ messages[0].role }}")
    (folder / "pirate" / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3}))
    chat = [{"role": "me", "content": "ahoy"}]
    with fake_engine(known_adapters=folder) as engine:
        (output,) = engine.chat(chat, adapter="pirate")
        assert (output.prompt, output.text) == ("ahoy by me", "pirate says: ahoy")
    with fake_engine(known_adapters=folder) as engine:
        assert engine.stream(chat, adapter="pirate")._handle.result(30).prompt == "ahoy by me"
        (output,) = engine.generate_iter([chat], adapter="poet")
        assert output.prompt == "me: ahoy"
