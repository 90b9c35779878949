"""The effect of an adapter on the model, measured on a probe and compared with PEFT's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from qlora_infer.errors import MissingDependencyError, ModelNotFoundError

#: What is read with and without the adapter unless the caller has texts nearer to its purpose.
PROBE = (
    "The capital of France is Paris, and the city is known for its museums, its bridges and its bread.",
    "Question: What is 12 plus 30? Answer: 12 plus 30 is 42, because 10 and 30 make 40 and 2 more make 42.",
    "Dear Sir or Madam, thank you very much for your letter, which I have read with great interest.",
    'def add(a, b):\n    """Return the sum of two numbers."""\n    return a + b\n',
    "User: Hello! Who are you?\nAssistant: Hello! I am an assistant, and I am happy to help you.",
)


@frozen
class Scores:
    """A model's scores for the tokens of a text.

    Attributes:
        logprobs: The log-probability of each token but the first, in nats.
        favourites: At each of these places, the token that the model takes for the most likely.
    """

    logprobs: Sequence[float]
    favourites: Sequence[int]

    @classmethod
    def read(cls, token_ids: Sequence[int], prompt_logprobs: Sequence[Any]) -> Scores:
        """Take them from vLLM's ``prompt_logprobs``, asked for with 1."""
        entries: list[Mapping[int, Any]] = list(prompt_logprobs[1:])
        return cls(
            [entry[token].logprob for token, entry in zip(token_ids[1:], entries, strict=True)],
            [next(token for token, logprob in entry.items() if logprob.rank == 1) for entry in entries],
        )


@frozen
class AdapterEffect:
    """The change that an adapter makes to a model's predictions.

    Attributes:
        adapter: The adapter's name, with the version.
        num_tokens: The number of compared tokens.
        share_changed: The share of tokens, 0 to 1, for which the adapter makes another token the most likely.
        mean_shift: The mean change of a token's log-probability, in nats.
        reference_base_shift: The mean distance between the base model here and in transformers, which is the effect of
            quantization and arithmetic; ``None`` without a reference.
        reference_shift: The mean distance between the adapter here and in PEFT; ``None`` without a reference. If the
            adapter is applied correctly, it is about ``reference_base_shift``, and far below ``mean_shift``.

    Example:
        >>> str(AdapterEffect("pirate@1", 98, 0.34, 0.71))
        'pirate@1 changes 34% of the most likely tokens, and log-probabilities by 0.71 in the mean (98 tokens)'
    """

    adapter: str
    num_tokens: int
    share_changed: float
    mean_shift: float
    reference_base_shift: float | None = None
    reference_shift: float | None = None

    def __str__(self) -> str:
        text = (
            f"{self.adapter} changes {self.share_changed:.0%} of the most likely tokens, and log-probabilities by "
            f"{self.mean_shift:.2f} in the mean ({self.num_tokens} tokens)"
        )
        if self.reference_shift is not None:
            text += f"; from PEFT it is {self.reference_shift:.2f} away, the base model {self.reference_base_shift:.2f}"
        return text


def effect(
    adapter: str,
    base: Sequence[Scores],
    adapted: Sequence[Scores],
    reference: tuple[Sequence[Scores], Sequence[Scores]] | None,
) -> AdapterEffect:
    """Compare the scores of some texts; ``reference`` is the base model's and the adapter's elsewhere."""
    changed = [
        one != other
        for a, b in zip(base, adapted, strict=True)
        for one, other in zip(a.favourites, b.favourites, strict=True)
    ]
    return AdapterEffect(
        adapter,
        len(changed),
        _mean(changed),
        _distance(base, adapted),
        _distance(base, reference[0]) if reference else None,
        _distance(adapted, reference[1]) if reference else None,
    )


def _distance(some: Sequence[Scores], others: Sequence[Scores]) -> float:
    return _mean(
        [
            abs(one - other)
            for a, b in zip(some, others, strict=True)
            for one, other in zip(a.logprobs, b.logprobs, strict=True)
        ]
    )


def _mean(numbers: Sequence[float]) -> float:
    return math.fsum(numbers) / len(numbers)


def reference_scores(
    model: str, adapter: Path, texts: Sequence[Sequence[int]], *, token: str | None
) -> tuple[list[Scores], list[Scores]]:
    """Score texts with transformers and PEFT: by the base model, and by the adapter.

    The model is loaded into host memory, in the number type of its checkpoint, and forgotten afterwards.

    Args:
        model: A checkpoint of the same model that transformers can load, on the Hub or in a folder.
        adapter: The adapter's folder.
        texts: Token ids.
        token: The Hub's access token.

    Raises:
        MissingDependencyError: PEFT is not installed, or a package that the checkpoint needs.
        ModelNotFoundError: transformers cannot load it.
    """
    try:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise MissingDependencyError("a comparison with PEFT needs it: pip install peft") from error
    try:
        base = AutoModelForCausalLM.from_pretrained(model, dtype="auto", token=token)
    except ImportError as error:
        raise MissingDependencyError(f"transformers needs another package to load {model}: {error}") from error
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"transformers cannot load {model}: {error}") from error
    by_base = [_score(base, text) for text in texts]
    adapted = PeftModel.from_pretrained(base, str(adapter)).eval()
    return by_base, [_score(adapted, text) for text in texts]


def _score(model: Any, token_ids: Sequence[int]) -> Scores:
    import torch

    with torch.inference_mode():
        logits = model(torch.tensor([list(token_ids)])).logits[0, :-1].float()
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]
    return Scores(chosen.tolist(), logits.argmax(dim=-1).tolist())
