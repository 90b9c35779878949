"""The arithmetic of TIES and DARE on tensors, the same to the bit as PEFT 0.21's ``merge_utils``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def keep_largest(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """Set all but the largest numbers to zero (Yadav et al. 2023, "TIES-Merging", section 3.2)."""
    import torch

    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    mask = torch.zeros_like(tensor).flatten()
    mask[kept] = 1
    return tensor * mask.view_as(tensor)


def keep_random(tensor: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """Set numbers to zero at random and enlarge the others, so that the expected value stays (Yu et al. 2023, DARE)."""
    import torch

    return tensor * torch.bernoulli(torch.full_like(tensor, density), generator=generator) / density


def mean_of_majority(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Average, at each place, the weighted numbers whose sign is that of the sum ("TIES-Merging", section 3.2).

    The vote is PEFT's ``majority_sign_method="total"``: the numbers vote with their size and without their weights.
    """
    import torch

    stacked = torch.stack(list(tensors))
    elected = stacked.sign() == torch.where(stacked.sum(dim=0) >= 0, 1, -1)
    weighted = stacked * torch.tensor(weights).view(-1, 1, 1)
    return (weighted * elected).sum(dim=0) / elected.sum(dim=0).clamp(min=1)
