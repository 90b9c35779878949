"""What transformers and PEFT answer, in float32 on the CPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def load(architecture: str, folder: Path) -> Any:
    """Return the model of a checkpoint as transformers' class ``architecture``."""
    import torch
    import transformers

    network = getattr(transformers, architecture).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return network.eval()


def with_adapter(network: Any, folder: Path) -> Any:
    """Return PEFT's model with an adapter; PEFT does not take several of different ``target_parameters`` into one."""
    import peft

    return peft.PeftModel.from_pretrained(network, folder).eval()


def logprobs(model: Any, token_ids: Sequence[int]) -> list[float]:
    """Return the log-probability of each token but the first, after those before it."""
    import torch

    ids = torch.tensor([list(token_ids)])
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    scores = logits[0].float().log_softmax(-1)
    return [float(scores[place, token]) for place, token in enumerate(token_ids[1:])]
