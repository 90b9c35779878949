"""The decisions on CUDA graphs: how vLLM compiles the model, and which steps have a graph."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from qlora_infer.config import Startup
from qlora_infer.plan.decision import Decision
from qlora_infer.quantization import Platform

#: The largest step that vLLM captures a CUDA graph for by itself (``vllm/config/vllm.py``; Blackwell's is larger).
#: Eight prompts of 64 tokens fill it.
VLLM_LARGEST_GRAPH = 512
#: The largest that there is one for here.
LARGEST_GRAPH = 4096
#: Tokens of a step times the model's parameters, up to which it has a graph: 4096 tokens of 8 billion. A small model's
#: step waits for the host that launches its kernels one by one. A larger one's does beside a thread that reads an
#: adapter: of 8 billion, steps with prompts took 52 and 75 ms without a graph and 33 and 39 with one (GPTQ and
#: bitsandbytes, ``docs/benchmarks.md``). How it is with still larger models was not measured; the larger the model, the
#: longer its graphs take to capture.
GRAPH_BOUND = 1 << 45
#: A step runs in the next larger graph. Each takes some 0.1 s at the start, twice: with adapters and without. So these
#: grow with the step, by a quarter at most; vLLM's own go on in steps of 8 and 16.
GRAPH_SIZES = (
    *(1, 2, 4, *range(8, 64, 8)),
    *(size for half in (64, 128, 256, 512, 1024, 2048) for size in range(half, 2 * half, half // 4)),
    LARGEST_GRAPH,
)

#: vLLM's switch for graphs that are captured without torch.compile, around the attention, which runs by itself
#: (``vllm/compilation/breakable_cudagraph.py`` in 0.32). It is an environment variable only.
BREAKABLE = "VLLM_USE_BREAKABLE_CUDAGRAPH"
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_AND_PIECEWISE"}

#: If you give one of these, you have chosen how the model is compiled, or for which sizes.
COMPILATION_ARGS = frozenset({"compilation_config", "optimization_level"})
GRAPH_SIZE_ARGS = frozenset(
    {"cudagraph_capture_sizes", "max_cudagraph_capture_size", "performance_mode", "speculative_config"}
)


def compilation(
    engine_args: Mapping[str, Any], platform: Platform, startup: Startup = "fast", num_parameters: int | None = None
) -> tuple[Decision[Any], dict[str, Any] | None]:
    """Decide how vLLM compiles the model and which steps have CUDA graphs.

    On a CPU vLLM 0.32 does not compile models with LoRA (``vllm/platforms/cpu.py``), but leaves its C++ operators
    off, as it does for models that it compiles. They are turned on.

    On a GPU it compiles, which takes the longer the larger a model is, and for one of 1.1 billion parameters half a
    minute more than CUDA graphs alone. Steps that only decode are one graph each; those with prompts are cut at the
    attention (``BREAKABLE``). ``FULL`` for both is not used: in vLLM 0.32.0 it garbles batches of several prompts.

    Args:
        engine_args: Arguments of vLLM's ``EngineArgs``.
        platform: The machine.
        startup: On a GPU, whether to compile.
        num_parameters: Those of the linear layers that a GPU computes with, where that is known.

    Returns:
        The decision, and vLLM's ``compilation_config``; ``None`` to leave it as it is.
    """
    if given := sorted(COMPILATION_ARGS & engine_args.keys()):
        return Decision("compilation", "given", f"engine_args has {', '.join(given)}"), None
    if platform.device == "cpu":
        reason = "vLLM would leave its C++ operators off, as if it compiled models with LoRA"
        return Decision("compilation", "C++ operators", reason), {"custom_ops": ["all"]}
    if platform.device != "cuda" or engine_args.get("enforce_eager"):
        return Decision("compilation", "none", "there are no CUDA graphs"), None
    if startup == "compiled":
        reason = "torch.compile and CUDA graphs; starts more slowly, a large model by minutes"
        return Decision("startup", startup, reason, logging.INFO), None
    config: dict[str, Any] = dict(GRAPHS)
    reason = 'CUDA graphs without torch.compile ("compiled" is the other choice)'
    if platform.environment.get(BREAKABLE) == "0":
        config["cudagraph_mode"] = "FULL_DECODE_ONLY"
        reason += f", of decoding steps only because of {BREAKABLE}=0"
    if not GRAPH_SIZE_ARGS & engine_args.keys():
        config["cudagraph_capture_sizes"] = sizes = graph_sizes(engine_args, num_parameters)
        reason += f"; {len(sizes)} sizes of up to {sizes[-1]} tokens"
    return Decision("startup", startup, reason, logging.INFO), config


def graph_sizes(engine_args: Mapping[str, Any], num_parameters: int | None = None) -> list[int]:
    """Return the tokens of the steps that have CUDA graphs; one is for ``max_num_seqs`` requests that decode.

    They go on for as long as one is worth its cost (``GRAPH_BOUND``), and none is larger than a step can be, as far as
    the arguments tell.
    """
    max_num_seqs = engine_args.get("max_num_seqs")
    most = engine_args.get("max_num_batched_tokens")
    if not most and max_num_seqs and engine_args.get("max_model_len"):
        most = max_num_seqs * engine_args["max_model_len"]
    largest = VLLM_LARGEST_GRAPH
    if num_parameters:
        largest = max(largest, *(size for size in GRAPH_SIZES if size * num_parameters <= GRAPH_BOUND))
    largest = min(most or largest, largest)
    sizes = {size for size in GRAPH_SIZES if size < largest}
    return sorted(sizes | {largest, min(max_num_seqs or largest, largest)})
