"""vLLM's executor of workers in separate processes, which leaves the reason when an engine does not start.

Elsewhere the core imports ``worker.py``, because it is the worker. Read in vLLM 0.32.0,
``vllm/v1/executor/abstract.py``.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from qlora_infer._vllm import start_fault


class FaultLeavingExecutor(MultiprocExecutor):  # type: ignore[misc]
    """vLLM's own, in a core whose errors reach the process that starts it, such as too little room for a KV cache."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        start_fault.leave_fault()
        super().__init__(*args, **kwargs)
