"""Counts of requests, tokens and steps."""

from __future__ import annotations

import copy
import threading
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from attrs import define, field, frozen

from qlora_infer.adapters.memory_stats import AdapterResidency
from qlora_infer.display import BASE_MODEL, Displayed, Table
from qlora_infer.durations import NONE, Durations
from qlora_infer.requests.pending import PendingRequest
from qlora_infer.requests.request import GenerationOutput, GenerationRequest


@define
class AdapterStats:
    """The numbers of one adapter, or of the base model, since the engine started; an independent copy.

    Attributes:
        num_waiting: Requests in the queue now.
        num_running: Requests in the engine now.
        num_finished: Requests that finished.
        num_failed: Requests that ended with an error, including cancelled and timed-out ones.
        prompt_tokens: Tokens of the prompts that the engine received.
        generation_tokens: Tokens generated.
        num_swaps: Moves of the adapter into a slot on the device.
        queue_time: The times that requests waited in the queue.
        time_to_first_token: The times of finished requests from their start to their first token.
        num_refused: Requests refused because ``max_waiting`` others waited.
        errors: Failed requests by class of the error, ``num_failed`` in all.
    """

    num_waiting: int = 0
    num_running: int = 0
    num_finished: int = 0
    num_failed: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    num_swaps: int = 0
    queue_time: Durations = NONE
    time_to_first_token: Durations = NONE
    num_refused: int = 0
    errors: Mapping[str, int] = {}  # replaced, never changed, so that copies may share it


@frozen
class EngineStats(Displayed):
    """An engine's numbers at one moment; plain values that do not change.

    Attributes:
        num_waiting: Requests in the queue.
        num_running: Requests in the engine.
        num_adapters_waiting: Adapters that wait for a slot.
        num_steps: Steps since the engine started.
        num_restarts: Restarts after the engine core died.
        step_time: The durations of steps.
        kv_cache_usage: The share of the KV cache's blocks in use, 0 to 1, after the newest step.
        adapters: Numbers by adapter; the base model is ``None``. An adapter is included from its first request until it
            is unloaded.
        residency: Loads, evictions and places in memory by adapter, from its load until it is unloaded.
        load_errors: Failed calls of ``load_adapter``, by class of the error.
        is_running: True while the engine accepts requests; false after ``close`` or the death of the core.
    """

    num_waiting: int
    num_running: int
    num_adapters_waiting: int
    num_steps: int
    num_restarts: int
    step_time: Durations
    kv_cache_usage: float
    adapters: Mapping[str | None, AdapterStats] = field(repr=False)
    residency: Mapping[str, AdapterResidency] = field(factory=dict, repr=False)
    load_errors: Mapping[str, int] = field(factory=dict)
    is_running: bool = True

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts that the engine received."""
        return sum(adapter.prompt_tokens for adapter in self.adapters.values())

    @property
    def generation_tokens(self) -> int:
        """Tokens generated."""
        return sum(adapter.generation_tokens for adapter in self.adapters.values())

    def _tables(self) -> Sequence[Table]:
        header = (
            *("adapter", "waiting", "running", "finished", "failed", "tokens in", "tokens out"),
            *("queue ms", "first token ms", "swaps", "loads", "evictions", "in memory"),
        )
        # The base model first; an adapter without requests is in residency alone, the base model never is.
        names = sorted({*self.adapters, *self.residency}, key=lambda name: name or "")
        return [Table(self._totals()), Table([self._row(name) for name in names], header, empty="no requests yet")]

    def _totals(self) -> list[tuple[str, str]]:
        errors: Counter[str] = Counter()
        for counts in self.adapters.values():
            errors.update(counts.errors)
        return [
            ("engine", "running" if self.is_running else "not running"),
            ("requests", f"{self.num_waiting} waiting, {self.num_running} running"),
            ("adapters", f"{self.num_adapters_waiting} waiting for a slot"),
            ("steps", f"{self.num_steps}, {_milliseconds(self.step_time) or 0.0} ms in the mean"),
            ("tokens", f"{self.prompt_tokens} in prompts, {self.generation_tokens} generated"),
            ("KV cache", f"{self.kv_cache_usage:.0%} in use"),
            ("restarts", str(self.num_restarts)),
            ("failed requests", _format_errors(errors)),
            ("failed loads", _format_errors(self.load_errors)),
        ]

    def _row(self, name: str | None) -> Sequence[str | int | float | None]:
        counts, residency = self.adapters.get(name, AdapterStats()), self.residency.get(name or "", AdapterResidency())
        is_base = name is None
        return (
            BASE_MODEL if name is None else name,
            counts.num_waiting,
            counts.num_running,
            counts.num_finished,
            counts.num_failed,
            counts.prompt_tokens,
            counts.generation_tokens,
            _milliseconds(counts.queue_time),
            _milliseconds(counts.time_to_first_token),
            None if is_base else counts.num_swaps,
            None if is_base else residency.num_loads,
            None if is_base else residency.num_evictions,
            None if is_base else residency.num_resident,
        )


class StatsRecorder:
    """The counters of requests; every thread can call every method."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._adapters: defaultdict[str | None, AdapterStats] = defaultdict(AdapterStats)
        self._num_steps = 0
        self._num_restarts = 0
        self._step_time = NONE
        self._kv_cache_usage = 0.0

    def count_waiting(self, pending: PendingRequest) -> None:
        """Count a request that entered the queue."""
        with self._lock:
            self._of(pending).num_waiting += 1

    def count_refusal(self, request: GenerationRequest) -> None:
        """Count a request that found no room in the queue."""
        with self._lock:
            self._adapters[request.adapter_name].num_refused += 1

    def count_admission(self, pending: PendingRequest, now: float) -> None:
        """Count a request that left the queue for the engine."""
        waited = now - pending.request.queued
        with self._lock:
            counts = self._of(pending)
            counts.num_waiting -= 1
            counts.num_running += 1
            counts.queue_time = counts.queue_time.plus(waited)

    def count_prompt(self, pending: PendingRequest, num_tokens: int, *, is_swap: bool) -> None:
        """Count the prompt tokens of a request that the engine took, and its swap if its adapter moved into a slot."""
        with self._lock:
            counts = self._of(pending)
            counts.prompt_tokens += num_tokens
            counts.num_swaps += is_swap

    def count_step(self, seconds: float, kv_cache_usage: float, num_tokens: Mapping[str | None, int]) -> None:
        """Count a step and the tokens that it gave each adapter."""
        with self._lock:
            self._num_steps += 1
            self._step_time = self._step_time.plus(seconds)
            self._kv_cache_usage = kv_cache_usage
            for name, number in num_tokens.items():
                self._adapters[name].generation_tokens += number

    def count_end(
        self,
        pending: PendingRequest,
        output: GenerationOutput | None,
        error: BaseException | None,
        *,
        was_running: bool,
    ) -> None:
        """Count a request that ended, with an output or with an error."""
        with self._lock:
            counts = self._of(pending)
            if was_running:
                counts.num_running -= 1
            else:
                counts.num_waiting -= 1
            if output is None:
                kind = type(error).__name__
                counts.num_failed += 1
                counts.errors = {**counts.errors, kind: counts.errors.get(kind, 0) + 1}
                return
            counts.num_finished += 1
            if output.times.time_to_first_token is not None:
                counts.time_to_first_token = counts.time_to_first_token.plus(output.times.time_to_first_token)

    def count_requeue(self, pending: PendingRequest) -> None:
        """Count a request that went back to the queue, because the engine died."""
        with self._lock:
            counts = self._of(pending)
            counts.num_running -= 1
            counts.num_waiting += 1

    def count_restart(self) -> None:
        """Count a restart of the engine after it died."""
        with self._lock:
            self._num_restarts += 1

    def forget(self, name: str) -> None:
        """Drop an adapter that is gone, unless it has requests."""
        with self._lock:
            counts = self._adapters.get(name)
            if counts is not None and not counts.num_waiting and not counts.num_running:
                del self._adapters[name]

    def snapshot(
        self,
        *,
        num_adapters_waiting: int,
        residency: Mapping[str, AdapterResidency],
        load_errors: Mapping[str, int],
        is_running: bool,
    ) -> EngineStats:
        """Return the current numbers, with those that others count."""
        with self._lock:
            adapters = {name: copy.copy(counts) for name, counts in self._adapters.items()}
            return EngineStats(
                num_waiting=sum(counts.num_waiting for counts in adapters.values()),
                num_running=sum(counts.num_running for counts in adapters.values()),
                num_adapters_waiting=num_adapters_waiting,
                num_steps=self._num_steps,
                num_restarts=self._num_restarts,
                step_time=self._step_time,
                kv_cache_usage=self._kv_cache_usage,
                adapters=adapters,
                residency=residency,
                load_errors=load_errors,
                is_running=is_running,
            )

    def _of(self, pending: PendingRequest) -> AdapterStats:
        return self._adapters[pending.request.adapter_name]


def _milliseconds(durations: Durations) -> float | None:
    return None if durations.mean is None else round(durations.mean * 1000, 1)


def _format_errors(errors: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(errors.items())) or "none"
