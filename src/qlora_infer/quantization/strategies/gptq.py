"""GPTQ: 4- and 8-bit weights quantized by second-order information (Frantar et al., 2022, arXiv:2210.17323)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qlora_infer.config import EngineConfig
from qlora_infer.quantization.checkpoint import quant_method, quantization_config
from qlora_infer.quantization.strategy import Platform, register, unserved

#: Bits that vLLM 0.32 has kernels for (``auto_gptq.py``), and those of them that it has on a CPU.
_BITS, _BITS_ON_A_CPU = (4, 8), (4,)


@register
class GPTQ:
    """GPTQ checkpoints; vLLM picks the fastest kernel that the device has (Marlin on recent GPUs)."""

    name = "gptq"

    def matches(self, model_config: Mapping[str, Any]) -> bool:
        """Return whether the checkpoint names GPTQ."""
        return quant_method(model_config) == "gptq"

    def check(self, config: EngineConfig, model_config: Mapping[str, Any], platform: Platform) -> None:
        """Refuse GPUs before 6.0, and forms that vLLM 0.32 dropped: asymmetric weights, activation orders in groups."""
        platform.require_capability(60, "GPTQ")
        for says in _sections(quantization_config(model_config)):
            bits, group_size = says.get("bits", 4), says.get("group_size", -1)
            if bits not in _BITS:
                raise unserved(config.model, f"bits={bits}", "vLLM runs GPTQ with 4 and 8 bits")
            if says.get("sym") is False:
                raise unserved(config.model, "sym=False", "vLLM runs symmetric weights only")
            if says.get("desc_act") and group_size != -1:
                order = f"desc_act=True with group_size={group_size}"
                raise unserved(config.model, order, "vLLM runs activation orders in groups no more")
            if bits not in _BITS_ON_A_CPU:
                platform.require_gpu(f"GPTQ with {bits} bits")

    def engine_args(self, config: EngineConfig, model_config: Mapping[str, Any]) -> dict[str, Any]:
        """Name the method; vLLM reads everything else from the checkpoint."""
        return {"quantization": "gptq"}


def _sections(quantization: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the fields of all layers, and those of the patterns in GPTQModel's ``dynamic``."""
    yield quantization
    for pattern, changes in (quantization.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and isinstance(changes, Mapping):
            yield {**quantization, **changes}
