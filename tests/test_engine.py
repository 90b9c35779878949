"""What users rely on in QuantizedLoRAEngine, on the fake engine: order, errors at the door, cancelling, closing, dying."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import typing

import pytest

import qlora_infer
from qlora_infer import QuantizedLoRAEngine
from qlora_infer.errors import (
    AdapterLoadError,
    AdapterNotLoadedError,
    EngineClosedError,
    EngineDeadError,
    RequestCancelledError,
    RequestRejectedError,
)
from qlora_infer.testing import FakeEngine, fake_engine, write_adapter

LONG = {"max_tokens": 1000}
ENDLESS = " ".join(["word"] * 900)


@pytest.fixture
def backend():
    return FakeEngine()


@pytest.fixture
def engine(backend, tmp_path):
    adapters = {name: write_adapter(tmp_path / name, seed=seed) for seed, name in enumerate(["pirate", "json"])}
    with fake_engine(backend=backend, adapters=adapters) as engine:
        yield engine


def slow_engine(step_seconds=0.01, **arguments):
    backend = FakeEngine(step_seconds=step_seconds)
    return backend, fake_engine(backend=backend, **arguments)


# What people write first ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["generate", "chat", "generate_iter", "stream", "add_request"])
def test_a_sampling_parameter_among_the_arguments_is_told_where_it_belongs(engine, method):
    """``generate("hi", max_tokens=64)``: the error has what to write; nothing is queued."""
    with pytest.raises(TypeError) as caught:
        getattr(engine, method)(["hi"], max_tokens=64)
    assert str(caught.value) == (
        f"{method}() has no argument 'max_tokens'; sampling parameters are one argument, such as "
        "sampling_params={'max_tokens': 64}"
    )


def test_outputs_are_read_as_vllms_are(engine):
    """``outputs[0].outputs[0].text`` is the text of the first completion."""
    outputs = engine.generate("ahoy", {"max_tokens": 64}, adapter="pirate")
    assert outputs[0].outputs[0].text == outputs[0].text == "pirate says: ahoy"


# Results ----------------------------------------------------------------------------------------------------------


def test_results_come_in_the_order_of_the_prompts(engine):
    """Whatever finishes first, output i answers prompt i with adapter i."""
    prompts = [" ".join(["w"] * (1 + (7 * i) % 11)) + f" {i}" for i in range(40)]
    adapters = [(None, "pirate", "json")[i % 3] for i in range(40)]
    outputs = engine.generate(prompts, {"max_tokens": 100}, adapter=adapters)
    expected = [f"{adapter} says: {p}" if adapter else f"You said: {p}" for p, adapter in zip(prompts, adapters)]
    assert [output.text for output in outputs] == expected
    assert [output.prompt for output in outputs] == prompts
    assert [output.adapter for output in outputs] == adapters


def test_one_prompt_gives_a_list_of_one(engine):
    """A string, and a list of token ids, are one prompt each."""
    (by_text,) = engine.generate("hello there", LONG)
    (by_ids,) = engine.generate(list(by_text.prompt_token_ids), LONG)
    assert by_text.text == by_ids.text == "You said: hello there"
    assert by_ids.prompt is None
    assert by_ids.prompt_token_ids == by_text.prompt_token_ids
    assert engine.generate([]) == []


def test_sampling_params_may_differ_by_prompt(engine):
    """One mapping serves all prompts; a list has one for each."""
    same = engine.generate(["a b c", "d e f"], {"max_tokens": 2})
    assert [output.text for output in same] == ["You said:", "You said:"]
    assert [output.finish_reason for output in same] == ["length", "length"]
    each = engine.generate(["a b c", "d e f"], [{"max_tokens": 3}, LONG])
    assert [output.text for output in each] == ["You said: a", "You said: d e f"]
    assert [output.finish_reason for output in each] == ["length", "stop"]


def test_logprobs_and_several_completions_come_through(engine):
    """logprobs, prompt_logprobs and n are answered; the first completion is the output's own."""
    (output,) = engine.generate("a b", {"max_tokens": 9, "logprobs": 1, "prompt_logprobs": 1, "n": 3})
    assert [completion.index for completion in output.completions] == [0, 1, 2]
    assert output.text == output.completions[0].text
    assert len(output.logprobs) == len(output.token_ids) == 4
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids) == 2


def test_times_are_in_order(engine):
    """A finished output knows when it was queued, had its first token, and finished."""
    (output,) = engine.generate("a b c", LONG)
    assert output.times.queued <= output.times.first_token <= output.times.finished
    assert output.times.time_to_first_token <= output.times.total


def test_chat_goes_through_the_template(engine):
    """One conversation or several; the template's text is the prompt."""
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    (one,) = engine.chat(conversation, LONG, adapter="pirate")
    assert one.prompt == "system: Be brief. user: Hi"
    assert one.text == "pirate says: system: Be brief. user: Hi"
    assert len(engine.chat([conversation, conversation], LONG)) == 2


def test_stream_yields_growing_text_and_ends_with_all_of_it(engine):
    """Each partial output begins with the one before; only the last is finished."""
    outputs = list(engine.stream("a b c d", LONG, adapter="json"))
    texts = [output.text for output in outputs]
    assert texts[-1] == "json says: a b c d"
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:]))
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]


def test_handles_may_be_made_and_read_by_any_thread(engine):
    """Requests from many threads get their own answers."""
    answers = {}

    def ask(number):
        handle = engine.add_request(f"question {number}", LONG, adapter="pirate" if number % 2 else None)
        answers[number] = handle.result(timeout=30).text

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == {n: f"{'pirate says' if n % 2 else 'You said'}: question {n}" for n in range(50)}


def test_a_result_can_be_read_again_and_late(engine):
    """A finished handle keeps its output; nobody else's finishing loses it."""
    first = engine.add_request("first", LONG)
    engine.generate(["others"] * 20)
    assert first.result(timeout=10).text == first.result().text == "You said: first"
    assert first.done()
    assert [output.text for output in first] == ["You said: first"]


# At the door ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda e: e.generate(["a", "b"], adapter=["pirate"]),
            ValueError,
            "adapter has 1 entries for 2 prompts",
        ),
        (lambda e: e.generate(["a", "b"], [{}]), ValueError, "sampling_params has 1 entries"),
        (
            lambda e: e.generate(["a", "b"], adapter=["pirate", "nobody"]),
            AdapterNotLoadedError,
            "'pirate', 'json'",
        ),
        (lambda e: e.generate("a", {"max_tokns": 3}), TypeError, "no field 'max_tokns'"),
        (lambda e: e.generate("a", {"max_tokens": 0}), ValueError, "max_tokens"),
        (lambda e: e.generate("a", 7), TypeError, "SamplingParams or a mapping"),
        (lambda e: e.generate(7), TypeError, "prompts must be"),
        (lambda e: e.generate(["a", 7]), TypeError, "a prompt must be"),
        (lambda e: e.generate(["a", []]), TypeError, "a prompt must be"),
        (lambda e: e.chat("hello"), TypeError, "messages must be"),
        (lambda e: e.add_request("a", adapter="nobody"), AdapterNotLoadedError, "'nobody'"),
        (lambda e: e.stream("a", adapter="nobody"), AdapterNotLoadedError, "'nobody'"),
        (lambda e: e.unload_adapter("nobody"), AdapterNotLoadedError, "'nobody'"),
        (lambda e: e.load_adapter("", "org/repo"), ValueError, "printable text"),
        (lambda e: e.load_adapter(7, "org/repo"), TypeError, "must be a string"),
        (lambda e: e.load_adapter("x", 7), TypeError, "a source must be"),
    ],
)
def test_a_wrong_call_is_refused_at_once_and_queues_nothing(engine, backend, call, error, match):
    """Bad arguments are an error at the call, in words; no request of the call runs."""
    steps = backend.num_steps
    with pytest.raises(error, match=match):
        call(engine)
    assert backend.num_unfinished == 0
    assert backend.num_steps == steps
    assert set(engine.adapters) == {"pirate", "json"}


def test_a_prompt_that_is_too_long_fails_alone():
    """vLLM's refusal of one request is that request's error; others go on."""
    with fake_engine(max_model_len=5) as engine:
        good, bad = engine.add_request("a b"), engine.add_request("a b c d e f g")
        with pytest.raises(RequestRejectedError, match="7 tokens of 5"):
            bad.result(timeout=10)
        assert good.result(timeout=10).text == "You said: a b"
        with pytest.raises(RequestRejectedError):
            engine.generate(["a b"] * 20 + ["a b c d e f g"])
        assert engine.generate("a b")[0].text == "You said: a b"


def test_bad_engine_arguments_start_nothing(backend):
    """A wrong constructor argument is refused before the backend is touched."""
    for arguments in [{"max_loras": 0}, {"engine_args": {"max_loras": 3}}, {"quantization": "nonsense"}]:
        with pytest.raises(ValueError):
            fake_engine(backend=backend, **arguments)
    assert backend.engine_args == {}


def test_max_lora_rank_fits_the_adapters(tmp_path):
    """ "auto" provides for the largest given adapter, at least 16; without adapters, for rank 64."""
    for rank, provided in [(4, 16), (33, 64), (100, 128)]:
        backend = FakeEngine()
        with fake_engine(backend=backend, adapters={"a": write_adapter(tmp_path / str(rank), rank=rank)}):
            assert backend.engine_args["max_lora_rank"] == provided
    backend = FakeEngine()
    with fake_engine(backend=backend):
        assert backend.engine_args["max_lora_rank"] == 64


# Adapters ---------------------------------------------------------------------------------------------------------


def test_adapters_tells_what_is_loaded(engine, tmp_path):
    """adapters has name, id, source, rank and size of each, and does not change under its reader."""
    before = engine.adapters
    loaded = engine.load_adapter("third", write_adapter(tmp_path / "third", rank=4, base_model="org/base"))
    assert engine.adapters["third"] == loaded
    assert "third" not in before
    assert (loaded.name, loaded.rank, loaded.num_modules, loaded.base_model) == ("third", 4, 14, "org/base")
    assert loaded.source == str(tmp_path / "third")
    assert loaded.int_id not in {adapter.int_id for adapter in before.values()}


def test_an_integer_id_is_never_used_again(engine, tmp_path):
    """Unloading and loading again, also of the same content, gives new ids that only grow."""
    folder = write_adapter(tmp_path / "again")
    seen = [adapter.int_id for adapter in engine.adapters.values()]
    for _ in range(5):
        seen.append(engine.load_adapter("again", folder).int_id)
        engine.unload_adapter("again")
    assert seen == sorted(set(seen))


def test_the_same_content_is_not_loaded_again(engine, backend, tmp_path):
    """load_adapter with the content that the name has is answered with what is loaded."""
    folder = write_adapter(tmp_path / "same")
    first = engine.load_adapter("same", folder)
    assert engine.load_adapter("same", folder) == first
    assert backend.loads.count("same") == 1


def test_a_replaced_adapter_serves_new_requests_and_old_ones_finish_on_the_old(tmp_path):
    """Requests that run keep their version; later ones have the new; the old one is freed after its last request."""
    backend, engine = slow_engine()
    with engine:
        folder = write_adapter(tmp_path / "pirate", seed=1)
        old = engine.load_adapter("pirate", folder)
        running = engine.add_request(ENDLESS, {"max_tokens": 40}, adapter="pirate")
        waiting_on_old = next(iter(running)).adapter_id
        write_adapter(folder, seed=2)
        new = engine.load_adapter("pirate", folder)
        later = engine.add_request("b", LONG, adapter="pirate")
        assert waiting_on_old == old.int_id
        assert later.result(timeout=10).adapter_id == new.int_id
        assert backend.resident == ("pirate", "pirate")
        assert running.result(timeout=10).adapter_id == old.int_id
        engine.generate("flush")
        assert backend.resident == ("pirate",)


def test_an_unloaded_adapter_finishes_its_requests_and_is_gone(tmp_path):
    """unload_adapter takes the name away at once and the memory after the last request."""
    backend, engine = slow_engine(adapters={"pirate": write_adapter(tmp_path / "pirate")})
    with engine:
        running = engine.add_request(ENDLESS, {"max_tokens": 20}, adapter="pirate")
        engine.unload_adapter("pirate")
        with pytest.raises(AdapterNotLoadedError):
            engine.add_request("b", adapter="pirate")
        assert running.result(timeout=10).text.startswith("pirate says: word")
        engine.generate("flush")
        assert backend.resident == ()


def test_what_happens_to_the_source_does_not_change_what_is_served(tmp_path):
    """Every version is a private copy: deleting the source while it is served harms nobody, also after an eviction."""
    backend = FakeEngine()
    with fake_engine(backend=backend, max_loras=1, max_cpu_loras=1) as engine:
        for name in ("a", "b"):
            folder = write_adapter(tmp_path / name, seed=len(name))
            engine.load_adapter(name, folder)
            for path in folder.iterdir():
                path.unlink()
        texts = [engine.generate("x", adapter=name)[0].text for name in ("a", "b", "a", "b")]
        assert texts == ["a says: x", "b says: x", "a says: x", "b says: x"]


def test_many_adapters_run_through_few_places(tmp_path):
    """More adapters than places in host memory all answer, and vLLM never evicts by itself."""
    backend = FakeEngine()
    with fake_engine(backend=backend, max_loras=2, max_cpu_loras=3) as engine:
        names = [f"a{number}" for number in range(12)]
        for number, name in enumerate(names):
            engine.load_adapter(name, write_adapter(tmp_path / name, seed=number))
        outputs = engine.generate(["x"] * 60, adapter=[names[i % 12] for i in range(60)])
        assert [output.text for output in outputs] == [f"{names[i % 12]} says: x" for i in range(60)]
        assert len(backend.resident) <= 3


def test_an_adapter_that_vllm_refuses_is_an_error_and_nothing_more(engine, backend, tmp_path):
    """What passes every check and still does not load leaves the engine and the others alone."""
    backend.refuse("odd", "cannot copy")
    with pytest.raises(AdapterLoadError, match="cannot copy"):
        engine.load_adapter("odd", write_adapter(tmp_path / "odd"))
    assert "odd" not in engine.adapters
    assert engine.generate("x", adapter="pirate")[0].text == "pirate says: x"


def test_a_slow_download_delays_nobody_else(tmp_path):
    """While one adapter loads, requests run and another adapter loads: no lock is held across a load."""
    blocked, go = threading.Event(), threading.Event()

    class SlowPath(type(tmp_path)):
        def __fspath__(self):
            blocked.set()
            assert go.wait(10)
            return super().__fspath__()

    with fake_engine() as engine:
        slow = SlowPath(write_adapter(tmp_path / "slow"))
        thread = threading.Thread(target=engine.load_adapter, args=("slow", slow))
        thread.start()
        assert blocked.wait(10)
        engine.load_adapter("fast", write_adapter(tmp_path / "fast"))
        assert engine.generate("x", adapter="fast")[0].text == "fast says: x"
        assert "slow" not in engine.adapters
        go.set()
        thread.join(10)
        assert "slow" in engine.adapters


# Cancelling -------------------------------------------------------------------------------------------------------


def test_a_cancelled_request_ends_at_once_and_alone():
    """cancel frees the request's place; its handle raises; the others go on."""
    backend, engine = slow_engine()
    with engine:
        doomed, other = engine.add_request(ENDLESS, LONG), engine.add_request("a b", LONG)
        next(iter(doomed))
        assert doomed.cancel()
        assert not doomed.cancel()
        with pytest.raises(RequestCancelledError):
            doomed.result(timeout=1)
        assert other.result(timeout=10).text == "You said: a b"
        engine.generate("flush")
        assert backend.num_unfinished == 0


def test_leaving_a_stream_early_cancels_it():
    """Breaking out of the loop frees the request."""
    backend, engine = slow_engine()
    with engine:
        for output in engine.stream(ENDLESS, LONG):
            if len(output.token_ids) > 2:
                break
        engine.generate("flush")
        assert backend.num_unfinished == 0


def test_a_result_that_takes_too_long_raises_and_the_request_goes_on():
    """result(timeout) gives up waiting, not the request."""
    _, engine = slow_engine()
    with engine:
        handle = engine.add_request(ENDLESS, {"max_tokens": 30})
        with pytest.raises(TimeoutError, match="goes on"):
            handle.result(timeout=0.01)
        assert handle.result(timeout=10).finish_reason == "length"


def test_ctrl_c_in_generate_leaves_nothing_for_the_next_call():
    """An interrupted generate aborts what it added; the next call gets its own results only."""
    backend, engine = slow_engine()
    with engine:
        timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            engine.generate([ENDLESS] * 10, LONG)
        outputs = engine.generate(["a", "b"], LONG)
        assert [output.text for output in outputs] == ["You said: a", "You said: b"]
        assert backend.num_unfinished == 0


# Closing and dying ------------------------------------------------------------------------------------------------


def test_close_ends_what_is_unfinished_with_an_error():
    """close fails waiting and running requests, and every later call, with EngineClosedError; twice is harmless."""
    backend, engine = slow_engine(engine_args={"max_num_seqs": 2})
    handles = [engine.add_request(ENDLESS, LONG) for _ in range(6)]
    next(iter(handles[0]))
    engine.close()
    engine.close()
    for handle in handles:
        with pytest.raises(EngineClosedError):
            handle.result(timeout=1)
    for call in (lambda: engine.generate("a"), lambda: engine.add_request("a")):
        with pytest.raises(EngineClosedError):
            call()
    assert not backend.is_running
    assert "closed" in repr(engine)


def test_loading_into_a_closed_engine_is_an_error(tmp_path):
    """load_adapter after close raises instead of waiting, and leaves no copy behind."""
    engine = fake_engine()
    engine.close()
    with pytest.raises(EngineClosedError):
        engine.load_adapter("a", write_adapter(tmp_path / "a"))
    assert not engine._registry._store._folder.exists()


def test_an_engine_that_nobody_holds_is_closed(tmp_path):
    """Losing the last reference closes the engine and removes its private copies."""
    backend = FakeEngine()
    engine = fake_engine(backend=backend, adapters={"a": write_adapter(tmp_path / "a")})
    assert engine.generate("x", adapter="a")[0].text == "a says: x"
    store = engine._registry._store._folder
    assert store.exists()
    del engine
    gc.collect()
    assert not backend.is_running
    assert not store.exists()


def test_when_the_core_dies_every_handle_gets_the_error():
    """Running, waiting and later requests raise EngineDeadError with the cause; nothing hangs."""
    backend, engine = slow_engine(engine_args={"max_num_seqs": 3})
    with engine:
        handles = [engine.add_request(ENDLESS, LONG) for _ in range(20)]
        next(iter(handles[0]))
        backend.die("out of memory")
        for handle in handles:
            with pytest.raises(EngineDeadError, match="out of memory"):
                handle.result(timeout=5)
        with pytest.raises(EngineDeadError):
            engine.generate("a")


def test_a_load_that_meets_a_dead_core_raises(tmp_path):
    """load_adapter on a dead engine raises EngineDeadError, and so does everything after it."""
    backend, engine = slow_engine()
    with engine:
        backend.die("killed")
        for _ in range(2):
            with pytest.raises(EngineDeadError):
                engine.load_adapter("a", write_adapter(tmp_path / "a"))


def test_a_backend_that_does_not_start_leaves_nothing():
    """An error while starting is raised as it is, and the backend is closed."""

    class Failing(FakeEngine):
        def start(self, plan):
            super().start(plan)
            raise RuntimeError("no memory")

    backend = Failing()
    with pytest.raises(RuntimeError, match="no memory"):
        fake_engine(backend=backend)
    assert not backend.is_running


def test_a_step_that_hangs_does_not_hang_close(monkeypatch):
    """close kills an engine that does not answer, within its bound."""
    monkeypatch.setattr("qlora_infer.requests.driver.CLOSE_TIMEOUT", 0.3)

    class Hanging(FakeEngine):
        def __init__(self):
            super().__init__()
            self.killed = threading.Event()

        def step(self):
            self.killed.wait(30)
            return super().step()

        def kill(self):
            super().kill()
            self.killed.set()

    engine = fake_engine(backend=Hanging())
    handle = engine.add_request("a")
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < 5
    with pytest.raises((EngineClosedError, EngineDeadError)):
        handle.result(timeout=1)


# The package ------------------------------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing_heavy():
    """import qlora_infer loads neither torch, vllm, transformers, numpy, huggingface_hub nor an optional package.

    Nor the engine, which is imported when it is named; then, too, nothing of these is loaded.
    """
    heavy = ("torch", "vllm", "transformers", "numpy", "huggingface_hub", "fsspec", "aiohttp")
    heavy += ("prometheus_client", "opentelemetry", "ray")
    count = "sum(name.startswith('qlora_infer.') for name in sys.modules)"
    code = f"import sys, qlora_infer; print({count}); qlora_infer.QuantizedLoRAEngine; "
    code += f"print([name for name in {heavy} if name in sys.modules])"
    num_modules, found = subprocess.check_output([sys.executable, "-c", code], text=True).split("\n", 1)
    assert int(num_modules) <= 30
    assert found.strip() == "[]"


def test_without_vllm_the_engine_says_which_extra_to_install():
    """The package imports without vLLM; making an engine names both extras."""
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "from qlora_infer import MissingDependencyError, QuantizedLoRAEngine\n"
        "try: QuantizedLoRAEngine('org/model')\n"
        "except MissingDependencyError as error: print(error)"
    )
    told = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert "pip install 'qlora-infer[cuda]'" in told
    assert "'qlora-infer[cpu]'" in told


def test_all_lists_what_there_is():
    """Every name of __all__ exists, and everything public that was defined here is in it."""
    for name in qlora_infer.__all__:
        assert hasattr(qlora_infer, name)
    errors = {n for n, v in vars(qlora_infer.errors).items() if isinstance(v, type) and issubclass(v, Exception)}
    assert errors <= set(qlora_infer.__all__)


def test_type_hints_of_the_public_classes_resolve():
    """typing.get_type_hints works on the public API without vLLM."""
    for function in (
        QuantizedLoRAEngine.generate,
        QuantizedLoRAEngine.load_adapter,
        QuantizedLoRAEngine.chat,
    ):
        assert "return" in typing.get_type_hints(function)
    for name in ("GenerationOutput", "LoadedAdapter", "Completion", "RequestTimes"):
        assert typing.get_type_hints(getattr(qlora_infer, name))


def test_an_engine_without_the_main_guard_is_told_about_it(tmp_path):
    """A script that makes its engine at import is told to use the guard, instead of starting engines for ever."""
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing\n"
        "from qlora_infer.testing import fake_engine\n"
        "if multiprocessing.current_process().name != 'MainProcess':\n"
        "    fake_engine()\n"
        "else:\n"
        "    p = multiprocessing.get_context('spawn').Process(target=print)\n"
        "    p.start(); p.join(); print('exit code', p.exitcode)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert "exit code 1" in done.stdout
    assert 'if __name__ == "__main__":' in done.stderr
