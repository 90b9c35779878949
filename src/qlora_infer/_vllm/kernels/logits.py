"""The rows of logits and their adapters, which vLLM does not pass to its LoRA kernels.

The kernels know one row of logits for each request of a step (``sampler_indices``). For ``prompt_logprobs`` vLLM also
computes logits of every token of a prompt, and its second runner computes several for each request that has drafted
tokens. Without the right rows, a prompt gets the adapters of other requests, or the kernels end the process.

Read in vLLM 0.32.0: ``vllm/v1/worker/gpu_model_runner.py`` (the first runner, which CPUs have and which hands over
drafted tokens rightly) and ``vllm/v1/worker/gpu`` (the second, which GPUs have).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

Slots = npt.NDArray[np.int32]


class LogitsKernels(Protocol):
    """LoRA kernels that can be given the rows of logits."""

    def use_logits_rows(self, slots: Slots | None) -> None:
        """Use one slot for each row of the next logits, -1 for none; ``None`` brings the step's own rows back."""


def slots_of(ids: Sequence[int], lora_index_to_id: Sequence[int | None]) -> Slots:
    """Return the slot of each row, -1 for rows without an adapter.

    Args:
        ids: vLLM's id of each row's adapter, 0 for none.
        lora_index_to_id: The id of the adapter in each slot.
    """
    slot_of = {lora_id: slot for slot, lora_id in enumerate(lora_index_to_id) if lora_id is not None}
    return np.fromiter((slot_of[lora_id] if lora_id > 0 else -1 for lora_id in ids), np.int32, len(ids))


def put_sampler_indices(wrapper: Any, slots: torch.Tensor) -> None:
    """Write the rows of logits where vLLM's ``PunicaWrapperBase`` keeps them."""
    wrapper._sampler_indices[: len(slots)].copy_(slots)
    wrapper.indices_len[1] = len(slots)


def follow(runner: Any) -> None:
    """From now on compute each row of logits with its own request's adapter.

    Call it once, when the engine has started. It does nothing where no adapter can change the logits: where vLLM adapts
    no ``lm_head``, and on the ranks of a pipeline that have none.
    """
    from vllm.lora.layers import LogitsProcessorWithLoRA

    manager = runner.lora_manager._adapter_manager
    heads = [module for module in manager.modules.values() if isinstance(module, LogitsProcessorWithLoRA)]
    if not heads:
        return
    wrapper = heads[0].punica_wrapper
    kernels: LogitsKernels = wrapper if hasattr(wrapper, "use_logits_rows") else VllmsKernels(wrapper)
    if hasattr(runner, "_get_prompt_logprobs_dict"):
        _follow_prompts_of_the_first_runner(runner, manager, kernels)
    elif runner.prompt_logprobs_worker is not None:
        _follow_prompts_of_the_second_runner(runner, manager, kernels)
        _follow_drafts_of_the_second_runner(runner)


class VllmsKernels:
    """vLLM's own kernels, given the rows of logits in the way that its ``update_metadata`` gives them."""

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        self._own: torch.Tensor | None = None

    def use_logits_rows(self, slots: Slots | None) -> None:
        """Use one slot for each row of the next logits; ``None`` brings the step's own rows back."""
        if self._own is None:
            self._own = self._wrapper.sampler_indices.clone()
        put_sampler_indices(self._wrapper, self._own if slots is None else torch.from_numpy(slots))
        if slots is None:
            self._own = None
        if hasattr(self._wrapper, "prompt_mapping_meta"):
            self._sort()

    def _sort(self) -> None:
        """Sort the rows on the device, for which the host waits."""
        from vllm.utils.gpu_sync_debug import gpu_sync_allowed

        with gpu_sync_allowed():
            self._wrapper.prompt_mapping_meta.prepare_tensors(self._wrapper.sampler_indices)


class PromptLogits:
    """A model's ``compute_logits`` for tokens of a step, each with its own adapter.

    As a context it brings the step's own rows of logits back at its end.

    Args:
        kernels: The kernels that add an adapter to logits.
        compute_logits: The model's own method.
        hidden_states: Those of the step's tokens, ``[num_tokens, hidden_size]``.
        slots: Returns the slot of each token; called when logits are first computed, which is rare.
    """

    def __init__(
        self,
        kernels: LogitsKernels,
        compute_logits: Callable[[torch.Tensor], Any],
        hidden_states: torch.Tensor,
        slots: Callable[[], Slots],
    ) -> None:
        self._kernels = kernels
        self._compute_logits = compute_logits
        self._hidden_states = hidden_states
        self._find_slots = slots
        self._slots: Slots | None = None

    def __enter__(self) -> PromptLogits:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._slots is not None:
            self._kernels.use_logits_rows(None)

    def __call__(self, rows: torch.Tensor) -> Any:
        """Compute the logits of some rows of the hidden states."""
        if self._slots is None:
            self._slots = self._find_slots()
        first = first_row(self._hidden_states, rows)
        self._kernels.use_logits_rows(self._slots[first : first + len(rows)])
        return self._compute_logits(rows)


def first_row(whole: torch.Tensor, rows: torch.Tensor) -> int:
    """Return the place in ``whole`` of the first of some rows, which are a view of it.

    Raises:
        RuntimeError: They are not, so the rows cannot be assigned.
    """
    first, rest = divmod(int(rows.storage_offset() - whole.storage_offset()), int(whole.stride(0)))
    is_view = rows.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    if not is_view or rest or rows.stride() != whole.stride() or not 0 <= first <= len(whole) - len(rows):
        raise RuntimeError("vLLM computes logits of rows that are not the step's hidden states, in the order of tokens")
    return first


def _follow_prompts_of_the_first_runner(runner: Any, manager: Any, kernels: LogitsKernels) -> None:
    theirs = runner._get_prompt_logprobs_dict

    def prompt_logprobs(hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
        if not runner.num_prompt_logprobs:
            return theirs(hidden_states, num_scheduled_tokens)

        def slots() -> Slots:
            batch = runner.input_batch
            counts = [num_scheduled_tokens[req_id] for req_id in batch.req_ids]
            ids = batch.request_lora_mapping[: batch.num_reqs].repeat(counts)
            return slots_of(ids, manager.lora_index_to_id)

        model, compute_logits = runner.model, runner.model.compute_logits
        with PromptLogits(kernels, compute_logits, hidden_states, slots) as model.compute_logits:
            try:
                return theirs(hidden_states, num_scheduled_tokens)
            finally:
                model.compute_logits = compute_logits

    runner._get_prompt_logprobs_dict = prompt_logprobs


def _follow_prompts_of_the_second_runner(runner: Any, manager: Any, kernels: LogitsKernels) -> None:
    worker = runner.prompt_logprobs_worker

    def followed(theirs: Callable[..., Any]) -> Callable[..., Any]:
        def compute(logits_fn: Callable[[torch.Tensor], Any], hidden_states: Any, input_batch: Any, *rest: Any) -> Any:
            def slots() -> Slots:
                ids = runner.lora_state.lora_ids[input_batch.idx_mapping_np].repeat(input_batch.num_scheduled_tokens)
                return slots_of(ids, manager.lora_index_to_id)

            with PromptLogits(kernels, logits_fn, hidden_states, slots) as compute_logits:
                return theirs(compute_logits, hidden_states, input_batch, *rest)

        return compute

    for name in ("compute_prompt_logprobs", "compute_prompt_token_id_logprobs"):
        if hasattr(worker, name):
            setattr(worker, name, followed(getattr(worker, name)))


def _follow_drafts_of_the_second_runner(runner: Any) -> None:
    """Name a request's adapter for each of its rows of logits, where vLLM names it once.

    It is done where vLLM makes the mapping of a step, between the two methods, so that kernels see nothing of it.
    """
    if runner.decode_query_len == 1:
        return
    prepare, make = runner.prepare_inputs, runner.lora_state.make_lora_inputs
    counts: npt.NDArray[np.int32] = np.zeros(0, np.int32)

    def prepare_inputs(*args: Any, **kwargs: Any) -> Any:
        nonlocal counts
        input_batch = prepare(*args, **kwargs)
        counts = np.diff(input_batch.cu_num_logits_np)
        return input_batch

    def make_lora_inputs(req_ids: Any, idx_mapping: Any, num_scheduled_tokens: Any) -> Any:
        prompts, tokens, requests = make(req_ids, idx_mapping, num_scheduled_tokens)
        return tuple(np.repeat(prompts, counts)), tokens, requests

    runner.prepare_inputs, runner.lora_state.make_lora_inputs = prepare_inputs, make_lora_inputs
