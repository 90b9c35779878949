"""A program as users write it, for type checkers: `assert_type` states what they see, `ignore` what they refuse.

It is never run. Both checkers also report an `ignore` that hides nothing, so that each one is a refusal that happens.
"""

from collections.abc import Mapping, Sequence
from typing import Any, assert_type

from qlora_infer import (
    AdapterError,
    AdapterNotLoadedError,
    BlendSource,
    Completion,
    Decision,
    EnginePlan,
    EngineStats,
    GenerationOutput,
    HubSource,
    IncompatibleAdapterError,
    LoadedAdapter,
    PartialOutputs,
    QLoRAInferError,
    QuantizedLoRAEngine,
    RequestHandle,
    TensorSource,
    URLSource,
)
from qlora_infer.config import EngineConfig
from qlora_infer.quantization import Platform, QuantizationStrategy, register
from qlora_infer.testing import FakeEngine, fake_engine


def answers(engine: QuantizedLoRAEngine) -> list[str]:
    outputs = engine.generate("hello")
    assert_type(outputs, list[GenerationOutput])
    assert_type(engine.generate([1, 2, 3], {"max_tokens": 8}, adapter="pirate", timeout=3), list[GenerationOutput])
    mixed: list[str | list[int]] = ["a", [1, 2]]
    assert_type(engine.generate(mixed, [None, {"seed": 1}], adapter=["pirate", None]), list[GenerationOutput])
    assert_type(engine.chat([{"role": "user", "content": "hello"}]), list[GenerationOutput])
    assert_type(outputs[0].text, str)
    assert_type(outputs[0].token_ids, tuple[int, ...])
    assert_type(outputs[0].finish_reason, str | None)
    assert_type(outputs[0].completions, tuple[Completion, ...])
    assert_type(outputs[0].times.total, float | None)
    for output in engine.generate_iter((f"number {i}" for i in range(9)), in_order=False):
        assert_type(output, GenerationOutput)
    return [output.text for output in outputs]


def parts(engine: QuantizedLoRAEngine) -> None:
    stream = engine.stream("hello", adapter="pirate")
    assert_type(stream, PartialOutputs)
    for part in stream:
        assert_type(part, GenerationOutput)
    stream.close()


async def answer(engine: QuantizedLoRAEngine) -> str:
    handle = engine.add_request("hello", block=False)
    assert_type(handle, RequestHandle)
    async for part in engine.stream("hello"):
        assert_type(part, GenerationOutput)
    async for part in handle:
        assert_type(part, GenerationOutput)
    assert_type(handle.result(timeout=1.0), GenerationOutput)
    assert_type(handle.cancel(), bool)
    return (await handle).text


def adapters(engine: QuantizedLoRAEngine) -> Mapping[str, LoadedAdapter]:
    source = URLSource("s3://bucket/pirate", storage_options={"anon": True})
    assert_type(engine.load_adapter("pirate", source, share=2), LoadedAdapter)
    assert_type(engine.load_adapter("poet", HubSource("org/repo", revision="v1", token="hf_x")), LoadedAdapter)
    assert_type(engine.load_adapter("both", BlendSource({"pirate": 0.5, "poet": 0.5}, method="ties")), LoadedAdapter)
    assert_type(engine.load_adapter("pushed", TensorSource({}, {"r": 8})), LoadedAdapter)
    assert_type(engine.adapter_versions("pirate"), list[LoadedAdapter])
    assert_type(engine.stats(), EngineStats)
    return engine.adapters


def errors(engine: QuantizedLoRAEngine) -> Sequence[str]:
    try:
        engine.load_adapter("pirate", "me/pirate")
    except IncompatibleAdapterError as error:
        return error.reasons
    except AdapterNotLoadedError as error:
        as_lookup: LookupError = error
        return [str(as_lookup)]
    except AdapterError as error:
        as_base: QLoRAInferError = error
        return [str(as_base)]
    return []


@register
class HQQ:
    name = "hqq"

    def matches(self, model_config: Mapping[str, Any]) -> bool:
        return "hqq" in model_config

    def check(self, config: EngineConfig, model_config: Mapping[str, Any], platform: Platform) -> None:
        platform.require_package("hqq", "pip install hqq")

    def engine_args(self, config: EngineConfig, model_config: Mapping[str, Any]) -> dict[str, Any]:
        return {"quantization": self.name}


class NoStrategy:
    name = "none"


def strategies() -> None:
    strategy: QuantizationStrategy = HQQ()
    with QuantizedLoRAEngine("org/model", quantization=strategy, backend=FakeEngine()) as engine:
        assert_type(engine, QuantizedLoRAEngine)
    QuantizedLoRAEngine("org/model", quantization=None, backend=FakeEngine()).close()
    with fake_engine() as engine:
        assert_type(engine, QuantizedLoRAEngine)
        assert_type(engine.plan, EnginePlan)
        assert_type(engine.plan.decisions, Sequence[Decision[Any]])
    QuantizedLoRAEngine("org/model", quantization=NoStrategy())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def refused(engine: QuantizedLoRAEngine) -> None:
    engine.generate(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    engine.generate("hello", adapter=3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    engine.generate("hello", {}, "pirate")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    engine.generate("hello", adaptor="pirate")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    engine.stream("hello", adapter=["pirate"])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    engine.load_adapter("pirate", 3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    engine.load_adapter("both", BlendSource(["pirate"]))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    engine.load_adapter("both", BlendSource({"a": 1}, method="slerp"))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    QuantizedLoRAEngine("org/model", policy="lifo")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    QuantizedLoRAEngine("org/model", gpu_memory_utilization=0.8)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    QuantizedLoRAEngine("org/model", backend="vllm")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    engine.generate("hello")[0].text = "bye"  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
