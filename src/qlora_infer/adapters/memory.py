"""Which adapters are in vLLM's host memory, and which of them makes room for another."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol

from qlora_infer.adapters.memory_stats import ResidencyRecorder
from qlora_infer.errors import AdapterLoadError

if TYPE_CHECKING:
    from qlora_infer.adapters.version import AdapterVersion


class AdapterMemory(Protocol):
    """Where adapters' tensors are put: the engine underneath."""

    def load_adapter(self, version: AdapterVersion) -> None:
        """Have a version in host memory; raises ``AdapterLoadError`` and leaves no trace then."""
        ...

    def prefetch_adapter(self, version: AdapterVersion) -> None:
        """Begin to read a version into host memory, so that ``load_adapter`` finds it read."""
        ...

    def have_read(self, versions: Collection[AdapterVersion]) -> set[AdapterVersion]:
        """Those whose reading, which ``prefetch_adapter`` began, has ended, well or badly."""
        ...

    def remove_adapter(self, version: AdapterVersion) -> None:
        """Forget a version's tensors, also while they are being read."""
        ...


class AdapterFiles(Protocol):
    """Where adapters are read from: their copies on disk, which may have to be made again."""

    def fetch(self, version: AdapterVersion) -> Future[None] | None:
        """Begin to make a copy again; ``None`` where it is there."""
        ...

    def restore(self, version: AdapterVersion) -> bool:
        """Have a copy there, waiting for it; whether it had to be made again."""
        ...


class Residency:
    """Keeps adapters in host memory within a budget, the least recently used one leaving first.

    vLLM would evict by itself, also an adapter with requests in flight, and read it again from disk in the middle of
    a step, where a failure ends the engine. So this object decides, and vLLM, which is given more places than are
    used, never needs to. What has requests in flight stays; what is pinned stays; what has requests waiting goes
    only when nothing else can. It belongs to the driving thread and is not locked.

    Args:
        memory: Where the tensors are put.
        files: Where they are read from.
        max_cpu_loras: How many adapters stay there.
        max_loras: The slots on the device.
        max_bytes: How many bytes of tensors stay there; ``None`` for no limit. Adapters in flight may take more.

    Attributes:
        recorder: Counts what happens; any thread may read it.
    """

    def __init__(
        self,
        memory: AdapterMemory,
        files: AdapterFiles,
        max_cpu_loras: int,
        max_loras: int,
        max_bytes: int | None = None,
    ) -> None:
        self._memory = memory
        self._files = files
        self._max_cpu_loras = max_cpu_loras
        self._max_loras = max_loras
        self._max_bytes = max_bytes
        self._resident: OrderedDict[AdapterVersion, None] = OrderedDict()  # the least recently used first
        self._prefetched: set[AdapterVersion] = set()
        self._fetched: dict[AdapterVersion, Future[None]] = {}  # of these, those whose files are being fetched first
        self._read: set[AdapterVersion] = set()  # and those whose reading has ended, well or badly
        self._failed: dict[AdapterVersion, BaseException] = {}  # of these, why their files could not be fetched
        self._in_slots: OrderedDict[AdapterVersion, None] = OrderedDict()  # as vLLM keeps them, the oldest first
        self._num_running: dict[AdapterVersion, int] = {}
        self._pinned: set[str] = set()
        self.recorder = ResidencyRecorder()

    @property
    def num_bytes(self) -> int:
        """The tensors in host memory."""
        return sum(version.manifest.num_bytes for version in self._resident)

    @property
    def num_spare(self) -> int:
        """The places in host memory that neither the adapters in slots need nor those that are pinned."""
        return max(0, self._max_cpu_loras - self._max_loras - len(self._pinned))

    def is_resident(self, version: AdapterVersion) -> bool:
        """Whether a version is in host memory, or on its way there."""
        return version in self._resident

    def is_in_slot(self, version: AdapterVersion) -> bool:
        """Whether a version is in a slot on the device."""
        return version in self._in_slots

    def pin(self, version: AdapterVersion) -> None:
        """Load an adapter and keep it in host memory, and later versions of its name in its place.

        Raises:
            AdapterLoadError: It could not be loaded, or there would be no room left for others.
        """
        pinned = self._pinned | {version.name}
        if len(pinned) + self._max_loras > self._max_cpu_loras:
            raise AdapterLoadError(
                version.name,
                f"adapter {version.name!r} cannot be pinned: host memory has {self._max_cpu_loras} places, "
                f"{self._max_loras} of them are for adapters that run, and {len(self._pinned)} are pinned "
                "(raise max_cpu_loras, or unpin one)",
            )
        if not self._is_in_memory(version):
            self.load(version)
        self._pinned = pinned

    def unpin(self, name: str) -> None:
        """Let an adapter leave host memory again; harmless when it was not pinned."""
        self._pinned.discard(name)

    def enter(self, version: AdapterVersion | None) -> None:
        """Count a request that is to run, and begin to read its adapter where it is not in memory."""
        if version is not None:
            self._num_running[version] = self._num_running.get(version, 0) + 1
            if version in self._resident:
                self._resident.move_to_end(version)
            else:
                self._begin(version)

    def read_on(self) -> None:
        """Have the readings go on that have begun, and learn which have ended; once for each step."""
        for version in [version for version, fetched in self._fetched.items() if fetched.done()]:
            failure = self._fetched.pop(version).exception()
            if failure is None:
                self._memory.prefetch_adapter(version)
            else:
                self._failed[version] = failure  # load will tell
                self._read.add(version)
        being_read = self._prefetched - self._read - self._fetched.keys()
        if being_read:
            self._read |= self._memory.have_read(being_read)

    def has_read(self, version: AdapterVersion | None) -> bool:
        """Whether ``activate`` need not wait for a reading that has begun."""
        return version is None or version not in self._prefetched or version in self._read

    def activate(self, version: AdapterVersion | None) -> bool:
        """Have the adapter of a request in memory that runs now, after ``enter``.

        Returns:
            Whether the adapter has to be moved into a slot first.

        Raises:
            AdapterLoadError: It could not be loaded.
        """
        if version is None:
            return False
        self.load(version)
        is_swap = version not in self._in_slots
        self._in_slots[version] = None
        self._in_slots.move_to_end(version)
        if is_swap:
            self.recorder.moved(version.name, in_slots=+1)
        self._empty_slots()
        return is_swap

    def leave(self, version: AdapterVersion | None) -> None:
        """Count a request that entered, and runs no more."""
        if version is None:
            return
        self._num_running[version] -= 1
        if not self._num_running[version]:
            del self._num_running[version]
            self._empty_slots()

    def load(self, version: AdapterVersion) -> None:
        """Load an adapter that is not in memory, and evict what is then too much; raises ``AdapterLoadError``.

        When nothing else may leave, the new adapter itself does: that it loads has been seen, and it is loaded once
        more when one of its requests starts. Files are waited for only where nobody began to fetch them before.
        """
        if self._is_in_memory(version):
            self._resident.move_to_end(version)
            return
        began = time.monotonic()
        failure = self._failed.get(version)
        is_being_read = version in self._prefetched and version not in self._fetched
        self._forget_reading(version)
        self._leave_memory(version)
        if failure is not None:
            raise failure
        if not is_being_read:
            self._files.restore(version)
        try:
            self._memory.load_adapter(version)
        except AdapterLoadError:
            # Its files may have made room for others before they were read.
            if not is_being_read or not self._files.restore(version):
                raise
            self._memory.load_adapter(version)
        self.recorder.loaded(version.name, time.monotonic() - began)
        self._take_in(version)

    def prefetch(self, version: AdapterVersion) -> None:
        """Begin to load an adapter that is wanted soon, if there is a place for it."""
        if version in self._resident:
            self._resident.move_to_end(version)
        elif self._has_room_for(version):
            self._begin(version)

    def _begin(self, version: AdapterVersion) -> None:
        fetched = self._files.fetch(version)
        if fetched is None:
            self._memory.prefetch_adapter(version)
        else:
            self._fetched[version] = fetched
        self._prefetched.add(version)
        self._take_in(version)

    def drop(self, version: AdapterVersion) -> None:
        """Take an adapter out of host memory, if it is there."""
        if version in self._resident:
            self._leave_memory(version)
            self._leave_slot(version)
            if not self._forget_reading(version):
                self._memory.remove_adapter(version)

    def clear(self) -> list[AdapterVersion]:
        """Forget everything, because the memory is gone; tells what was in it."""
        resident = list(self._resident)
        self._resident.clear()
        self._in_slots.clear()
        self._prefetched.clear()
        self._fetched.clear()
        self._read.clear()
        self._failed.clear()
        self.recorder.emptied()
        return resident

    def _is_in_memory(self, version: AdapterVersion) -> bool:
        """Whether its reading has ended well, and it was loaded."""
        return version in self._resident and version not in self._prefetched

    def _has_room_for(self, version: AdapterVersion) -> bool:
        staying = [other for other in self._resident if not self._may_leave(other)]
        num_bytes = sum(other.manifest.num_bytes for other in (*staying, version))
        return len(staying) < self._max_cpu_loras and (self._max_bytes is None or num_bytes <= self._max_bytes)

    def _forget_reading(self, version: AdapterVersion) -> bool:
        """Forget that a reading was begun; tells whether its files were still being fetched."""
        self._prefetched.discard(version)
        self._read.discard(version)
        self._failed.pop(version, None)
        return self._fetched.pop(version, None) is not None

    def _leave_memory(self, version: AdapterVersion) -> None:
        if version in self._resident:
            del self._resident[version]
            self.recorder.moved(version.name, resident=-1)

    def _leave_slot(self, version: AdapterVersion) -> None:
        if version in self._in_slots:
            del self._in_slots[version]
            self.recorder.moved(version.name, in_slots=-1)

    def _empty_slots(self) -> None:
        """As vLLM does: what was used longest ago leaves its slot, and what runs does not.

        One more than there are slots may be meant for one, while what is about to leave it runs.
        """
        idle = (version for version in list(self._in_slots) if version not in self._num_running)
        while len(self._in_slots) > self._max_loras and (version := next(idle, None)) is not None:
            self._leave_slot(version)

    def _take_in(self, version: AdapterVersion) -> None:
        self._resident[version] = None
        self.recorder.moved(version.name, resident=+1)
        while self._is_too_much():
            leaving = [other for other in self._resident if self._may_leave(other)]
            if not leaving:
                return
            # The first without waiting requests, and if all have some, the least recently used.
            evicted = next((other for other in leaving if not other.num_uses), leaving[0])
            self.drop(evicted)
            self.recorder.evicted(evicted.name)

    def _is_too_much(self) -> bool:
        if len(self._resident) > self._max_cpu_loras:
            return True
        return self._max_bytes is not None and self.num_bytes > self._max_bytes

    def _may_leave(self, version: AdapterVersion) -> bool:
        return version not in self._num_running and version.name not in self._pinned
