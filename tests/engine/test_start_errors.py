"""Why the real vLLM does not start: the first cause is in the error's message, and no process is left behind."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from multiprocessing import resource_tracker
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.conftest import ENGINE_ARGS
from engine.test_life import children, is_alive
from qlora_infer import EngineStartError, QuantizationError, QuantizedLoRAEngine, UnsupportedModelError
from qlora_infer.demo import demo_model

TESTS = Path(__file__).parents[1]
TOKEN = "hf_" + "Qx7" * 12


@pytest.fixture
def left_behind(engines):
    """Give a function that returns the processes and the folders of errors that are left of what began meanwhile."""
    engines.close()
    resource_tracker.ensure_running()  # Python's own, for as long as this process
    before = {*children(os.getpid()), *_folders()}

    def find():
        running = {pid for pid in children(os.getpid()) if is_alive(pid)}
        return ({*running, *_folders()}) - before

    return find


def _folders():
    return set(Path(tempfile.gettempdir()).glob(f"qlora-infer-start-{os.getpid()}-*"))


def tiny(folder, config):
    """A checkpoint of random weights, or of none where transformers' class is not given, with the demo's tokenizer."""
    config.save_pretrained(folder)
    for file in Path(demo_model("awq")).glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def tiny_llama(folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return tiny(folder, LlamaConfig.from_pretrained(folder))


def start(model, *, quantization="none", engine_args=None, **arguments):
    return QuantizedLoRAEngine(
        str(model),
        quantization=quantization,
        max_loras=1,
        max_model_len=256,
        engine_args={**ENGINE_ARGS, **(engine_args or {})},
        **arguments,
    )


def test_a_missing_tensor_is_named(tmp_path, left_behind, monkeypatch):
    """A checkpoint without one of its tensors: the error has that tensor's name, and no token of the Hub."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    model = tiny_llama(tmp_path / "holes")
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.input_layernorm.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(EngineStartError, match=r"model\.layers\.1\.input_layernorm\.weight") as failure:
        start(model, token=TOKEN)
    assert str(failure.value).startswith(f"vLLM did not start with {model}: ValueError: ")
    assert TOKEN not in str(failure.value)
    assert "See root cause above" in str(failure.value.__cause__)
    assert left_behind() == set()


def test_a_tensor_of_another_shape_is_the_cause(tmp_path, left_behind, monkeypatch):
    """A tensor that does not fit its layer: with two workers, the error is that of the first that read its half."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    model = tiny_llama(tmp_path / "bent")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] = torch.zeros(128, 64, dtype=torch.bfloat16)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        EngineStartError, match=r"exceeds dimension size \(64\)|range of \[-64, 64\], but got 128"
    ) as failure:
        start(model, engine_args={"tensor_parallel_size": 2})
    assert "root cause" not in str(failure.value)
    assert left_behind() == set()


def test_too_little_memory_for_the_kv_cache(left_behind, monkeypatch):
    """An error of the core, which no worker has: the message has vLLM's numbers, and what makes room."""
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)  # it would outdo the argument
    with pytest.raises(EngineStartError, match="No available memory for the cache blocks") as failure:
        start(demo_model("awq"), quantization="awq", engine_args={"kv_cache_memory_bytes": 1 << 16})
    assert "Make room: a smaller max_model_len" in str(failure.value)
    assert left_behind() == set()


def test_a_model_without_lora_is_refused_before_its_weights(tmp_path, left_behind):
    """Falcon, which vLLM serves without LoRA: refused from its config.json alone, and no process was started."""
    from transformers import FalconConfig

    config = FalconConfig(
        vocab_size=49152,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        dtype="bfloat16",
        architectures=["FalconForCausalLM"],
    )
    with pytest.raises(UnsupportedModelError, match=r"FalconForCausalLM does not support LoRA yet\."):
        start(tiny(tmp_path / "falcon", config))
    assert left_behind() == set()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["NoSuchForCausalLM"]}, r"NoSuchForCausalLM.* are not supported for now"),
        ({"architectures": ["NoSuchForCausalLM"], "model_type": "no_such"}, "model type `no_such`"),
    ],
)
def test_an_architecture_that_vllm_does_not_know(tmp_path, left_behind, changes, reason):
    """It is refused with vLLM's reason, and without its list of 300 others."""
    from transformers import LlamaConfig

    model = tiny(tmp_path / "unknown", LlamaConfig(hidden_size=128, num_hidden_layers=1, num_attention_heads=2))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UnsupportedModelError, match=reason) as failure:
        start(model)
    assert "LlamaForCausalLM" not in str(failure.value)
    assert left_behind() == set()


def test_a_model_that_needs_torchvision_says_so(tmp_path):
    """Gemma 3 without torchvision is refused before the start, with the command that installs the one that matches."""
    from transformers import Gemma3Config

    model = tiny(tmp_path / "gemma", Gemma3Config(architectures=["Gemma3ForConditionalGeneration"]))
    script = textwrap.dedent(f"""
        import multiprocessing
        from qlora_infer import MissingDependencyError, QuantizedLoRAEngine

        if __name__ == "__main__":
            try:
                QuantizedLoRAEngine({str(model)!r}, max_loras=1, max_model_len=256)
            except MissingDependencyError as error:
                print("MESSAGE", error)
            print("CHILDREN", multiprocessing.active_children())
    """)
    path = [str(TESTS / "no_torchvision"), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    (tmp_path / "start.py").write_text(script)
    done = subprocess.run(
        [sys.executable, tmp_path / "start.py"], capture_output=True, text=True, env=environment, timeout=300
    )
    (message,) = (line for line in done.stdout.splitlines() if line.startswith("MESSAGE"))
    assert "needs torchvision, also for text alone, and it is not installed" in message
    assert "pip install --force-reinstall --no-deps 'torchvision==0." in message
    assert "CHILDREN []" in done.stdout


def test_a_quantization_that_vllm_does_not_run_is_called_one(tmp_path, left_behind):
    """What no strategy knows and vLLM refuses is a QuantizationError in vLLM's words, and speaks of no memory."""
    folder = tiny_llama(tmp_path / "model")
    says = {"quant_method": "auto-round", "bits": 4, "group_size": 64, "packing_format": "auto_round:gptq_of_tomorrow"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": says}))
    with pytest.raises(QuantizationError, match="Unsupported packing_format: auto_round:gptq_of_tomorrow") as failure:
        QuantizedLoRAEngine(folder, engine_args=ENGINE_ARGS)
    assert "memory" not in str(failure.value)
    assert not left_behind()
