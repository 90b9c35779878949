"""A head in EAGLE's form for a tiny Llama, which drafts the same token again and again."""

import json
from pathlib import Path


def write_head(served: Path, folder: Path) -> None:
    """Write the head of a Llama: one layer that adds nothing, after a projection that keeps the model's hidden states.

    It has no embeddings and no output layer of its own, as those that were published: vLLM gives it the model's.
    """
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((served / "config.json").read_text())
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    layer = {
        name.removeprefix("model."): tensor.clone()
        for name, tensor in load_file(served / "model.safetensors").items()
        if name.startswith("model.layers.0.")
    }
    del layer["layers.0.input_layernorm.weight"]  # which EAGLE's first layer lacks
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        layer[f"layers.0.{name}.weight"].zero_()
    hidden = config["hidden_size"]
    layer["fc.weight"] = torch.cat([torch.zeros(hidden, hidden), torch.eye(hidden)], dim=1)
    save_file(layer, folder / "model.safetensors", metadata={"format": "pt"})
