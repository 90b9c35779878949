"""How requests wait, run and end, on the fake engine: priorities, deadlines, backpressure, asyncio, restarts, numbers."""

import asyncio
import concurrent.futures
import gc
import itertools
import math
import os
import pty
import queue
import subprocess
import sys
import termios
import threading
import time
from types import SimpleNamespace

import pytest

from qlora_infer import (
    AdapterLoadError,
    AdapterNotLoadedError,
    EngineClosedError,
    EngineDeadError,
    QueueFullError,
    RequestCancelledError,
    RequestRejectedError,
    RequestTimeoutError,
)
from qlora_infer.requests.ahead import steps_ahead
from qlora_infer.requests.backend import StepOutput
from qlora_infer.requests.deadlines import Deadlines
from qlora_infer.requests.pending import PendingRequest
from qlora_infer.requests.request import GenerationRequest
from qlora_infer.testing import FakeEngine, fake_engine, write_adapter

LONG = {"max_tokens": 1000}
ENDLESS = " ".join(["word"] * 900)


class Gate(FakeEngine):
    """A fake engine whose steps wait until they are let through."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.open = threading.Event()
        self.entered = threading.Event()
        self.order = []

    def step(self):
        self.entered.set()
        assert self.open.wait(20)
        return super().step()

    def add_request(self, request):
        self.order.append(request.prompt)
        return super().add_request(request)


def gated(**arguments):
    backend = Gate()
    engine = fake_engine(backend=backend, engine_args={"max_num_seqs": 1}, **arguments)
    blocker = engine.add_request("blocker", LONG)
    assert backend.entered.wait(10)  # from now on, requests wait in our queue
    return backend, engine, blocker


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def slow_engine(step_seconds=0.01, **arguments):
    backend = FakeEngine(step_seconds=step_seconds)
    return backend, fake_engine(backend=backend, **arguments)


# Order ------------------------------------------------------------------------------------------------------------


def test_a_lower_priority_value_goes_first():
    """Waiting requests start by their priority, and by their arrival within one."""
    backend, engine, _blocker = gated()
    with engine:
        handles = [engine.add_request(f"p{p} {i}", priority=p) for i, p in enumerate([5, 0, -3, 0, 5])]
        backend.open.set()
        for handle in handles:
            handle.result(timeout=10)
        assert backend.order[1:] == ["p-3 2", "p0 1", "p0 3", "p5 0", "p5 4"]
        assert [o.text for o in engine.generate(["a", "b"], priority=[1, 0])] == ["You said: a", "You said: b"]


@pytest.mark.parametrize(("policy", "at_most"), [("fair", 40), ("fcfs", 200)])
def test_a_rare_adapter_is_not_last_behind_a_flood(tmp_path, policy, at_most):
    """200 requests of one adapter before one of another, one slot: fairly shared, the one is early; else the last."""
    adapters = {name: write_adapter(tmp_path / name, seed=len(name)) for name in ("busy", "rare")}
    order = []

    class Watched(FakeEngine):
        def add_request(self, request):
            order.append(request.adapter_name)
            return super().add_request(request)

    backend = Watched(step_seconds=0.0005)
    with fake_engine(
        backend=backend, adapters=adapters, max_loras=1, policy=policy, engine_args={"max_num_seqs": 4}
    ) as engine:
        outputs = engine.generate(["a b c d e f"] * 201, LONG, adapter=["busy"] * 200 + ["rare"])
        assert outputs[200].text == "rare says: a b c d e f"
    assert order.index("rare") <= at_most
    assert (order.index("rare") == 200) == (policy == "fcfs")


def test_the_engine_is_never_given_more_adapters_than_it_has_slots(tmp_path):
    """With interleaved adapters, the batch holds at most max_loras of them, and stays full otherwise."""
    adapters = {f"a{i}": write_adapter(tmp_path / f"a{i}", seed=i) for i in range(9)}

    class Watched(FakeEngine):
        most = 0

        def step(self):
            held = [*self._running, *self._waiting]
            self.most = max(self.most, len({entry.request.adapter for entry in held} - {None}))
            return super().step()

    backend = Watched()
    with fake_engine(backend=backend, adapters=adapters, max_loras=3) as engine:
        names = [*itertools.islice(itertools.cycle([*adapters, None]), 200)]
        outputs = engine.generate(["x y z"] * 200, adapter=names)
        assert [output.adapter for output in outputs] == names
    assert backend.most == 3


def test_the_next_adapter_is_read_before_its_turn(tmp_path):
    """An adapter that is not in host memory is prefetched while others run, so that its turn costs no reading."""
    adapters = {f"a{i}": write_adapter(tmp_path / f"a{i}", seed=i) for i in range(6)}

    class Watched(FakeEngine):
        num_ahead = 0

        def start_load(self, version):
            super().start_load(version)
            self.num_ahead += not version.num_running

    backend = Watched(step_seconds=0.001)
    with fake_engine(backend=backend, adapters=adapters, max_loras=1, max_cpu_loras=2) as engine:
        backend.num_ahead = 0
        engine.generate(["x"] * 60, adapter=[f"a{i % 6}" for i in range(60)])
        swaps = sum(stats.num_swaps for stats in engine.stats().adapters.values())
        assert backend.num_ahead >= 5
        assert swaps <= 12


def test_what_the_engine_cannot_begin_waits_in_the_fair_queue(tmp_path):
    """With a KV cache that holds few requests, later ones wait where adapters take turns, not in the engine's line."""
    order = []

    class SmallCache(FakeEngine):
        def _schedule(self):
            held_back = self._waiting[max(0, 4 - len(self._running)) :]
            self._waiting = self._waiting[: max(0, 4 - len(self._running))]
            order.extend(entry.request.adapter_name for entry in self._waiting)
            super()._schedule()
            self._waiting += held_back

    adapters = {name: write_adapter(tmp_path / name, seed=len(name)) for name in ("busy", "rare")}
    backend = SmallCache(step_seconds=0.0005)
    with fake_engine(backend=backend, adapters=adapters, engine_args={"max_num_seqs": 32}) as engine:
        engine.generate(["a b c d"] * 201, adapter=["busy"] * 200 + ["rare"])
    assert order.index("rare") < 60


def test_an_adapter_that_cannot_be_loaded_again_fails_its_own_requests(tmp_path):
    """A reload that fails is the error of that adapter's requests; others go on."""
    adapters = {name: write_adapter(tmp_path / name, seed=seed) for seed, name in enumerate("abc")}
    backend = FakeEngine()
    with fake_engine(backend=backend, adapters=adapters, max_loras=1, max_cpu_loras=1) as engine:
        backend.refuse("a", "bad luck")
        bad, good = engine.add_request("x", adapter="a"), engine.add_request("x", adapter="b")
        with pytest.raises(AdapterLoadError, match="bad luck"):
            bad.result(timeout=10)
        assert good.result(timeout=10).text == "b says: x"


def test_a_share_is_seen_and_checked(tmp_path):
    """share is part of a loaded adapter, may be changed by loading it again, and must be a number above 0."""
    folder = write_adapter(tmp_path / "a")
    with fake_engine(adapters={"a": folder}) as engine:
        assert engine.adapters["a"].share == 1.0
        assert engine.load_adapter("a", folder, share=2.5).share == 2.5
        assert engine.adapters["a"].share == 2.5
        for share, error in [(0, ValueError), (-1, ValueError), (float("inf"), ValueError), ("2", TypeError)]:
            with pytest.raises(error, match="share"):
                engine.load_adapter("a", folder, share=share)
        assert engine.adapters["a"].share == 2.5


# Deadlines --------------------------------------------------------------------------------------------------------


class Watched(FakeEngine):
    """Takes 2 ms for a step, and notes how many requests it has at each."""

    def __init__(self):
        super().__init__(step_seconds=0.002)
        self.seen = []

    def step(self):
        self.seen.append(self.num_unfinished)
        return super().step()


def test_the_next_requests_are_there_before_their_places_are_free():
    """The engine has a spare request for eight places, and one for each that is within four steps of its max_tokens."""
    backend = Watched()
    with fake_engine(backend=backend, engine_args={"max_num_seqs": 8}) as engine:
        all_here = threading.Event()
        engine._driver.post(all_here.wait)
        handles = [engine.add_request(" ".join(["word"] * 30), {"max_tokens": 20}) for _ in range(32)]
        all_here.set()
        assert [handle.result(timeout=30).num_tokens for handle in handles] == [20] * 32
    assert set(backend.seen[:16]) == {9}
    assert set(backend.seen[17:20]) == {17}
    assert len(backend.seen) == 4 * 20


def test_the_shorter_a_step_the_sooner_the_next_requests_are_there():
    """As many steps before as handing a batch over takes, half a millisecond a request; at least 4, at most 16."""
    assert steps_ahead(64, seconds=0.003) == math.ceil(64 * 0.5 / 3)
    assert steps_ahead(64, seconds=1.0) == 4
    assert steps_ahead(64, seconds=0.0) == steps_ahead(1024, seconds=0.003) == 16


class Pipelined(FakeEngine):
    """Makes two steps more before it tells of one, as vLLM's core does that schedules ahead."""

    def __init__(self):
        super().__init__()
        self.untold = [StepOutput(), StepOutput()]
        self.most = 0

    def step(self):
        self.untold.append(super().step())
        self.most = max(self.most, len({entry.request.adapter for entry in [*self._running, *self._waiting]}))
        return self.untold.pop(0)


@pytest.mark.parametrize("max_tokens", [1, 2, 8])
def test_the_next_adapters_are_there_before_their_slots_are_free(tmp_path, max_tokens):
    """Where each of 32 adapters has 2 requests and there are 4 slots, no slot stays empty between two of them.

    The engine is told of the next adapter while the requests of one before it are about to reach their max_tokens.
    """
    adapters = {f"a{i}": write_adapter(tmp_path / f"a{i}", seed=i) for i in range(32)}
    backend = Pipelined()
    with fake_engine(backend=backend, adapters=adapters, max_loras=4, engine_args={"max_num_seqs": 16}) as engine:
        all_here = threading.Event()
        engine._driver.post(all_here.wait)
        params = {"max_tokens": max_tokens}
        handles = [engine.add_request("one two three four five six", params, adapter=f"a{i % 32}") for i in range(64)]
        all_here.set()
        for handle in handles:
            assert handle.result(timeout=30).num_tokens == max_tokens
    assert backend.num_steps <= 8 * max_tokens + 8
    assert backend.most <= 8


def test_an_adapter_that_is_about_to_leave_its_slot_leaves_it(tmp_path):
    """A client that asks again whenever it is about to be answered does not keep its adapter in the only slot."""
    adapters = {name: write_adapter(tmp_path / name, seed=len(name)) for name in ("busy", "rare")}
    backend = FakeEngine(step_seconds=0.001)
    with fake_engine(backend=backend, adapters=adapters, max_loras=1, engine_args={"max_num_seqs": 2}) as engine:
        busy = engine.add_request("a b c d", {"max_tokens": 4}, adapter="busy")
        rare = engine.add_request("a b c d", {"max_tokens": 4}, adapter="rare")
        num_asked = 1
        while not rare.done() and num_asked < 500:
            for number, _ in enumerate(busy):
                if number == 1:
                    following = engine.add_request("a b c d", {"max_tokens": 4}, adapter="busy")
            busy, num_asked = following, num_asked + 1
        assert rare.result(timeout=10).text == "rare says: a b"
    assert num_asked < 10


def test_a_request_that_waits_too_long_is_dropped():
    """A timeout passes while the request waits: it raises at once, takes no place, and others go on."""
    backend, engine, blocker = gated()
    with engine:
        late, patient = engine.add_request("late", timeout=0.05), engine.add_request("patient", timeout=30)
        began = time.monotonic()
        with pytest.raises(RequestTimeoutError, match=r"within 0\.05 s"):
            late.result(timeout=10)
        assert time.monotonic() - began < 5  # though no step has ended
        backend.open.set()
        assert patient.result(timeout=10).text == "You said: patient"
        assert "late" not in backend.order
        assert blocker.result(timeout=10).text == "You said: blocker"


def test_a_request_that_runs_too_long_is_aborted():
    """A timeout passes while the request runs: it is aborted and raises; the one beside it is answered."""
    backend, engine = slow_engine()
    with engine:
        late, other = engine.add_request(ENDLESS, LONG, timeout=0.1), engine.add_request("a b", LONG)
        parts = iter(late)
        with pytest.raises(RequestTimeoutError):
            list(parts)
        assert next(parts, None) is None
        assert isinstance(late._pending.error, TimeoutError)
        assert other.result(timeout=10).text == "You said: a b"
        wait_until(lambda: backend.num_unfinished == 0)


def test_generate_with_a_timeout_leaves_nothing_behind():
    """When one prompt is late, generate raises, cancels the others, and the next call gets its own results."""
    backend, engine = slow_engine()
    with engine:
        with pytest.raises(RequestTimeoutError):
            engine.generate([ENDLESS] * 10, LONG, timeout=0.1)
        assert engine.generate(["a"], LONG, timeout=10)[0].text == "You said: a"
        assert backend.num_unfinished == 0
        for timeout, error in [(0, ValueError), (-1, ValueError), (float("nan"), ValueError), ("1", TypeError)]:
            with pytest.raises(error, match="timeout"):
                engine.generate("a", timeout=timeout)
        with pytest.raises(TypeError, match="priority"):
            engine.generate("a", priority=1.5)


def test_a_timeout_without_end_ends_no_other():
    """timeout=inf, or a number that no clock has, is no limit; the deadlines of others hold."""
    backend, engine = slow_engine()
    with engine:
        for endless in (math.inf, 1e300):
            assert engine.add_request("hi", timeout=endless).result(timeout=endless).finished
        with pytest.raises(RequestTimeoutError):
            engine.generate(ENDLESS, LONG, timeout=0.1)
    backend, engine, _blocker = gated(max_waiting=1)
    with engine:
        engine.add_request("waits")
        thread = threading.Thread(target=lambda: engine.add_request("waits too", timeout=math.inf).result())
        thread.start()
        backend.open.set()
        thread.join(10)
        assert not thread.is_alive()


def test_deadlines_of_ended_requests_are_forgotten():
    """A service that gives each request a day keeps no memory of those that have ended."""
    deadlines = Deadlines(lambda pending: None)
    for number in range(5000):
        pending = PendingRequest(GenerationRequest(f"r{number}", "prompt", None, None, timeout=86400.0))
        deadlines.add(pending)
        pending.fail(RuntimeError("it has ended"))
    assert len(deadlines._heap) <= 1024
    deadlines.close()


def test_generates_timeout_counts_from_the_call():
    """Also for those of its prompts that max_waiting has not let in at once."""
    _, engine = slow_engine(max_waiting=1, engine_args={"max_num_seqs": 1})
    with engine, pytest.raises(RequestTimeoutError):
        engine.generate([" ".join(["word"] * 50)] * 10, {"max_tokens": 50}, timeout=2.5)  # half a second each


def test_sampling_params_are_those_of_the_call():
    """An object that is changed for the next request leaves those that wait as they were."""
    backend, engine, _blocker = gated()
    params = SimpleNamespace(max_tokens=2, n=1, logprobs=None, prompt_logprobs=None)
    with engine:
        handles = []
        for params.max_tokens in (2, 4, 6):
            handles.append(engine.add_request(ENDLESS, params))
        backend.open.set()
        assert [handle.result(10).num_tokens for handle in handles] == [2, 4, 6]


@pytest.mark.parametrize("prompts", [b"hello", bytearray(b"hello"), [b"hello"], b""])
def test_bytes_are_no_token_ids(prompts):
    """They are refused: a text that somebody forgot to decode would be answered as five tokens."""
    with fake_engine() as engine, pytest.raises(TypeError, match="must be a string"):
        engine.generate(prompts)


def test_an_adapter_is_asked_for_by_its_name(tmp_path):
    """Anything else, such as what load_adapter returns, is a TypeError that says so."""
    with fake_engine() as engine:
        loaded = engine.load_adapter("pirate", write_adapter(tmp_path / "pirate"))
        for wrong in (loaded, 1):
            with pytest.raises(TypeError, match="adapter must be the name"):
                engine.add_request("hello", adapter=wrong)


# Backpressure -----------------------------------------------------------------------------------------------------


def test_a_full_queue_raises_or_blocks_as_the_caller_chooses():
    """With max_waiting requests waiting, block=False raises, and block=True waits until one of them starts."""
    backend, engine, _blocker = gated(max_waiting=2)
    with engine:
        waiting = [engine.add_request("first"), engine.add_request("next")]
        with pytest.raises(QueueFullError, match="max_waiting=2"):
            engine.add_request("too much", block=False)
        with pytest.raises(QueueFullError, match="max_waiting=2"):
            engine.stream("too much", block=False)
        with pytest.raises(RequestTimeoutError):
            engine.add_request("too much", timeout=0.05)
        answers = []
        thread = threading.Thread(target=lambda: answers.append(engine.add_request("patient").result(timeout=10)))
        thread.start()
        time.sleep(0.05)
        assert not answers
        backend.open.set()
        thread.join(10)
        assert [output.text for output in answers] == ["You said: patient"]
        assert [handle.result(timeout=10).finished for handle in waiting] == [True] * len(waiting)
        assert "too much" not in backend.order


def test_a_coroutine_is_never_kept_waiting_for_room():
    """Its event loop would stand still: a full queue raises at once, as with block=False."""
    backend, engine, _blocker = gated(max_waiting=1)

    async def main():
        async with engine:
            handle = engine.add_request("first")
            with pytest.raises(QueueFullError, match="max_waiting=1"):
                engine.add_request("too much")
            backend.open.set()
            assert (await handle).text == "You said: first"
        assert not engine.is_running

    asyncio.run(main())


def test_generate_gets_through_a_small_queue():
    """max_waiting holds up generate, and does not fail it."""
    with fake_engine(max_waiting=3, engine_args={"max_num_seqs": 2}) as engine:
        assert [output.text for output in engine.generate([f"n {i}" for i in range(200)], LONG)] == [
            f"You said: n {i}" for i in range(200)
        ]


@pytest.mark.parametrize("end", ["close", "die"])
def test_who_waits_for_room_hears_of_the_end(end):
    """close, and the death of the core, wake whoever waits for room in the queue."""
    backend, engine, _blocker = gated(max_waiting=1)
    with engine:
        handles = [engine.add_request("fill")]
        errors = []

        def ask():
            try:
                handles.append(engine.add_request("a"))
            except (EngineClosedError, EngineDeadError) as error:
                errors.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(0.05)
        if end == "close":
            threading.Timer(0.05, backend.open.set).start()
            engine.close()
        else:
            backend.die("killed")
            backend.open.set()
        thread.join(10)
        assert len(errors) == 1


# Any number of prompts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_order", [True, False])
def test_a_million_prompts_keep_a_bounded_number_in_memory(in_order):
    """generate_iter reads prompts as outputs are taken, never more than max_pending ahead."""
    num_read = 0

    def prompts():
        nonlocal num_read
        for num_read in range(1, 1_000_001):
            yield f"n {num_read}"

    with fake_engine() as engine:
        outputs = engine.generate_iter(prompts(), LONG, in_order=in_order, max_pending=50, use_tqdm=False)
        seen = set()
        for number, output in enumerate(itertools.islice(outputs, 500), 1):
            seen.add(output.text)
            assert num_read - number <= 50
            if in_order:
                assert output.text == f"You said: n {number}"
        assert len(seen) == 500
        outputs.close()
        engine.generate("flush")
        assert engine._backend.num_unfinished == 0
        stats = engine.stats()
        assert (stats.num_waiting, stats.num_running) == (0, 0)


def test_generate_iter_gives_each_prompt_its_own_adapter_and_parameters(tmp_path):
    """adapter and sampling_params may be iterables too, endless ones as well; one that is too short is an error."""
    adapters = {name: write_adapter(tmp_path / name, seed=len(name)) for name in ("pirate", "json")}
    with fake_engine(adapters=adapters) as engine:
        names = itertools.cycle(["pirate", None, "json"])
        params = ({"max_tokens": 2 + i} for i in itertools.count())
        outputs = list(engine.generate_iter(["a b c"] * 5, params, adapter=names, use_tqdm=False))
        assert [output.adapter for output in outputs] == ["pirate", None, "json", "pirate", None]
        assert [len(output.token_ids) for output in outputs] == [2, 3, 4, 5, 5]
        assert [o.text for o in engine.generate_iter(["a", "b"], LONG, adapter="json")] == [
            "json says: a",
            "json says: b",
        ]
        with pytest.raises(ValueError, match="adapter has fewer entries"):
            list(engine.generate_iter(["a"] * 3, adapter=["json"]))
        with pytest.raises(AdapterNotLoadedError):
            list(engine.generate_iter(["a"], adapter="nobody"))
        for call in (lambda: engine.generate_iter("text"), lambda: engine.generate_iter([7])):
            with pytest.raises(TypeError, match="prompt"):
                list(call())
        with pytest.raises(ValueError, match="max_pending"):
            engine.generate_iter(["a"], max_pending=0)
        assert list(engine.generate_iter([])) == []


def test_as_they_finish_short_ones_come_first():
    """in_order=False yields an output when it is there, and does not wait for a longer one before it."""
    with fake_engine() as engine:
        prompts = [" ".join(["w"] * 100), "a"]
        first, second = engine.generate_iter(prompts, LONG, in_order=False)
        assert (first.prompt, second.prompt) == ("a", prompts[0])


def test_a_prompt_that_fails_ends_generate_iter_and_cancels_the_rest():
    """The error comes where the output would; nothing of the call stays in the engine."""
    backend = FakeEngine(step_seconds=0.001)
    with fake_engine(backend=backend, max_model_len=5) as engine:
        outputs = engine.generate_iter(["a b", "a b c d e f g", *["a b"] * 50], LONG)
        assert next(outputs).text == "You said: a b"
        with pytest.raises(RequestRejectedError):
            next(outputs)
        wait_until(lambda: backend.num_unfinished == 0)


def test_a_prompt_that_fails_is_an_output_with_an_error(tmp_path):
    """on_error="return": one bad row among many is a row with an error, in its place, and the others are answered."""
    rows = ["a b", "a b c d e f g", 7, "x", *["c d"] * 50]
    adapters = [None, None, None, "parrot", *["pirate"] * 50]
    for in_order in (True, False):
        with fake_engine(max_model_len=5, adapters={"pirate": write_adapter(tmp_path / "pirate")}) as engine:
            outputs = list(
                engine.generate_iter(rows, LONG, adapter=iter(adapters), on_error="return", in_order=in_order)
            )
        assert sorted(output.index for output in outputs) == list(range(54))
        by_index = {output.index: output for output in outputs}
        faults = {index: type(output.error) for index, output in by_index.items() if output.error}
        assert faults == {1: RequestRejectedError, 2: TypeError, 3: AdapterNotLoadedError}
        assert (by_index[0].text, by_index[53].text) == ("You said: a b", "pirate says: c d")
        with pytest.raises(RequestRejectedError):
            _ = by_index[1].text
        if in_order:
            assert outputs == [by_index[index] for index in range(54)]


def test_an_engine_that_dies_ends_a_batch_that_keeps_errors():
    """on_error="return" is for rows; what is asked of a dead engine is no row's fault."""
    backend = FakeEngine()
    with fake_engine(backend=backend) as engine:
        outputs = engine.generate_iter(itertools.repeat("a"), LONG, on_error="return", max_pending=4)
        assert next(outputs).error is None
        backend.die()
        with pytest.raises(EngineDeadError):
            list(outputs)


# Futures ----------------------------------------------------------------------------------------------------------


def test_handles_are_futures():
    """concurrent.futures waits for them, and each tells its result, or the error that it ended with."""
    with fake_engine(max_model_len=5) as engine:
        handles = [engine.add_request(prompt, LONG) for prompt in ("a", "b", "a b c d e f g")]
        done, not_done = concurrent.futures.wait(handles, timeout=10)
        assert (done, not_done) == (set(handles), set())
        assert set(concurrent.futures.as_completed(handles)) == set(handles)
        assert handles[0].exception() is None
        assert isinstance(handles[2].exception(), RequestRejectedError)
        assert [handle.result().text for handle in handles[:2]] == ["You said: a", "You said: b"]
        assert not any(handle.running() or handle.cancelled() for handle in handles)


def test_a_callback_is_called_although_nobody_holds_the_handle():
    """Once, with the handle, when the request has ended; and at once where it has already."""
    found = queue.SimpleQueue()
    backend, engine = slow_engine()
    with engine:
        engine.add_request("a b", LONG).add_done_callback(found.put)
        gc.collect()
        handle = found.get(timeout=10)
        assert handle.result().text == "You said: a b"
        handle.add_done_callback(found.put)
        assert found.get(timeout=10) is handle
        assert found.empty()
        assert handle._pending._held is None
    assert backend.num_unfinished == 0


def test_a_cancelled_handle_tells_its_callbacks():
    """cancel() is heard of at once, by callbacks, by as_completed and by asyncio.wrap_future."""
    backend, engine = slow_engine()

    async def wrapped(handle):
        handle.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wrap_future(handle)

    with engine:
        found = []
        handle = engine.add_request(ENDLESS, LONG)
        handle.add_done_callback(found.append)
        wait_until(handle.running)
        assert handle.cancel()
        assert found == [handle]
        assert next(concurrent.futures.as_completed([handle], timeout=10)) is handle
        assert (handle.done(), handle.cancelled(), handle.running(), handle.cancel()) == (True, True, False, False)
        asyncio.run(wrapped(engine.add_request(ENDLESS, LONG)))
        wait_until(lambda: backend.num_unfinished == 0)


def test_a_wrapped_future_that_is_cancelled_cancels_its_request():
    """asyncio.wrap_future(handle): a task that is cancelled while it awaits it stops the request."""
    backend, engine = slow_engine()

    async def main():
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(engine.add_request(ENDLESS, LONG)), 0.05)

    with engine:
        asyncio.run(main())
        wait_until(lambda: backend.num_unfinished == 0)


def test_a_callback_that_raises_harms_nobody(caplog):
    """concurrent.futures logs it; the thread that drives the engine goes on."""
    with fake_engine() as engine:
        engine.add_request("a", LONG).add_done_callback(lambda handle: 1 / 0)
        assert engine.generate("b", LONG)[0].text == "You said: b"
    assert "ZeroDivisionError" in caplog.text


def test_parts_have_what_came_since_the_part_before():
    """The deltas of a stream make up its text; an output outside of a stream has none."""
    _, engine = slow_engine(step_seconds=0.002)
    with engine:
        parts = list(engine.stream(" ".join(f"w{i}" for i in range(30)), {"max_tokens": 30}))
        assert len(parts) > 1
        assert all(part.text == "".join(each.delta for each in parts[: i + 1]) for i, part in enumerate(parts))
        assert engine.generate("a", LONG)[0].delta == ""


def test_an_output_tells_which_version_answered(tmp_path):
    """output.adapter_version is the number after the @, of exactly the version that the request ran on."""
    with fake_engine(adapters={"pirate": write_adapter(tmp_path / "one")}) as engine:
        first = engine.generate("a", LONG, adapter="pirate")[0]
        engine.load_adapter("pirate", write_adapter(tmp_path / "two", rank=4))
        second, base, exact = engine.generate(["a"] * 3, LONG, adapter=["pirate", None, "pirate@1"])
    assert [output.adapter_version for output in (first, second, base, exact)] == [1, 2, None, 1]


# Letting go -------------------------------------------------------------------------------------------------------


def test_a_handle_that_nobody_holds_cancels_its_request():
    """Dropping the last reference frees the request, whether it runs or waits; others are untouched."""
    backend, engine = slow_engine(engine_args={"max_num_seqs": 2})
    with engine:
        handles = [engine.add_request(ENDLESS, LONG) for _ in range(8)]
        next(iter(handles[0]))
        kept = engine.add_request("a b", LONG)
        del handles
        gc.collect()
        assert kept.result(timeout=10).text == "You said: a b"
        wait_until(lambda: backend.num_unfinished == 0)
        stats = engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.adapters[None].num_failed) == (0, 0, 8)


def test_a_handle_in_a_reference_cycle_is_let_go_by_the_garbage_collector():
    """The collector may find it at any moment, in any thread, and nothing locks up."""
    backend, engine = slow_engine(step_seconds=0.001)
    with engine:
        stop = time.monotonic() + 1.0
        while time.monotonic() < stop:
            cycle = [engine.add_request(ENDLESS, LONG)]
            cycle.append(cycle)
            del cycle
            gc.collect()
        wait_until(lambda: backend.num_unfinished == 0)
        assert engine.generate("a", LONG)[0].text == "You said: a"


def test_a_result_taken_on_the_spot_is_not_let_go():
    """engine.add_request(...).result() holds the handle as long as it needs it."""
    with fake_engine() as engine:
        gc.collect()
        assert engine.add_request("a b", LONG).result(timeout=10).text == "You said: a b"


def test_cancelling_a_thousand_waiting_requests_leaves_the_others_in_order():
    """Whoever is cancelled is heard of by nobody else."""
    backend, engine, _blocker = gated()
    with engine:
        handles = [engine.add_request(f"n{i}") for i in range(1000)]
        for number, handle in enumerate(handles):
            if number % 10:
                assert handle.cancel()
        backend.open.set()
        for number, handle in enumerate(handles):
            if number % 10:
                with pytest.raises(RequestCancelledError):
                    handle.result(timeout=10)
            else:
                assert handle.result(timeout=10).text == f"You said: n{number}"
        assert backend.order[1:] == [f"n{i}" for i in range(0, 1000, 10)]


# asyncio ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["close", "die"])
def test_whether_it_runs_can_be_asked(end):
    """is_running is true until the engine is closed or found dead."""
    backend = FakeEngine()
    with fake_engine(backend=backend) as engine:
        assert engine.is_running
        getattr(engine if end == "close" else backend, end)()
        if end == "die":
            with pytest.raises(EngineDeadError):
                engine.add_request("a").result(10)
            wait_until(lambda: not engine.is_running)
        assert not engine.is_running


def test_a_handle_can_be_awaited():
    """await handle gives the output or raises the error, beside other coroutines, for any number of tasks."""
    _, engine = slow_engine(step_seconds=0.001)

    async def main():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticking = asyncio.create_task(tick())
        handles = [engine.add_request(f"n {i} " + "w " * 30, LONG) for i in range(50)]
        outputs = await asyncio.gather(*handles)
        assert [output.text.split()[3] for output in outputs] == [str(i) for i in range(50)]
        assert ticks > 5
        ticking.cancel()
        same = engine.add_request("a b", LONG)
        assert await same == await same == same.result()
        doomed = engine.add_request(ENDLESS, LONG)
        doomed.cancel()
        with pytest.raises(RequestCancelledError):
            await doomed

    with engine:
        asyncio.run(main())


def test_a_handle_can_be_iterated_by_a_coroutine():
    """async for yields growing texts and ends with all of it; add_request and stream alike; leaving early cancels."""
    backend, engine = slow_engine(step_seconds=0.001)

    async def main():
        texts = [part.text async for part in engine.add_request("a b c d", LONG)]
        assert texts[-1] == "You said: a b c d"
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
        async for part in engine.stream(ENDLESS, LONG):
            if len(part.token_ids) > 3:
                break
        failing = engine.add_request(ENDLESS, LONG, timeout=0.05)
        with pytest.raises(RequestTimeoutError):
            async for _ in failing:
                pass

    with engine:
        asyncio.run(main())
        wait_until(lambda: backend.num_unfinished == 0)


def test_giving_up_an_await_does_not_end_the_request():
    """asyncio.wait_for gives up waiting; the handle is still good, as with result(timeout)."""
    _, engine = slow_engine()

    async def main():
        handle = engine.add_request(ENDLESS, {"max_tokens": 40})
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(handle, 0.05)
        assert not handle.done()
        assert len((await handle).token_ids) == 40
        assert handle._pending._listeners == []

    with engine:
        asyncio.run(main())


def test_several_event_loops_and_threads_share_one_engine():
    """Each of many loops in threads of their own, and plain threads, gets its own answers."""
    answers = {}

    async def ask(number):
        answers[number] = (await engine.add_request(f"question {number}", LONG)).text

    async def ask_many(numbers):
        await asyncio.gather(*map(ask, numbers))

    with fake_engine() as engine:
        threads = [threading.Thread(target=asyncio.run, args=(ask_many(range(i * 20, i * 20 + 20)),)) for i in range(5)]
        threads += [
            threading.Thread(
                target=lambda n: answers.update({n: engine.generate(f"question {n}", LONG)[0].text}), args=(n,)
            )
            for n in range(100, 120)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert answers == {n: f"You said: question {n}" for n in range(120)}


def test_an_event_loop_that_is_gone_disturbs_nobody():
    """A loop that was closed while it waited for a handle does not harm the driving thread."""
    _, engine = slow_engine()
    with engine:
        handle = engine.add_request(ENDLESS, {"max_tokens": 30})

        async def main():
            asyncio.get_running_loop().create_task(handle._awaited())
            await asyncio.sleep(0.02)

        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
        loop.close()
        assert len(handle.result(timeout=10).token_ids) == 30
        assert engine.generate("a", LONG)[0].text == "You said: a"


# A core that dies -------------------------------------------------------------------------------------------------


def test_on_failure_a_new_core_runs_again_what_had_no_token(tmp_path):
    """With restart="on-failure", waiting requests and those without a token are answered; others fail and say so."""
    backend = Gate()
    adapter = write_adapter(tmp_path / "pirate")
    with fake_engine(
        backend=backend, adapters={"pirate": adapter}, restart="on-failure", engine_args={"max_num_seqs": 2}
    ) as engine:
        backend.open.set()
        started = engine.add_request(ENDLESS, LONG, adapter="pirate")
        next(iter(started))
        backend.open.clear()
        backend.entered.clear()
        assert backend.entered.wait(10)
        others = [engine.add_request(f"n {i}", LONG, adapter=("pirate", None)[i % 2]) for i in range(10)]
        backend.die("out of memory")
        backend.open.set()
        with pytest.raises(EngineDeadError, match=r"out of memory.*had produced \d+ tokens"):
            started.result(timeout=10)
        assert [handle.result(timeout=10).text for handle in others] == [
            f"{'You said' if i % 2 else 'pirate says'}: n {i}" for i in range(10)
        ]
        assert backend.num_starts == 2
        assert engine.stats().num_restarts == 1
        assert backend.resident == ("pirate",)
        assert engine.generate("a", adapter="pirate")[0].text == "pirate says: a"


def test_a_request_that_kills_every_core_is_run_twice_and_then_fails():
    """A poisonous request cannot restart the engine for ever; others are answered."""

    class Poisoned(FakeEngine):
        def step(self):
            if any(entry.request.prompt == "poison" for entry in (*self._waiting, *self._running)):
                self.die("poisoned")
            return super().step()

    backend = Poisoned()
    with fake_engine(backend=backend, restart="on-failure") as engine:
        poison = engine.add_request("poison")
        with pytest.raises(EngineDeadError, match="run twice"):
            poison.result(timeout=10)
        assert engine.generate("a", LONG)[0].text == "You said: a"
        assert backend.num_starts == 3


def test_a_core_that_cannot_be_started_again_is_dead():
    """When the new core does not start, every request fails with the cause, and nothing hangs."""

    class Once(FakeEngine):
        def start(self, plan):
            if self.num_starts:
                raise RuntimeError("no memory left")
            super().start(plan)

    backend = Once(step_seconds=0.01)
    with fake_engine(backend=backend, restart="on-failure") as engine:
        handles = [engine.add_request(ENDLESS, LONG) for _ in range(5)]
        next(iter(handles[0]))
        backend.die()
        for handle in handles:
            with pytest.raises(EngineDeadError):
                handle.result(timeout=10)
        with pytest.raises(EngineDeadError, match="no memory left"):
            engine.generate("a")


def test_a_load_that_meets_a_dying_core_can_be_tried_again(tmp_path):
    """The call that finds the core dead raises; with a new core, the next one works."""
    backend = FakeEngine()
    with fake_engine(backend=backend, restart="on-failure") as engine:
        backend.die("killed")
        with pytest.raises(EngineDeadError):
            engine.load_adapter("a", write_adapter(tmp_path / "a"))
        wait_until(lambda: backend.is_running)
        engine.load_adapter("a", tmp_path / "a")
        assert engine.generate("x", adapter="a")[0].text == "a says: x"


# Numbers ----------------------------------------------------------------------------------------------------------


def test_stats_count_what_happened(tmp_path):
    """Requests, tokens, times, swaps and steps, in all and by adapter; a snapshot does not change."""
    adapters = {name: write_adapter(tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    with fake_engine(adapters=adapters, max_loras=1) as engine:
        before = engine.stats()
        engine.generate(["one two"] * 3, LONG, adapter=["a", "b", None])
        engine.generate(["one two"], LONG, adapter="a")
        with pytest.raises(RequestTimeoutError):
            engine.generate([ENDLESS], LONG, timeout=1e-9)
        wait_until(lambda: engine.stats().num_running == 0 == engine.stats().num_waiting)
        stats = engine.stats()
        assert before.adapters == {}
        assert set(stats.adapters) == {"a", "b", None}
        a, base = stats.adapters["a"], stats.adapters[None]
        assert (a.num_finished, a.prompt_tokens, a.generation_tokens) == (2, 4, 8)
        assert (a.num_swaps, base.num_swaps) == (2, 0)
        assert (base.num_finished, base.num_failed) == (1, 1)
        assert stats.generation_tokens >= 16
        assert a.queue_time.count == a.time_to_first_token.count == 2
        assert 0 <= a.queue_time.mean <= a.time_to_first_token.mean <= a.time_to_first_token.max
        assert stats.num_steps == engine._backend.num_steps
        assert stats.step_time.count == stats.num_steps
        engine.unload_adapter("a")
        engine.generate("flush")
        assert "a" not in engine.stats().adapters
    assert engine.stats().num_waiting == 0


def test_stats_see_what_waits():
    """While requests wait, they are counted, and so are the adapters that wait for a slot."""
    backend, engine, _blocker = gated()
    with engine:
        handles = [engine.add_request("x") for _ in range(7)]
        stats = engine.stats()
        assert (stats.num_waiting, stats.num_running) == (7, 1)
        backend.open.set()
        assert [handle.result(timeout=10).finished for handle in handles] == [True] * 7


def test_stats_are_cheap_with_a_thousand_adapters():
    """A snapshot with 1,000 adapters is plain data, and taking it every second costs next to nothing."""
    from qlora_infer.requests.pending import PendingRequest
    from qlora_infer.requests.request import GenerationRequest
    from qlora_infer.requests.stats import StatsRecorder

    class Version:
        share = 1.0

        def __init__(self, name):
            self.name = name

    recorder = StatsRecorder()
    for number in range(1000):
        recorder.count_waiting(PendingRequest(GenerationRequest(str(number), "x", None, Version(f"a{number}"))))
    stats = recorder.snapshot(num_adapters_waiting=0, residency={}, load_errors={}, is_running=True)
    assert len(stats.adapters) == stats.num_waiting == 1000
    assert all(type(value) is int for value in (stats.num_steps, stats.num_waiting, stats.generation_tokens))


PROGRESS = """
from qlora_infer.testing import FakeEngine, fake_engine
with fake_engine(backend=FakeEngine(step_seconds=0.05)) as engine:
    engine.generate(["a b c"] * 20)
    engine.generate(["a b c"] * 20, use_tqdm=False)
"""


def test_progress_is_shown_on_a_terminal():
    """On a terminal, the bar has requests, tokens per second in and out, and adapters that wait."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 160))
    process = subprocess.Popen([sys.executable, "-c", PROGRESS], stderr=slave, stdout=subprocess.DEVNULL)
    os.close(slave)
    shown = b""
    try:
        while data := os.read(master, 4096):
            shown += data
    except OSError:  # the other end was closed
        pass
    os.close(master)
    assert process.wait(30) == 0
    text = shown.decode()
    assert "20/20" in text
    assert text.count("100%") == 1
    for word in ("in ", "out ", "tok/s", "adapters waiting"):
        assert word in text


def test_progress_is_quiet_elsewhere():
    """Into a file or a pipe, nothing is written."""
    done = subprocess.run([sys.executable, "-c", PROGRESS], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == done.stderr == ""
