"""Checkpoints that speak of their quantization elsewhere, or keep some layers in 16 bits, on the real vLLM."""

import json
import shutil

import attrs
import pytest
from models import checkpoints
from models.catalog import ATTENTION, BY_NAME
from models.comparison import PARAMS, PROMPTS, Answer, Reference
from safetensors.torch import load_file, save_file

from engine.conftest import ENGINE_ARGS
from engine.test_models import TOLERANCE, Served
from qlora_infer import QuantizedLoRAEngine

LIMITS = {"max_num_seqs": 16, "max_num_batched_tokens": 512, **ENGINE_ARGS}


def start(folder, dtype):
    return QuantizedLoRAEngine(
        folder, max_loras=4, max_lora_rank=32, max_model_len=64, engine_args={"dtype": dtype, **LIMITS}
    )


@pytest.mark.parametrize(("name", "file"), [("llama-awq", "quant_config.json"), ("qwen2-gptq", "quantize_config.json")])
def test_a_quantization_that_stands_beside_the_config_is_served(engines, tmp_path, name, file):
    """What "auto" finds in AutoAWQ's and AutoGPTQ's older files is served as PEFT computes it."""
    engines.close()
    model = BY_NAME[name]
    checkpoint = checkpoints.write(attrs.evolve(model, adapters=(ATTENTION,), refused=()), tmp_path / "model")
    config = json.loads((checkpoint.served / "config.json").read_text())
    says = config.pop("quantization_config")
    del says["quant_method"]
    (checkpoint.served / "config.json").write_text(json.dumps(config))
    (checkpoint.served / file).write_text(json.dumps(says))
    with start(checkpoint.served, model.dtype) as engine:
        served = Served(checkpoint, engine, Reference(checkpoint))
        served.assert_right(served.answers([ATTENTION.name])[ATTENTION.name], ATTENTION.name)


def test_layers_of_16_bits_stay_so_and_parts_of_a_module_do_not(engines, tmp_path, caplog):
    """In bitsandbytes, a layer kept in 16 bits is served so, and q of qkv is quantized after all, as a warning says."""
    engines.close()
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    whole, part = (
        ("model.layers.1.self_attn", "model.layers.1.mlp", "model.layers.0.mlp"),
        "model.layers.0.self_attn.q_proj",
    )
    checkpoint = checkpoints.write(attrs.evolve(BY_NAME["llama"], adapters=(ATTENTION,)), tmp_path / "model")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", *whole, part],
    )
    network = AutoModelForCausalLM.from_pretrained(checkpoint.served, dtype=torch.bfloat16, quantization_config=config)
    network.save_pretrained(tmp_path / "served")
    for file in checkpoint.served.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "served")
    with start(tmp_path / "served", "bfloat16") as engine:
        assert f"keeps {part} in 16 bits" in caplog.text
        outputs = engine.generate(PROMPTS, PARAMS, use_tqdm=False)
    answers = [
        Answer.of(prompt, output.token_ids, output.prompt_logprobs, output.logprobs)
        for prompt, output in zip(PROMPTS, outputs, strict=True)
    ]

    def error(name, *skipped):
        folder = in_16_bits(checkpoint.served, tmp_path / name, ("lm_head", "embed_tokens", "norm", *skipped))
        return Reference(attrs.evolve(checkpoint, reference=folder)).distance(answers, None).error

    quantized, kept, none = error("quantized", *whole), error("kept", *whole, part), error("none")
    assert quantized < TOLERANCE["bfloat16"], (quantized, kept, none)
    assert kept > 1.3 * quantized, (quantized, kept, none)
    assert none > 1.3 * quantized, (quantized, kept, none)


def in_16_bits(source, target, skipped):
    """Write a model whose weights went to nf4 and back, but for those with one of these in their names."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    shutil.copytree(source, target)
    weights = load_file(source / "model.safetensors")
    for name, weight in weights.items():
        if not any(part in name for part in skipped):
            weights[name] = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4")).to(weight.dtype).contiguous()
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target
