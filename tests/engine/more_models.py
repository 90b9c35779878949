"""The models that tests/engine/test_models.py leaves out, for time: ``nox -s models``; a file that is named is collected."""

from models import catalog, checkpoints
from models.comparison import Reference

from engine.test_models import (
    Served,
    model_engines,
    pytest_generate_tests,
    served,
    start,
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


def test_towers_are_adapted_where_vllm_is_asked_to(model_engines, tmp_path):
    """With enable_tower_connector_lora, no module of an adapter is left out, and answers to text are PEFT's."""
    model_engines.close()
    checkpoint = checkpoints.write(catalog.BY_NAME["qwen2.5-vl"], tmp_path / "model")
    with start(checkpoint, enable_tower_connector_lora=True) as engine:
        loaded = engine.load_adapter(catalog.ALL.name, checkpoint.served_adapters[catalog.ALL.name])
        assert loaded.num_modules == loaded.num_model_modules
        served = Served(checkpoint, engine, Reference(checkpoint))
        for name, answers in served.answers([None, catalog.ALL.name]).items():
            served.assert_right(answers, name)
