"""Prometheus metrics of engines (``pip install 'qlora-infer[metrics]'``).

The numbers are those of ``engine.stats()``, read when Prometheus scrapes: requests do not pay for them. docs/metrics.md
lists them. Names are vLLM's where vLLM has the same metric.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qlora_infer.display import BASE_MODEL
from qlora_infer.durations import BOUNDS, Durations
from qlora_infer.errors import MissingDependencyError

try:
    from prometheus_client import REGISTRY, CollectorRegistry
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
except ImportError as error:
    raise MissingDependencyError(
        "metrics need the package prometheus_client: pip install 'qlora-infer[metrics]'"
    ) from error

if TYPE_CHECKING:
    from qlora_infer.adapters.memory_stats import AdapterResidency
    from qlora_infer.engine import QuantizedLoRAEngine
    from qlora_infer.requests.stats import AdapterStats, EngineStats


#: One series: the values of its labels, and its own.
Sample = tuple[tuple[str, ...], Any]

_ENGINE, _ADAPTER, _ERROR = ("engine",), ("engine", "adapter"), ("engine", "error")


def register(
    engine: QuantizedLoRAEngine, *, name: str | None = None, registry: CollectorRegistry = REGISTRY
) -> EngineCollector:
    """Export an engine's numbers to a registry of prometheus_client, as long as the engine exists.

    It does not serve HTTP: call ``prometheus_client.start_http_server(8000)``, or ``make_asgi_app()`` in a web service.

    Args:
        engine: The engine; the registry does not keep it alive.
        name: The value of the ``engine`` label; by default the model's name.
        registry: The registry; by default that of prometheus_client.

    Returns:
        The collector of all engines in that registry.

    Raises:
        ValueError: Another running engine has that name.

    Example:
        >>> from prometheus_client import CollectorRegistry, generate_latest
        >>> from qlora_infer.metrics import register
        >>> from qlora_infer.testing import fake_engine
        >>> registry = CollectorRegistry()
        >>> with fake_engine() as engine:
        ...     _ = register(engine, name="chat", registry=registry)
        ...     _ = engine.generate("hello there")
        ...     registry.get_sample_value("qlora_infer_prompt_tokens_total", {"engine": "chat", "adapter": "@base"})
        2
    """
    with _lock:
        collector = _collectors.get(registry)
        if collector is None:
            # One collector for all, because a metric may be written only once, with the series of every engine.
            collector = EngineCollector()
            registry.register(collector)
            _collectors[registry] = collector
    collector.add(engine, name)
    return collector


class EngineCollector:
    """The collector that gives a registry of prometheus_client the numbers of engines.

    Usually ``register`` makes it. Any thread may use it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engines: dict[str, weakref.ref[QuantizedLoRAEngine]] = {}

    def add(self, engine: QuantizedLoRAEngine, name: str | None = None) -> None:
        """Collect from one more engine, under a name that no other running engine has; see ``register``."""
        name = engine._config.model if name is None else name
        with self._lock:
            other = self._engines[name]() if name in self._engines else None
            if other is not None and other is not engine and other.stats().is_running:
                raise ValueError(f"another engine is exported as {name!r}: give this one a name= of its own")
            self._engines[name] = weakref.ref(engine)

    def remove(self, engine: QuantizedLoRAEngine) -> None:
        """Collect from an engine no longer; harmless when it was not collected from."""
        with self._lock:
            self._engines = {name: ref for name, ref in self._engines.items() if ref() is not engine}

    def describe(self) -> Iterable[Any]:
        """Yield the metrics without their series, so that a registry detects names that are taken."""
        return _metrics({})

    def collect(self) -> Iterable[Any]:
        """Yield the current metrics."""
        with self._lock:
            engines = {name: ref() for name, ref in self._engines.items()}
            self._engines = {name: self._engines[name] for name, engine in engines.items() if engine is not None}
        return _metrics({name: engine.stats() for name, engine in engines.items() if engine is not None})


_lock = threading.Lock()
_collectors: weakref.WeakKeyDictionary[CollectorRegistry, EngineCollector] = weakref.WeakKeyDictionary()


def _metrics(engines: Mapping[str, EngineStats]) -> Iterator[Any]:
    return itertools.chain(_of_engines(engines), _of_requests(engines), _of_residency(engines), _of_errors(engines))


def _of_engines(engines: Mapping[str, EngineStats]) -> Iterator[Any]:
    def gauge(name: str, text: str, attribute: str) -> Any:
        samples = [((engine,), getattr(stats, attribute)) for engine, stats in engines.items()]
        return _gauge(name, text, _ENGINE, samples)

    yield gauge("up", "Whether the engine takes requests: 0 after its close or its death.", "is_running")
    yield gauge("num_adapters_waiting", "Adapters that wait for a slot.", "num_adapters_waiting")
    yield gauge("kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", "kv_cache_usage")
    restarts = [((engine,), stats.num_restarts) for engine, stats in engines.items()]
    yield _counter("restarts", "Engine cores that died and were started again.", _ENGINE, restarts)
    steps = [((engine,), stats.step_time) for engine, stats in engines.items()]
    yield _histogram("step_time_seconds", "How long steps took.", _ENGINE, steps)


def _of_requests(engines: Mapping[str, EngineStats]) -> Iterator[Any]:
    rows = [
        ((engine, BASE_MODEL if name is None else name), counts)
        for engine, stats in engines.items()
        for name, counts in stats.adapters.items()
    ]

    def samples(attribute: str) -> list[Sample]:
        return [(labels, getattr(counts, attribute)) for labels, counts in rows]

    requests = [(labels, _num_requests(counts)) for labels, counts in rows]
    yield _gauge("num_requests_running", "Requests in the engine.", _ADAPTER, samples("num_running"))
    yield _gauge("num_requests_waiting", "Requests in the queue.", _ADAPTER, samples("num_waiting"))
    yield _counter("requests", "Requests that entered the queue.", _ADAPTER, requests)
    yield _counter("request_success", "Requests that finished.", _ADAPTER, samples("num_finished"))
    yield _counter("admission_rejections", "Requests refused by a full queue.", _ADAPTER, samples("num_refused"))
    yield _counter("prompt_tokens", "Tokens of prompts given to the engine.", _ADAPTER, samples("prompt_tokens"))
    yield _counter("generation_tokens", "Tokens generated.", _ADAPTER, samples("generation_tokens"))
    yield _counter("adapter_swaps", "Moves into a slot on the device.", _ADAPTER, samples("num_swaps"))
    yield _histogram("request_queue_time_seconds", "Time in the queue.", _ADAPTER, samples("queue_time"))
    to_first = samples("time_to_first_token")
    yield _histogram(
        "time_to_first_token_seconds", "Time to the first token of those that finished.", _ADAPTER, to_first
    )


def _of_residency(engines: Mapping[str, EngineStats]) -> Iterator[Any]:
    rows: list[tuple[tuple[str, ...], AdapterResidency]] = [
        ((engine, name), counts) for engine, stats in engines.items() for name, counts in stats.residency.items()
    ]

    def samples(attribute: str) -> list[Sample]:
        return [(labels, getattr(counts, attribute)) for labels, counts in rows]

    yield _gauge("adapter_resident", "Versions in host memory.", _ADAPTER, samples("num_resident"))
    yield _gauge(
        "adapter_in_slots",
        "Versions in slots on the device, or about to move into one.",
        _ADAPTER,
        samples("num_in_slots"),
    )
    yield _counter("adapter_loads", "Loads into host memory.", _ADAPTER, samples("num_loads"))
    yield _counter("adapter_evictions", "Evictions from host memory.", _ADAPTER, samples("num_evictions"))
    yield _histogram(
        "adapter_load_time_seconds", "How long steps stood still for loads.", _ADAPTER, samples("load_time")
    )


def _of_errors(engines: Mapping[str, EngineStats]) -> Iterator[Any]:
    of_requests = [
        ((engine, BASE_MODEL if name is None else name, kind), number)
        for engine, stats in engines.items()
        for name, counts in stats.adapters.items()
        for kind, number in counts.errors.items()
    ]
    yield _counter("request_errors", "Requests that failed, by the error's class.", (*_ADAPTER, "error"), of_requests)
    of_loads = [
        ((engine, kind), number) for engine, stats in engines.items() for kind, number in stats.load_errors.items()
    ]
    yield _counter("adapter_load_errors", "Adapters that did not load, by the error's class.", _ERROR, of_loads)


def _num_requests(counts: AdapterStats) -> int:
    return counts.num_finished + counts.num_failed + counts.num_running + counts.num_waiting


def _gauge(name: str, text: str, labels: tuple[str, ...], samples: Iterable[Sample]) -> Any:
    return _filled(GaugeMetricFamily(f"qlora_infer_{name}", text, labels=labels), samples)


def _counter(name: str, text: str, labels: tuple[str, ...], samples: Iterable[Sample]) -> Any:
    return _filled(CounterMetricFamily(f"qlora_infer_{name}", text, labels=labels), samples)


def _filled(family: Any, samples: Iterable[Sample]) -> Any:
    for labels, value in samples:
        family.add_metric(labels, value)
    return family


def _histogram(name: str, text: str, labels: tuple[str, ...], samples: Iterable[Sample]) -> Any:
    family = HistogramMetricFamily(f"qlora_infer_{name}", text, labels=labels)
    for values, durations in samples:
        family.add_metric(values, buckets=_buckets(durations), sum_value=durations.total)
    return family


def _buckets(durations: Durations) -> list[tuple[str, float]]:
    bounds = [*map(str, BOUNDS), "+Inf"]
    return list(zip(bounds, map(float, itertools.accumulate(durations.buckets)), strict=True))
