"""4-bit weights in the layouts of AWQ, GPTQ and compressed-tensors, by rounding to the nearest step.

Real AWQ and GPTQ choose their steps by looking at activations; here only the layout matters, which is what vLLM reads:
AWQ's "gemm" layout (https://github.com/mit-han-lab/llm-awq), GPTQ's (https://github.com/AutoGPTQ/AutoGPTQ), and the
"pack-quantized" one of compressed-tensors (https://github.com/vllm-project/compressed-tensors).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

if TYPE_CHECKING:
    import torch

#: SmolLM2's sizes, 576 and 1536, are multiples of 64 and not of 128.
GROUP_SIZE = 64

#: Which of eight neighbouring columns each 4-bit field of AWQ's 32-bit words holds, the lowest field first.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
#: Parts of a group's range that are tried; what lies outside is clipped.
_CLIPPING = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_PLAIN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)


@frozen(eq=False)
class Quantized:
    """A matrix in 4 bits: ``(steps - zeros) * scales``, with one zero and one scale for each group of rows.

    Attributes:
        steps: Integers 0 to 15, ``[in_features, out_features]``.
        scales: ``[in_features / GROUP_SIZE, out_features]``, representable in bfloat16.
        zeros: Integers 0 to 15, the shape of ``scales``.
    """

    steps: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def dequantized(self) -> torch.Tensor:
        """Return the matrix that it stands for, in float32, ``[in_features, out_features]``."""
        zeros = self.zeros.repeat_interleave(GROUP_SIZE, dim=0)
        return (self.steps - zeros).float() * self.scales.repeat_interleave(GROUP_SIZE, dim=0)


def quantize(weight: torch.Tensor, *, symmetric: bool) -> Quantized:
    """Round a matrix to 4 bits; of several ranges to clip each group to, the one with the least squared error.

    Args:
        weight: ``[in_features, out_features]``; ``in_features`` a multiple of ``GROUP_SIZE``.
        symmetric: Whether every zero is 8, as GPTQ's kernels like it.
    """
    import torch

    in_features, out_features = weight.shape
    groups = weight.float().reshape(in_features // GROUP_SIZE, GROUP_SIZE, out_features)
    candidates = [_round(groups, ratio, symmetric) for ratio in _CLIPPING]
    errors = torch.stack([((s - z[:, None]) * c[:, None] - groups).square().sum(dim=1) for s, c, z in candidates])
    best = errors.argmin(dim=0)
    steps = torch.stack([steps for steps, _, _ in candidates]).gather(0, best[None, :, None].expand(1, *groups.shape))[
        0
    ]
    scales, zeros = (
        torch.stack([candidate[which] for candidate in candidates]).gather(0, best[None])[0] for which in (1, 2)
    )
    return Quantized(steps.reshape(in_features, out_features).int(), scales, zeros.int())


def _round(groups: torch.Tensor, ratio: float, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return steps, scales and zeros when each group is clipped to ``ratio`` of its range."""
    import torch

    low, high = groups.amin(dim=1).clamp(max=0) * ratio, groups.amax(dim=1).clamp(min=0) * ratio
    scales = torch.maximum(high, -low) / 7.5 if symmetric else (high - low) / 15
    # vLLM reads scales as the model's dtype: rounded here, they are the same numbers there.
    scales = scales.clamp(min=1e-4).bfloat16().float()
    zeros = torch.full_like(scales, 8) if symmetric else (-low / scales).round().clamp(0, 15)
    steps = ((groups / scales[:, None]).round() + zeros[:, None]).clamp(0, 15)
    return steps, scales, zeros


def pack_awq(matrix: Quantized) -> dict[str, torch.Tensor]:
    """Return the three tensors of an AWQ layer, by the last part of their names; scales in the dtype of the model."""
    return {
        "qweight": _pack_columns(matrix.steps, _AWQ_ORDER),
        "qzeros": _pack_columns(matrix.zeros, _AWQ_ORDER),
        "scales": matrix.scales.bfloat16(),
    }


def unpack_awq(tensors: dict[str, torch.Tensor]) -> Quantized:
    """Invert ``pack_awq``."""
    return Quantized(
        _unpack_columns(tensors["qweight"], _AWQ_ORDER),
        tensors["scales"].float(),
        _unpack_columns(tensors["qzeros"], _AWQ_ORDER),
    )


def pack_gptq(matrix: Quantized) -> dict[str, torch.Tensor]:
    """Return the four tensors of a GPTQ layer, by the last part of their names; zeros are stored less one."""
    import torch

    return {
        "qweight": _pack_columns(matrix.steps.T, _PLAIN_ORDER).T.contiguous(),
        "qzeros": _pack_columns(matrix.zeros - 1, _PLAIN_ORDER),
        "scales": matrix.scales.bfloat16(),
        "g_idx": (torch.arange(matrix.steps.shape[0]) // GROUP_SIZE).int(),
    }


def unpack_gptq(tensors: dict[str, torch.Tensor]) -> Quantized:
    """Invert ``pack_gptq``."""
    return Quantized(
        _unpack_columns(tensors["qweight"].T, _PLAIN_ORDER).T.contiguous(),
        tensors["scales"].float(),
        _unpack_columns(tensors["qzeros"], _PLAIN_ORDER) + 1,
    )


def pack_compressed(matrix: Quantized) -> dict[str, torch.Tensor]:
    """Return the three tensors of a symmetric compressed-tensors layer, by the last part of their names."""
    import torch

    return {
        "weight_packed": _pack_columns(matrix.steps.T, _PLAIN_ORDER),
        "weight_scale": matrix.scales.T.bfloat16().contiguous(),
        "weight_shape": torch.tensor(matrix.steps.T.shape),
    }


def unpack_compressed(tensors: dict[str, torch.Tensor]) -> Quantized:
    """Return the inverse of ``pack_compressed``."""
    import torch

    scales = tensors["weight_scale"].T.float()
    zeros = torch.full_like(scales, 8).int()
    return Quantized(_unpack_columns(tensors["weight_packed"], _PLAIN_ORDER).T, scales, zeros)


def _pack_columns(values: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Eight neighbouring columns into one column of 32-bit words."""
    import torch

    eights = values.reshape(values.shape[0], -1, 8).to(torch.int64)
    words = torch.zeros(eights.shape[:2], dtype=torch.int64)
    for field, column in enumerate(order):
        words |= eights[:, :, column] << (4 * field)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int().contiguous()


def _unpack_columns(words: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    import torch

    columns = torch.empty((*words.shape, 8), dtype=torch.int32)
    for field, column in enumerate(order):
        columns[:, :, column] = (words >> (4 * field)) & 15
    return columns.reshape(words.shape[0], -1)
