"""The models that tests/engine/test_models.py leaves out, for time: ``nox -s models``; a file that is named is collected."""

from models import catalog

from engine.test_models import (
    model_engines,
    pytest_generate_tests,
    served,
    test_a_model_that_vllm_has_without_lora_is_refused,
    test_an_adapter_answers_as_peft_computes,
    test_an_adapter_that_is_not_served_here_is_refused_in_words,
    test_base_and_adapters_in_one_batch_are_right,
    test_inspect_adapter_and_the_engine_give_one_verdict,
    test_the_files_of_a_checkpoint_tell_the_modules_of_the_running_model,
)

MODELS = catalog.OUT_OF_CI

__all__ = [
    "model_engines",
    "pytest_generate_tests",
    "served",
    "test_a_model_that_vllm_has_without_lora_is_refused",
    "test_an_adapter_answers_as_peft_computes",
    "test_an_adapter_that_is_not_served_here_is_refused_in_words",
    "test_base_and_adapters_in_one_batch_are_right",
    "test_inspect_adapter_and_the_engine_give_one_verdict",
    "test_the_files_of_a_checkpoint_tell_the_modules_of_the_running_model",
]
