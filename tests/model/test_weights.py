"""The base model's tensors, found in its folder or the Hub's cache by the names that adapters have for its modules."""

import json

import pytest

np = pytest.importorskip("numpy")

from qlora_infer.errors import ModelNotFoundError  # noqa: E402
from qlora_infer.files.safetensors import write_tensors  # noqa: E402
from qlora_infer.model.weights import BaseWeights  # noqa: E402

EMBEDDINGS, HEAD, BIAS = np.arange(12, dtype="<f4").reshape(4, 3), np.ones((4, 3), "<f4"), np.zeros(3, "<f2")


def write(folder, config, **files):
    """Write a checkpoint; more than one file has an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    for file, tensors in files.items():
        write_tensors(folder / f"{file}.safetensors", tensors)
    if len(files) > 1:
        found = {name: f"{file}.safetensors" for file, tensors in files.items() for name in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": found}))
    return folder


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model."])
def test_a_module_is_found_by_its_name_behind_the_wrappers(prefix, tmp_path):
    """A multimodal checkpoint has other wrappers around its language model than an adapter."""
    tensors = {f"{prefix}embed_tokens.weight": EMBEDDINGS, f"{prefix}layers.0.self_attn.q_proj.bias": BIAS}
    base = BaseWeights(str(write(tmp_path / "m", {}, model=tensors)))
    for name in ("model.embed_tokens", "model.language_model.embed_tokens"):
        assert np.array_equal(base.tensor(name, "weight"), EMBEDDINGS)
    assert base.tensor("model.layers.0.self_attn.q_proj", "bias").dtype == "<f2"
    with pytest.raises(ModelNotFoundError, match="no tensor of that name"):
        base.tensor("model.norm", "weight")


def test_a_checkpoint_of_several_files_is_read_by_its_index(tmp_path):
    """Only the file that has the tensor is opened: of the other one there is nothing."""
    folder = write(tmp_path / "m", {}, one={"model.embed_tokens.weight": EMBEDDINGS}, two={"lm_head.weight": HEAD})
    (folder / "two.safetensors").unlink()
    base = BaseWeights(str(folder))
    assert np.array_equal(base.tensor("model.embed_tokens", "weight"), EMBEDDINGS)
    with pytest.raises(ModelNotFoundError, match="cannot be read"):
        base.tensor("lm_head", "weight")


@pytest.mark.parametrize(
    ("config", "has_head", "is_tied"),
    [
        ({"tie_word_embeddings": True}, True, True),
        ({"tie_word_embeddings": False}, False, False),
        ({"text_config": {"tie_word_embeddings": True}}, False, True),
        ({}, False, True),
        ({}, True, False),
    ],
    ids=str,
)
def test_an_output_layer_is_tied_as_the_config_says_or_else_the_file(config, has_head, is_tied, tmp_path):
    """A class's own default stands in no config; an output layer that is not tied has a tensor."""
    tensors = {"model.embed_tokens.weight": EMBEDDINGS, **({"lm_head.weight": HEAD} if has_head else {})}
    base = BaseWeights(str(write(tmp_path / "m", config, model=tensors)))
    assert base.ties_embeddings == is_tied
    if is_tied:
        assert np.array_equal(base.tensor("lm_head", "weight"), EMBEDDINGS)


def test_the_hubs_cache_is_read_and_nothing_is_downloaded(tmp_path, monkeypatch):
    """A model that vLLM has fetched is there; of another one the message has the command that fetches it."""
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    home, commit = tmp_path / "models--org--model", "a" * 40
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    write(home / "snapshots" / commit, {}, model={"model.embed_tokens.weight": EMBEDDINGS})
    assert np.array_equal(BaseWeights("org/model").tensor("model.embed_tokens", "weight"), EMBEDDINGS)
    with pytest.raises(ModelNotFoundError, match="hf download org/other"):
        BaseWeights("org/other").tensor("model.embed_tokens", "weight")
    with pytest.raises(ModelNotFoundError, match="hf download org/model --revision v2"):
        BaseWeights("org/model", revision="v2").tensor("model.embed_tokens", "weight")


def test_numbers_that_are_quantized_are_told(tmp_path):
    """GGUF files, and tensors that hold other numbers than floating-point ones."""
    folder = write(tmp_path / "m", {}, model={"model.embed_tokens.weight": EMBEDDINGS})
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))
    with pytest.raises(ModelNotFoundError, match="quantized"):
        BaseWeights(str(folder)).tensor("model.embed_tokens", "weight")
    for model in ("org/model-GGUF:Q4_K_M", str(tmp_path / "x.gguf")):
        with pytest.raises(ModelNotFoundError, match="GGUF"):
            BaseWeights(model).tensor("model.embed_tokens", "weight")


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 40], ids=["empty", "zeros", "garbage"])
def test_a_broken_checkpoint_is_an_error_in_words(content, tmp_path):
    """As everything that is read of a model."""
    folder = write(tmp_path / "m", {}, model={"model.embed_tokens.weight": EMBEDDINGS})
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelNotFoundError, match="cannot be read"):
        BaseWeights(str(folder)).tensor("model.embed_tokens", "weight")
