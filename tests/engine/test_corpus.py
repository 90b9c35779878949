"""The corpus of adapters on the real vLLM: every served kind loads into one engine, and answers as PEFT computes."""

import logging
import re

import pytest
from corpus.all_entries import REFUSED, SERVED
from corpus.base import CONFIG
from models import checkpoints, text
from models.comparison import PARAMS, PROMPTS, Answer, Reference
from models.tiny import TinyModel

from engine.conftest import ENGINE_ARGS
from engine.test_models import SMALLEST_EFFECT, TOLERANCE
from qlora_infer import IncompatibleAdapterError, QuantizedLoRAEngine

#: Those that need no package to be made, and no weights of their own.
ENTRIES = [entry for entry in (*SERVED, *REFUSED) if not entry.needs and not entry.is_about_zeros]

MODEL = TinyModel("corpus", "LlamaForCausalLM", text.llama)

#: Kinds whose answers are compared, and the kind that PEFT reads instead where it does not read them as they are.
COMPARED = {
    **{
        name: name
        for name in ("plain", "all_linear", "peft_0_3", "unsloth", "ms_swift", "torchtune", "one_layer", "blended")
    },
    **{name: name for name in ("rank_64", "rslora", "embedding", "head", "half_trained", "excluded", "no_targets")},
    **{name: name for name in ("rank_patterns", "rank_of_each_layer", "llama_factory", "large_tokenizer")},
    **dict.fromkeys(
        ("compiled", "fsdp", "checkpointed", "data_parallel", "twice_prefixed", "not_prefixed", "named"), "plain"
    ),
    **dict.fromkeys(("float16", "float64", "hostile_pattern", "broken_pattern", "vision_too"), "plain"),
    "tinker": "head",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The corpus' model, and all adapters of the corpus that need no package to be made."""
    root = tmp_path_factory.mktemp("corpus")
    folders = {entry.name: root / "adapters" / entry.name for entry in ENTRIES}
    for entry in ENTRIES:
        folders[entry.name].mkdir(parents=True)
        entry.make(folders[entry.name])
    written = checkpoints.write(MODEL, root)
    return checkpoints.Checkpoint(MODEL, written.served, written.reference, folders, folders)


@pytest.fixture(scope="module")
def running(engines, checkpoint):
    engines.close()
    with QuantizedLoRAEngine(
        checkpoint.served,
        quantization="none",
        max_lora_rank=64,
        max_loras=4,
        max_model_len=64,
        engine_args={"dtype": "float32", "max_num_seqs": 32, "max_num_batched_tokens": 512, **ENGINE_ARGS},
    ) as running:
        yield running


def test_the_model_of_the_corpus_is_the_one_that_runs():
    """The sizes that the corpus writes by hand are those of transformers' config."""
    built = text.llama()
    assert all(getattr(built, name) == value for name, value in CONFIG.items() if name != "architectures")


def test_every_served_kind_loads_and_answers_as_peft_computes(running, checkpoint, caplog):
    """All are loaded side by side, with the warnings that the corpus has; compared ones have PEFT's log-probabilities."""
    served = [entry for entry in ENTRIES if entry.error is None]
    with caplog.at_level(logging.WARNING, logger="qlora_infer"):
        for entry in served:
            loaded = running.load_adapter(entry.name, checkpoint.served_adapters[entry.name])
            assert loaded.num_modules > 0
    own = [record.getMessage() for record in caplog.records if "says that it was trained on" not in record.getMessage()]
    expected = [part for entry in served for part in entry.warnings if "trained on" not in part]
    assert len(own) == len(expected)

    names = [name for name in COMPARED for _ in PROMPTS]
    prompts = [prompt for _ in COMPARED for prompt in PROMPTS]
    outputs = running.generate(prompts, PARAMS, adapter=names, use_tqdm=False)
    answers = {}
    for name, prompt, output in zip(names, prompts, outputs, strict=True):
        answer = Answer.of(prompt, output.token_ids, output.prompt_logprobs, output.logprobs)
        answers.setdefault(name, []).append(answer)
    reference = Reference(checkpoint, recipes=())
    far = {}
    for name, of_peft in COMPARED.items():
        distance = reference.distance(answers[name], of_peft)
        if distance.error >= TOLERANCE["float32"] * distance.effect or distance.effect < SMALLEST_EFFECT:
            far[name] = str(distance)
    assert far == {}


def without_examples(reason):
    """Leave out which of the model's modules a reason names; a running model lists more than a checkpoint."""
    return re.sub(r"the model has model\..*?, …\.", "the model has …", reason)


def test_every_refused_kind_is_refused_in_the_same_words(running, checkpoint):
    """The real vLLM's modules and tokens give the reasons that the corpus has; the engine goes on."""
    for entry in ENTRIES:
        if entry.error is IncompatibleAdapterError and "BASE" not in str(entry.says):
            with pytest.raises(IncompatibleAdapterError) as caught:
                running.load_adapter("refused", checkpoint.served_adapters[entry.name])
            assert [without_examples(says) for says in caught.value.reasons] == list(map(without_examples, entry.says))
    assert running.is_running
