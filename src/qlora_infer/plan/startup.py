"""What vLLM is told at its start beyond what the user said, by the device it runs on."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_infer.config import LoraKernels, Startup

logger = logging.getLogger("qlora_infer")

#: Where vLLM's ``additional_config`` tells the workers that vLLM's own kernels are wanted (``kernels.install``).
KERNELS_KEY = "qlora_infer_lora_kernels"

#: On so few cores none is left idle for vLLM's own loop.
FEW_CORES = 2

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

#: Where vLLM makes the sockets between its processes (``vllm/envs.py``). A socket's name has at most 107 bytes, and
#: vLLM's part of it has 37.
SOCKETS, LONGEST_SOCKET_FOLDER = "VLLM_RPC_BASE_PATH", 70

#: Who gives one of these has said how much memory the KV cache takes.
CPU_MEMORY_ARGS = frozenset({"gpu_memory_utilization", "kv_cache_memory_bytes"})

#: Who gives one of these has chosen how the model is compiled, or for which sizes.
COMPILATION_ARGS = frozenset({"compilation_config", "optimization_level"})
GRAPH_SIZE_ARGS = frozenset(
    {"cudagraph_capture_sizes", "max_cudagraph_capture_size", "performance_mode", "speculative_config"}
)


def with_cpu_memory(engine_args: Mapping[str, Any], *, device: str, free_memory: int | None) -> dict[str, Any]:
    """The arguments, with a quarter of the free memory for the KV cache on a CPU where the user says nothing of it.

    vLLM 0.32 wants 0.92 of all memory (``vllm/v1/worker/cpu_worker.py``) and does not start where that is not free.
    """
    is_said = CPU_MEMORY_ARGS & engine_args.keys() or os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    if device != "cpu" or free_memory is None or is_said:
        return dict(engine_args)
    return {**engine_args, "kv_cache_memory_bytes": free_memory // 4}


def with_defaults(
    engine_args: Mapping[str, Any], *, device: str, startup: Startup = "fast", num_parameters: int | None = None
) -> dict[str, Any]:
    """The arguments, with what is better for a device than vLLM's own defaults; what the user gives stays.

    On a CPU vLLM 0.32 does not compile models with LoRA (``vllm/platforms/cpu.py``), but leaves its C++ operators
    off, as it does for models that it compiles. They are turned on.

    On a GPU it compiles, which takes the longer the larger a model is, and for one of 1.1 billion parameters half a
    minute more than CUDA graphs alone. Steps that only decode are one graph each; those with prompts are cut at the
    attention (``breakable_graphs``). ``FULL`` for both is not used: in vLLM 0.32.0 it garbles batches of several
    prompts.

    Args:
        engine_args: Arguments of vLLM's ``EngineArgs``.
        device: vLLM's device type, such as ``"cpu"`` or ``"cuda"``.
        startup: On a GPU, whether to compile.
        num_parameters: Those of the linear layers that a GPU computes with, where that is known.
    """
    if COMPILATION_ARGS & engine_args.keys():
        return dict(engine_args)
    if device == "cpu":
        return {**engine_args, "compilation_config": {"custom_ops": ["all"]}}
    if device != "cuda" or engine_args.get("enforce_eager"):
        return dict(engine_args)
    if startup == "compiled":
        logger.info('startup="compiled": torch.compile and CUDA graphs; starts more slowly, a large model by minutes')
        return dict(engine_args)
    logger.info('startup="fast": CUDA graphs without torch.compile ("compiled" is the other choice)')
    compilation_config: dict[str, Any] = dict(GRAPHS)
    if os.environ.get(BREAKABLE) == "0":
        compilation_config["cudagraph_mode"] = "FULL_DECODE_ONLY"
    if not GRAPH_SIZE_ARGS & engine_args.keys():
        compilation_config["cudagraph_capture_sizes"] = graph_sizes(engine_args, num_parameters)
    return {**engine_args, "compilation_config": compilation_config}


def with_kernels(engine_args: Mapping[str, Any], lora_kernels: LoraKernels, *, device: str) -> dict[str, Any]:
    """The arguments, which tell the workers whose LoRA kernels are wanted.

    Raises:
        ValueError: vLLM's own are wanted where they answer wrongly: on a CPU.
    """
    if lora_kernels == "auto":
        return dict(engine_args)
    if device == "cpu":
        raise ValueError(
            "lora_kernels=\"vllm\" is for GPUs: on a CPU vLLM's own LoRA kernels give base requests another request's "
            'adapter; leave it "auto"'
        )
    additional_config = {**engine_args.get("additional_config", {}), KERNELS_KEY: lora_kernels}
    return {**engine_args, "additional_config": additional_config}


def graph_sizes(engine_args: Mapping[str, Any], num_parameters: int | None = None) -> list[int]:
    """How many tokens of a step there are CUDA graphs for; one is for ``max_num_seqs`` requests that decode.

    They go on for as long as one is worth what it costs (``GRAPH_BOUND``), and none is larger than a step can be, as
    far as the arguments tell.
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


@contextlib.contextmanager
def breakable_graphs(engine_args: Mapping[str, Any]) -> Iterator[None]:
    """Set ``BREAKABLE``, unless it is, for an engine that starts with ``GRAPHS``: its processes take it over."""
    compilation_config = engine_args.get("compilation_config")
    wanted = isinstance(compilation_config, Mapping) and GRAPHS.items() <= compilation_config.items()
    if not wanted or BREAKABLE in os.environ:
        yield
        return
    os.environ[BREAKABLE] = "1"
    try:
        yield
    finally:
        del os.environ[BREAKABLE]


@contextlib.contextmanager
def sockets_in(folder: Path) -> Iterator[None]:
    """Have an engine that starts put its sockets into a folder, unless the user names one, or its name is too long."""
    if SOCKETS in os.environ or len(os.fspath(folder)) > LONGEST_SOCKET_FOLDER:
        yield
        return
    os.environ[SOCKETS] = os.fspath(folder)
    try:
        yield
    finally:
        os.environ.pop(SOCKETS, None)


def set_environment(*, device: str, num_cores: int | None = None) -> None:
    """Set the environment variables that vLLM reads at its start, unless they are set.

    A forked core hangs for ever once its parent has used torch's threads (``docs/architecture.md``). On a CPU with AMX
    vLLM 0.32 rounds what comes into an AWQ or GPTQ layer to 8 bits, for speed (``VLLM_CPU_INT4_W4A8`` in
    ``vllm/envs.py``), which is not the model that adapters were trained on, and is heard in its answers. And it leaves
    one core to its own loop, which on two cores is half of what could compute.

    Args:
        device: vLLM's device type, such as ``"cpu"``.
        num_cores: How many cores this process may use; ``None`` to ask the system.
    """
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if device != "cpu":
        return
    os.environ.setdefault("VLLM_CPU_INT4_W4A8", "0")
    if num_cores is None:
        num_cores = len(os.sched_getaffinity(0))
    if num_cores <= FEW_CORES and "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
