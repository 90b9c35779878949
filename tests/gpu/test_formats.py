"""On a GPU: today's formats of checkpoints, each a tiny model with adapters, held against transformers + PEFT in float32.

Both sides have the same weights. vLLM computes in bfloat16 and, in FP8 and int8, rounds the inputs of each layer to 8
bits as it runs, which the reference does not: there an error is allowed to be a third of what the adapter changes
(``TOLERANCE_OF_8_BITS``), and elsewhere a fifth. An adapter that does nothing, or twice too much, is off by all of it.
"""

import pytest
from engine import test_answers
from engine.conftest import ENGINE_ARGS
from engine.test_models import (
    TOLERANCE,
    model_engines,
    pytest_generate_tests,
    served,
    test_an_adapter_answers_as_peft_computes,
    test_base_and_adapters_in_one_batch_are_right,
)
from models import catalog
from models.comparison import PROMPTS

from qlora_infer import QuantizedLoRAEngine
from qlora_infer.demo import demo_adapters, demo_model

MODELS = catalog.FORMATS_ON_GPU

__all__ = [
    "model_engines",
    "pytest_generate_tests",
    "served",
    "test_an_adapter_answers_as_peft_computes",
    "test_base_and_adapters_in_one_batch_are_right",
]


def test_a_batch_of_everything_gives_what_each_gives_alone(served, record_property):
    """Each prompt of base and adapters has the log-probabilities in a mixed batch that it has alone.

    They are compared as far as the texts are the same, and differ by less than a fifth of what the adapter changes:
    steps of other sizes are computed by other kernels, in another order of sums.
    """
    adapters = [None, *served.checkpoint.adapters]
    mixed = served.answers(adapters)
    for adapter in adapters:
        alone = [served.answers([adapter], [prompt])[adapter][0] for prompt in PROMPTS]
        differences = sorted(
            abs(a - b)
            for one, other in zip(alone, mixed[adapter], strict=True)
            for a, b in zip(one.logprobs[: common(one, other)], other.logprobs)
        )
        largest, effect = differences[int(0.95 * len(differences))], served.reference.distance(alone, adapter).effect
        record_property(str(adapter), f"{largest:.1e} of {effect:.2f}")
        assert largest < TOLERANCE["bfloat16"] * effect, f"{adapter}: {largest:.1e} of {effect:.2f}"


def common(one, other):
    """Return how many log-probabilities are those of the same tokens after the same ones."""
    same = [a == b for a, b in zip(one.token_ids, other.token_ids, strict=True)]
    return (same.index(False) if False in same else len(same)) - 1


@pytest.mark.parametrize("quantization", ["fp8", "none"])
def test_a_model_of_16_bits_keeps_its_habits(engines, quantization):
    """The demo model in 16 bits, cast to FP8 as it loads and as it is: base and adapters answer in their own ways."""
    engines.close()
    with QuantizedLoRAEngine(
        demo_model("none"),
        quantization=quantization,
        adapters=demo_adapters(),
        max_loras=4,
        max_lora_rank=64,
        max_model_len=512,
        engine_args=ENGINE_ARGS,
    ) as engine:
        test_answers.test_each_adapter_shows_its_habit_in_one_batch(engine)
