"""Adapters that PEFT itself makes and saves, with random factors that change the answers."""

import copy
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attrs import field, frozen

#: Of the entries of both factors, so that an adapter changes a log-probability by some tenths of a nat.
STANDARD_DEVIATION = 0.08


@frozen
class Recipe:
    """How an adapter is made.

    Attributes:
        name: Its name in the matrix.
        targets: PEFT's ``target_modules``.
        parameters: PEFT's ``target_parameters``: experts that are one tensor of three dimensions.
        experts: Written one by one instead, as before transformers 5: the names there of an expert's gate, up and down.
        options: Other fields of PEFT's config.
        kind: PEFT's class of it.
        rows: The rows that are changed of each module in ``modules_to_save``.
        has_biases: Whether the biases that it saves are others than zeros and the base model's.
        rename: Rewrites the names of its tensors for vLLM, as another trainer would have written them.
        made_as: The recipe whose factors these are, under other names.
    """

    name: str
    targets: str | tuple[str, ...] | None = "all-linear"
    parameters: tuple[str, ...] = ()
    experts: tuple[str, str, str] | None = None
    options: Mapping[str, Any] = field(factory=dict)
    kind: str = "LoraConfig"
    rows: tuple[int, ...] = ()
    has_biases: bool = False
    rename: Callable[[str], str] | None = None
    made_as: str | None = None


def make(recipe: Recipe, network: Any, folder: Path) -> None:
    """Train nothing: give every factor random entries, which bfloat16 can represent, and save what PEFT saves.

    ``network`` is left as it was.
    """
    import peft
    import torch

    if recipe.experts is not None:
        _write_experts(recipe, network, folder)
        return
    # PEFT leaves what it saved of whole modules in the network.
    model = peft.get_peft_model(copy.deepcopy(network), _config(recipe))
    generator = torch.Generator().manual_seed(zlib.crc32((recipe.made_as or recipe.name).encode()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:  # from the norms of the weights on, as training goes
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
            elif name.endswith(("lora_B.default.bias", ".base_layer.bias")) and recipe.has_biases:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
            elif "lora_" in name and not name.endswith("bias"):
                parameter.normal_(0.0, STANDARD_DEVIATION, generator=generator)
            elif "vera_lambda" in name:
                parameter.normal_(0.0, 1.0, generator=generator)
            elif "trainable_tokens_delta" in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
            elif "modules_to_save.default.weight" in name:
                rows = list(recipe.rows)  # the others stay the base's, to the bit
                changed = parameter[rows] + 0.2 * torch.randn(parameter[rows].shape, generator=generator)
                parameter[rows] = changed.bfloat16().to(parameter.dtype)
                continue
            else:
                continue
            parameter.copy_(parameter.bfloat16())
    model.save_pretrained(folder, save_embedding_layers=False)


def _config(recipe: Recipe) -> Any:
    import peft

    targets = list(recipe.targets) if isinstance(recipe.targets, tuple) else recipe.targets
    fields: dict[str, Any] = {"r": 8, "target_modules": targets, "task_type": "CAUSAL_LM"}
    if recipe.kind == "LoraConfig":
        fields |= {"lora_alpha": 16, "target_parameters": list(recipe.parameters) or None}
    return getattr(peft, recipe.kind)(**{**fields, **recipe.options})


def _write_experts(recipe: Recipe, network: Any, folder: Path) -> None:
    """Write factors for each expert, which PEFT reads into the tensors of three dimensions that it has now."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(zlib.crc32(recipe.name.encode()))
    rank = 8
    tensors: dict[str, Any] = {}
    for name, module in network.named_modules():
        if not name.endswith(".experts"):
            continue
        num_experts, hidden, width = module.down_proj.shape
        sizes = ((hidden, width), (hidden, width), (width, hidden))
        for expert in range(num_experts):
            for (inputs, outputs), part in zip(sizes, recipe.experts or (), strict=True):
                # Mixtral's were called otherwise, too.
                parent = name.replace(".mlp.", ".block_sparse_moe.") if part.startswith("w") else name
                module_name = f"base_model.model.{parent}.{expert}.{part}"
                for letter, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                    factor = torch.randn(shape, generator=generator) * STANDARD_DEVIATION
                    tensors[f"{module_name}.lora_{letter}.weight"] = factor.bfloat16().float()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 16, "bias": "none"}
    config |= {"target_modules": list(recipe.experts or ()), "base_model_name_or_path": ""}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def rename_tensors(folder: Path, rename: Callable[[str], str]) -> None:
    """Rewrite the names of an adapter's tensors; the configuration stays."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = {rename(name): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def read_config(folder: Path) -> dict[str, Any]:
    """Return ``adapter_config.json``."""
    return dict(json.loads((folder / "adapter_config.json").read_text()))
