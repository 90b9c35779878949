"""On a GPU: what vLLM's CPU build does not run, adapters of experts above all, as tests/engine/test_models.py has it.

Both sides have the same weights, which bfloat16 can represent; vLLM computes in bfloat16 and PEFT in float32.
"""

from engine.test_models import (
    model_engines,
    pytest_generate_tests,
    served,
    test_an_adapter_answers_as_peft_computes,
    test_base_and_adapters_in_one_batch_are_right,
)
from models import catalog

MODELS = catalog.ON_GPU

__all__ = [
    "model_engines",
    "pytest_generate_tests",
    "served",
    "test_an_adapter_answers_as_peft_computes",
    "test_base_and_adapters_in_one_batch_are_right",
]
