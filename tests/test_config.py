"""What is refused at the door, before anything is downloaded or started."""

import pytest

from qlora_infer.config import OWN_ENGINE_ARGS, EngineConfig

VALID = {
    "model": "org/model",
    "quantization": "auto",
    "max_loras": 8,
    "max_slot_bytes": None,
    "max_lora_rank": "auto",
    "max_cpu_loras": 32,
    "max_cpu_bytes": None,
    "max_disk_bytes": None,
    "max_model_len": None,
    "enforce_eager": False,
    "startup": "fast",
    "lora_kernels": "auto",
    "revision": None,
    "token": None,
    "engine_args": {},
    "policy": "fair",
    "max_waiting": None,
    "restart": "never",
}


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("model", "", ValueError),
        ("model", 7, TypeError),
        ("max_loras", 0, ValueError),
        ("max_loras", True, TypeError),
        ("max_loras", "8", ValueError),
        ("max_slot_bytes", 0, ValueError),
        ("max_slot_bytes", 1 << 30, ValueError),
        ("max_lora_rank", 24, ValueError),
        ("policy", "random", ValueError),
        ("max_waiting", 0, ValueError),
        ("max_cpu_bytes", 0, ValueError),
        ("max_disk_bytes", 0, ValueError),
        ("max_waiting", "many", TypeError),
        ("restart", "always", ValueError),
        ("max_cpu_loras", 4, ValueError),
        ("max_cpu_loras", "many", ValueError),
        ("max_model_len", -1, ValueError),
        ("enforce_eager", "yes", TypeError),
        ("startup", "slow", ValueError),
        ("lora_kernels", "mine", ValueError),
    ],
)
def test_a_wrong_argument_is_refused_by_its_name(argument, value, error):
    """A value out of range is an error that names the argument."""
    with pytest.raises(error, match=argument):
        EngineConfig(**{**VALID, argument: value})


@pytest.mark.parametrize("key", sorted(OWN_ENGINE_ARGS))
def test_engine_args_may_not_say_what_an_argument_says(key):
    """What has a parameter of its own, or is this library's, is refused in engine_args with the parameter's name."""
    with pytest.raises(ValueError, match=key):
        EngineConfig(**{**VALID, "engine_args": {key: "anything"}})


def test_engine_args_may_not_contradict_the_strategy():
    """A key that the strategy sets to another value is refused; the same value is not."""
    config = EngineConfig(**{**VALID, "engine_args": {"dtype": "float16"}})
    with pytest.raises(ValueError, match="dtype"):
        config.vllm_args({"dtype": "bfloat16"}, max_lora_rank=16)
    assert config.vllm_args({"dtype": "float16"}, max_lora_rank=16)["dtype"] == "float16"


def test_vllm_gets_every_argument_and_more_places_than_are_used():
    """engine_args go to vLLM as they are; vLLM has places enough never to evict by itself, also while all are replaced."""
    theirs = {"seed": 7, "tensor_parallel_size": 4, "pipeline_parallel_size": 2, "distributed_executor_backend": "ray"}
    config = EngineConfig(**{**VALID, "token": "hf_secret", "engine_args": theirs})
    arguments = config.vllm_args({"quantization": "awq"}, max_lora_rank=32)
    assert theirs.items() <= arguments.items()
    assert arguments["quantization"] == "awq"
    assert arguments["max_lora_rank"] == 32
    assert arguments["hf_token"] == "hf_secret"
    assert arguments["max_cpu_loras"] == 2 * 4 * 8 + 1


def test_a_token_is_never_printed():
    """The repr of a config has no token."""
    assert "hf_secret" not in repr(EngineConfig(**{**VALID, "token": "hf_secret"}))
