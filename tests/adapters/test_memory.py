"""Which adapters are in host memory, and how they come there."""

from concurrent.futures import Future

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qlora_infer.adapters.memory import HostMemory, State
from qlora_infer.errors import AdapterLoadError, AdapterNotFoundError, EngineDeadError


class Version:
    """What host memory sees of a version."""

    def __init__(self, name, num_bytes=1):
        self.name = str(name)
        self.num_bytes = num_bytes
        self.num_uses = self.num_running = 0

    def __repr__(self):
        return self.name


class Disk:
    """Copies that make room for others, and whose sources come and go; making one again takes until ``copy``."""

    def __init__(self):
        self.gone = set()
        self.without_source = set()
        self.being_made = {}

    def fetch(self, version):
        if version not in self.gone:
            return None
        return self.being_made.setdefault(version, Future())

    def copy(self, version):
        made = self.being_made.pop(version)
        if version in self.without_source:
            made.set_exception(AdapterNotFoundError(version.name, "gone"))
        else:
            self.gone.discard(version)
            made.set_result(None)


class Backend:
    """Reads adapters from a disk, and refuses some; a reading takes until ``slow`` has it no more."""

    def __init__(self, disk=None):
        self.disk = disk or Disk()
        self.inside = set()
        self.being_read = {}
        self.refused = set()
        self.slow = set()
        self.num_loads = 0

    def start_load(self, version):
        assert version not in self.inside
        assert version not in self.being_read
        self.being_read[version] = version in self.disk.gone
        self.num_loads += 1

    def poll_loads(self):
        ended = {version: is_lost for version, is_lost in self.being_read.items() if version not in self.slow}
        for version in ended:
            del self.being_read[version]
        failed = {version for version, is_lost in ended.items() if is_lost or version in self.refused}
        self.inside |= ended.keys() - failed
        return {version: AdapterLoadError(version.name, "refused") if version in failed else None for version in ended}

    def remove_adapter(self, version):
        assert version in self.inside or version in self.being_read
        self.inside.discard(version)
        self.being_read.pop(version, None)


VERSIONS = [Version(number) for number in range(7)]


class Life(RuleBasedStateMachine):
    """Host memory under a driver and loaders, while files come and go, readings take long, and the core may die."""

    @initialize(max_cpu_loras=st.integers(1, 4))
    def start(self, max_cpu_loras):
        for version in VERSIONS:
            version.num_uses = version.num_running = 0
        self.max_cpu_loras = max_cpu_loras
        self.disk = Disk()
        self.backend = Backend(self.disk)
        self.memory = HostMemory(self.backend, self.disk, max_cpu_loras, max_loras=1)
        self.reading, self.begun, self.loads = [], [], []
        self.pinned, self.kept, self.faulty = set(), set(), set()

    # Requests, as the driver has them

    @rule(version=st.sampled_from(VERSIONS))
    def request(self, version):
        if self.may_stay(version):
            version.num_running += 1
            version.num_uses += 1
            self.memory.request(version)
            self.reading.append(version)

    @rule(version=st.sampled_from(VERSIONS))
    def prefetch(self, version):
        self.memory.prefetch(version)

    @rule()
    def turn(self):
        self.memory.poll()
        for version in list(self.reading):
            if version in self.reading and self.memory.is_ready(version):
                self.hand_over(version)
        self.loads = [(version, loaded) for version, loaded in self.loads if not self.has_ended(version, loaded)]

    @precondition(lambda self: self.reading or self.begun)
    @rule(data=st.data())
    def leave(self, data):
        requests = data.draw(st.sampled_from([part for part in (self.reading, self.begun) if part]))
        self.end(requests, data.draw(st.sampled_from(requests)))

    @rule()
    def die(self):
        """The core dies and another is started, as ``Driver._restart`` does it."""
        for requests in (self.reading, self.begun):
            for version in list(requests):
                self.end(requests, version)
        self.backend.inside.clear()
        self.backend.being_read.clear()
        self.kept.clear()
        loading = {version for version, _ in self.loads}
        versions = self.memory.clear(lambda: EngineDeadError("dead"))
        assert not loading.intersection(versions)
        assert all(isinstance(loaded.exception(0), EngineDeadError) for _, loaded in self.loads)
        self.loads.clear()
        for version in versions:
            self.memory.prefetch(version)

    # Calls, as the loader makes them

    @rule(version=st.sampled_from(VERSIONS))
    def load(self, version):
        self.loads.append((version, self.memory.load(version)))

    @precondition(lambda self: self.loads)
    @rule(data=st.data())
    def give_up(self, data):
        load = data.draw(st.sampled_from(self.loads))
        load[1].cancel()
        self.loads.remove(load)

    @rule(version=st.sampled_from(VERSIONS))
    def pin(self, version):
        if self.may_stay(version) and len(self.pinned | {version.name}) < self.max_cpu_loras:
            self.memory.pin(version)
            self.pinned.add(version.name)

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data):
        name = data.draw(st.sampled_from(sorted(self.pinned)))
        self.memory.unpin(name)
        self.pinned.remove(name)
        self.kept = {version for version in self.kept if version.name != name}

    @rule(version=st.sampled_from(VERSIONS))
    def evict(self, version):
        self.memory.evict(version)
        if not version.num_running:
            self.kept.discard(version)

    # The world

    @rule(version=st.sampled_from(VERSIONS))
    def lose_copy(self, version):
        self.disk.gone.add(version)

    @precondition(lambda self: self.disk.being_made)
    @rule(data=st.data())
    def make_copy(self, data):
        self.disk.copy(data.draw(st.sampled_from(list(self.disk.being_made))))

    @rule(version=st.sampled_from(VERSIONS), there=st.booleans())
    def change_source(self, version, there):
        self.faulty |= set() if there else {version}
        (self.disk.without_source.discard if there else self.disk.without_source.add)(version)

    @rule(version=st.sampled_from(VERSIONS), refused=st.booleans())
    def change_mind(self, version, refused):
        self.faulty |= {version} if refused else set()
        (self.backend.refused.add if refused else self.backend.refused.discard)(version)

    @rule(version=st.sampled_from(VERSIONS), slow=st.booleans())
    def change_speed(self, version, slow):
        (self.backend.slow.add if slow else self.backend.slow.discard)(version)

    # What always holds

    @invariant()
    def states_are_true(self):
        states = {version: self.memory.state(version) for version in VERSIONS}
        assert {version for version in VERSIONS if states[version] is State.RESIDENT} == self.backend.inside
        assert {version for version in VERSIONS if states[version] is State.READING} == self.backend.being_read.keys()
        assert {version for version in VERSIONS if version in self.memory} == {v for v in VERSIONS if states[v]}

    @invariant()
    def who_runs_is_in_memory_and_who_is_pinned_stays(self):
        self.kept |= {version for version in self.backend.inside if version.name in self.pinned}
        assert self.kept | set(self.begun) <= self.backend.inside

    @invariant()
    def memory_is_bounded(self):
        num_places = sum(version in self.memory for version in VERSIONS)
        assert num_places <= self.max_cpu_loras + self.memory.is_loading

    def teardown(self):
        """Whoever waits gets an answer once readings end, whatever goes on running."""
        self.backend.slow.clear()
        for _ in range(2 * len(self.loads) + 6):
            for version in list(self.disk.being_made):
                self.disk.copy(version)
            self.turn()
        assert (self.reading, self.loads, self.memory.is_loading) == ([], [], False)

    def may_stay(self, version):
        """Return whether a version may run or be pinned: the queue and ``pin`` leave no more to stay than have room."""
        staying = {other for other in VERSIONS if other.num_running or other.name in self.pinned}
        return len(staying | {version}) <= self.max_cpu_loras

    def hand_over(self, version):
        try:
            self.memory.activate(version)
        except (AdapterLoadError, AdapterNotFoundError):
            assert version in self.faulty - set(self.begun)
            for _ in range(self.reading.count(version)):
                self.end(self.reading, version)
        else:
            self.reading.remove(version)
            self.begun.append(version)

    def has_ended(self, version, loaded):
        assert not loaded.done() or loaded.exception() is None or version in self.faulty
        return loaded.done()

    def end(self, requests, version):
        requests.remove(version)
        version.num_running -= 1
        version.num_uses -= 1


class TestLife(Life.TestCase):
    """A version that runs is in memory, a pinned one stays, places are bounded, and everybody who waits is answered."""


def load(memory, version):
    loaded = memory.load(version)
    for _ in range(3):
        memory.poll()
    return loaded.result(0)


def start(memory, version):
    version.num_running += 1
    memory.request(version)
    memory.poll()
    assert memory.is_ready(version)
    return memory.activate(version)


def leave(memory, version):
    version.num_running -= 1
    memory.poll()


def test_a_version_goes_through_its_states():
    """Its copy is made where it is gone, it is read beside the steps, and then it is resident; each takes a poll."""
    backend, a = Backend(), Version("a")
    memory = HostMemory(backend, backend.disk, 2, 1)
    backend.disk.gone, backend.slow = {a}, {a}
    states = [memory.state(a)]
    memory.request(a)
    for change in (lambda: None, lambda: backend.disk.copy(a), lambda: None, backend.slow.clear):
        change()
        memory.poll()
        states.append(memory.state(a))
    assert states == [None, State.COPYING, State.READING, State.READING, State.RESIDENT]


def test_files_that_go_before_they_are_read_are_made_again():
    """A reading that finds no files fails only when the copy is there; else the copy is made and read."""
    backend, a = Backend(), Version("a")
    memory = HostMemory(backend, backend.disk, 2, 1)
    memory.prefetch(a)
    backend.being_read[a], backend.disk.gone = True, {a}
    memory.poll()
    assert memory.state(a) is State.COPYING
    backend.disk.copy(a)
    memory.poll()
    assert memory.state(a) is State.RESIDENT


def test_all_who_wait_for_a_reading_that_fails_are_told_and_later_ones_read_again():
    """A load and the requests of a version share one reading and its error; the next request has it read anew."""
    backend, a = Backend(), Version("a")
    memory = HostMemory(backend, backend.disk, 2, 1)
    backend.refused.add(a)
    loaded = memory.load(a)
    a.num_running = 1
    memory.request(a)
    memory.poll()
    assert memory.is_ready(a)
    with pytest.raises(AdapterLoadError) as raised:
        memory.activate(a)
    assert loaded.exception(0) is raised.value
    assert backend.num_loads == 1
    backend.refused.clear()
    assert start(memory, a)
    assert backend.num_loads == 2


def test_a_load_needs_no_request_to_end():
    """With every place in use, one adapter at a time is read beside them and leaves again; the next waits its turn."""
    backend, (a, b, c) = Backend(), map(Version, "abc")
    memory = HostMemory(backend, backend.disk, 1, 1)
    start(memory, a)
    backend.slow = {b}
    first, second = memory.load(b), memory.load(c)
    for _ in range(3):
        memory.poll()
    assert (backend.inside, set(backend.being_read)) == ({a}, {b})
    backend.slow.clear()
    for _ in range(2):
        memory.poll()
    assert first.done() and second.done()
    assert backend.inside == {a}


def test_loads_that_have_room_are_read_together():
    """Several calls of load_adapter do not wait for one another, as long as there are places."""
    backend, (a, b, c) = Backend(), map(Version, "abc")
    memory = HostMemory(backend, backend.disk, 3, 1)
    backend.slow = {a, b, c}
    for version in (a, b, c):
        memory.load(version)
    memory.poll()
    assert set(backend.being_read) == {a, b, c}


def test_what_is_in_memory_is_not_read_again():
    """Going back to a version that requests still run on costs no reading."""
    backend, a = Backend(), Version("a")
    memory = HostMemory(backend, backend.disk, 2, 1)
    for _ in range(2):
        load(memory, a)
    assert backend.num_loads == 1


def test_a_prefetched_adapter_is_there_when_it_is_needed():
    """prefetch reads once, and the first request of the adapter finds it; the base model needs nothing."""
    backend, a = Backend(), Version("a")
    memory = HostMemory(backend, backend.disk, 2, 1)
    for _ in range(2):
        memory.prefetch(a)
    memory.poll()
    assert start(memory, a)
    assert backend.num_loads == 1
    assert not start(memory, a)
    memory.request(None)
    assert memory.is_ready(None)
    assert not memory.activate(None)


def test_slots_are_counted_as_vllm_keeps_them():
    """An adapter is moved in when it is not among those used last, as many as there are slots."""
    backend = Backend()
    memory = HostMemory(backend, backend.disk, 4, 2)
    swaps = []
    a, b, c = map(Version, "abc")
    for version in (a, b, a, c, b, a):
        swaps.append(start(memory, version))
        leave(memory, version)
    assert swaps == [True, True, False, True, True, True]
    assert {name: counts.num_in_slots for name, counts in memory.stats().items()} == {"a": 1, "b": 1, "c": 0}


def test_prefetching_evicts_nobody_who_runs():
    """With every place in use, prefetch does nothing."""
    backend, a = Backend(), Version("a")
    memory = HostMemory(backend, backend.disk, 1, 1)
    start(memory, a)
    memory.prefetch(Version("b"))
    assert backend.inside == {a}
    assert not backend.being_read


def test_the_least_recently_used_adapter_leaves_first():
    """Using an adapter keeps it in memory longer than one that was loaded later and not used."""
    backend, (a, b, c) = Backend(), map(Version, "abc")
    memory = HostMemory(backend, backend.disk, 2, 2)
    load(memory, a)
    load(memory, b)
    start(memory, a)
    leave(memory, a)
    load(memory, c)
    assert backend.inside == {a, c}


def test_an_adapter_with_waiting_requests_leaves_last():
    """Among those that do not run, one that nobody waits for makes room, even if it was used later."""
    backend, (a, b, c) = Backend(), map(Version, "abc")
    memory = HostMemory(backend, backend.disk, 2, 1)
    load(memory, a)
    load(memory, b)
    a.num_uses = 1
    load(memory, c)
    assert backend.inside == {a, c}


def test_memory_is_counted_in_bytes():
    """max_bytes bounds the tensors, whatever their number; what runs may exceed it, and nothing is read ahead then."""
    backend = Backend()
    small, middle, large = Version("small", 10), Version("middle", 40), Version("large", 90)
    memory = HostMemory(backend, backend.disk, 10, 2, max_bytes=100)
    load(memory, small)
    load(memory, middle)
    assert backend.inside == {small, middle}
    load(memory, large)
    assert backend.inside == {large}
    start(memory, large)
    memory.prefetch(middle)
    assert not backend.being_read
    memory.prefetch(small)
    assert set(backend.being_read) == {small}
    start(memory, middle)
    assert backend.inside == {large, middle}
    leave(memory, large)
    load(memory, small)
    assert backend.inside == {small, middle}


def test_a_pinned_adapter_stays_until_it_is_unpinned():
    """pin keeps an adapter; unpin lets it go; places for adapters that run are never pinned away."""
    backend, (a, b, c, d) = Backend(), map(Version, "abcd")
    memory = HostMemory(backend, backend.disk, 3, 2)
    memory.pin(a)
    for version in (b, c, d):
        load(memory, version)
    assert backend.inside == {a, c, d}
    with pytest.raises(AdapterLoadError, match="raise max_cpu_loras, or unpin one"):
        memory.pin(b)
    memory.pin(a)
    memory.unpin("a")
    memory.unpin("never")
    for version in (b, c, d):
        load(memory, version)
    assert backend.inside == {b, c, d}


def test_an_adapter_that_does_not_load_is_no_adapter_s_end():
    """A load that fails leaves no trace, and what ran goes on."""
    backend, (good, bad) = Backend(), map(Version, ("good", "bad"))
    memory = HostMemory(backend, backend.disk, 2, 1)
    assert start(memory, good)
    backend.refused.add(bad)
    with pytest.raises(AdapterLoadError):
        load(memory, bad)
    assert (backend.inside, bad in memory) == ({good}, False)
    assert not start(memory, good)
