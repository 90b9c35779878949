"""Which adapters stay in host memory."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_infer.adapters.residency import Residency
from qlora_infer.errors import AdapterLoadError


class Memory:
    """Remembers what is in it, and refuses what it is told to refuse."""

    def __init__(self):
        self.inside = set()
        self.loads = 0
        self.refused = set()

    def load_adapter(self, version):
        if version in self.refused:
            raise AdapterLoadError(str(version), "refused")
        assert version not in self.inside
        self.inside.add(version)
        self.loads += 1

    def remove_adapter(self, version):
        self.inside.remove(version)


def handle_for(version):
    return SimpleNamespace(request=SimpleNamespace(adapter=version))


@given(
    max_cpu_loras=st.integers(1, 4),
    actions=st.lists(st.tuples(st.sampled_from(["enter", "leave", "load", "drop"]), st.integers(0, 6)), max_size=80),
)
def test_adapters_in_use_are_always_in_memory_and_memory_is_bounded(max_cpu_loras, actions):
    """An adapter with running requests is never evicted, and at most max_cpu_loras adapters are resident."""
    memory = Memory()
    residency = Residency(memory, max_cpu_loras)
    running = []
    for action, version in actions:
        if action == "enter" and residency.has_room_for(handle_for(version)):
            residency.enter(version)
            running.append(version)
        elif action == "leave" and version in running:
            residency.leave(version)
            running.remove(version)
        elif action == "load" and version not in memory.inside:
            residency.load(version)
        elif action == "drop" and version not in running:
            residency.drop(version)
        assert set(running) <= memory.inside
        assert len(memory.inside) <= max_cpu_loras


def test_the_base_model_always_has_room():
    """Requests without an adapter need no place in memory."""
    residency = Residency(Memory(), 1)
    residency.enter("only")
    assert residency.has_room_for(handle_for(None))
    assert not residency.has_room_for(handle_for("other"))


def test_the_least_recently_used_adapter_leaves_first():
    """Using an adapter keeps it in memory longer than one that was loaded later and not used."""
    memory = Memory()
    residency = Residency(memory, 2)
    residency.load("a")
    residency.load("b")
    residency.enter("a")
    residency.leave("a")
    residency.load("c")
    assert memory.inside == {"a", "c"}


def test_an_adapter_that_does_not_load_evicts_nobody():
    """A load that fails leaves what was resident where it was, and counts no request."""
    memory = Memory()
    residency = Residency(memory, 1)
    residency.load("good")
    memory.refused.add("bad")
    with pytest.raises(AdapterLoadError):
        residency.enter("bad")
    residency.leave("bad")
    assert memory.inside == {"good"}
    assert residency.has_room_for(handle_for("another"))
