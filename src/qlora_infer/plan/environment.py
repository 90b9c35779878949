"""The environment variables that a plan sets for vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qlora_infer.plan.decision import Decision
from qlora_infer.plan.graphs import BREAKABLE, GRAPHS
from qlora_infer.quantization import Platform

#: On so few cores none is left idle for vLLM's own loop.
FEW_CORES = 2


def environment(engine_args: Mapping[str, Any], platform: Platform) -> list[Decision[str]]:
    """Decide on the environment variables that vLLM reads; those that you have set are yours.

    Args:
        engine_args: Arguments of vLLM's ``EngineArgs``.
        platform: The machine.
    """
    return [variable for variable in _variables(engine_args, platform) if variable.name not in platform.environment]


def _variables(engine_args: Mapping[str, Any], platform: Platform) -> Iterator[Decision[str]]:
    yield Decision("VLLM_WORKER_MULTIPROC_METHOD", "spawn", "a forked core hangs if this process has used CUDA")
    if platform.device == "cpu":
        # vLLM 0.32 rounds what comes into an AWQ or GPTQ layer to 8 bits, for speed (``vllm/envs.py``), which is not
        # the model that adapters were trained on, and is heard in its answers.
        yield Decision("VLLM_CPU_INT4_W4A8", "0", "the inputs of 4-bit layers stay in 16 bits")
        # And it leaves one core to its own loop, which on two cores is half of what could compute.
        is_bound = "VLLM_CPU_OMP_THREADS_BIND" in platform.environment
        if platform.num_cores is not None and platform.num_cores <= FEW_CORES and not is_bound:
            yield Decision("VLLM_CPU_NUM_OF_RESERVED_CPU", "0", f"all of {platform.num_cores} cores compute")
    compilation_config = engine_args.get("compilation_config")
    if isinstance(compilation_config, Mapping) and GRAPHS.items() <= compilation_config.items():
        yield Decision(BREAKABLE, "1", "steps with prompts have CUDA graphs, cut at the attention")
