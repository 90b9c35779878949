"""``/metrics``: this library's numbers, and those by which routers choose a replica, under vLLM's names.

llm-d and the Gateway API Inference Extension read waiting and running requests, the use of the KV cache and
``vllm:lora_requests_info``; AIBrix and vLLM's production-stack read some of them. Names and labels are those of vLLM
0.32.0, ``vllm/v1/metrics/loggers.py``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.responses import Response

from qlora_infer.metrics import register

if TYPE_CHECKING:
    from qlora_infer.engine import QuantizedLoRAEngine


class Metrics:
    """The numbers of one server, in a registry of its own.

    vLLM puts gauges of its names into the process's registry when an engine starts, which stay 0 in this library.

    Args:
        engine: The engine.
        model_name: The value of the ``model_name`` label.
    """

    def __init__(self, engine: QuantizedLoRAEngine, model_name: str) -> None:
        self._registry = CollectorRegistry()
        register(engine, name=model_name, registry=self._registry)
        self._registry.register(RouterCollector(engine, model_name))
        self._registry.register(_ProcessCollector())

    def response(self) -> Response:
        """Return the current numbers, as Prometheus reads them."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


class RouterCollector:
    """The metrics that routers read."""

    def __init__(self, engine: QuantizedLoRAEngine, model_name: str) -> None:
        self._engine = engine
        self._labels = {"model_name": model_name, "engine": "0"}

    def describe(self) -> Iterable[Any]:
        """Yield nothing: in its registry, these names are unique."""
        return ()

    def collect(self) -> Iterable[Any]:
        """Yield the current numbers."""
        stats = self._engine.stats()
        gauges = {
            "num_requests_running": (stats.num_running, "Requests in the engine."),
            "num_requests_waiting": (stats.num_waiting, "Requests in the queue."),
            "kv_cache_usage_perc": (stats.kv_cache_usage, "Share of the KV cache in use, 0 to 1."),
        }
        for name, (value, text) in gauges.items():
            yield self._filled(GaugeMetricFamily, name, text, value)
        finished = sum(adapter.num_finished for adapter in stats.adapters.values())
        counters = {
            "prompt_tokens": (stats.prompt_tokens, "Tokens of prompts given to the engine."),
            "generation_tokens": (stats.generation_tokens, "Tokens generated."),
            "request_success": (finished, "Requests that finished."),
        }
        for name, (value, text) in counters.items():
            yield self._filled(CounterMetricFamily, name, text, value)
        yield self._lora_requests(stats.adapters)

    def _filled(self, kind: Any, name: str, text: str, value: float) -> Any:
        family = kind(f"vllm:{name}", text, labels=tuple(self._labels))
        family.add_metric(tuple(self._labels.values()), value)
        return family

    def _lora_requests(self, adapters: Any) -> Any:
        """Return the gauge whose labels are the adapters' names, and whose value is the time at which they were so."""
        running = sorted(name for name, counts in adapters.items() if name is not None and counts.num_running)
        waiting = sorted(name for name, counts in adapters.items() if name is not None and counts.num_waiting)
        labels = ("max_lora", "waiting_lora_adapters", "running_lora_adapters")
        family = GaugeMetricFamily("vllm:lora_requests_info", "Adapters of the requests of now.", labels=labels)
        family.add_metric((str(self._engine.plan.max_loras), ",".join(waiting), ",".join(running)), time.time())
        return family


class _ProcessCollector:
    """The numbers of the process, such as its memory, which are in its own registry."""

    def describe(self) -> Iterable[Any]:
        return ()

    def collect(self) -> Iterable[Any]:
        return [family for family in REGISTRY.collect() if family.name.startswith(("process_", "python_"))]
