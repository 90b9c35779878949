"""The plan of an engine: everything that is decided before vLLM starts, with the reasons."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from attrs import evolve, frozen

from qlora_infer import quantization
from qlora_infer.config import EngineConfig
from qlora_infer.display import Displayed, Table
from qlora_infer.plan import memory
from qlora_infer.plan.decision import Decision, given
from qlora_infer.plan.environment import environment
from qlora_infer.plan.graphs import compilation
from qlora_infer.plan.size import adapter_bytes, linear_parameters, weight_bytes
from qlora_infer.quantization import Platform, QuantizationStrategy
from qlora_infer.quantization.checkpoint import quant_method

#: Where vLLM's ``additional_config`` has the workers use vLLM's own kernels (``kernels.install``).
KERNELS_KEY = "qlora_infer_lora_kernels"
#: The compute capability of the GPUs that this library's LoRA kernels were measured on: Hopper's.
KERNELS_CAPABILITY = 90


@frozen(kw_only=True)
class EnginePlan(Displayed):
    """The decisions before vLLM starts. ``print`` shows each with its reason.

    Attributes:
        quantization: The name of the quantization strategy.
        max_loras: The number of adapters that one batch can mix.
        max_cpu_loras: The number of adapters kept in host memory.
        engine_args: All arguments of vLLM's ``EngineArgs``, including the Hub's token.
        environment: Environment variables that the engine sets while vLLM starts. It does not change yours.
        tool_call_parser: The name of vLLM's parser for tool calls.
        decisions: Each decision with its reason.
    """

    quantization: str
    max_loras: int
    max_cpu_loras: int
    engine_args: Mapping[str, Any]
    environment: Mapping[str, str]
    tool_call_parser: str | None = None
    decisions: Sequence[Decision[Any]]

    @classmethod
    def of(cls, config: EngineConfig, model_config: Mapping[str, Any], platform: Platform) -> Self:
        """Return the plan for a model on a machine. It reads, sets and starts nothing.

        Args:
            config: The options.
            model_config: The model's ``config.json``.
            platform: The machine and the installation.

        Raises:
            ValueError: ``engine_args`` contradicts the strategy, or an option is for another device.
            MissingDependencyError: The quantization needs a package that is not installed.
            QuantizationError: The checkpoint cannot be served this way on this machine.
        """
        strategy = quantization.choose(config, model_config)
        strategy.check(config, model_config, platform)
        strategy_args = strategy.engine_args(config, model_config)
        rank = memory.rank(config)
        size = adapter_bytes(model_config, rank.value)
        slots = memory.slots(config, platform, size)
        places = memory.places(config, platform, size, slots.value)
        weights = weight_bytes(model_config, strategy.name)
        eager = memory.eager(config, platform, weights, slots.value * (size or 0))
        engine_args = {
            **_without_contradiction(config.engine_args, strategy_args),
            **_own_args(config),
            "enforce_eager": eager.value,
            "max_loras": slots.value,
            "max_lora_rank": rank.value,
            # So many that vLLM never evicts an adapter by itself (see adapters/memory.py): each may be being replaced,
            # and one comes before another leaves.
            "max_cpu_loras": 2 * places.value + 1,
        }
        num_parameters = (linear_parameters(model_config) or 0) // config.tensor_parallel_size
        compiled, compilation_config = compilation(engine_args, platform, config.startup, num_parameters)
        if compilation_config is not None:
            engine_args["compilation_config"] = compilation_config
        cache = memory.cpu_memory(engine_args, platform)
        if cache is not None:
            engine_args["kv_cache_memory_bytes"] = cache.value
        kernels = _kernels(config, platform)
        if config.lora_kernels == "vllm":
            engine_args["additional_config"] = {**engine_args.get("additional_config", {}), KERNELS_KEY: "vllm"}
        variables = environment(engine_args, platform)
        return cls(
            quantization=strategy.name,
            max_loras=slots.value,
            max_cpu_loras=places.value,
            engine_args=engine_args,
            tool_call_parser=config.tool_call_parser,
            environment={variable.name: variable.value for variable in variables},
            decisions=[
                _quantization(config, model_config, strategy),
                *(slots, rank, places),
                given(config, "max_model_len"),
                *(eager, compiled, kernels),
                *([cache] if cache else []),
                *variables,
                *_further(config.engine_args, strategy_args),
            ],
        )

    def with_rank(self, rank: int) -> Self:
        """Return the plan with the rank that the adapters need, once their files have been read."""
        decided = Decision("max_lora_rank", rank, "the adapters that load at the start need it", logging.INFO)
        decisions = [decided if decision.name == decided.name else decision for decision in self.decisions]
        return evolve(self, engine_args={**self.engine_args, "max_lora_rank": rank}, decisions=decisions)

    def __repr__(self) -> str:
        return f"<EnginePlan {self.engine_args['model']} quantization={self.quantization!r}>"

    def _tables(self) -> Sequence[Table]:
        model = Table([("model", str(self.engine_args["model"]))])
        return [model, Table([_row(decision) for decision in self.decisions])]


def _row(decision: Decision[Any]) -> tuple[str, str | None, str]:
    return decision.name, None if decision.value is None else str(decision.value), decision.reason


def _own_args(config: EngineConfig) -> dict[str, Any]:
    return {
        "model": config.model,
        "revision": config.revision,
        "hf_token": config.token,
        "max_model_len": config.max_model_len,
        "enable_lora": True,
        **({"reasoning_parser": config.reasoning_parser} if config.reasoning_parser is not None else {}),
        "worker_extension_cls": "qlora_infer._vllm.worker.WorkerExtension",
    }


def _quantization(
    config: EngineConfig, model_config: Mapping[str, Any], strategy: QuantizationStrategy
) -> Decision[str]:
    if config.quantization not in ("auto", None):
        return Decision("quantization", strategy.name, "given")
    method = quant_method(model_config)
    if method:
        reason = f"the checkpoint names {method!r}"
    elif config.quantization is None:
        reason = "the checkpoint is not quantized, and stays so"
    else:
        reason = "the checkpoint is not quantized: in flight, as it loads"
    return Decision("quantization", strategy.name, reason, logging.INFO)


def _kernels(config: EngineConfig, platform: Platform) -> Decision[str]:
    if config.lora_kernels == "vllm":
        if platform.device == "cpu":
            raise ValueError(
                'lora_kernels="vllm" is for GPUs: on a CPU vLLM\'s own LoRA kernels give base requests another '
                'request\'s adapter; leave it "auto"'
            )
        return given(config, "lora_kernels")
    if platform.device == "cpu":
        return Decision("lora_kernels", "qlora_infer", "vLLM's own give base requests another request's adapter")
    if platform.device == "cuda" and platform.capability == KERNELS_CAPABILITY:
        return Decision("lora_kernels", "qlora_infer", "they were tried on this GPU, Hopper")
    reason = f"ours were not tried on this {'GPU' if platform.device == 'cuda' else 'device'}"
    return Decision("lora_kernels", "vllm", reason, logging.INFO)


def _without_contradiction(given: Mapping[str, Any], strategy_args: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in given.items():
        if key in strategy_args and strategy_args[key] != value:
            raise ValueError(
                f"engine_args[{key!r}] = {value!r} contradicts the quantization strategy, which needs "
                f"{strategy_args[key]!r}: leave it out, or pass a strategy of your own as quantization="
            )
    return {**given, **strategy_args}


def _further(given: Mapping[str, Any], strategy_args: Mapping[str, Any]) -> Iterator[Decision[str]]:
    """Name the further arguments of vLLM; their values may hold secrets."""
    if strategy_args.keys() - {"quantization"}:
        names = ", ".join(sorted(strategy_args.keys() - {"quantization"}))
        yield Decision("engine_args", names, "the quantization needs them")
    if given:
        yield Decision("engine_args", ", ".join(sorted(given)), "given: vLLM gets them as they are")
