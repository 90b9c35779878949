"""How adapters came into memory and left it, in numbers."""

from __future__ import annotations

import copy
import threading
from collections import Counter

from attrs import define

from qlora_infer.durations import NONE, Durations


@define
class AdapterResidency:
    """Where an adapter is, and how often it moved, over all versions of its name; a copy of its own.

    Attributes:
        num_resident: Versions in host memory now, or on their way there: 1, or 0 while it is on disk only. More while
            requests still run on an older version.
        num_in_slots: Versions in slots on the device now, or about to move into one.
        num_loads: How often it was loaded into host memory: by ``load_adapter``, and again after each eviction.
        num_evictions: How often it left host memory to make room for another.
        load_time: How long the engine stood still for these loads; reading from disk goes on beside its steps.
    """

    num_resident: int = 0
    num_in_slots: int = 0
    num_loads: int = 0
    num_evictions: int = 0
    load_time: Durations = NONE


class ResidencyRecorder:
    """Counts what happens to adapters; any thread may call any method."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._adapters: dict[str, AdapterResidency] = {}
        self._errors: Counter[str] = Counter()

    def loaded(self, name: str, seconds: float) -> None:
        """An adapter was loaded into host memory, for which the engine stood still for so long."""
        with self._lock:
            counts = self._of(name)
            counts.num_loads += 1
            counts.load_time = counts.load_time.plus(seconds)

    def evicted(self, name: str) -> None:
        """An adapter has made room for another."""
        with self._lock:
            self._of(name).num_evictions += 1

    def moved(self, name: str, *, resident: int = 0, in_slots: int = 0) -> None:
        """So many versions more, or less where negative, are in host memory and in slots."""
        with self._lock:
            counts = self._of(name)
            counts.num_resident = max(0, counts.num_resident + resident)  # the memory may have been emptied before
            counts.num_in_slots = max(0, counts.num_in_slots + in_slots)

    def emptied(self) -> None:
        """The memory is gone, with everything in it."""
        with self._lock:
            for counts in self._adapters.values():
                counts.num_resident = counts.num_in_slots = 0

    def failed(self, error: BaseException) -> None:
        """An adapter could not be loaded; it is not named, because nobody bounds the names of those."""
        with self._lock:
            self._errors[type(error).__name__] += 1

    def forget(self, name: str) -> None:
        """Drop an adapter that is gone, unless a version of it is in memory."""
        with self._lock:
            if not self._of(name).num_resident:
                del self._adapters[name]

    def adapters(self) -> dict[str, AdapterResidency]:
        """The numbers of this moment."""
        with self._lock:
            return {name: copy.copy(counts) for name, counts in self._adapters.items()}

    def errors(self) -> dict[str, int]:
        """How many loads have failed, by the error's class."""
        with self._lock:
            return dict(self._errors)

    def _of(self, name: str) -> AdapterResidency:
        return self._adapters.setdefault(name, AdapterResidency())
