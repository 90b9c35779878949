"""The wrapper through which vLLM's LoRA layers call our fused kernel on a GPU.

What our kernel does not do (mixtures of experts, adapters that are split over GPUs, float32) vLLM's own kernels still
do, which this class inherits. Read in vLLM 0.32.0, ``vllm/lora/punica_wrapper/punica_gpu.py``.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
from vllm.utils.gpu_sync_debug import gpu_sync_allowed
from vllm.utils.torch_utils import direct_register_custom_op

from qlora_infer._vllm.kernels.cuda.fused import Batch, Module, Scratch, add_lora, warm_up
from qlora_infer._vllm.kernels.loading.slots import spread
from qlora_infer._vllm.kernels.logits import Slots, put_sampler_indices, slots_of

#: Slices of the modules that our kernel takes, a Mamba's five among them; vLLM's own take modules of more.
MOST_SLICES = 8
#: A tile says in so many bits which slices its adapter changes.
NUM_BITS = 31


class FusedPunicaWrapper(PunicaWrapperGPU):  # type: ignore[misc]
    """vLLM's seam to its LoRA kernels, with ours behind it."""

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: Any, **kwargs: Any) -> None:
        """Reserve the memory that CUDA graphs refer to."""
        # Layers split over GPUs need it; made when they first ask, it would be made in what torch compiles.
        self._uses_vllms_metadata = kwargs["lora_config"].fully_sharded_loras
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self._manager: Any = None
        self._max_rows = max_num_batched_tokens
        self._tokens = Batch(max_num_batched_tokens, self.max_loras, device)
        self._prompts = Batch(max_num_batched_tokens, self.max_loras, device)
        self._own_prompts: Slots = np.zeros(0, np.int32)
        self._logits = self._own_prompts
        self._slot_heads: dict[int, tuple[int, int]] = {}
        self._modules: dict[int, Module | None] = {}
        self._first_bits: dict[tuple[int, ...], int] = {}
        self._heads: weakref.WeakKeyDictionary[Any, tuple[int, int]] = weakref.WeakKeyDictionary()
        self._scratch: Scratch | None = None
        self._has_pdl = torch.cuda.get_device_capability(device) >= (9, 0)
        _WRAPPERS[self._token_lora_indices.data_ptr()] = self

    def watch(self, manager: Any) -> list[str]:
        """From now on use vLLM's ``LoRAModelManager`` to find each adapter's own rank and the modules that it changes.

        Returns:
            The modules whose LoRA vLLM's own kernels compute.
        """
        self._manager = manager
        return modules_of_vllms(manager)

    # vLLM's metadata is sorted on the device, for which the host waits. It is made only once something asked for it.

    @property
    def token_mapping_meta(self) -> Any:
        """The description of a step's tokens that vLLM's own kernels need."""
        self._want_vllms_metadata()
        return self._token_mapping_meta

    @token_mapping_meta.setter
    def token_mapping_meta(self, meta: Any) -> None:
        self._token_mapping_meta = meta

    @property
    def prompt_mapping_meta(self) -> Any:
        """The description of the tokens with logits that vLLM's own kernels need."""
        self._want_vllms_metadata()
        return self._prompt_mapping_meta

    @prompt_mapping_meta.setter
    def prompt_mapping_meta(self, meta: Any) -> None:
        self._prompt_mapping_meta = meta

    def _want_vllms_metadata(self) -> None:
        if not self._uses_vllms_metadata:
            self._uses_vllms_metadata = True
            self._prepare_vllms_metadata()

    def _prepare_vllms_metadata(self) -> None:
        with gpu_sync_allowed():
            self._token_mapping_meta.prepare_tensors(self.token_lora_indices)
            put_sampler_indices(self, torch.from_numpy(self._logits))
            self._prompt_mapping_meta.prepare_tensors(self.sampler_indices)

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """Take over which adapter each row of the next steps has."""
        self.is_prefill = mapping.is_prefill
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        self._slot_heads = self._heads_of(lora_index_to_id)
        self._tokens.update(slots_of(mapping.index_mapping, lora_index_to_id), self._slot_heads)
        self._own_prompts = slots_of(mapping.prompt_mapping, lora_index_to_id)
        self.use_logits_rows(None)

    def use_logits_rows(self, slots: Slots | None) -> None:
        """Use one slot for each row of the next logits, -1 for none; ``None`` brings the step's own rows back."""
        self._logits = self._own_prompts if slots is None else slots
        self._prompts.update(self._logits, self._slot_heads)
        if self._uses_vllms_metadata:
            self._prepare_vllms_metadata()

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the adapters' contributions to a linear module's output."""
        add = kwargs.get("add_inputs", True)
        if torch.compiler.is_compiling():
            a, b = list(lora_a_stacked), list(lora_b_stacked)
            torch.ops.vllm.qlora_add_lora_linear(y, x, a, b, scale, list(output_slices), add, self._token_lora_indices)
        elif scale != 1.0 or not _is_for_us(y, x, lora_a_stacked, lora_b_stacked):
            super().add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, buffer=buffer, **kwargs)
        else:
            self._add(y, x, lora_a_stacked, lora_b_stacked, self._tokens, add=add)

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """Add the adapters' contributions to an embedding; x is their row of A."""
        if torch.compiler.is_compiling():
            torch.ops.vllm.qlora_add_lora_embedding(y, x, lora_b_stacked, add_inputs, self._token_lora_indices)
        elif not _is_for_us(y, x, (x,), (lora_b_stacked,)):
            super().add_lora_embedding(y, x, lora_b_stacked, add_inputs, **kwargs)
        else:
            self._add(y, x, (lora_b_stacked,), (lora_b_stacked,), self._tokens, add=add_inputs, is_shrunk=True)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the adapters' contributions to logits.

        Raises:
            ValueError: The numbers of rows and slots differ, so the rows cannot be assigned.
        """
        if self._prompts.num_rows and len(self._logits) != len(x):
            raise ValueError(f"{len(self._logits)} rows of logits have a slot, but there are {len(x)}")
        a, b = (lora_a_stacked,), (lora_b_stacked,)
        if scale != 1.0 or not _is_for_us(y, x, a, b):
            super().add_lora_logits(y, x, lora_a_stacked, lora_b_stacked, scale, buffer=buffer, **kwargs)
        else:
            self._add(y, x, a, b, self._prompts)

    def _add(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        a: Sequence[torch.Tensor],
        b: Sequence[torch.Tensor],
        batch: Batch,
        *,
        add: bool = True,
        is_shrunk: bool = False,
    ) -> None:
        if batch.num_rows == 0 or not len(x):
            return
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        module = self._modules.get(b[0].data_ptr()) or self._meet(y, x, a, b, is_shrunk=is_shrunk)
        assert self._scratch is not None
        add_lora(y, x, module, batch, self._scratch, add=add, is_shrunk=is_shrunk, pdl=self._has_pdl)

    def _meet(
        self, y: torch.Tensor, x: torch.Tensor, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], *, is_shrunk: bool
    ) -> Module:
        """Describe a module on its first use, and compile its kernels for steps of any size."""
        module = Module.of(a, b, first_bit=self._first_bit(b))
        if self._scratch is None or self._scratch.num_slices < len(b):
            # All modules come in vLLM's profile of a step, before a CUDA graph refers to it.
            self._scratch = Scratch(self._max_rows, self.max_loras, module.rank, len(b), y.device)
        warm_up(y, x, module, self._scratch, self.max_loras, is_shrunk=is_shrunk, pdl=self._has_pdl)
        self._modules[b[0].data_ptr()] = module
        return module

    def _first_bit(self, b: Sequence[torch.Tensor]) -> int:
        """Modules of one shape share their bits; so do those that come when all bits are given away."""
        sizes = tuple(tensor.shape[-2] for tensor in b)
        if sizes not in self._first_bits:
            used = sum(len(known) for known in self._first_bits)
            self._first_bits[sizes] = min(used, NUM_BITS - len(sizes))
        return self._first_bits[sizes]

    def _heads_of(self, lora_index_to_id: list[int | None]) -> dict[int, tuple[int, int]]:
        """For each slot its adapter's rank, and the bits of the slices that it changes."""
        if self._manager is None:
            return {}
        heads = {}
        for slot, lora_id in enumerate(lora_index_to_id):
            adapter = self._manager._registered_adapters.get(lora_id) if lora_id is not None else None
            if adapter is not None:
                if adapter not in self._heads:
                    self._heads[adapter] = self._head_of(adapter)
                heads[slot] = self._heads[adapter]
        return heads

    def _head_of(self, adapter: Any) -> tuple[int, int]:
        """Return an adapter's rank, in the steps of 8 that 16 bytes make, and the bits of the modules it changes."""
        rank, bits = 0, 0
        for name, module in self._manager.modules.items():
            weights = self._manager._get_lora_layer_weights(adapter, name)
            stacked = getattr(module, "lora_b_stacked", None)
            if not weights or not _is_matrices(stacked):
                continue
            stacked = stacked if isinstance(stacked, tuple) else (stacked,)
            a = weights.lora_a if isinstance(weights.lora_a, list) else [weights.lora_a]
            if len(a) > len(stacked):
                return 1 << 30, -1
            first_bit = self._first_bit(stacked)
            for piece, weight in enumerate(spread(a, len(stacked))):
                if weight is not None:
                    rank = max(rank, min(weight.shape))
                    bits |= 1 << (first_bit + piece)
        return -(-rank // 8) * 8, bits


def _is_matrices(stacked: Any) -> bool:
    """Return whether a layer's slots are those of a linear layer, not of experts, which vLLM's own kernels compute."""
    return isinstance(stacked, torch.Tensor | tuple)


def modules_of_vllms(manager: Any) -> list[str]:
    """Return the modules whose LoRA vLLM's own kernels compute: experts, and those of too many slices."""
    return [
        name
        for name, layer in manager.modules.items()
        if not _is_matrices(stacked := getattr(layer, "lora_b_stacked", None))
        or (isinstance(stacked, tuple) and len(stacked) > MOST_SLICES)
    ]


def _is_for_us(y: torch.Tensor, x: torch.Tensor, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    dtype = a[0].dtype
    return (
        dtype in (torch.float16, torch.bfloat16)
        and y.dtype == x.dtype == b[0].dtype == dtype
        and y.stride(-1) == x.stride(-1) == 1
        and len(b) <= MOST_SLICES
    )


# What a compiler sees: an operator for a layer, which it does not look into. It knows a wrapper by where its tensor of
# indices is: torch keeps compiled code for later processes, and a number would be compiled into it.

_WRAPPERS: weakref.WeakValueDictionary[int, FusedPunicaWrapper] = weakref.WeakValueDictionary()


def _add_lora_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    a: list[torch.Tensor],
    b: list[torch.Tensor],
    scale: float,
    sizes: list[int],
    add: bool,
    indices: torch.Tensor,
) -> None:
    _WRAPPERS[indices.data_ptr()].add_lora_linear(y, x, tuple(a), tuple(b), scale, tuple(sizes), add_inputs=add)


def _add_lora_embedding(y: torch.Tensor, x: torch.Tensor, b: torch.Tensor, add: bool, indices: torch.Tensor) -> None:
    _WRAPPERS[indices.data_ptr()].add_lora_embedding(y, x, b, add)


def _only_changes_y(*arguments: Any) -> None:
    """Stand in for both operators while torch compiles: they change ``y`` and return nothing."""


for operator in (_add_lora_linear, _add_lora_embedding):
    direct_register_custom_op(
        op_name=f"qlora{operator.__name__}", op_func=operator, mutates_args=["y"], fake_impl=_only_changes_y
    )
