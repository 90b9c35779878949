"""Adapters that are converted with the base model, in an engine: loaded, evicted from disk, blended, started with."""

import json
import logging
import shutil

import pytest

np = pytest.importorskip("numpy")

from attrs import evolve  # noqa: E402

from qlora_infer import AdapterLoadError, BlendSource, IncompatibleAdapterError  # noqa: E402
from qlora_infer.files.safetensors import map_tensors, write_tensors  # noqa: E402
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


def test_a_converted_adapter_is_not_blended(base, tokens, tmp_path):
    """Its rows would be lost."""
    pytest.importorskip("torch")
    with engine_of(base, adapters={"tokens": str(tokens), "plain": write_adapter(tmp_path / "plain")}) as engine:
        with pytest.raises(IncompatibleAdapterError, match="together with the base model"):
            engine.load_adapter("both", BlendSource({"tokens": 0.5, "plain": 0.5}))
        assert set(engine.adapters) == {"tokens", "plain"}


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
