"""Which adapters stay in host memory."""

from concurrent.futures import Future
from contextlib import suppress
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_infer.adapters.memory import Residency
from qlora_infer.errors import AdapterLoadError, AdapterNotFoundError


class Version:
    """What residency sees of a version."""

    def __init__(self, name, num_bytes=1):
        self.name = str(name)
        self.manifest = SimpleNamespace(num_bytes=num_bytes)
        self.num_uses = 0

    def __repr__(self):
        return self.name


VERSIONS = [Version(number) for number in range(7)]


class Memory:
    """Remembers what is in it, and refuses what it is told to refuse."""

    def __init__(self):
        self.inside = set()
        self.being_read = set()
        self.loads = 0
        self.refused = set()
        self.slow = set()
        self.questions = []

    def load_adapter(self, version):
        if version in self.refused:
            raise AdapterLoadError(str(version), "refused")
        assert version not in self.inside
        self.being_read.discard(version)
        self.inside.add(version)
        self.loads += 1

    def prefetch_adapter(self, version):
        assert version not in self.inside
        self.being_read.add(version)

    def have_read(self, versions):
        self.questions.append(set(versions))
        return self.being_read.intersection(versions) - self.slow

    def remove_adapter(self, version):
        self.inside.discard(version)
        self.being_read.discard(version)


class Files:
    """All there."""

    def fetch(self, version):
        return None

    def restore(self, version):
        return False


def start(residency, version):
    residency.enter(version)
    residency.read_on()
    assert residency.has_read(version)
    return residency.activate(version)


@given(
    max_cpu_loras=st.integers(1, 4),
    actions=st.lists(
        st.tuples(
            st.sampled_from(["enter", "leave", "load", "prefetch", "read_on", "drop"]), st.sampled_from(VERSIONS)
        ),
        max_size=80,
    ),
)
def test_adapters_in_use_are_always_in_memory_and_memory_is_bounded(max_cpu_loras, actions):
    """An adapter with running requests is never evicted, and at most max_cpu_loras adapters are resident or read."""
    memory = Memory()
    residency = Residency(memory, Files(), max_cpu_loras, max_cpu_loras)
    running = []
    for action, version in actions:
        if action == "enter" and len({*running, version}) <= max_cpu_loras:
            start(residency, version)
            running.append(version)
        elif action == "leave" and version in running:
            residency.leave(version)
            running.remove(version)
        elif action == "load":
            residency.load(version)
        elif action == "prefetch":
            residency.prefetch(version)
        elif action == "read_on":
            residency.read_on()
        elif action == "drop" and version not in running:
            residency.drop(version)
        assert set(running) <= memory.inside
        assert len(memory.inside | memory.being_read) <= max_cpu_loras
        assert all(residency.is_resident(other) for other in memory.inside | memory.being_read)


class Disk:
    """Files that make room for others, and whose sources come and go."""

    def __init__(self):
        self.copies = set(VERSIONS)
        self.without_source = set()

    def fetch(self, version):
        if version in self.copies:
            return None
        fetched = Future()
        try:
            self.restore(version)
        except AdapterNotFoundError as error:
            fetched.set_exception(error)
        else:
            fetched.set_result(None)
        return fetched

    def restore(self, version):
        if version in self.copies:
            return False
        if version in self.without_source:
            raise AdapterNotFoundError(str(version), "gone")
        self.copies.add(version)
        return True


class ReadingMemory(Memory):
    """Reads from a disk: what is not there when a reading begins fails when it is asked for."""

    def __init__(self, disk):
        super().__init__()
        self.disk = disk
        self.failed = set()

    def prefetch_adapter(self, version):
        super().prefetch_adapter(version)
        if version not in self.disk.copies:
            self.failed.add(version)

    def load_adapter(self, version):
        was_read, has_failed = version in self.being_read, version in self.failed
        self.being_read.discard(version)
        self.failed.discard(version)
        if has_failed or not (was_read or version in self.disk.copies):
            raise AdapterLoadError(str(version), "no files")
        super().load_adapter(version)

    def remove_adapter(self, version):
        super().remove_adapter(version)
        self.failed.discard(version)


@given(
    max_cpu_loras=st.integers(1, 4),
    actions=st.lists(
        st.tuples(
            st.sampled_from(
                ["request", "load", "prefetch", "read_on", "drop", "make room", "lose", "find", "refuse", "accept"]
            ),
            st.sampled_from(VERSIONS),
        ),
        max_size=80,
    ),
)
def test_nothing_is_in_memory_that_is_not_counted(max_cpu_loras, actions):
    """Whatever fails in between, what is read or loaded is known, and what is in memory needs no file any more."""
    disk = Disk()
    memory = ReadingMemory(disk)
    residency = Residency(memory, disk, max_cpu_loras, max_cpu_loras)
    for action, version in actions:
        match action:
            case "request":
                was_inside = version in memory.inside
                try:
                    residency.enter(version)
                    for _ in range(2):
                        residency.read_on()
                    residency.activate(version)
                except (AdapterLoadError, AdapterNotFoundError):
                    assert not was_inside
                    assert version in memory.refused or version in disk.without_source
                residency.leave(version)
            case "load":
                was_inside = version in memory.inside
                with suppress(AdapterLoadError, AdapterNotFoundError):
                    residency.load(version)
                    was_inside = False
                assert not was_inside
            case "prefetch":
                residency.prefetch(version)
            case "read_on":
                residency.read_on()
            case "drop":
                residency.drop(version)
            case "make room":
                disk.copies.discard(version)
            case "lose":
                disk.without_source.add(version)
            case "find":
                disk.without_source.discard(version)
            case "refuse":
                memory.refused.add(version)
            case "accept":
                memory.refused.discard(version)
        there = memory.inside | memory.being_read
        assert len(there) <= max_cpu_loras
        assert all(residency.is_resident(other) for other in there)


def test_what_is_in_memory_is_not_read_again():
    """Going back to a version that requests still run on costs no reading."""
    memory, a = Memory(), Version("a")
    residency = Residency(memory, Files(), 2, 1)
    for _ in range(2):
        residency.load(a)
    assert memory.loads == 1


def test_a_prefetched_adapter_is_finished_when_it_is_needed():
    """prefetch begins a load once, and the first request of the adapter ends it; the base model needs none."""
    memory, a = Memory(), Version("a")
    residency = Residency(memory, Files(), 2, 1)
    for _ in range(2):
        residency.prefetch(a)
    assert (memory.being_read, memory.loads) == ({a}, 0)
    assert start(residency, a)
    assert (memory.being_read, memory.loads) == (set(), 1)
    assert not start(residency, a)
    assert not start(residency, None)
    residency.leave(None)


def test_all_readings_are_asked_of_at_once_and_no_longer_than_they_take():
    """A question waits until a step has ended: one for all that are being read, none for those that have been."""
    memory, a, b = Memory(), Version("a"), Version("b")
    residency = Residency(memory, Files(), 2, 1)
    for version in (a, b):
        residency.prefetch(version)
    memory.slow = {b}
    asked = []
    for _ in range(3):
        asked.append((residency.has_read(a), residency.has_read(b)))
        residency.read_on()
    memory.slow.clear()
    for _ in range(3):
        residency.read_on()
    assert asked == [(False, False), (True, False), (True, False)]
    assert residency.has_read(b)
    assert memory.questions == [{a, b}, {b}, {b}, {b}]


def test_slots_are_counted_as_vllm_keeps_them():
    """An adapter is moved in when it is not among those used last, as many as there are slots."""
    residency = Residency(Memory(), Files(), 4, 2)
    swaps = []
    a, b, c = map(Version, "abc")
    for version in (a, b, a, c, b, a):
        swaps.append(start(residency, version))
        residency.leave(version)
    assert swaps == [True, True, False, True, True, True]


def test_prefetching_evicts_nobody_who_runs():
    """With every place in use, prefetch does nothing."""
    memory, a = Memory(), Version("a")
    residency = Residency(memory, Files(), 1, 1)
    start(residency, a)
    residency.prefetch(Version("b"))
    assert memory.inside == {a}
    assert not memory.being_read


def test_the_least_recently_used_adapter_leaves_first():
    """Using an adapter keeps it in memory longer than one that was loaded later and not used."""
    memory, (a, b, c) = Memory(), map(Version, "abc")
    residency = Residency(memory, Files(), 2, 2)
    residency.load(a)
    residency.load(b)
    start(residency, a)
    residency.leave(a)
    residency.load(c)
    assert memory.inside == {a, c}


def test_an_adapter_with_waiting_requests_leaves_last():
    """Among those that do not run, one that nobody waits for makes room, even if it was used later."""
    memory, (a, b, c) = Memory(), map(Version, "abc")
    residency = Residency(memory, Files(), 2, 1)
    residency.load(a)
    residency.load(b)
    a.num_uses = 1
    residency.load(c)
    assert memory.inside == {a, c}


def test_memory_is_counted_in_bytes():
    """max_bytes bounds the tensors, whatever their number; what runs may exceed it, and nothing is read ahead then."""
    memory = Memory()
    small, middle, large = Version("small", 10), Version("middle", 40), Version("large", 90)
    residency = Residency(memory, Files(), 10, 2, max_bytes=100)
    residency.load(small)
    residency.load(middle)
    assert residency.num_bytes == 50
    residency.load(large)
    assert memory.inside == {large}
    start(residency, large)
    residency.prefetch(middle)
    assert not memory.being_read
    residency.prefetch(small)
    assert memory.being_read == {small}
    start(residency, middle)
    assert memory.inside == {large, middle}
    residency.leave(large)
    residency.load(small)
    assert residency.num_bytes == 50


def test_a_pinned_adapter_stays_until_it_is_unpinned():
    """pin loads and keeps an adapter; unpin lets it go; places for adapters that run are never pinned away."""
    memory, (a, b, c, d) = Memory(), map(Version, "abcd")
    residency = Residency(memory, Files(), 3, 2)
    residency.pin(a)
    for version in (b, c, d):
        residency.load(version)
    assert memory.inside == {a, c, d}
    with pytest.raises(AdapterLoadError, match="raise max_cpu_loras, or unpin one"):
        residency.pin(b)
    residency.pin(a)
    residency.unpin("a")
    residency.unpin("never")
    residency.load(b)
    assert a not in memory.inside


def test_an_adapter_that_does_not_load_evicts_nobody():
    """A load that fails leaves what was resident where it was, and counts no request."""
    memory, (good, bad) = Memory(), map(Version, ("good", "bad"))
    residency = Residency(memory, Files(), 2, 1)
    residency.load(good)
    memory.refused.add(bad)
    with pytest.raises(AdapterLoadError):
        start(residency, bad)
    residency.leave(bad)
    assert memory.inside == {good}
    assert start(residency, good)
