"""Models of many architectures, served by the real vLLM and held against transformers + PEFT in float32.

An answer's error is measured by what its adapter changes: an adapter that is loaded and does nothing, or goes to the
wrong modules, is off by as much as its effect. ``nox -s models`` runs the models that are left out here, for time.
"""

import json

import pytest
from attrs import frozen
from models import catalog, checkpoints, quantized, verdicts
from models.checkpoints import Checkpoint
from models.comparison import PARAMS, PROMPTS, Answer, Reference
from typer.testing import CliRunner

from engine.conftest import ENGINE_ARGS as MACHINES
from qlora_infer import IncompatibleAdapterError, QLoRAInferError, QuantizedLoRAEngine
from qlora_infer.cli.app import app

MODELS = catalog.IN_CI

#: An effect below this, in nats, would not show that an adapter is applied.
SMALLEST_EFFECT = 0.1
#: The error that is allowed, in parts of the effect, by the dtype that the model is served in.
TOLERANCE = {"float32": 0.005, "bfloat16": 0.2}
#: The same where kernels round the inputs of layers to 8 bits, those of FP8 to 4 significant ones: the reference
#: does not, and has the same weights.
TOLERANCE_OF_8_BITS = 0.35
ENGINE_ARGS = {"max_num_seqs": 32, "max_num_batched_tokens": 512}


@frozen
class Served:
    """A model that runs, and what it is held against."""

    checkpoint: Checkpoint
    engine: QuantizedLoRAEngine
    reference: Reference

    def answers(self, adapters, prompts=PROMPTS):
        """Return what each adapter answers to each prompt, of all in one batch; adapter by adapter."""
        for adapter in set(adapters) - {None, *self.engine.adapters}:
            self.engine.load_adapter(adapter, self.checkpoint.served_adapters[adapter])
        jobs = [(prompt, adapter) for adapter in adapters for prompt in prompts]
        outputs = self.engine.generate(
            [prompt for prompt, _ in jobs], PARAMS, adapter=[adapter for _, adapter in jobs], use_tqdm=False
        )
        answers = [
            Answer.of(prompt, output.token_ids, output.prompt_logprobs, output.logprobs)
            for (prompt, _), output in zip(jobs, outputs, strict=True)
        ]
        return {
            adapter: answers[place * len(prompts) : (place + 1) * len(prompts)]
            for place, adapter in enumerate(adapters)
        }

    def assert_right(self, answers, adapter):
        """Assert that these answers are what PEFT computes, and are not the base model's."""
        model = self.checkpoint.model
        distance = self.reference.distance(answers, adapter)
        tolerance = TOLERANCE_OF_8_BITS if quantized.rounds_activations(model.quantization) else TOLERANCE[model.dtype]
        assert distance.effect > SMALLEST_EFFECT, f"{adapter}: {distance}"
        assert distance.error < tolerance * distance.effect, f"{adapter}: {distance}"
        return distance


def start(checkpoint, **engine_args):
    """Start an engine with a tiny model."""
    model = checkpoint.model
    return QuantizedLoRAEngine(
        checkpoint.served,
        quantization=quantized.strategy(model.quantization),
        max_lora_rank=32,
        max_loras=4,
        max_model_len=64,
        engine_args={"dtype": model.dtype, **ENGINE_ARGS, **MACHINES, **model.engine_args, **engine_args},
    )


class ModelEngines:
    """At most one running engine: asking for another model closes the one before."""

    def __init__(self, new_folder):
        self._new_folder = new_folder
        self._model = self._served = self._error = None

    def get(self, model):
        if self._model is not model:
            self.close()
            self._model = model
            try:
                checkpoint = checkpoints.write(model, self._new_folder("model"))
                self._served = Served(checkpoint, start(checkpoint), Reference(checkpoint))
            except Exception as error:
                self._error = error
        if self._error is not None:
            raise self._error  # without a start for each of its tests
        return self._served

    def close(self):
        if self._served is not None:
            self._served.engine.close()
        self._model = self._served = self._error = None


@pytest.fixture(scope="session")
def model_engines(engines, tmp_path_factory):
    engines.close()
    model_engines = ModelEngines(tmp_path_factory.mktemp)
    yield model_engines
    model_engines.close()


@pytest.fixture
def served(request, model_engines):
    """One model."""
    return model_engines.get(request.module.MODELS[request.param])


def pytest_generate_tests(metafunc):
    """One test for each model of the module's ``MODELS``, and for each of its adapters where a test takes one."""
    models = metafunc.module.MODELS.values()
    if "adapter" in metafunc.fixturenames:
        cells = [(model.name, name) for model in models if model.adapters for name in metafunc.function.names(model)]
        ids = [f"{model}-{adapter}" for model, adapter in cells]
        metafunc.parametrize(("served", "adapter"), cells, indirect=["served"], ids=ids)
    elif "served" in metafunc.fixturenames:
        metafunc.parametrize("served", [model.name for model in models if model.adapters], indirect=True)
    elif "refused" in metafunc.fixturenames:
        metafunc.parametrize("refused", [model.name for model in models if not model.adapters])


def of_each(recipes):
    """Run a test for these adapters of each model."""

    def decorate(test):
        test.names = lambda model: [recipe.name for recipe in recipes(model)]
        return test

    return decorate


@of_each(lambda model: model.adapters)
def test_an_adapter_answers_as_peft_computes(served, adapter, record_property):
    """The log-probabilities of prompts and answers with one adapter are PEFT's."""
    distance = served.assert_right(served.answers([adapter])[adapter], adapter)
    record_property("distance", str(distance))


def test_base_and_adapters_in_one_batch_are_right(served, record_property):
    """A batch of base requests and requests of all adapters: each has the answer that PEFT computes for it."""
    for adapter, answers in served.answers([None, *served.checkpoint.adapters]).items():
        record_property(str(adapter), str(served.assert_right(answers, adapter)))


@of_each(lambda model: (*model.refused, *model.refused_on_cpu))
def test_an_adapter_that_is_not_served_here_is_refused_in_words(served, adapter):
    """Modules that vLLM does not adapt are an error of the adapter, with reasons; the engine goes on."""
    with pytest.raises(IncompatibleAdapterError) as refusal:
        served.engine.load_adapter(adapter, served.checkpoint.served_adapters[adapter])
    assert refusal.value.reasons
    assert "architecture" not in str(refusal.value)  # it was trained on this very one
    served.assert_right(served.answers([None])[None], None)


def test_the_files_of_a_checkpoint_tell_the_modules_of_the_running_model(served):
    """What ``inspect-adapter --base`` reads of the base is what the engine lists: names, sizes, and what is not adapted."""
    assert verdicts.differences(served.engine._loader.model_modules, served.checkpoint.served) == []


@of_each(lambda model: (*model.adapters, *model.refused, *model.refused_on_cpu))
def test_inspect_adapter_and_the_engine_give_one_verdict(served, adapter):
    """``qlora-infer inspect-adapter --base``, which reads files only, says what the engine says, reason by reason."""
    running, folder = served.engine._loader.model_modules, served.checkpoint.served_adapters[adapter]
    options = ["--base", str(served.checkpoint.served), "--device", running.device, "--max-lora-rank", "32", "--json"]
    found = CliRunner().invoke(app, ["inspect-adapter", str(folder), *options])
    said = json.loads(found.output)
    assert (said["fit"] or tuple(said["reasons"])) == verdicts.verdict(
        folder, running, served.checkpoint.served, max_lora_rank=32
    )
    assert (found.exit_code == 0) == (adapter in served.checkpoint.adapters)


def test_a_model_that_vllm_has_without_lora_is_refused(refused, request, tmp_path, model_engines):
    """The engine does not start, and the error has vLLM's own reason."""
    model_engines.close()
    with pytest.raises(QLoRAInferError, match="does not support LoRA"):
        start(checkpoints.write(request.module.MODELS[refused], tmp_path))
