"""The extension of vLLM's workers that loads adapters and lists the modules of the model.

vLLM mixes ``WorkerExtension`` into its worker class (``worker_extension_cls``) and imports this module before it
builds the model. So this module's import is the place to install kernels: it happens only in the workers of engines
that this library starts. Read in vLLM 0.32.0, ``vllm/v1/worker/worker_base.py`` and ``vllm/lora/model_manager.py``.
"""

from __future__ import annotations

import copy
import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from qlora_infer._vllm import kernels, lora_layers, start_fault
from qlora_infer._vllm.kernels import dora, logits
from qlora_infer._vllm.kernels.cpu import bitsandbytes
from qlora_infer._vllm.kernels.dora import DoRA
from qlora_infer._vllm.kernels.loading.lora_model import PinnedLoRAModel, merge
from qlora_infer._vllm.kernels.loading.slots import move_at_once
from qlora_infer._vllm.short_turns import ShortTurns

logger = logging.getLogger("qlora_infer")

start_fault.leave_fault()
kernels.install()

#: Adapters that are read at a time, at most. Steps are slower while any is read: the sooner all are there, the better.
MOST_READERS = 4
#: While adapters are read, so that a step does not wait for who builds hundreds of objects.
SHORT_TURNS = ShortTurns(0.0005)


class WorkerExtension:
    """Methods that the driving process calls by name through ``collective_rpc``."""

    model_runner: Any
    device: Any
    _qlora_reader: ThreadPoolExecutor | None = None
    _qlora_reads: dict[int, Future[Any]]
    _qlora_dora: DoRA | None = None

    def qlora_pack_weights(self) -> None:
        """Lay the base model's weights out as this machine's CPU reads them fastest."""
        if self.device.type == "cpu":
            num_packed = bitsandbytes.pack_weights(self.model_runner.model)
            if num_packed:
                logger.info("%d bitsandbytes weights are packed for this CPU's AVX512-BF16 kernel", num_packed)

    def qlora_lora_modules(self) -> dict[str, Any]:
        """Describe the modules that an adapter may change (``_lora_layers.describe``).

        It is called once, when the engine has started: from now on adapters come.
        """
        lora_manager = self.model_runner.lora_manager
        manager = lora_manager._adapter_manager
        computed_by_vllm = kernels.watch(manager)
        logits.follow(self.model_runner)
        moved = move_at_once(manager)
        # A CPU casts when it reads, not in the middle of a step.
        no_dora = dora.why_not(manager)
        self._qlora_dora = None if no_dora else DoRA(manager)
        cast_late = moved if self.device.type == "cuda" else frozenset()
        lora_manager._lora_model_cls = PinnedLoRAModel.moved_at_once(cast_late)
        return {
            **lora_layers.describe(manager),
            "computed_by_vllm": computed_by_vllm,
            "no_dora": no_dora,
        }

    def qlora_poll_loads(self, adapters: list[tuple[str, int, str]]) -> dict[int, str | None]:
        """Load adapters (name, id, path), and return the ids of those that have ended, with the reason of a failure.

        One call begins all and ends all, once a step, because each call waits until a step has ended. Unlike vLLM's
        ``add_lora`` it fills no slot, out of which it might push an adapter that runs. It may be asked again for an
        adapter that has ended, because another worker has not.
        """
        loaded = self.model_runner.lora_manager._adapter_manager._registered_adapters
        ended: dict[int, str | None] = {}
        until = self._qlora_dora.end_of_turn() if self._qlora_dora is not None else 0.0
        for name, int_id, path in adapters:
            if int_id in loaded:
                ended[int_id] = None
                continue
            reading = self._qlora_reading(name, int_id, path)
            if not reading.done():
                continue
            if error := reading.exception():
                ended[int_id] = f"{type(error).__name__}: {error}"
                continue
            try:
                if self._qlora_dora is not None and not self._qlora_dora.advance(reading.result(), until):
                    continue
            except Exception as error:
                ended[int_id] = f"{type(error).__name__}: {error}"
                continue
            loaded[int_id], ended[int_id] = reading.result(), None
            del self._qlora_reads[int_id]
        return ended

    def qlora_drop_load(self, int_id: int) -> None:
        """Forget a load that has not ended, or has failed."""
        if self._qlora_reader is not None:
            read = self._qlora_reads.pop(int_id, None)
            if read is not None:
                read.cancel()
        if self._qlora_dora is not None:
            self._qlora_dora.drop(int_id)

    def _qlora_reading(self, name: str, int_id: int, path: str) -> Future[Any]:
        """Return the reading of an adapter, which is begun where there is none, on another thread than the steps."""
        from vllm.lora.request import LoRARequest

        if self._qlora_reader is None:
            self._qlora_reader = ThreadPoolExecutor(
                _num_readers(self.device.type), "qlora-infer-read", initializer=_leave_the_compute_cores
            )
            self._qlora_reads = {}
        if int_id not in self._qlora_reads:
            request = LoRARequest(name, int_id, path)
            self._qlora_reads[int_id] = self._qlora_reader.submit(self._qlora_load, request)
        return self._qlora_reads[int_id]

    def _qlora_load(self, request: Any) -> Any:
        """Do all that an adapter needs before it is in host memory, and change nothing of the manager.

        ``_load_adapter`` is what ``LRUCacheWorkerLoRAManager.add_adapter`` calls in the middle of a step, for an
        adapter that it does not have; it reads, casts and pins. ``_add_adapter`` then puts the modules together that
        the model has in one; here, for a manager that nobody else has.
        """
        lora_manager = self.model_runner.lora_manager
        with SHORT_TURNS:
            adapter = lora_manager._load_adapter(request)
            aside = copy.copy(lora_manager._adapter_manager)
            aside._registered_adapters = {}
            merge(aside, adapter)
            if self._qlora_dora is not None:
                self._qlora_dora.compile(adapter)
        return adapter


def _num_readers(device: str) -> int:
    """Return how many adapters are read at a time: one where cores compute, several where they feed a GPU."""
    return 1 if device == "cpu" else max(1, min(MOST_READERS, (os.cpu_count() or 1) // 4))


def _leave_the_compute_cores() -> None:
    """Allow this thread any core: on the CPU, vLLM binds a worker to those that compute, which are busy."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
