"""Which modules a base model has, read from its files without loading it."""

import json
import struct

import pytest

from qlora_infer.errors import ModelNotFoundError
from qlora_infer.model.checkpoint import modules_of_tensors, read_checkpoint
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
    assert sizes(modules_of_tensors(tensors(method), config).shapes) == {**TINY_MODEL, **EMBEDDINGS}


def test_a_config_tells_the_same(tmp_path):
    """Without headers, the modules of a Llama are read from its config.json, and are those of its headers."""
    found = read_checkpoint(str(write_model(tmp_path / "model")))
    assert found.modules.shapes == modules_of_tensors(tensors(), TINY_CONFIG).shapes
    assert "from its config.json alone" in found.checked


def test_embeddings_are_adapted_where_vllm_adapts_them():
    """A Mistral has the same linear layers, and no embeddings that vLLM would adapt."""
    config = {**TINY_CONFIG, "architectures": ["MistralForCausalLM"]}
    found = modules_of_tensors(tensors(), config)
    assert sizes(found.shapes) == dict(TINY_MODEL)
    assert found.unadapted == {"model.embed_tokens": "VocabParallelEmbedding", "lm_head": "ParallelLMHead"}


def test_a_checkpoint_of_compressed_tensors_is_read():
    """weight_packed has its inputs packed, eight to an int32; its scales tell how many, where they are in groups."""
    shapes = {"model.embed_tokens.weight": (1000, 64)}
    for name, (inputs, outputs) in TINY_MODEL.items():
        shapes[f"{name}.weight_packed"] = (outputs, inputs // 8)
        shapes[f"{name}.weight_scale"] = (outputs, inputs // 32)
        shapes[f"{name}.weight_shape"] = (2,)
    groups = {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}}
    quantization = {"quant_method": "compressed-tensors", "config_groups": groups}
    config = {**TINY_CONFIG, "quantization_config": quantization}
    assert sizes(modules_of_tensors(shapes, config).shapes) == {**TINY_MODEL, **EMBEDDINGS}
    for name in TINY_MODEL:
        del shapes[f"{name}.weight_scale"]
    assert sizes(modules_of_tensors(shapes, config).shapes) == {**TINY_MODEL, **EMBEDDINGS}


def test_a_checkpoint_of_torchao_is_read():
    """torchao writes a weight's numbers, scales and zeros as tensors of the layer."""
    shapes = {"model.embed_tokens.weight": (1000, 64)}
    for name, (inputs, outputs) in TINY_MODEL.items():
        shapes[f"{name}._weight_qdata"] = (outputs, inputs)
        shapes[f"{name}._weight_scale"] = shapes[f"{name}._weight_zero_point"] = (outputs, 1)
    config = {**TINY_CONFIG, "quantization_config": {"quant_method": "torchao"}}
    assert sizes(modules_of_tensors(shapes, config).shapes) == {**TINY_MODEL, **EMBEDDINGS}


MOE_CONFIG = {"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 64, "vocab_size": 1000, "num_hidden_layers": 1}
EXPERTS = {
    f"model.layers.0.mlp.experts.{expert}.{name}": sizes
    for expert in range(4)
    for name, sizes in {"gate_proj": (64, 32), "down_proj": (32, 64), "up_proj": (64, 32)}.items()
}


def test_experts_are_listed_one_by_one_whichever_form_the_checkpoint_has():
    """Qwen3-MoE's experts as modules of their own and as 3D tensors are the same modules; on a CPU vLLM adapts none."""
    by_name = {f"{name}.weight": (outputs, inputs) for name, (inputs, outputs) in EXPERTS.items()}
    stacked = {
        "model.layers.0.mlp.experts.gate_up_proj": (4, 64, 64),
        "model.layers.0.mlp.experts.down_proj": (4, 64, 32),
    }
    for shapes in (by_name, stacked):
        assert sizes(modules_of_tensors(shapes, MOE_CONFIG).shapes) == EXPERTS
        on_cpu = modules_of_tensors(shapes, MOE_CONFIG, "cpu")
        assert not on_cpu.shapes
        assert on_cpu.unadapted == {"model.layers.0.mlp.experts": "MoERunner"}


def test_experts_of_gpt_oss_are_listed_as_one_module_of_all():
    """Its MXFP4 blocks hold two numbers a byte; vLLM takes factors of all experts together."""
    shapes = {
        "model.layers.0.mlp.experts.gate_up_proj_blocks": (4, 64, 2, 16),
        "model.layers.0.mlp.experts.gate_up_proj_scales": (4, 64, 2),
        "model.layers.0.mlp.experts.down_proj_blocks": (4, 64, 1, 16),
        "model.layers.0.mlp.experts.down_proj_scales": (4, 64, 1),
    }
    found = modules_of_tensors(shapes, {**MOE_CONFIG, "architectures": ["GptOssForCausalLM"]}).shapes
    assert sizes(found) == {
        "model.layers.0.mlp.experts.base_layer": (64, 64),
        "model.layers.0.mlp.experts": (32, 64),
    }
    assert {shape.num_experts for shape in found.values()} == {4}


def test_a_multimodal_checkpoint_has_the_running_models_names():
    """Modules of the language model are renamed as vLLM does, those of the tower are left out."""
    shapes = {
        "model.language_model.layers.0.mlp.up_proj.weight": (128, 64),
        "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": (128, 64),
    }
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"num_hidden_layers": 1}}
    found = modules_of_tensors(shapes, config)
    assert sizes(found.shapes) == {"language_model.model.layers.0.mlp.up_proj": (64, 128)}
    assert found.is_left_out("model.vision_tower.vision_model.encoder.layers.0.mlp.fc1")


def test_a_module_that_vllm_takes_in_parts_is_listed_in_parts():
    """GLM-4's checkpoint has gate_up_proj, and vLLM takes factors of gate_proj and up_proj."""
    shapes = {"model.layers.0.mlp.gate_up_proj.weight": (256, 64)}
    found = modules_of_tensors(shapes, {"architectures": ["Glm4ForCausalLM"]})
    assert sizes(found.shapes) == {
        "model.layers.0.mlp.gate_proj": (64, 128),
        "model.layers.0.mlp.up_proj": (64, 128),
    }
    assert found.locate_parts("model.layers.0.mlp.gate_up_proj") == list(found.shapes)


def test_an_architecture_without_lora_is_refused(tmp_path):
    """vLLM's own reason is given, as the engine gives it, and nothing of the weights is read."""
    found = read_checkpoint(
        str(write_model(tmp_path / "model", {**TINY_CONFIG, "architectures": ["FalconForCausalLM"]}))
    )
    assert found.refusal == "vLLM has no LoRA for this model: FalconForCausalLM does not support LoRA yet."


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
    assert whole.checked == "names and shapes of 16 modules, from the headers of its safetensors files"
    (model / "b.safetensors").unlink()
    partly = read_checkpoint(str(model))
    assert partly.modules.shapes == whole.modules.shapes
    assert "from its config.json alone" in partly.checked


def packed_by_bitsandbytes(names):
    """Return the shapes of 4-bit weights as transformers saves them: one column, and a tensor of numbers."""
    return {f"{name}.weight": (4096, 1) for name in names} | {
        f"{name}.weight.quant_state.bitsandbytes__nf4": (80,) for name in names
    }


def test_packed_4_bit_weights_of_bitsandbytes_have_the_shapes_of_the_config(tmp_path):
    """Their headers tell names, and no shapes, and nobody guesses those that config.json does not tell either."""
    shapes = {"model.embed_tokens.weight": (1000, 64)} | packed_by_bitsandbytes(TINY_MODEL)
    found = read_checkpoint(str(write_model(tmp_path / "one", quantized("bitsandbytes"), shapes)))
    assert sizes(found.modules.shapes) == {**TINY_MODEL, **EMBEDDINGS}
    shapes |= packed_by_bitsandbytes(["model.layers.0.self_attn.qkv_proj"])
    with pytest.raises(ModelNotFoundError, match=r"the shape of model\.layers\.0\.self_attn\.qkv_proj"):
        read_checkpoint(str(write_model(tmp_path / "two", quantized("bitsandbytes"), shapes)))


def test_another_architecture_is_checked_by_its_headers_or_not_at_all(tmp_path):
    """With headers, what is left open is said; without, it is an error that says why."""
    config = {**TINY_CONFIG, "architectures": ["StrangeForCausalLM"]}
    found = read_checkpoint(str(write_model(tmp_path / "one", config, tensors())))
    assert found.checked.endswith(
        "vLLM may serve fewer modules of StrangeForCausalLM, or name them otherwise (not among those that were looked at)"
    )
    with pytest.raises(ModelNotFoundError, match=r"cannot be checked without loading it.*StrangeForCausalLM"):
        read_checkpoint(str(write_model(tmp_path / "two", config)))
