"""How many adapters there is room for, chosen from the memory there is."""

import logging

import pytest

from qlora_infer.plan.room import adapter_bytes, weight_bytes
from qlora_infer.quantization import Platform
from qlora_infer.testing import TINY_MODEL, FakeEngine, fake_engine, write_adapter

GIB = 1 << 30
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


class Machine(FakeEngine):
    """A Llama of 8 billion parameters on a machine of some memory."""

    def __init__(self, device_memory, host_memory, **arguments):
        quantized = {"quantization_config": {"quant_method": "awq", "bits": 4}}
        super().__init__(model_config={"architectures": ["LlamaForCausalLM"], **quantized, **LLAMA_8B}, **arguments)
        self._memory = device_memory, host_memory

    def platform(self):
        return Platform("cuda", 90, frozenset({"vllm"}), *self._memory)


def chosen(backend, **arguments):
    with fake_engine(backend=backend, **arguments):
        return backend.engine_args["max_loras"], (backend.engine_args["max_cpu_loras"] - 1) // 2


def test_the_size_of_an_adapter_is_that_of_its_factors():
    """Rank 16 on all linear layers of Llama 3.1 8B is 41,943,040 numbers, as PEFT counts them."""
    assert adapter_bytes(LLAMA_8B, 16) == 2 * 41_943_040
    assert adapter_bytes({"text_config": LLAMA_8B}, 32) == 4 * 41_943_040
    assert adapter_bytes({"hidden_size": 7}, 16) is None


@pytest.mark.parametrize(
    ("device", "host", "arguments", "expected"),
    [
        (80 * GIB, 256 * GIB, {"max_lora_rank": 16}, (16, 819)),
        (24 * GIB, 16 * GIB, {"max_lora_rank": 64}, (3, 12)),
        (8 * GIB, 16 * GIB, {"max_lora_rank": 512}, (1, 4)),
        (80 * GIB, 256 * GIB, {"max_lora_rank": 16, "max_slot_bytes": 400 << 20}, (5, 819)),
        (80 * GIB, 256 * GIB, {"max_lora_rank": 16, "max_cpu_bytes": 1 * GIB}, (16, 1024)),
        (80 * GIB, 256 * GIB, {"max_lora_rank": 16, "max_cpu_loras": 3}, (3, 3)),
        (None, None, {}, (8, 32)),
    ],
)
def test_auto_chooses_from_the_memory(device, host, arguments, expected, caplog):
    """max_loras="auto" and max_cpu_loras="auto" fit adapters of max_lora_rank into the memory, and log the numbers."""
    with caplog.at_level(logging.INFO, "qlora_infer"):
        assert chosen(Machine(device, host), max_loras="auto", **arguments) == expected
    assert f"max_loras={expected[0]}: " in caplog.text


def test_numbers_that_are_given_are_taken(caplog):
    """What the caller says is not second-guessed."""
    assert chosen(Machine(8 * GIB, 8 * GIB), max_loras=32, max_cpu_loras=100, max_lora_rank=512) == (32, 100)


def test_bytes_bound_what_is_in_host_memory(tmp_path):
    """With max_cpu_bytes the adapters in host memory take no more than that, however many are registered."""
    backend = FakeEngine()
    size = sum(2 * 4 * (i + o) for i, o in TINY_MODEL.values()) * 2  # rank 4, float32
    with fake_engine(backend=backend, max_loras=1, max_cpu_bytes=3 * size) as engine:
        for seed in range(8):
            adapter = engine.load_adapter(f"a{seed}", write_adapter(tmp_path / str(seed), rank=4, seed=seed))
        assert adapter.num_bytes <= size
        engine.generate("x", adapter="a0")
        assert sum(engine.adapters[name].num_bytes for name in backend.resident) <= 3 * size
        assert "a0" in backend.resident


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
