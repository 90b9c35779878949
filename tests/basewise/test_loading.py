"""Adapters that are converted with the base model, in an engine: loaded, evicted from disk, blended, started with."""

import json
import logging
import shutil

import pytest

np = pytest.importorskip("numpy")

from attrs import evolve  # noqa: E402

from qlora_infer import AdapterLoadError, BlendSource, IncompatibleAdapterError  # noqa: E402
from qlora_infer.files.manifest import read_manifest  # noqa: E402
from qlora_infer.files.peft_config import scaling  # noqa: E402
from qlora_infer.files.safetensors import as_floats, map_tensors, write_tensors  # noqa: E402
from qlora_infer.model.weights import BaseWeights  # noqa: E402
from qlora_infer.testing import TINY_MODEL, FakeEngine, fake_engine, write_adapter  # noqa: E402

VOCABULARY, HIDDEN = 96, 64
WEIGHTS = "adapter_model.safetensors"
DELTA = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
MODULES = {**TINY_MODEL, "model.embed_tokens": (VOCABULARY, HIDDEN), "lm_head": (HIDDEN, VOCABULARY)}
EMBEDDINGS = np.random.default_rng(0).standard_normal((VOCABULARY, HIDDEN)).astype("<f4")


@pytest.fixture
def base(tmp_path):
    """A checkpoint with tied embeddings."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    write_tensors(folder / "model.safetensors", {"model.embed_tokens.weight": EMBEDDINGS})
    return folder


def engine_of(base, **arguments):
    return fake_engine(str(base), backend=FakeEngine(modules=MODULES), max_lora_rank=16, **arguments)


def with_tensors(folder, tensors, **fields):
    """Write an adapter with tensors beside its factors."""
    write_adapter(folder, modules=TINY_MODEL, **fields)
    found = {name: np.array(tensor) for name, tensor in map_tensors("a", folder / WEIGHTS).items()}
    write_tensors(folder / WEIGHTS, {**found, **tensors})
    return folder


@pytest.fixture
def tokens(tmp_path):
    """An adapter with rows of two tokens, of which one is the base model's."""
    rows = EMBEDDINGS[[5, 70]].copy()
    rows[1] += 1
    return with_tensors(tmp_path / "tokens", {DELTA: rows}, trainable_token_indices=[5, 70])


def test_the_log_says_what_was_converted(base, tokens, caplog):
    """And the adapter's record counts the modules that it changes now."""
    with caplog.at_level(logging.INFO), engine_of(base) as engine:
        loaded = engine.load_adapter("tokens", tokens)
    assert loaded.num_modules == len(TINY_MODEL) + 2
    assert "1 rows of model.embed_tokens, 1 rows of lm_head" in caplog.text


def test_a_copy_that_left_the_disk_is_converted_again(base, tokens):
    """As long as the base model's files are there; without them the error says so, and nothing else is disturbed."""
    with engine_of(base, adapters={"tokens": str(tokens)}) as engine:
        version, store = engine._registry.current("tokens"), engine._registry._store
        first = version.path.joinpath(WEIGHTS).read_bytes()
        shutil.rmtree(version.snapshot.folder)
        assert store.restore(version)
        assert version.path.joinpath(WEIGHTS).read_bytes() == first
        version.fit = evolve(version.fit, conversion=evolve(version.fit.conversion, base=BaseWeights("org/gone")))
        shutil.rmtree(version.snapshot.folder)
        with pytest.raises(AdapterLoadError, match="could not be converted: the weights of org/gone"):
            store.restore(version)


def product(folder, module):
    """Return a module's B A times its scaling, of an adapter's files; 0 where it has none."""
    manifest = read_manifest("a", folder)
    if module not in manifest.modules:
        return np.zeros(())
    tensors = map_tensors("a", folder / WEIGHTS)
    a, b = (next(tensors[f"base_model.model.{module}.lora_{name}"] for name in names if f"base_model.model.{module}.lora_{name}" in tensors)
            for names in (("A.weight", "embedding_A"), ("B.weight", "embedding_B")))  # fmt: skip
    a, b = (as_floats(factor).astype("<f8") for factor in (a, b))
    return b @ a * scaling(manifest.config, module, len(a))


def write_vera(folder):
    """Write a VeRA adapter of the tiny model."""
    folder.mkdir()
    drawn = np.random.default_rng(1).standard_normal
    tensors = {"base_model.vera_A": drawn((8, 128)).astype("<f4"), "base_model.vera_B": drawn((128, 8)).astype("<f4")}
    for name, (_, outputs) in TINY_MODEL.items():
        tensors[f"base_model.model.{name}.vera_lambda_b"] = drawn(outputs).astype("<f4")
        tensors[f"base_model.model.{name}.vera_lambda_d"] = drawn(8).astype("<f4")
    write_tensors(folder / WEIGHTS, tensors)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "VERA", "r": 8, "save_projection": True}))
    return folder


def test_a_converted_adapter_is_blended_as_the_lora_that_it_becomes(base, tokens, tmp_path):
    """Rows of tokens, VeRA and plain LoRA: the blend is the weighted sum of what is served of each, and nothing is left over."""
    pytest.importorskip("torch")
    sources = {"tokens": tokens, "vera": write_vera(tmp_path / "vera"), "plain": write_adapter(tmp_path / "plain")}
    weights = {"tokens": 0.5, "vera": -0.25, "plain": 2.0}
    with fake_engine(str(base), backend=FakeEngine(modules=MODULES), max_lora_rank=32) as engine:
        for name, folder in sources.items():
            engine.load_adapter(name, folder)
        assert engine.load_adapter("all", BlendSource(weights)).num_modules == len(MODULES)
        path = {name: engine._registry.current(name).path for name in (*sources, "all")}
        for module in MODULES:
            expected = sum(weight * product(path[name], module) for name, weight in weights.items())
            np.testing.assert_allclose(product(path["all"], module), expected, rtol=1e-4, atol=1e-5)
        folders = [other for other in engine._registry._store._folder.iterdir() if not other.name.isdigit()]
        assert folders == []


def test_an_adapter_with_biases_is_not_blended(base, tmp_path):
    """Its biases would be lost."""
    pytest.importorskip("torch")
    module, (_, outputs) = next(iter(TINY_MODEL.items()))
    bias = {f"base_model.model.{module}.lora_B.bias": np.ones(outputs, "<f4")}
    odd = with_tensors(tmp_path / "odd", bias, lora_bias=True)
    with engine_of(base, adapters={"odd": str(odd), "plain": write_adapter(tmp_path / "plain")}) as engine:
        with pytest.raises(IncompatibleAdapterError, match="biases, which no sum of factors can hold"):
            engine.load_adapter("both", BlendSource({"odd": 0.5, "plain": 0.5}))
        assert set(engine.adapters) == {"odd", "plain"}


def test_a_base_model_that_is_not_on_this_machine_is_told(tokens, monkeypatch, tmp_path):
    """Without its rows nothing is served in their place."""
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    backend, words = FakeEngine(modules=MODULES), "hf download org/model"
    with fake_engine("org/model", backend=backend) as engine, pytest.raises(IncompatibleAdapterError, match=words):
        engine.load_adapter("tokens", tokens)


def test_max_lora_rank_auto_makes_room_for_the_tokens(base, tmp_path):
    """An adapter that an engine starts with counts with each of its tokens."""
    adapter = with_tensors(
        tmp_path / "a", {DELTA: np.zeros((20, HIDDEN), "<f4")}, trainable_token_indices=list(range(20))
    )
    with fake_engine(str(base), backend=FakeEngine(modules=MODULES), adapters={"a": str(adapter)}) as engine:
        assert engine.adapters["a"].rank == 20
        assert engine._loader.max_lora_rank == 32


def test_the_memory_of_a_converted_adapter_is_that_of_its_factors(base, tmp_path):
    """VeRA's file is small; what vLLM reads of it is not."""
    rank, outputs = 16, {name: sizes[1] for name, sizes in TINY_MODEL.items()}
    folder = tmp_path / "vera"
    folder.mkdir()
    tensors = {"base_model.vera_A": np.ones((rank, 128), "<f4"), "base_model.vera_B": np.ones((128, rank), "<f4")}
    for name, size in outputs.items():
        tensors[f"base_model.model.{name}.vera_lambda_b"] = np.ones(size, "<f4")
        tensors[f"base_model.model.{name}.vera_lambda_d"] = np.ones(rank, "<f4")
    write_tensors(folder / WEIGHTS, tensors)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "VERA", "r": rank, "save_projection": True}))
    with engine_of(base) as engine:
        loaded = engine.load_adapter("vera", folder)
        assert loaded.rank == rank
        assert loaded.num_bytes > 4 * rank * sum(map(sum, TINY_MODEL.values()))
