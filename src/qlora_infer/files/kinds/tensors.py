"""The kinds of models, other than language models, that tensors belong to, by the tensors' names.

Names are those of kohya's sd-scripts, diffusers 0.36, and transformers 5.19 (``t5``, ``bart``, ``whisper``, ``bert``).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from qlora_infer.display import format_names
from qlora_infer.files.kinds.training import Training

_IMAGE = re.compile(
    r"(?:^|[._])(?:lora_unet|lora_te\d?|lora_transformer|down_blocks|up_blocks|mid_block|transformer_blocks"
    r"|double_blocks|single_blocks|diffusion_model|input_blocks|controlnet)[._]"
)
_DECODER_WITH_ENCODER = re.compile(r"\.(?:EncDecAttention|encoder_attn|SelfAttention|DenseReluDense)\.")
_ENCODER = re.compile(
    r"(?:\w+\.)?(?:encoder\.layer\.\d+\.(?:attention|intermediate|output)\.|transformer\.layer\.\d+\.(?:attention|ffn)\.)"
)
#: Real names have fewer characters.
_MAX_LENGTH = 256
_WHOLE = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.(?:weight|bias)")


def is_of_image_model(names: Iterable[str]) -> bool:
    """Return whether tensors are a diffusion model's, in kohya's names or diffusers'."""
    names = list(names)
    return bool(names) and all(_IMAGE.search(name[:_MAX_LENGTH]) for name in names)


def foreign_kind(modules: Collection[str], config: Mapping[str, Any]) -> str:
    """Return a sentence about an adapter of a model that is no language model; empty for any other.

    Args:
        modules: The names of its modules, or of its tensors where none are factors that vLLM reads.
        config: Its config, which may name the class that it was trained on.
    """
    if not modules:
        return ""
    names = f"{Training.of(config, {}).model_class or 'modules'}: {format_names(modules)}"
    if is_of_image_model(modules):
        return f"It adapts an image model ({names}), and this library serves language models."
    if any(_DECODER_WITH_ENCODER.search(f".{name[:_MAX_LENGTH]}.") for name in modules):
        return (
            f"It adapts a model with an encoder and a decoder, as T5 and Whisper are ({names}), and this library "
            "serves models that continue text."
        )
    if all(_ENCODER.match(f"{name[:_MAX_LENGTH]}.") for name in modules):
        return f"It adapts an encoder, as BERT is ({names}), and this library serves models that continue text."
    return ""


def format_strays(names: Collection[str], *, num_factors: int) -> str:
    """Return a sentence about tensors that are no LoRA factors.

    Args:
        names: Their names.
        num_factors: The factors that stand beside them.
    """
    listed = format_names(names)
    if not num_factors and all("lora" not in name.lower() and _WHOLE.fullmatch(name) for name in names):
        return (
            f"It holds {len(names)} whole weights and no LoRA factors ({listed}), as a full fine-tune or a merged "
            "adapter does: serve it as the base model, without an adapter."
        )
    beginning = f"It has {len(names)} tensors that are no LoRA factors and would be lost"
    return f"{beginning}: {listed}; vLLM serves LoRA factors only."
