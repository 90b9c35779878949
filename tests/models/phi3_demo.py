"""The demo model and its adapters as a Phi-3: q, k and v are one module in the checkpoint, and so are gate and up.

A Phi-3 computes what a Llama does, so both forms have the same answers.
"""

import json
import math
import shutil

import torch
from safetensors.torch import load_file, save_file

from qlora_infer.demo import _build, demo_adapters, demo_model

#: The modules that are fused, and their parts.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def phi3_model(folder, source=None):
    """Write the unquantized model, and in AWQ; return both folders.

    Args:
        folder: Where to.
        source: The unquantized Llama; the demo model by default.
    """
    source = source or demo_model("none")
    plain, quantized = folder / "plain", folder / "awq"
    if not quantized.exists():
        plain.mkdir(parents=True)
        for path in source.iterdir():
            if path.suffix != ".safetensors":
                shutil.copy(path, plain)
        config = json.loads((plain / "config.json").read_text())
        changes = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "pad_token_id": 2}
        changes["original_max_position_embeddings"] = config["max_position_embeddings"]
        (plain / "config.json").write_text(json.dumps(config | changes))
        weights = load_file(source / "model.safetensors")
        save_file(fuse(weights), plain / "model.safetensors", metadata={"format": "pt"})
        _build._quantize(plain, quantized, "awq")
    return plain, quantized


def phi3_adapters(folder, model=None, sources=None):
    """Write adapters for it; return their folders by name.

    Args:
        folder: Where to.
        model: The unquantized Llama; the demo model by default.
        sources: Its adapters, by name; the demo's by default.
    """
    adapters = {}
    weights = load_file((model or demo_model("none")) / "model.safetensors")
    widths = {name.removesuffix(".weight"): len(weight) for name, weight in weights.items()}
    for name, source in (sources or demo_adapters()).items():
        adapters[name] = folder / name
        if not adapters[name].exists():
            shutil.copytree(source, adapters[name])
            config = json.loads((source / "adapter_config.json").read_text())
            tensors, rank = fuse_factors(load_file(source / "adapter_model.safetensors"), config["r"], widths)
            scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
            config |= {"lora_alpha": scaling * rank, "r": rank, "use_rslora": False}
            config["target_modules"] = sorted({key.split(".")[-3] for key in tensors})
            (adapters[name] / "adapter_config.json").write_text(json.dumps(config))
            save_file(tensors, adapters[name] / "adapter_model.safetensors", metadata={"format": "pt"})
    return adapters


def fuse(weights):
    """Put the outputs of a module's parts one behind the other."""
    fused = {}
    for name, weight in weights.items():
        whole = whole_of(name)
        if whole is None:
            fused[name] = weight
        elif part_of(name) == FUSED[whole][0]:
            parts = [weights[name.replace(FUSED[whole][0], part)] for part in FUSED[whole]]
            fused[name.replace(FUSED[whole][0], whole)] = torch.cat(parts)
    return fused


def fuse_factors(tensors, rank, widths):
    """Put factors of parts into one pair: A's one above the other, B's in blocks. All modules get the same rank.

    Args:
        tensors: The factors by name.
        rank: The rank of each.
        widths: The outputs of each of the model's modules.
    """
    largest = rank * max(map(len, FUSED.values()))
    modules = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in tensors}
    fused = {}
    for module in sorted(modules):
        part, whole = part_of(module), whole_of(module)
        parts = FUSED[whole] if whole else (part,)
        target = module.replace(part, whole) if whole else module
        outputs = [widths[module.replace(part, other)] for other in parts]
        a, b = fused.get(f"{target}.A"), fused.get(f"{target}.B")
        its_a, its_b = (tensors[f"base_model.model.{module}.lora_{factor}.weight"] for factor in "AB")
        if a is None:
            a, b = its_a.new_zeros(largest, its_a.shape[1]), its_b.new_zeros(sum(outputs), largest)
        place = parts.index(part)
        ranks, first = slice(place * rank, (place + 1) * rank), sum(outputs[:place])
        a[ranks] = its_a
        b[first : first + outputs[place], ranks] = its_b
        fused[f"{target}.A"], fused[f"{target}.B"] = a, b
    renamed = {
        f"base_model.model.{key[:-2]}.lora_{key[-1]}.weight": tensor.contiguous() for key, tensor in fused.items()
    }
    return renamed, largest


def part_of(name):
    return name.removesuffix(".weight").rpartition(".")[2]


def whole_of(name):
    return next((whole for whole, parts in FUSED.items() if part_of(name) in parts), None)
