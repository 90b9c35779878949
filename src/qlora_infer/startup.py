"""What vLLM is told at its start beyond what the user said, by the device it runs on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

#: On so few cores none is left idle for vLLM's own loop.
FEW_CORES = 2


def with_defaults(engine_args: Mapping[str, Any], *, device: str) -> dict[str, Any]:
    """The arguments, with what is better for a device than vLLM's own defaults; what the user gives stays.

    On a CPU vLLM 0.32 does not compile models with LoRA (``vllm/platforms/cpu.py``), but leaves its C++ operators
    off, as it does for models that it compiles. They are turned on.
    """
    if device == "cpu" and "compilation_config" not in engine_args:
        return {**engine_args, "compilation_config": {"custom_ops": ["all"]}}
    return dict(engine_args)


def set_environment(*, device: str, num_cores: int | None = None) -> None:
    """Set the environment variables that vLLM reads at its start, unless they are set.

    A forked core hangs for ever once its parent has used torch's threads (``docs/architecture.md``). And on a CPU
    vLLM leaves one core to its own loop, which on two cores is half of what could compute.

    Args:
        device: vLLM's device type, such as ``"cpu"``.
        num_cores: How many cores this process may use; ``None`` to ask the system.
    """
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if num_cores is None:
        num_cores = len(os.sched_getaffinity(0))
    if device == "cpu" and num_cores <= FEW_CORES and "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
