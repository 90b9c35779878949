"""Everything at once, from many threads: each call ends well or with an error of its own, and the books are right."""

import gc
import random
import shutil
import threading
from collections import Counter

import pytest
from test_versions import CONFIG, tensors_of

from qlora_infer import BlendSource, EngineClosedError, QLoRAInferError, TensorSource
from qlora_infer.adapters.memory import State
from qlora_infer.testing import FakeEngine, fake_engine, write_adapter

pytest.importorskip("torch")  # for blends

NAMES = "abcde"
NUM_FOLDERS, NUM_THREADS, NUM_CALLS = 5, 6, 150
WRITING = threading.Lock()


class Traffic:
    """Calls of one thread after the other, chosen at random."""

    def __init__(self, engine, backend, folders, seed, *, may_die):
        self.engine, self.backend, self.folders, self.may_die = engine, backend, folders, may_die
        self.random = random.Random(seed)
        self.tensors = tensors_of(seed)

    def call(self):
        """One call; raises what it raises."""
        calls = [self.load, self.replace, self.change_source, self.unload, self.roll_back, self.blend, self.from_memory]
        calls += [self.pin, self.unpin, self.prefetch, self.look, self.refuse]
        calls += [self.generate, self.stream, self.cancel] * 4
        calls += [self.die] * self.may_die
        self.random.choice(calls)(self.random.choice(NAMES))

    def load(self, name):
        self.engine.load_adapter(name, self.random.choice(self.folders))

    def replace(self, name):
        expected = self.engine.adapter_versions(name)[0].version
        self.engine.load_adapter(name, self.random.choice(self.folders), expect=expected)

    def change_source(self, _):
        folder = self.random.choice(self.folders)
        with WRITING:
            shutil.rmtree(folder, ignore_errors=True)
            if self.random.random() < 0.7:
                write_adapter(folder, seed=self.random.randrange(9))

    def unload(self, name):
        self.engine.unload_adapter(name)

    def roll_back(self, name):
        self.engine.rollback_adapter(name)

    def blend(self, name):
        self.engine.load_adapter(name, BlendSource({self.random.choice(NAMES): 0.5, name: 0.5}))

    def from_memory(self, name):
        self.engine.load_adapter(name, TensorSource(self.tensors, CONFIG))

    def pin(self, name):
        self.engine.pin_adapter(name)

    def unpin(self, name):
        self.engine.unpin_adapter(name)

    def prefetch(self, name):
        self.engine.prefetch_adapters([name])

    def look(self, name):
        self.engine.stats()
        self.engine.adapter_versions(name)

    def refuse(self, _):
        if self.random.random() < 0.1:
            self.backend.refuse(NAMES[-1], "not any more")

    def generate(self, name):
        names = [self.random.choice([name, None]) for _ in range(3)]
        outputs = self.engine.generate(["x"] * 3, adapter=names)
        assert [output.text for output in outputs] == [f"{name} says: x" if name else "You said: x" for name in names]

    def stream(self, name):
        for number, output in enumerate(self.engine.stream("one two three four", adapter=name)):
            assert f"{name} says: one two three four".startswith(output.text)
            if number == 2 and self.random.random() < 0.5:
                break

    def cancel(self, name):
        handle = self.engine.add_request("x " * 20, adapter=name, timeout=self.random.choice([None, 0.001, 10]))
        if self.random.random() < 0.5:
            handle.cancel()
        handle.result(60)

    def die(self, _):
        if self.random.random() < 0.1:
            self.backend.die()


def run_all(engine, backend, folders, seed, *, may_die, then=None):
    """All threads to their end, each with its own traffic; gives what should not have been raised."""
    unexpected, start = [], threading.Barrier(NUM_THREADS)

    def run(number):
        traffic = Traffic(engine, backend, folders, 100 * seed + number, may_die=may_die)
        start.wait()
        for call in range(NUM_CALLS):
            if then is not None and number == 0 and call == NUM_CALLS // 2:
                then()
            try:
                traffic.call()
            except QLoRAInferError:
                pass
            except BaseException as error:
                unexpected.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a call hangs"
    return unexpected


@pytest.fixture
def folders(tmp_path):
    return [write_adapter(tmp_path / str(number), seed=number) for number in range(NUM_FOLDERS)]


def some_engine(seed, folders):
    """An engine that is short of everything, and what is underneath."""
    choose = random.Random(seed).choice
    num_bytes = sum(path.stat().st_size for path in folders[0].iterdir())
    backend = FakeEngine(step_seconds=choose([0, 0.0005]), load_seconds=choose([0, 0.002]))
    return backend, fake_engine(
        backend=backend,
        max_loras=choose([1, 2]),
        max_cpu_loras=choose([3, 4]),
        max_disk_bytes=choose([None, 4 * num_bytes]),
        policy=choose(["fair", "fcfs"]),
        restart="on-failure",
        engine_args={"max_num_seqs": choose([2, 8])},
    )


@pytest.mark.parametrize("seed", range(6))
def test_any_traffic_leaves_the_books_right(seed, folders):
    """No call hangs or raises what is not this library's; afterwards nothing is held that nobody needs."""
    backend, engine = some_engine(seed, folders)
    with engine:
        assert run_all(engine, backend, folders, seed, may_die=seed % 2) == []
        gc.collect()  # handles that nobody holds cancel their requests
        engine._registry._store._pool.shutdown()  # what is still being fetched is done
        for _ in range(2):  # and what was posted to the driving thread meanwhile
            assert engine.generate("x")[0].text == "You said: x"
        cache, copies, memory, queue = engine._registry, engine._registry._store, engine._memory, engine._driver._queue
        versions = {version for held in cache._held.values() for version in held}
        assert not any(version.num_uses or version.num_running for version in versions)
        assert (len(queue), queue.num_running, engine._driver._running, backend.num_unfinished) == (0, 0, {}, 0)
        assert (len(cache._loading), copies._fetches, memory._loads) == (0, {}, [])
        assert {path.name for path in copies._folder.iterdir()} == {str(version.int_id) for version in copies._sizes}
        assert copies.num_bytes == sum(copies._sizes.values())
        assert set(memory._places) | set(copies._sizes) <= versions
        assert memory._pinned <= set(cache._held) == set(cache._num_alive)
        loaded = Counter(version.name for version in memory._places if memory.state(version) is State.RESIDENT)
        assert Counter(backend.resident) == loaded
        resident = Counter(version.name for version in memory._places)
        in_slots = Counter(version.name for version in memory._in_slots)
        counted = engine.stats().residency
        assert {name: (resident[name], in_slots[name]) for name in counted} == {
            name: (counts.num_resident, counts.num_in_slots) for name, counts in counted.items()
        }


@pytest.mark.parametrize("seed", range(3))
def test_any_traffic_ends_when_the_engine_is_closed(seed, folders):
    """Whatever goes on then ends with an error of this library, and no file is left."""
    backend, engine = some_engine(seed, folders)
    assert run_all(engine, backend, folders, seed, may_die=False, then=engine.close) == []
    assert not engine._registry._store._folder.exists()
    assert (backend.num_unfinished, backend.is_running) == (0, False)
    with pytest.raises(EngineClosedError):
        engine.generate("x")
