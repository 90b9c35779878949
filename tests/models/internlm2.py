"""InternLM2, which transformers has no class of: a Llama's checkpoint and adapters under InternLM2's names.

Its weights are a Llama's, but q, k and v are one matrix, in which the rows of each key-value head stand together:
first those of its query heads, then the key's, then the value's (vLLM 0.32, ``models/internlm2.py``, ``split_qkv``).
"""

import json
import shutil
from pathlib import Path
from typing import Any

#: InternLM2's names by Llama's.
NAMES = {
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "model.tok_embeddings",
    "lm_head": "output",
}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def rename(name: str) -> str:
    for llamas, internlms in NAMES.items():
        name = name.replace(llamas, internlms)
    return name


def rewrite_checkpoint(source: Path, target: Path) -> None:
    """Write a Llama's checkpoint as InternLM2's; ``config.json`` needs no remote code, for it stays a Llama's."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "architectures": ["InternLM2ForCausalLM"]}))
    tensors = load_file(source / "model.safetensors")
    made = {rename(name): tensor for name, tensor in tensors.items() if not any(part in name for part in QKV)}
    for name in [name for name in tensors if QKV[0] in name]:
        parts = [tensors[name.replace(QKV[0], part)] for part in QKV]
        made[name.replace(QKV[0], "attention.wqkv")] = interleave(parts, config["num_key_value_heads"])
    save_file(made, target / "model.safetensors", metadata={"format": "pt"})


def interleave(parts: list[Any], num_kv_heads: int) -> Any:
    """Return the rows of q, k and v, those of each key-value head together."""
    import torch

    width = parts[0].shape[-1]
    groups = [part.reshape(num_kv_heads, -1, width) for part in parts]
    return torch.cat(groups, dim=1).reshape(-1, width).contiguous()


def rewrite_adapter(source: Path, target: Path, num_kv_heads: int = 2) -> None:
    """Write a Llama's adapter as InternLM2's.

    ``wqkv`` has one factor A, so that its rank is the sum of the ranks of q, k and v: A's rows stand below one another,
    and B has the columns of each in the rows of its own outputs. That is what they add, exactly.
    """
    import torch
    from safetensors.torch import load_file, save_file

    target.mkdir(parents=True)
    config = json.loads((source / "adapter_config.json").read_text())
    tensors = load_file(source / "adapter_model.safetensors")
    made = {rename(name): tensor for name, tensor in tensors.items() if not any(part in name for part in QKV)}
    for name in [name for name in tensors if f"{QKV[0]}.lora_A" in name]:
        of_a = [tensors[name.replace(QKV[0], part)] for part in QKV]
        of_b = [tensors[name.replace(QKV[0], part).replace("lora_A", "lora_B")] for part in QKV]
        ranks = [a.shape[0] for a in of_a]
        blocks = []
        for place, b in enumerate(of_b):
            padded = torch.zeros(b.shape[0], sum(ranks))
            padded[:, sum(ranks[:place]) : sum(ranks[: place + 1])] = b
            blocks.append(padded)
        fused = name.replace(QKV[0], "attention.wqkv")
        made[fused] = torch.cat(of_a)
        made[fused.replace("lora_A", "lora_B")] = interleave(blocks, num_kv_heads)
    save_file(made, target / "adapter_model.safetensors", metadata={"format": "pt"})
    config["target_modules"] = sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in made})
    # Three ranks of 8 are one of 24, whose scale must be theirs.
    config["rank_pattern"] = {"wqkv": 3 * config["r"]}
    config["alpha_pattern"] = {"wqkv": 3 * config["lora_alpha"]}
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2))
