"""How far an engine's answers are from those of transformers + PEFT, measured by what the adapter changes."""

import random
import statistics
from collections.abc import Sequence
from typing import Any

from attrs import frozen

from models import reference
from models.checkpoints import Checkpoint
from models.peft_adapters import Recipe
from models.tiny import FIRST_WORD, VOCABULARY

_LENGTHS = (3, 7, 12, 24)
_random = random.Random(29)
#: Of words only, of several lengths.
PROMPTS = [[_random.randrange(FIRST_WORD, VOCABULARY) for _ in range(length)] for length in _LENGTHS]

#: Greedy, with the log-probabilities of the prompt's tokens and of the answer's.
PARAMS = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, "logprobs": 0, "prompt_logprobs": 0}


@frozen
class Answer:
    """What an engine answered to a prompt.

    Attributes:
        token_ids: The prompt's tokens and the answer's.
        logprobs: The log-probability of each of them but the first.
    """

    token_ids: list[int]
    logprobs: list[float]

    @classmethod
    def of(cls, prompt: Sequence[int], token_ids: Sequence[int], prompt_logprobs: Any, logprobs: Any) -> "Answer":
        """Return the answer from vLLM's own lists."""
        of_prompt = [step[token].logprob for step, token in zip(prompt_logprobs[1:], prompt[1:], strict=True)]
        of_answer = [step[token].logprob for step, token in zip(logprobs, token_ids, strict=True)]
        return cls([*prompt, *token_ids], [*of_prompt, *of_answer])


@frozen
class Distance:
    """How far answers are from the reference.

    Attributes:
        effect: The median change of a log-probability that the adapter makes, as PEFT computes it, in nats; for the
            base model, that of the adapter that changes least.
        error: The 95th percentile of the differences between the engine's log-probabilities and the reference's.
        largest: The largest of them.
    """

    effect: float
    error: float
    largest: float

    def __str__(self) -> str:
        return f"error {self.error:.1e} (largest {self.largest:.1e}), effect {self.effect:.2f}"


class Reference:
    """transformers + PEFT with the adapters of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, recipes: Sequence[Recipe] | None = None) -> None:
        self._checkpoint = checkpoint
        self._names = [recipe.name for recipe in (checkpoint.model.adapters if recipes is None else recipes)]
        self._models: dict[str | None, Any] = {}

    def distance(self, answers: Sequence[Answer], adapter: str | None) -> Distance:
        """Return how far these answers of one adapter, or of the base model, are from what PEFT computes."""
        expected = [self._logprobs(adapter, answer) for answer in answers]
        errors = sorted(
            abs(ours - theirs)
            for answer, row in zip(answers, expected, strict=True)
            for ours, theirs in zip(answer.logprobs, row, strict=True)
        )
        named = self._names if adapter is None else [adapter]
        effect = min((self._effect(answers, name) for name in named), default=0.0)
        return Distance(effect, errors[int(0.95 * len(errors))], errors[-1])

    def _effect(self, answers: Sequence[Answer], adapter: str) -> float:
        return statistics.median(
            abs(adapted - base)
            for answer in answers
            for adapted, base in zip(self._logprobs(adapter, answer), self._logprobs(None, answer), strict=True)
        )

    def _logprobs(self, adapter: str | None, answer: Answer) -> list[float]:
        if adapter not in self._models:
            network = reference.load(self._checkpoint.model.architecture, self._checkpoint.reference)
            if adapter is not None:
                network = reference.with_adapter(network, self._checkpoint.reference_adapters[adapter])
            self._models[adapter] = network
        return reference.logprobs(self._models[adapter], answer.token_ids)
