"""An executor that computes nothing: a step is some time of the host, and some of a device that is not there.

vLLM takes it by its name (``distributed_executor_backend``), and its core must find this module. The host's part is
small operations of torch, which give Python's lock away as the launches of a GPU's kernels do. Read in vLLM 0.32.0,
``vllm/v1/executor/uniproc_executor.py``.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Any

import torch
from vllm.v1.executor.uniproc_executor import AsyncOutputFuture, UniProcExecutor
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

#: Seconds of the host in each step, of the device in each, and of the device for each token of a prompt beside.
HOST = 0.001
DEVICE = 0.002
PROMPT_TOKEN = 5e-6


class EmulatedExecutor(UniProcExecutor):  # type: ignore[misc]
    """Has vLLM's worker and model, which it starts with and never runs."""

    def _init_executor(self) -> None:
        super()._init_executor()
        # As on a GPU: the core schedules a step while the device is at work on the one before.
        self.vllm_config.scheduler_config.async_scheduling = True
        self._small = torch.zeros(64)
        self._ends = 0.0
        self._progress: dict[str, list[int]] = {}
        self._output = ModelRunnerOutput([], {})

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """Be busy as a host, and have the device be busy after the step before."""
        launched = time.monotonic() + HOST
        self._output = self._tokens(scheduler_output)
        num_tokens, num_requests = scheduler_output.total_num_scheduled_tokens, len(self._output.req_ids)
        if not num_tokens:
            return _done(self._output) if non_block else self._output
        while time.monotonic() < launched:
            self._small.add_(1)
        num_prompt_tokens = num_tokens if num_tokens > num_requests else 0
        self._ends = max(self._ends, time.monotonic()) + DEVICE + PROMPT_TOKEN * num_prompt_tokens
        return _done(None) if non_block else None

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        """Return the step's tokens, when the device has them."""
        later = _Later(self._output, self._ends)
        return AsyncOutputFuture(later, True) if non_block else later.get_output()

    def _tokens(self, scheduler_output: Any) -> ModelRunnerOutput:
        """Return a token for each request whose prompt is through."""
        for request_id in scheduler_output.finished_req_ids:
            self._progress.pop(request_id, None)
        for new in scheduler_output.scheduled_new_reqs:
            self._progress[new.req_id] = [len(new.prompt_token_ids), new.num_computed_tokens]
        request_ids, tokens = [], []
        for request_id, number in scheduler_output.num_scheduled_tokens.items():
            progress = self._progress[request_id]
            progress[1] += number
            request_ids.append(request_id)
            tokens.append([1000 + progress[1]] if progress[1] >= progress[0] else [])
        return ModelRunnerOutput(request_ids, {name: index for index, name in enumerate(request_ids)}, tokens)


class _Later(AsyncModelRunnerOutput):  # type: ignore[misc]
    """An output that is complete at a moment, and waited for until then."""

    def __init__(self, output: ModelRunnerOutput, moment: float) -> None:
        self._output = output
        self._moment = moment

    def get_output(self) -> ModelRunnerOutput:
        time.sleep(max(0.0, self._moment - time.monotonic()))
        return self._output


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
