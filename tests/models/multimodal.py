"""The configs of multimodal models, and the processors without which vLLM does not start them.

Their towers are tiny and never run: the matrix sends text.
"""

import shutil
from pathlib import Path
from typing import Any

import transformers

from models import text
from models.tiny import HEADS_OF_64, SIZES, SPECIAL_TOKENS, STANDARD_DEVIATION

PIXELS = 56
PATCH = 14


def token(name: str) -> int:
    return SPECIAL_TOKENS.index(name)


#: What transformers' and vLLM's encoders call a small tower's sizes.
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": PIXELS,
    "patch_size": PATCH,
    "initializer_range": STANDARD_DEVIATION,
}
QWEN_TOWER = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "patch_size": PATCH,
    "out_hidden_size": SIZES["hidden_size"],
    "initializer_range": STANDARD_DEVIATION,
}
QWEN_TOKENS = {
    "image_token_id": token("<|image_pad|>"),
    "video_token_id": token("<|video_pad|>"),
    "vision_start_token_id": token("<|vision_start|>"),
    "vision_end_token_id": token("<|vision_end|>"),
}
#: Of 16 pairs of a head's numbers, those that turn with time, height and width.
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
INTERLEAVED_MROPE = {**MROPE, "mrope_interleaved": True}
#: Qwen2.5-VL has heads of 32, as all of Qwen2 here.
MROPE_OF_32 = {**MROPE, "mrope_section": [4, 6, 6]}


def gemma3() -> Any:
    return transformers.Gemma3Config(
        text_config=text.gemma3_text().to_dict(),
        vision_config=TOWER,
        mm_tokens_per_image=4,
        image_token_index=token("<image_soft_token>"),
        boi_token_index=token("<start_of_image>"),
        eoi_token_index=token("<end_of_image>"),
    )


def qwen2_5_vl() -> Any:
    return transformers.Qwen2_5_VLConfig(
        text_config={**SIZES, "rope_parameters": MROPE_OF_32},
        vision_config={**QWEN_TOWER, "fullatt_block_indexes": [1], "window_size": PIXELS},
        **QWEN_TOKENS,
        tie_word_embeddings=False,
    )


def qwen3_vl() -> Any:
    return transformers.Qwen3VLConfig(
        text_config={**SIZES, **HEADS_OF_64, "rope_parameters": INTERLEAVED_MROPE},
        vision_config={**QWEN_TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **QWEN_TOKENS,
        tie_word_embeddings=False,
    )


def qwen3_5() -> Any:
    rope = {**INTERLEAVED_MROPE, "mrope_section": [4, 6, 6], "partial_rotary_factor": 0.5}
    return transformers.Qwen3_5Config(
        text_config=text.qwen3_5_text(rope_parameters=rope).to_dict(),
        vision_config={**QWEN_TOWER, "num_position_embeddings": 16},
        **QWEN_TOKENS,
        tie_word_embeddings=False,
    )


def mistral3() -> Any:
    return transformers.Mistral3Config(
        text_config=text.mistral().to_dict(),
        vision_config={**TOWER, "head_dim": 32, "model_type": "pixtral"},
        image_token_index=token("[IMG]"),
        tie_word_embeddings=False,
    )


def llava() -> Any:
    return transformers.LlavaConfig(
        text_config=text.llama().to_dict(),
        vision_config={**TOWER, "model_type": "clip_vision_model", "projection_dim": 64},
        image_token_index=token("<image>"),
        image_seq_length=(PIXELS // PATCH) ** 2,
    )


def idefics3() -> Any:
    return transformers.Idefics3Config(
        text_config=text.llama().to_dict(),
        vision_config=TOWER,
        image_token_id=token("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )


def smolvlm() -> Any:
    return transformers.SmolVLMConfig(
        text_config=text.llama().to_dict(),
        vision_config={**TOWER, "max_image_size": {"longest_edge": PIXELS}},
        image_token_id=token("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )


def save_gemma3_processor(folder: Path, tokenizer: Any) -> None:
    tokenizer.image_token = "<image_soft_token>"
    images = transformers.Gemma3ImageProcessor(size={"height": PIXELS, "width": PIXELS})
    transformers.Gemma3Processor(images, tokenizer, image_seq_length=4).save_pretrained(folder)


def _qwen_processor(processor: str, image_processor: str, video_processor: str, folder: Path, tokenizer: Any) -> None:
    tokenizer.image_token = "<|image_pad|>"
    size = {"shortest_edge": PIXELS * PIXELS, "longest_edge": 4 * PIXELS * PIXELS}
    images = getattr(transformers, image_processor)(patch_size=PATCH, size=size)
    videos = getattr(transformers, video_processor)(patch_size=PATCH, size=size)
    getattr(transformers, processor)(images, tokenizer, videos).save_pretrained(folder)


def save_qwen2_5_vl_processor(folder: Path, tokenizer: Any) -> None:
    _qwen_processor("Qwen2_5_VLProcessor", "Qwen2VLImageProcessor", "Qwen2VLVideoProcessor", folder, tokenizer)


def save_qwen3_vl_processor(folder: Path, tokenizer: Any) -> None:
    _qwen_processor("Qwen3VLProcessor", "Qwen2VLImageProcessor", "Qwen3VLVideoProcessor", folder, tokenizer)


def save_pixtral_processor(folder: Path, tokenizer: Any) -> None:
    images = transformers.PixtralImageProcessor(size={"longest_edge": PIXELS}, patch_size=PATCH)
    transformers.PixtralProcessor(images, tokenizer, patch_size=PATCH, spatial_merge_size=2).save_pretrained(folder)


def save_llava_processor(folder: Path, tokenizer: Any) -> None:
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS}
    )
    transformers.LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(folder)


def save_idefics3_processor(folder: Path, tokenizer: Any) -> None:
    edge = {"longest_edge": PIXELS}
    images = transformers.Idefics3ImageProcessor(size=edge, max_image_size=edge)
    transformers.Idefics3Processor(images, tokenizer, image_seq_len=4).save_pretrained(folder)


def save_smolvlm_processor(folder: Path, tokenizer: Any) -> None:
    edge = {"longest_edge": PIXELS}
    images = transformers.SmolVLMImageProcessor(size=edge, max_image_size=edge)
    videos = transformers.SmolVLMVideoProcessor(size=edge, max_image_size=edge)
    transformers.SmolVLMProcessor(images, tokenizer, videos, image_seq_len=4).save_pretrained(folder)


def rewrite_tower(source: Path, target: Path) -> None:
    """Write a checkpoint with the names that CLIP's and SigLIP's towers have in all that were published.

    transformers 5.19 writes ``vision_tower.encoder``, which vLLM 0.32 does not read.
    """
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    made = {name.replace("vision_tower.", "vision_tower.vision_model.", 1): tensor for name, tensor in tensors.items()}
    save_file(made, target / "model.safetensors", metadata={"format": "pt"})


# The three forms that the names of one adapter have, by which class and which transformers it was trained with. -----


def before_transformers_4_52(name: str) -> str:
    """Return ``language_model.model.layers…`` for ``model.language_model.layers…``, and so for the towers."""
    name = name.replace("base_model.model.model.language_model.", "base_model.model.language_model.model.")
    name = name.replace("base_model.model.lm_head.", "base_model.model.language_model.lm_head.")
    return name.replace("base_model.model.model.", "base_model.model.")


def of_the_text_class(name: str) -> str:
    """Return ``model.layers…`` for ``model.language_model.layers…``."""
    return name.replace("base_model.model.model.language_model.", "base_model.model.model.")


def of_idefics3_text_class(name: str) -> str:
    """Return ``model.layers…`` for ``model.text_model.layers…``."""
    return name.replace("base_model.model.model.text_model.", "base_model.model.model.")
