"""Counts how often plain vLLM moves an adapter into a slot, which it does not tell by itself.

vLLM mixes the class into its workers (``worker_extension_cls``), which must find this module. Read in vLLM 0.32.0,
``vllm/lora/model_manager.py``: ``activate_adapter`` tells whether the adapter had not been in a slot.
"""

from __future__ import annotations

from typing import Any


class SwapCounter:
    """A method that the driving process calls by name through ``collective_rpc``."""

    model_runner: Any
    _num_swaps: int | None = None

    def num_swaps(self) -> int:
        """Return the number of moves since the first call."""
        if self._num_swaps is None:
            self._num_swaps = 0
            manager = self.model_runner.lora_manager._adapter_manager
            activate = manager.activate_adapter

            def counted(lora_id: int) -> bool:
                is_swap = bool(activate(lora_id))
                self._num_swaps = (self._num_swaps or 0) + is_swap
                return is_swap

            manager.activate_adapter = counted
        return self._num_swaps
