"""The description of a folder that has no adapter, by the files in it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from qlora_infer.display import format_names
from qlora_infer.files.kinds.tensors import is_of_image_model
from qlora_infer.files.snapshot import CONFIG_NAME, PICKLE_NAMES, WEIGHTS_NAME, where_else

#: A folder's names that are looked at.
MAX_NAMES = 1000

# How transformers, diffusers and DeepSpeed 0.18 call what they save.
_MODEL_WEIGHTS = re.compile(
    r"(?:model|pytorch_model|consolidated)(?:[-.][\w-]+)?\.(?:safetensors|bin|pth)(?:\.index\.json)?"
)
_IMAGE_MODEL = re.compile(
    r"model_index\.json|diffusion_pytorch_model[\w.-]*|pytorch_lora_weights\.(?:safetensors|bin)|lora_?unet.*"
)
_EMBEDDER = frozenset({"modules.json", "config_sentence_transformers.json"})
_DEEPSPEED = re.compile(r"zero_to_fp32\.py|global_step\d+|(?:zero_pp_rank|mp_rank)_.*\.pt|bf16_zero_pp_rank_.*")
_DISTRIBUTED = re.compile(r"pytorch_model_fsdp_\d+|__\d+_\d+\.distcp|\.metadata")


def next_step(adapters: list[str], names: Collection[str] = (), tensors: Collection[str] = ()) -> str:
    """Return the next step for a folder without an adapter's config or weights.

    Args:
        adapters: The adapters in folders inside it.
        names: The files in it.
        tensors: The names of the tensors in a file of weights that is no adapter's, where they are known.
    """
    if adapters:
        return where_else(adapters)
    return next(_kinds({name for name in names if name.isprintable()}, tensors), where_else([]))


def _kinds(names: set[str], tensors: Collection[str]) -> Iterator[str]:
    """Yield the possible kinds of the folder, the most certain first."""
    if found := _matching(_IMAGE_MODEL, names):
        yield f"{found} is of an image model (diffusers), and this library serves language models"
    if is_of_image_model(tensors):
        yield (
            f"its weights are a LoRA of an image model ({format_names(tensors)}), and this library serves language "
            "models"
        )
    weights = sorted(names & {WEIGHTS_NAME, *PICKLE_NAMES})
    if weights and CONFIG_NAME not in names:
        yield f"it has {weights[0]}: copy the {CONFIG_NAME} there that its trainer wrote beside it"
    if found := next(iter(sorted(names & _EMBEDDER)), ""):
        yield f"{found} is of a sentence-transformers model, which makes embeddings and no text"
    weights_of_model = _matching(_MODEL_WEIGHTS, names)
    if "config.json" in names and weights_of_model:
        yield (
            f"it is a whole model (config.json, {weights_of_model}), as a full fine-tune or a merged adapter is: "
            "serve it as the base model, without an adapter"
        )
    if found := _matching(_DEEPSPEED, names):
        yield (
            f"it is a checkpoint of DeepSpeed ({found}) whose weights were not gathered: train with "
            "stage3_gather_16bit_weights_on_model_save, or run its zero_to_fp32.py"
        )
    if found := _matching(_DISTRIBUTED, names):
        yield f"it is a distributed checkpoint ({found}): merge it with 'accelerate merge-weights', then save with PEFT"
    if found := next((name for name in sorted(names) if name.endswith(".gguf")), ""):
        yield f"{found} is for llama.cpp: name the PEFT adapter that it was converted from"
    if names:
        whole = "was it saved, or downloaded, in part" if CONFIG_NAME in names else "is it an adapter"
        yield f"it has {format_names(sorted(names))}: {whole}?"


def _matching(pattern: re.Pattern[str], names: set[str]) -> str:
    return next((name for name in sorted(names) if pattern.fullmatch(name)), "")
