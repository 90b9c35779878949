"""Which modules a base model has, read from its files without loading it."""

import json
import struct

import pytest

from qlora_infer.adapters.checkpoint import modules_of_config, modules_of_tensors, read_checkpoint
from qlora_infer.errors import ModelNotFoundError
from qlora_infer.testing import TINY_MODEL

#: The config of the fake engine's model.
TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 1000,
}
EMBEDDINGS = {"model.embed_tokens": (1000, 64), "lm_head": (64, 1000)}


def quantized(method):
    return {**TINY_CONFIG, "quantization_config": {"quant_method": method, "bits": 4}}


def tensors(method=None):
    """The shapes that a checkpoint of the tiny model has, as AutoAWQ, GPTQModel and transformers write them."""
    shapes = {"model.embed_tokens.weight": (1000, 64), "model.norm.weight": (64,)}
    for name, (inputs, outputs) in TINY_MODEL.items():
        if method is None:
            shapes[f"{name}.weight"] = (outputs, inputs)
            continue
        shapes[f"{name}.qweight"] = (inputs, outputs // 8) if method == "awq" else (inputs // 8, outputs)
        shapes[f"{name}.scales"] = (1, outputs)
        shapes[f"{name}.qzeros"] = (1, outputs // 8)
        if method == "gptq":
            shapes[f"{name}.g_idx"] = (inputs,)
    return shapes


def write_safetensors(path, shapes):
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(end))


def write_model(folder, config=TINY_CONFIG, shapes=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shapes:
        write_safetensors(folder / "model.safetensors", shapes)
    return folder


def sizes(modules):
    return {name: (shape.in_features, shape.out_features) for name, shape in modules.items()}


@pytest.mark.parametrize("method", [None, "awq", "gptq"])
def test_headers_tell_of_every_module(method):
    """Unquantized, AWQ and GPTQ checkpoints of one model have the same modules, with the tied output layer."""
    config = quantized(method) if method else TINY_CONFIG
    assert sizes(modules_of_tensors(tensors(method), config)) == {**TINY_MODEL, **EMBEDDINGS}


def test_a_config_tells_the_same():
    """What config.json says of a Llama is what its headers say."""
    assert modules_of_config(TINY_CONFIG) == modules_of_tensors(tensors(), TINY_CONFIG)


def test_embeddings_are_adapted_where_vllm_adapts_them():
    """A Mistral has the same linear layers, and no embeddings that vLLM would adapt."""
    config = {**TINY_CONFIG, "architectures": ["MistralForCausalLM"]}
    assert sizes(modules_of_tensors(tensors(), config)) == sizes(modules_of_config(config)) == dict(TINY_MODEL)


def test_a_split_checkpoint_is_read_whole(tmp_path):
    """All files that the index names are read; while one is missing, config.json tells instead, and this is said."""
    model = write_model(tmp_path / "model")
    shapes = list(tensors().items())
    write_safetensors(model / "a.safetensors", dict(shapes[:5]))
    write_safetensors(model / "b.safetensors", dict(shapes[5:]))
    weight_map = {name: "a.safetensors" if i < 5 else "b.safetensors" for i, (name, _) in enumerate(shapes)}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    whole = read_checkpoint(str(model))
    assert sizes(whole.modules.shapes) == {**TINY_MODEL, **EMBEDDINGS}
    assert whole.checked == (
        "names and shapes of 16 modules, from the headers of its safetensors files; its tokenizer was not looked at"
    )
    (model / "b.safetensors").unlink()
    partly = read_checkpoint(str(model))
    assert partly.modules.shapes == whole.modules.shapes
    assert "from its config.json alone" in partly.checked


def test_packed_4_bit_weights_of_bitsandbytes_are_read_from_the_config(tmp_path):
    """Their headers do not tell shapes, and nobody guesses them."""
    shapes = {"model.layers.0.mlp.up_proj.weight": (4096, 1)}
    shapes["model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"] = (80,)
    found = read_checkpoint(str(write_model(tmp_path / "model", quantized("bitsandbytes"), shapes)))
    assert sizes(found.modules.shapes) == {**TINY_MODEL, **EMBEDDINGS}
    assert "from its config.json alone" in found.checked


def test_another_architecture_is_checked_by_its_headers_or_not_at_all(tmp_path):
    """With headers, what is left open is said; without, it is an error that says why."""
    config = {**TINY_CONFIG, "architectures": ["StrangeForCausalLM"]}
    found = read_checkpoint(str(write_model(tmp_path / "one", config, tensors())))
    assert found.checked.endswith("vLLM may serve fewer modules of StrangeForCausalLM, or name them otherwise")
    with pytest.raises(ModelNotFoundError, match=r"cannot be checked without loading it.*StrangeForCausalLM"):
        read_checkpoint(str(write_model(tmp_path / "two", config)))
