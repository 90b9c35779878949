"""Counts of how adapters enter and leave host memory."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

from attrs import define, evolve

from qlora_infer.durations import NONE, Durations


@define
class AdapterResidency:
    """The place of an adapter and its moves, over all versions of its name; an independent copy.

    Attributes:
        num_resident: Versions in host memory now, or on their way there: 0 if the adapter is only on disk, 1, or more
            while requests still run on an older version.
        num_in_slots: Versions in slots on the device now, or about to move into one.
        num_loads: Loads into host memory, by ``load_adapter`` and again after each eviction.
        num_evictions: Evictions from host memory to make room for another adapter.
        load_time: The times that these loads stopped the engine; reading from disk does not stop it.
    """

    num_resident: int = 0
    num_in_slots: int = 0
    num_loads: int = 0
    num_evictions: int = 0
    load_time: Durations = NONE


class ResidencyRecorder:
    """The counters of adapters' moves; every thread can call every method."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._adapters: dict[str, AdapterResidency] = {}
        self._errors: Counter[str] = Counter()

    def count_load(self, name: str, seconds: float) -> None:
        """Count an adapter that was loaded into host memory, and the seconds for which the engine stood still."""
        with self._lock:
            counts = self._of(name)
            counts.num_loads += 1
            counts.load_time = counts.load_time.plus(seconds)

    def count_eviction(self, name: str) -> None:
        """Count an adapter that made room for another."""
        with self._lock:
            self._of(name).num_evictions += 1

    def count_failure(self, error: BaseException) -> None:
        """Count an adapter that could not be loaded, without its name, because such names are unbounded."""
        with self._lock:
            self._errors[type(error).__name__] += 1

    def forget(self, name: str) -> None:
        """Drop the counts of an adapter that is gone."""
        with self._lock:
            self._adapters.pop(name, None)

    def adapters(self, resident: Mapping[str, int], in_slots: Mapping[str, int]) -> dict[str, AdapterResidency]:
        """Return the counts of this moment, with the versions of each name that are in host memory and in slots."""
        with self._lock:
            return {
                name: evolve(
                    self._adapters.get(name, AdapterResidency()),
                    num_resident=resident.get(name, 0),
                    num_in_slots=in_slots.get(name, 0),
                )
                for name in {**self._adapters, **resident}
            }

    def errors(self) -> dict[str, int]:
        """Return how many loads have failed, by the error's class."""
        with self._lock:
            return dict(self._errors)

    def _of(self, name: str) -> AdapterResidency:
        return self._adapters.setdefault(name, AdapterResidency())
