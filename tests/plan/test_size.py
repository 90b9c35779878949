"""The size of a model, and of an adapter for it, as its config.json tells it."""

import pytest

from qlora_infer.plan.size import adapter_bytes, weight_bytes

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def test_the_size_of_an_adapter_is_that_of_its_factors():
    """Rank 16 on all linear layers of Llama 3.1 8B is 41,943,040 numbers, as PEFT counts them."""
    assert adapter_bytes(LLAMA_8B, 16) == 2 * 41_943_040
    assert adapter_bytes({"text_config": LLAMA_8B}, 32) == 4 * 41_943_040
    assert adapter_bytes({"hidden_size": 7}, 16) is None


@pytest.mark.parametrize(
    ("says", "quantization", "bits"),
    [
        ({}, "none", 16),
        ({}, "fp8", 8),
        ({}, "bitsandbytes", 4),
        ({"quant_method": "awq", "w_bit": 4}, "awq", 4),
        ({"quant_method": "gptq", "bits": 8}, "gptq", 8),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "bitsandbytes", 8),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", 8),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 8}}}}, "any", 8),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt", 4),
        ({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}, "modelopt", 8),
        ({"quant_method": "mxfp4"}, "mxfp4", 4),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}, "torchao", 8),
        ({"quant_method": "gguf", "file": "org/model-GGUF:Q6_K"}, "gguf", 6),
    ],
)
def test_the_size_of_the_weights_follows_the_format(says, quantization, bits):
    """Memory is estimated by the bits that each format keeps of a weight, and embeddings by 16."""
    model_config = {**LLAMA_8B, "vocab_size": 128_256, **({"quantization_config": says} if says else {})}
    embeddings = 2 * 2 * 128_256 * 4096
    assert weight_bytes(model_config, quantization) == bits * 6_979_321_856 // 8 + embeddings
