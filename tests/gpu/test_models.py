"""On a GPU: what vLLM's CPU build does not run, adapters of experts above all, as tests/engine/test_models.py has it.

Both sides have the same weights, which bfloat16 can represent; vLLM computes in bfloat16 and PEFT in float32.
"""

import pytest
from engine.test_models import (
    Served,
    model_engines,
    pytest_generate_tests,
    served,
    start,
    test_an_adapter_answers_as_peft_computes,
    test_base_and_adapters_in_one_batch_are_right,
)
from models import catalog, checkpoints
from models.comparison import Reference

MODELS = catalog.ON_GPU

__all__ = [
    "model_engines",
    "pytest_generate_tests",
    "served",
    "test_an_adapter_answers_as_peft_computes",
    "test_base_and_adapters_in_one_batch_are_right",
]


@pytest.mark.two_gpus
@pytest.mark.parametrize("name", ["phi3", "internlm2"])
def test_two_gpus_serve_fused_modules(model_engines, name, tmp_path):
    """With tensor_parallel_size=2, factors of modules that are fused in the checkpoint are split as their parts are."""
    model_engines.close()
    checkpoint = checkpoints.write(catalog.for_gpu(catalog.BY_NAME[name]), tmp_path)
    with start(checkpoint, tensor_parallel_size=2) as engine:
        for adapter, folder in checkpoint.served_adapters.items():
            engine.load_adapter(adapter, folder)
        on_two = Served(checkpoint, engine, Reference(checkpoint))
        for adapter, answers in on_two.answers([None, *checkpoint.adapters]).items():
            on_two.assert_right(answers, adapter)
