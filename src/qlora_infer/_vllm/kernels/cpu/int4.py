"""The AWQ and GPTQ kernel for CPUs without AVX-512, which vLLM lacks.

vLLM 0.32 chooses ``CPUWNA16LinearKernel`` for 4-bit weights on any CPU; what it calls, ``cpu_gemm_wna16``, is compiled
into the builds for AVX-512 and AMX only, and the first step ends the engine. Here the weights are written out once, as
they are loaded, in float32, which such a CPU multiplies several times as fast as bfloat16. They take eight times the
memory for it.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from vllm.model_executor.kernels.linear import register_linear_kernel
from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
from vllm.model_executor.layers.quantization.utils import replace_parameter
from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
from vllm.platforms import PlatformEnum

from qlora_infer._vllm.kernels.cpu.products import product

logger = logging.getLogger("qlora_infer")


class ExpandedLinearKernel(CPUWNA16LinearKernel):  # type: ignore[misc]
    """A linear module whose 4-bit weights were written out in float32."""

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        """As vLLM's, but for GPTQ's reordered inputs, which vLLM itself has refused since 0.32."""
        if getattr(config, "has_g_idx", False):
            return False, "GPTQ with desc_act is not served on a CPU without AVX-512"
        possible: tuple[bool, str | None] = super().can_implement(config)
        return possible

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the packed weights by unpacked ones, ``[out_features, in_features]``."""
        packed, scales = getattr(layer, self.w_q_name), getattr(layer, self.w_s_name)
        # compressed-tensors has them the other way round.
        quantized = packed.data.t() if packed.input_dim == 1 else packed.data
        factors = scales.data.t() if scales.output_dim == 0 else scales.data
        steps = unpack_quantized_values_into_int32(quantized, self.config.weight_type, 0)
        num_inputs, num_outputs = steps.shape
        weight = steps.float().view(len(factors), -1, num_outputs)
        weight -= self._zeros(layer)
        weight *= factors.float()[:, None]
        replace_parameter(layer, self.w_q_name, weight.view(num_inputs, num_outputs).t().contiguous())
        for name in (self.w_s_name, self.w_zp_name):
            if name is not None:
                setattr(layer, name, None)

    def _zeros(self, layer: torch.nn.Module) -> torch.Tensor | int:
        """Return the step that stands for zero: one for all, or one for each group and output."""
        if not self.config.zero_points:
            return int(self.config.weight_type.bias)
        packed = getattr(layer, self.w_zp_name)
        zeros = packed.data.t().contiguous() if packed.output_dim == 0 else packed.data
        unpacked: torch.Tensor = unpack_quantized_values_into_int32(zeros, self.config.weight_type, 1)
        return unpacked[:, None]

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return the product, in float32.

        A row gives the same bits whatever rows are beside it.
        """
        weight = getattr(layer, self.w_q_name)
        y = product(x.reshape(-1, x.shape[-1]).float(), weight)
        if bias is not None:
            y += bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)


def install() -> None:
    """Install this kernel in vLLM, for this process."""
    logger.info("this CPU has no AVX-512: AWQ and GPTQ weights are written out in float32 (docs/internals/cpu.md)")
    register_linear_kernel(ExpandedLinearKernel, PlatformEnum.CPU, "mp")
    disabled = os.environ.get("VLLM_DISABLED_KERNELS", "")
    os.environ["VLLM_DISABLED_KERNELS"] = ",".join(filter(None, (disabled, CPUWNA16LinearKernel.__name__)))
