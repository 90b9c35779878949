"""What is refused at the door, before anything is downloaded or started."""

import importlib.util
import subprocess
import sys
from inspect import Parameter, signature

import pytest
from attrs import NOTHING, fields

from qlora_infer import MissingDependencyError, QuantizedLoRAEngine
from qlora_infer.config import OWN_ENGINE_ARGS, EngineConfig
from qlora_infer.testing import FakeEngine

VALID = {"model": "org/model", "max_cpu_loras": 32}


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


def test_a_token_is_never_printed():
    """The repr of a config has no token."""
    assert "hf_secret" not in repr(EngineConfig(**{**VALID, "token": "hf_secret"}))


def test_the_constructor_has_the_options_of_the_config():
    """Every option of EngineConfig is an argument of QuantizedLoRAEngine by the same name, with the same default."""
    parameters = {
        name: NOTHING if parameter.default is Parameter.empty else parameter.default
        for name, parameter in signature(QuantizedLoRAEngine).parameters.items()
        if parameter.kind is not Parameter.VAR_KEYWORD
    }
    options = {option.name: option.default for option in fields(EngineConfig)}
    assert {**options, "adapters": None, "known_adapters": None, "backend": None} == parameters
    assert all(option.metadata["help"].endswith(".") for option in fields(EngineConfig))


@pytest.mark.parametrize(
    ("argument", "advice"),
    [
        ("max_lora", "did you mean max_loras?"),
        ("hf_token", "it is set by token="),
        ("no_such_thing", "if it is an argument of vLLM, write engine_args={'no_such_thing': 7}"),
    ],
)
def test_an_unknown_argument_is_refused_with_advice(argument, advice):
    """A misspelled argument, and one that belongs into engine_args, is a TypeError that says what to write."""
    with pytest.raises(TypeError) as error:
        QuantizedLoRAEngine("org/model", backend=FakeEngine(), **{argument: 7})
    assert str(error.value) == f"QuantizedLoRAEngine has no argument {argument!r}: {advice}"


@pytest.mark.parametrize(
    ("argument", "advice"),
    [
        ("gpu_memory_utilization", ", which is vLLM's: write engine_args={'gpu_memory_utilization': 0.8}"),
        ("gpu_memory_utilisation", ": did you mean engine_args={'gpu_memory_utilization': ...}?"),
    ],
)
def test_an_argument_of_vllm_is_refused_with_its_place(argument, advice):
    """It goes into engine_args; vLLM is not imported for that, which would take seconds."""
    pytest.importorskip("vllm")
    code = f"""if True:
        import sys
        from qlora_infer import QuantizedLoRAEngine
        try:
            QuantizedLoRAEngine("org/model", {argument}=0.8)
        except TypeError as error:
            print(error)
        assert not {{"vllm", "torch"}} & set(sys.modules)
    """
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout == f"QuantizedLoRAEngine has no argument {argument!r}{advice}\n", found.stderr


def test_the_value_of_an_unknown_argument_is_not_printed():
    """A text may be a secret."""
    with pytest.raises(TypeError) as error:
        QuantizedLoRAEngine("org/model", backend=FakeEngine(), api_token="hf_secret")
    assert "hf_secret" not in str(error.value)


def test_adapters_that_have_no_names_are_refused():
    """adapters= maps names to sources; a list has none."""
    with pytest.raises(TypeError, match="adapters must map names to sources"):
        QuantizedLoRAEngine("org/model", adapters=["./pirate"], backend=FakeEngine())


def test_vllms_sampling_params_can_be_imported_from_here():
    """`from qlora_infer import SamplingParams` is vLLM's class; without that line, vLLM and torch are not imported."""
    pytest.importorskip("vllm")
    code = """if True:
        import sys
        import qlora_infer
        assert not {"vllm", "torch"} & set(sys.modules)
        assert not hasattr(qlora_infer, "Sampling")
        from qlora_infer import SamplingParams
        import vllm
        assert SamplingParams is vllm.SamplingParams
    """
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_without_vllm_the_import_says_how_to_install_it(monkeypatch):
    """A light install has the library's own names, and a typed error for vLLM's."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install 'qlora-infer"):
        from qlora_infer import SamplingParams  # noqa: F401
