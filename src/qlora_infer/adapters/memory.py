"""Host memory: the state of each version in it, and the choice of the version that makes room."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from enum import Enum
from typing import TYPE_CHECKING, Protocol, cast

from attrs import frozen

from qlora_infer.adapters.memory_stats import AdapterResidency, ResidencyRecorder
from qlora_infer.errors import AdapterError, AdapterLoadError

if TYPE_CHECKING:
    from qlora_infer.adapters.version import AdapterVersion


class State(Enum):
    """The progress of a version. A version without a state has no place in host memory."""

    COPYING = "copying"  # its copy on disk had made room for others, and is made again
    READING = "reading"  # from that copy, while steps go on
    RESIDENT = "resident"
    FAILED = "failed"  # until the first who needs it has the error


class AdapterMemory(Protocol):
    """The memory that holds adapters' tensors: the engine underneath."""

    def start_load(self, version: AdapterVersion) -> None:
        """Begin to read a version into host memory, while steps go on."""
        ...

    def poll_loads(self) -> Mapping[AdapterVersion, AdapterError | None]:
        """Return the loads that have ended since the last call, with the error of each that left nothing behind."""
        ...

    def remove_adapter(self, version: AdapterVersion) -> None:
        """Forget a version that was loaded, or is being loaded."""
        ...


class AdapterFiles(Protocol):
    """The files that adapters are read from: their copies on disk."""

    def fetch(self, version: AdapterVersion) -> Future[None] | None:
        """Begin to make a copy again; return ``None`` where it is there."""
        ...


@frozen
class _Place:
    """A version's place in host memory."""

    state: State
    error: BaseException | None = None

    @property
    def is_settled(self) -> bool:
        return self.state in (State.RESIDENT, State.FAILED)


class HostMemory:
    """Gives each adapter one place with one state, within a budget; the least recently used leaves first.

    A version moves from ``COPYING``, where its copy is gone, over ``READING`` to ``RESIDENT``, or to ``FAILED``. It
    moves on in ``poll`` only, so no step waits for a disk.

    vLLM would evict by itself, also an adapter with requests in flight, and read it again from disk in the middle of
    a step, where a failure ends the engine. So this object decides, and vLLM, which is given more places than are
    used, never needs to. A version with running requests stays; a pinned one stays; one with waiting requests leaves
    only when no other can. The object belongs to the driving thread and is not locked.

    Args:
        memory: Where the tensors are put.
        files: Where they are read from.
        max_cpu_loras: The places. One version more may be on its way, for ``load``.
        max_loras: The slots on the device.
        max_bytes: The bytes of tensors in all places; ``None`` for no limit. Adapters in flight may take more.

    Attributes:
        recorder: Counts of loads, evictions and errors; any thread may use it.
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
        self._places: OrderedDict[AdapterVersion, _Place] = OrderedDict()  # the least recently used first
        self._copied: deque[tuple[AdapterVersion, Future[None]]] = deque()  # filled by the threads that copy
        self._loads: list[tuple[AdapterVersion, Future[None]]] = []  # what ``load`` has promised, the oldest first
        self._in_slots: OrderedDict[AdapterVersion, None] = OrderedDict()  # as vLLM keeps them, the oldest first
        self._pinned: set[str] = set()
        self.recorder = ResidencyRecorder()

    def __contains__(self, version: AdapterVersion) -> bool:
        return version in self._places

    @property
    def num_spare(self) -> int:
        """The places that neither the adapters in slots need nor those that are pinned."""
        return max(0, self._max_cpu_loras - self._max_loras - len(self._pinned))

    @property
    def is_loading(self) -> bool:
        """True if a caller waits for the result of ``load``."""
        return bool(self._loads)

    def state(self, version: AdapterVersion) -> State | None:
        """Return how far a version has come; ``None`` where it has no place."""
        place = self._places.get(version)
        return place.state if place else None

    def stats(self) -> dict[str, AdapterResidency]:
        """Return the numbers of this moment, by the adapters' names; any thread may call it."""
        resident = Counter(version.name for version in list(self._places))
        return self.recorder.adapters(resident, Counter(version.name for version in list(self._in_slots)))

    # Requests ---------------------------------------------------------------------------------------------------

    def request(self, version: AdapterVersion | None) -> None:
        """Begin to read the adapter of a request that is to run, whatever has to leave for it."""
        if version is not None and not self._touch(version):
            self._begin(version)

    def prefetch(self, version: AdapterVersion) -> None:
        """Begin to read an adapter that is wanted soon, if there is a place for it."""
        if not self._touch(version) and self._has_room_for(version):
            self._begin(version)

    def is_ready(self, version: AdapterVersion | None) -> bool:
        """Return whether ``activate`` has an answer for an adapter that was requested."""
        return version is None or self._places[version].is_settled

    def activate(self, version: AdapterVersion | None) -> bool:
        """Use an adapter that ``is_ready``, for a request that begins now.

        Returns:
            Whether the adapter has to be moved into a slot first.

        Raises:
            AdapterError: It could not be loaded. The next request reads it again.
        """
        if version is None:
            return False
        if self._places[version].error is not None:
            raise cast(BaseException, self._places.pop(version).error)  # in a variable it would hold itself
        self._touch(version)
        is_swap = version not in self._in_slots
        self._in_slots[version] = None
        self._in_slots.move_to_end(version)
        self._empty_slots()
        return is_swap

    # Loads ------------------------------------------------------------------------------------------------------

    def load(self, version: AdapterVersion) -> Future[None]:
        """Promise that an adapter loads, for ``load_adapter``; the future has the error where it does not.

        It does not wait for requests to end: where every place is taken, one adapter at a time is read beside them.
        When nothing else may leave then, the new adapter itself does. It is read once more when one of its requests
        starts.
        """
        loaded: Future[None] = Future()
        self._loads.append((version, loaded))
        self._touch(version)
        return loaded

    def pin(self, version: AdapterVersion) -> None:
        """Keep an adapter that was loaded, and later versions of its name in its place.

        Raises:
            AdapterLoadError: There would be no room left for others.
        """
        pinned = self._pinned | {version.name}
        if len(pinned) + self._max_loras > self._max_cpu_loras:
            raise AdapterLoadError(
                version.name,
                f"adapter {version.name!r} cannot be pinned: host memory has {self._max_cpu_loras} places, "
                f"{self._max_loras} of them are for adapters that run, and {len(self._pinned)} are pinned "
                "(raise max_cpu_loras, or unpin one)",
            )
        self._pinned = pinned
        self.prefetch(version)  # it may have left since

    def unpin(self, name: str) -> None:
        """Allow an adapter to leave again; harmless when it was not pinned."""
        self._pinned.discard(name)

    # States -----------------------------------------------------------------------------------------------------

    def poll(self) -> None:
        """Move every version on as far as it has come; once for each step."""
        for version in [version for version, _ in self._loads]:  # a death from here must not hold their futures
            if version not in self._places and (not self._may_leave(version) or self._has_room_for(version)):
                self._begin(version)
        while self._copied:
            version, copy = self._copied.popleft()
            if self.state(version) is not State.COPYING:
                continue  # it was evicted meanwhile
            if (error := copy.exception()) is not None:
                self._places[version] = _Place(State.FAILED, error)
            else:
                self._read(version)
        began = time.monotonic()
        for version, failure in self._memory.poll_loads().items():
            if failure is not None:
                self._read(version, failure)
            else:
                self._places[version] = _Place(State.RESIDENT)
                self.recorder.count_load(version.name, time.monotonic() - began)
        if self._loads:
            self._keep_promises()
        self._empty_slots()

    def evict(self, version: AdapterVersion) -> None:
        """Take an adapter out of host memory, unless requests run on it; harmless when it is not there."""
        if version.num_running or version not in self._places:
            return
        self._in_slots.pop(version, None)
        if self._places.pop(version).state in (State.READING, State.RESIDENT):
            self._memory.remove_adapter(version)

    def clear(self, make_error: Callable[[], BaseException]) -> list[AdapterVersion]:
        """Forget everything, because the memory is gone; every load that was promised fails.

        Returns:
            The versions that had a place, without those of the failed loads: one of them may have been the cause.
        """
        loads, self._loads = self._loads, []
        versions = [version for version in self._places if version not in dict(loads)]
        self._places.clear()
        self._in_slots.clear()
        for _, loaded in loads:
            if loaded.set_running_or_notify_cancel():
                loaded.set_exception(make_error())
        return versions

    def _touch(self, version: AdapterVersion) -> bool:
        """Make a version the most recently used; return whether it has a place."""
        if version not in self._places:
            return False
        self._places.move_to_end(version)
        return True

    def _begin(self, version: AdapterVersion) -> None:
        self._read(version)
        self._make_room()

    def _read(self, version: AdapterVersion, failure: AdapterError | None = None) -> None:
        """Read a version, from a copy that is made first where it is gone; a failure counts only where it is there."""
        copy = self._files.fetch(version)
        if copy is not None:
            self._places[version] = _Place(State.COPYING)
            copy.add_done_callback(lambda copy: self._copied.append((version, copy)))
        elif failure is not None:
            self._places[version] = _Place(State.FAILED, failure)
        else:
            self._places[version] = _Place(State.READING)
            self._memory.start_load(version)

    def _keep_promises(self) -> None:
        """End the loads whose adapters are there or have failed, and drop cancelled ones."""
        for load in list(self._loads):
            version, loaded = load
            place = self._places.get(version)
            if place is not None and place.is_settled:
                self._loads.remove(load)
                if place.error is not None and not version.num_running:  # else its requests have not had the error yet
                    del self._places[version]
                if loaded.set_running_or_notify_cancel():
                    loaded.set_exception(place.error) if place.error else loaded.set_result(None)
            elif loaded.cancelled():
                self._loads.remove(load)
        self._make_room()

    def _make_room(self) -> None:
        """Evict while there are too many: the first without requests, and if all have some, the least recently used."""
        while not self._fits(self._places):
            leaving = [version for version in self._places if self._may_leave(version)]
            if not leaving:
                return
            evicted = next((version for version in leaving if not version.num_uses), leaving[0])
            self.evict(evicted)
            self.recorder.count_eviction(evicted.name)

    def _has_room_for(self, version: AdapterVersion) -> bool:
        return self._fits([*(other for other in self._places if not self._may_leave(other)), version])

    def _fits(self, versions: Collection[AdapterVersion]) -> bool:
        if self._max_bytes is not None and sum(version.num_bytes for version in versions) > self._max_bytes:
            return False
        return len(versions) <= self._max_cpu_loras

    def _may_leave(self, version: AdapterVersion) -> bool:
        is_first_load = bool(self._loads) and version is self._loads[0][0]
        return not (version.num_running or version.name in self._pinned or is_first_load)

    def _empty_slots(self) -> None:
        """Count as vLLM does: the adapter used longest ago leaves its slot, and one that runs does not.

        One more than there are slots may be meant for one, while the adapter that is about to leave it runs.
        """
        idle = (version for version in list(self._in_slots) if not version.num_running)
        while len(self._in_slots) > self._max_loras and (version := next(idle, None)) is not None:
            del self._in_slots[version]
