"""The demo model for two GPUs: its 9 heads, which two cannot share, and 3 more that add nothing."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

from qlora_infer.demo import _build, demo_adapters, demo_model

HEAD = 64
#: What the shapes of its attention become: queries, keys and values, and the inputs of what joins the heads.
QUERIES, KEYS = 12 * HEAD, 4 * HEAD


def twelve_heads(folder, quantization):
    """The model, quantized."""
    plain = folder / "plain"
    plain.mkdir()
    for path in demo_model("none").iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, plain)
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"num_attention_heads": 12, "num_key_value_heads": 4}))
    weights = load_file(demo_model("none") / "model.safetensors")
    save_file(_padded(weights), plain / "model.safetensors", metadata={"format": "pt"})
    _build._quantize(plain, folder / quantization, quantization)
    return folder / quantization


def their_adapters(folder):
    """The demo adapters, for twelve heads."""
    adapters = {}
    for name, source in demo_adapters().items():
        adapters[name] = shutil.copytree(source, folder / name)
        path = adapters[name] / "adapter_model.safetensors"
        save_file(_padded(load_file(path)), path, metadata={"format": "pt"})
    return adapters


def _padded(weights):
    """Zeros for the outputs of heads that are new, and for what is made of them; LoRA's A and B alike."""
    padded = {}
    for name, weight in weights.items():
        rows, columns = weight.shape if weight.ndim == 2 else (0, 0)
        if "lora_A" not in name and "q_proj" in name:
            rows = QUERIES
        elif "lora_A" not in name and ("k_proj" in name or "v_proj" in name):
            rows = KEYS
        elif "lora_B" not in name and "o_proj" in name:
            columns = QUERIES
        if weight.ndim == 2:
            weight = torch.nn.functional.pad(weight, (0, columns - weight.shape[1], 0, rows - weight.shape[0]))
        padded[name] = weight.contiguous()
    return padded
