"""LoRA's arithmetic, where vLLM's own is wrong or slow, and how vLLM is given it."""

from __future__ import annotations

import logging

logger = logging.getLogger("qlora_infer")


def install() -> None:
    """Have vLLM use our kernels in this process, on the devices that we have kernels for: the CPU.

    ``Platform.get_punica_wrapper`` names the class whose methods vLLM's LoRA layers call (read in vLLM 0.32.0,
    ``vllm/lora/punica_wrapper/punica_selector.py``).
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        platform_class = type(current_platform)
        platform_class.get_punica_wrapper = classmethod(lambda cls: "qlora_infer.kernels.cpu.GroupedPunicaWrapper")
