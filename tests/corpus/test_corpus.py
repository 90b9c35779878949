"""Every kind of adapter that people have: its verdict, its changes of weights, and ``inspect-adapter``'s words for it."""

import json
import logging
import re
import warnings

import numpy as np
import pytest
from typer.testing import CliRunner

from corpus import served_factors
from corpus.all_entries import CORPUS, REFUSED, SERVED
from corpus.base import MODULES, TOKENS, write_base
from qlora_infer.cli.app import app
from qlora_infer.errors import AdapterError, IncompatibleAdapterError
from qlora_infer.testing import FakeEngine, fake_engine

MAX_RANK = 64
OF_PEFT = [entry for entry in SERVED if entry.is_read_by_peft]
each = pytest.mark.parametrize("entry", CORPUS, ids=str)


class Backend(FakeEngine):
    """An engine of the corpus' model, with its tokens."""

    def __init__(self):
        super().__init__(modules=MODULES)

    def vocabulary(self):
        return TOKENS


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The model's folder."""
    return write_base(tmp_path_factory.mktemp("org") / "base")


@pytest.fixture(scope="module")
def engine(base):
    with fake_engine(str(base), backend=Backend(), max_lora_rank=MAX_RANK) as engine:
        yield engine


def make(entry, folder):
    """Make an entry's adapter, where the packages for that are installed."""
    for package in entry.needs:
        pytest.importorskip(package)
    folder.mkdir()
    return entry.make(folder)


def said(error, folder, base):
    """Return an error's reasons, or its message."""
    words = error.reasons if isinstance(error, IncompatibleAdapterError) else [str(error)]
    return tuple(general(text, folder, base) for text in words)


def general(text, folder, base):
    """Return a message without the names of folders."""
    return text.replace(str(folder), "FOLDER").replace(str(base), "BASE")


def test_the_corpus_has_every_kind_once():
    """At least sixty kinds, each with a name of its own, words for it, where it comes from, and a way out."""
    assert len({entry.name for entry in CORPUS}) == len(CORPUS) >= 60
    assert len({(entry.kind, entry.origin) for entry in CORPUS}) == len(CORPUS)
    assert all(entry.says and entry.way_out for entry in REFUSED)


@each
def test_the_verdict(entry, engine, base, tmp_path, caplog):
    """It is served with the warnings that it deserves, or refused by the error and the sentences of its fault."""
    folder = tmp_path / "adapter"
    make(entry, folder)
    with caplog.at_level(logging.WARNING, logger="qlora_infer"):
        if entry.error is not None:
            with pytest.raises(AdapterError) as caught:
                engine.load_adapter("it", folder)
            assert (type(caught.value), said(caught.value, folder, base)) == (entry.error, entry.says)
            assert "it" not in engine.adapters
            return
        engine.load_adapter("it", folder)
        engine.unload_adapter("it")
    heard = [record.getMessage() for record in caplog.records if record.name == "qlora_infer"]
    assert len(heard) == len(entry.warnings)
    assert all(re.search(part, message) for part, message in zip(entry.warnings, heard, strict=True))


@pytest.mark.parametrize("entry", SERVED, ids=str)
def test_vllm_gets_the_change_that_the_adapter_stands_for(entry, engine, tmp_path):
    """Factors and scales of the copy for vLLM multiply to the expected change, module by module."""
    expected = make(entry, tmp_path / "adapter")
    engine.load_adapter("it", tmp_path / "adapter")
    found = served_factors.deltas(engine._registry.current("it").path)
    engine.unload_adapter("it")
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        np.testing.assert_allclose(found[name], delta, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("entry", OF_PEFT, ids=str)
def test_peft_stands_for_the_same_change(entry, tmp_path):
    """PEFT's get_delta_weight gives the expected change, of every adapter that PEFT reads as it is."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from corpus.by_peft import network

    expected = make(entry, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(network(), tmp_path / "adapter")
    try:
        found = {
            name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
            for name, module in model.named_modules()
            if isinstance(module, peft.tuners.lora.LoraLayer)
        }
    finally:
        model.unload()
    for name in expected.keys() | found.keys():
        zeros = np.zeros(1)  # a module that PEFT adapts and the file says nothing of changes nothing
        of_peft = found[name].to(torch.float64).numpy()
        np.testing.assert_allclose(of_peft, expected.get(name, zeros) + 0 * of_peft, rtol=1e-5, atol=1e-6)


@each
def test_inspect_adapter_and_the_engine_give_one_verdict(entry, base, engine, tmp_path):
    """With ``--base`` it ends with 0 where the engine serves, and has the same words where the engine refuses."""
    folder = tmp_path / "adapter"
    make(entry, folder)
    code, found, message = inspect(folder, "--base", str(base), "--device", "cpu", "--max-lora-rank", str(MAX_RANK))
    if entry.error is None:
        loaded = engine.load_adapter("it", folder)
        left_out = engine._registry.current("it").extras.left_out
        assert (code, found["reasons"], found["digest"], found["left_out"]) == (0, [], loaded.digest, left_out)
        assert found["changes_nothing"] == ("changes nothing" in str(entry.warnings))
        engine.unload_adapter("it")
    elif entry.error is IncompatibleAdapterError:
        assert (code, tuple(general(text, folder, base) for text in found["reasons"])) == (1, entry.says)
    else:
        assert (code, general(message, folder, base)) == (2, f"error: {entry.says[0]}\n")


@each
def test_without_a_base_inspect_adapter_refuses_what_no_engine_serves(entry, tmp_path):
    """It ends with 0 only where some model may serve the adapter."""
    folder = tmp_path / "adapter"
    make(entry, folder)
    code, found, _ = inspect(folder)
    refused = entry.error is not None and entry.is_refused_alone
    expected = 0 if not refused else 1 if entry.error is IncompatibleAdapterError else 2
    assert code == expected
    if code == 1:
        assert set(found["reasons"]) <= set(entry.says)


def inspect(*arguments):
    """Run the command; its exit code, what it printed as JSON, and its error."""
    found = CliRunner().invoke(app, ["inspect-adapter", *map(str, arguments), "--json"])
    return found.exit_code, json.loads(found.stdout) if found.stdout else None, found.stderr


def test_inspect_adapter_shows_how_an_adapter_was_trained(tmp_path):
    """Task, class, tools and PEFT's version, from the config and a model card."""
    shown = {}
    for entry in CORPUS:
        if entry.name in ("unsloth", "llama_factory", "whisper"):
            make(entry, tmp_path / entry.name)
            _, found, _ = inspect(tmp_path / entry.name)
            names = ("task", "training_class", "tools", "peft_version")
            shown[entry.name] = [found[name] for name in names]
    whisper = "WhisperForConditionalGeneration of transformers.models.whisper.modeling_whisper"
    assert shown == {
        "unsloth": ["", "LlamaForCausalLM of transformers.models.llama.modeling_llama", ["TRL", "Unsloth"], "0.21.2"],
        "llama_factory": ["CAUSAL_LM", "", ["LLaMA-Factory"], "0.21.2"],
        "whisper": ["", whisper, [], "0.21.2"],
    }
    lines = CliRunner().invoke(app, ["inspect-adapter", str(tmp_path / "unsloth")]).stdout.splitlines()
    assert "class       LlamaForCausalLM of transformers.models.llama.modeling_llama" in lines
    assert "saved by    TRL, Unsloth, PEFT 0.21.2" in lines


def test_peft_has_every_task_that_is_named():
    """The tasks whose models give no text are PEFT's own."""
    pytest.importorskip("peft")
    from peft.utils.peft_types import TaskType

    from qlora_infer.files.features import _TASKS

    assert set(TaskType.__members__) >= set(_TASKS)
