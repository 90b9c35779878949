"""Serve one quantized base model on vLLM with many LoRA adapters that come and go while it runs."""

import importlib
from typing import TYPE_CHECKING, Any

from qlora_infer.errors import (
    AdapterAccessError,
    AdapterConflictError,
    AdapterDownloadError,
    AdapterError,
    AdapterLoadError,
    AdapterNotFoundError,
    AdapterNotLoadedError,
    AdapterSourceError,
    CorruptAdapterError,
    EngineClosedError,
    EngineDeadError,
    EngineStartError,
    ForkedEngineError,
    IncompatibleAdapterError,
    MissingDependencyError,
    ModelNotFoundError,
    QLoRAInferError,
    QuantizationError,
    QueueFullError,
    RequestCancelledError,
    RequestError,
    RequestRejectedError,
    RequestTimeoutError,
    StorageError,
    UnknownQuantizationError,
    UnsafeAdapterError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from vllm import SamplingParams as SamplingParams

    from qlora_infer.adapters.effect import AdapterEffect
    from qlora_infer.adapters.memory_stats import AdapterResidency
    from qlora_infer.adapters.version import LoadedAdapter
    from qlora_infer.chat.answer import ToolCall
    from qlora_infer.durations import Durations
    from qlora_infer.engine import QuantizedLoRAEngine
    from qlora_infer.plan.decision import Decision
    from qlora_infer.plan.engine_plan import EnginePlan
    from qlora_infer.requests.handle import PartialOutputs, RequestHandle
    from qlora_infer.requests.request import Completion, GenerationOutput, RequestTimes
    from qlora_infer.requests.stats import AdapterStats, EngineStats
    from qlora_infer.sources.blend import BlendSource
    from qlora_infer.sources.folder import FolderSource
    from qlora_infer.sources.hub import HubSource
    from qlora_infer.sources.source import Source, parse_source
    from qlora_infer.sources.tensors import TensorSource
    from qlora_infer.sources.url import URLSource

__version__ = "0.1.0"

#: The module of each name that is imported when it is first used: a program that wants the version waits for nothing.
_HOMES = {
    "AdapterEffect": "qlora_infer.adapters.effect",
    "AdapterResidency": "qlora_infer.adapters.memory_stats",
    "LoadedAdapter": "qlora_infer.adapters.version",
    "Durations": "qlora_infer.durations",
    "QuantizedLoRAEngine": "qlora_infer.engine",
    "Decision": "qlora_infer.plan.decision",
    "EnginePlan": "qlora_infer.plan.engine_plan",
    "PartialOutputs": "qlora_infer.requests.handle",
    "RequestHandle": "qlora_infer.requests.handle",
    "Completion": "qlora_infer.requests.request",
    "GenerationOutput": "qlora_infer.requests.request",
    "RequestTimes": "qlora_infer.requests.request",
    "ToolCall": "qlora_infer.chat.answer",
    "AdapterStats": "qlora_infer.requests.stats",
    "EngineStats": "qlora_infer.requests.stats",
    "BlendSource": "qlora_infer.sources.blend",
    "FolderSource": "qlora_infer.sources.folder",
    "HubSource": "qlora_infer.sources.hub",
    "Source": "qlora_infer.sources.source",
    "parse_source": "qlora_infer.sources.source",
    "TensorSource": "qlora_infer.sources.tensors",
    "URLSource": "qlora_infer.sources.url",
}


def __getattr__(name: str) -> Any:
    """Import the object of a public name; vLLM's ``SamplingParams`` is one, too."""
    if name == "SamplingParams":
        from qlora_infer._vllm.engine import sampling_params_class

        return sampling_params_class()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "QuantizedLoRAEngine",
    "LoadedAdapter",
    "Source",
    "HubSource",
    "FolderSource",
    "URLSource",
    "TensorSource",
    "BlendSource",
    "parse_source",
    "AdapterEffect",
    "GenerationOutput",
    "Completion",
    "RequestTimes",
    "ToolCall",
    "RequestHandle",
    "PartialOutputs",
    "EnginePlan",
    "Decision",
    "EngineStats",
    "AdapterStats",
    "AdapterResidency",
    "Durations",
    "QLoRAInferError",
    "MissingDependencyError",
    "QuantizationError",
    "UnknownQuantizationError",
    "ModelNotFoundError",
    "UnsupportedModelError",
    "EngineStartError",
    "ForkedEngineError",
    "EngineClosedError",
    "EngineDeadError",
    "AdapterError",
    "AdapterNotLoadedError",
    "AdapterConflictError",
    "AdapterSourceError",
    "AdapterNotFoundError",
    "AdapterAccessError",
    "AdapterDownloadError",
    "CorruptAdapterError",
    "UnsafeAdapterError",
    "IncompatibleAdapterError",
    "AdapterLoadError",
    "RequestError",
    "RequestCancelledError",
    "RequestTimeoutError",
    "StorageError",
    "RequestRejectedError",
    "QueueFullError",
    "__version__",
]
