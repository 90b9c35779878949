"""Which adapters are in vLLM's host memory, and which of them makes room for another."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from qlora_infer.adapters.cache import AdapterVersion


class AdapterMemory(Protocol):
    """Where adapters' tensors are put: the engine underneath."""

    def load_adapter(self, version: AdapterVersion) -> None:
        """Have a version in host memory; raises ``AdapterLoadError`` and leaves no trace then."""
        ...

    def prefetch_adapter(self, version: AdapterVersion) -> None:
        """Begin to read a version into host memory, so that ``load_adapter`` finds it read."""
        ...

    def remove_adapter(self, version: AdapterVersion) -> None:
        """Forget a version's tensors, also while they are being read."""
        ...


class Residency:
    """Keeps at most ``max_cpu_loras`` adapters in host memory, the least recently used one leaving first.

    vLLM would evict by itself, also an adapter with requests in flight, and read it again from disk in the middle of
    a step, where a failure ends the engine. So this object decides, and vLLM, which is given one place more, never
    needs to. It belongs to the driving thread and is not locked.

    Args:
        memory: Where the tensors are put.
        max_cpu_loras: How many adapters stay there.
        max_loras: The slots on the device.
    """

    def __init__(self, memory: AdapterMemory, max_cpu_loras: int, max_loras: int) -> None:
        self._memory = memory
        self._max_cpu_loras = max_cpu_loras
        self._max_loras = max_loras
        self._resident: OrderedDict[AdapterVersion, None] = OrderedDict()  # the least recently used first
        self._prefetched: set[AdapterVersion] = set()
        self._in_slots: OrderedDict[AdapterVersion, None] = OrderedDict()  # as vLLM keeps them, the oldest first
        self._num_running: dict[AdapterVersion, int] = {}

    def is_resident(self, version: AdapterVersion) -> bool:
        """Whether a version is in host memory, or on its way there."""
        return version in self._resident

    def enter(self, version: AdapterVersion | None) -> bool:
        """Count a request that starts to run, and load its adapter.

        Returns:
            Whether the adapter has to be moved into a slot first.

        Raises:
            AdapterLoadError: It could not be loaded.
        """
        if version is None:
            return False
        self._num_running[version] = self._num_running.get(version, 0) + 1
        if version in self._resident and version not in self._prefetched:
            self._resident.move_to_end(version)
        else:
            self.load(version)
        is_swap = version not in self._in_slots
        self._in_slots[version] = None
        self._in_slots.move_to_end(version)
        if len(self._in_slots) > self._max_loras:
            self._in_slots.popitem(last=False)
        return is_swap

    def leave(self, version: AdapterVersion | None) -> None:
        """Count a request that runs no more."""
        if version is None:
            return
        self._num_running[version] -= 1
        if not self._num_running[version]:
            del self._num_running[version]

    def load(self, version: AdapterVersion) -> None:
        """Load an adapter, and evict what is then too much; raises ``AdapterLoadError``.

        With every place in use, the new adapter itself is evicted again: that it loads has been seen, and it is
        loaded once more when one of its requests starts.
        """
        self._prefetched.discard(version)
        self._resident.pop(version, None)
        self._memory.load_adapter(version)
        self._take_in(version)

    def prefetch(self, version: AdapterVersion) -> None:
        """Begin to load an adapter that is wanted soon, if there is a place for it."""
        if version in self._resident:
            self._resident.move_to_end(version)
        elif len(self._resident) < self._max_cpu_loras or len(self._num_running) < self._max_cpu_loras:
            self._memory.prefetch_adapter(version)
            self._prefetched.add(version)
            self._take_in(version)

    def drop(self, version: AdapterVersion) -> None:
        """Take an adapter out of host memory, if it is there."""
        if version in self._resident:
            del self._resident[version]
            self._in_slots.pop(version, None)
            self._prefetched.discard(version)
            self._memory.remove_adapter(version)

    def clear(self) -> list[AdapterVersion]:
        """Forget everything, because the memory is gone; tells what was in it."""
        resident = list(self._resident)
        self._resident.clear()
        self._in_slots.clear()
        self._prefetched.clear()
        return resident

    def _take_in(self, version: AdapterVersion) -> None:
        self._resident[version] = None
        while len(self._resident) > self._max_cpu_loras:
            self.drop(next(idle for idle in self._resident if idle not in self._num_running))
