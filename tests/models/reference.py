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


def with_adapters(network: Any, folders: dict[str, Path]) -> Any:
    """Return PEFT's model with these adapters, none of which is chosen."""
    import peft

    (first, folder), *others = folders.items()
    model = peft.PeftModel.from_pretrained(network, folder, adapter_name=first)
    for name, folder in others:
        model.load_adapter(folder, adapter_name=name)
    return model.eval()


def logprobs(model: Any, adapter: str | None, token_ids: Sequence[int]) -> list[float]:
    """Return the log-probability of each token but the first, after those before it."""
    import torch

    ids = torch.tensor([list(token_ids)])
    with torch.no_grad():
        if adapter is not None:
            model.set_adapter(adapter)
            logits = model(ids, use_cache=False).logits
        elif hasattr(model, "disable_adapter"):
            with model.disable_adapter():
                logits = model(ids, use_cache=False).logits
        else:
            logits = model(ids, use_cache=False).logits
    scores = logits[0].float().log_softmax(-1)
    return [float(scores[place, token]) for place, token in enumerate(token_ids[1:])]
