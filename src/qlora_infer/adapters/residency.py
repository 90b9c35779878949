"""Which adapters are in vLLM's host memory, and which of them makes room for another."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from qlora_infer.adapters.cache import AdapterVersion
    from qlora_infer.requests.request import RequestHandle


class AdapterMemory(Protocol):
    """Where adapters' tensors are put: the engine underneath."""

    def load_adapter(self, version: AdapterVersion) -> None:
        """Read a version into host memory; raises ``AdapterLoadError`` and leaves no trace then."""
        ...

    def remove_adapter(self, version: AdapterVersion) -> None:
        """Forget a version's tensors."""
        ...


class Residency:
    """Keeps at most ``max_cpu_loras`` adapters in host memory, the least recently used one leaving first.

    vLLM would evict by itself, also an adapter with requests in flight, and read it again from disk in the middle of
    a step, where a failure ends the engine. So this object decides, and vLLM, which is given one place more, never
    needs to. It belongs to the driving thread and is not locked.

    Args:
        memory: Where the tensors are put.
        max_cpu_loras: How many adapters stay there.
    """

    def __init__(self, memory: AdapterMemory, max_cpu_loras: int) -> None:
        self._memory = memory
        self._max_cpu_loras = max_cpu_loras
        self._resident: OrderedDict[AdapterVersion, None] = OrderedDict()  # the least recently used first
        self._num_running: dict[AdapterVersion, int] = {}

    def has_room_for(self, handle: RequestHandle) -> bool:
        """Whether a request's adapter is resident or can be made so without evicting one that is in use."""
        version = handle.request.adapter
        return version is None or version in self._resident or len(self._num_running) < self._max_cpu_loras

    def enter(self, version: AdapterVersion | None) -> None:
        """Count a request that starts to run, and load its adapter; raises ``AdapterLoadError``."""
        if version is None:
            return
        self._num_running[version] = self._num_running.get(version, 0) + 1
        if version in self._resident:
            self._resident.move_to_end(version)
        else:
            self.load(version)

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
        self._memory.load_adapter(version)
        self._resident[version] = None
        while len(self._resident) > self._max_cpu_loras:
            self.drop(next(idle for idle in self._resident if idle not in self._num_running))

    def drop(self, version: AdapterVersion) -> None:
        """Take an adapter out of host memory, if it is there."""
        if version in self._resident:
            del self._resident[version]
            self._memory.remove_adapter(version)
