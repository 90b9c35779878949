"""Folders that people name as adapters and that are none of a language model's LoRA."""

from __future__ import annotations

import numpy as np

from corpus.base import CONFIG, LINEAR
from corpus.beside import POINTER
from corpus.entry import PREFIX, Entry, Files, lora, refused, safetensors
from qlora_infer.errors import AdapterNotFoundError, CorruptAdapterError

NOTHING = Files(None, None)
WEIGHT = safetensors({"weight": np.zeros((2, 2))})
SERVE_AS_BASE = "serve it as the base model, without an adapter"


def _factors(*modules: str) -> dict[str, tuple[int, int]]:
    return dict.fromkeys(modules, (64, 64))


# Nothing of PEFT's -------------------------------------------------------------------------------------------------


@refused(
    "whole model",
    "a full fine-tune, merge_and_unload",
    "FOLDER has no adapter_config.json; it is a whole model (config.json, model.safetensors), as a full fine-tune or a merged adapter is: serve it as the base model, without an adapter",
    error=AdapterNotFoundError,
    way_out=SERVE_AS_BASE,
)
def whole_model() -> Files:
    return NOTHING.beside(config__json=CONFIG, generation_config__json={}, model__safetensors=WEIGHT)


@refused(
    "whole model in several files",
    "a full fine-tune",
    "FOLDER has no adapter_config.json; it is a whole model (config.json, model-00001-of-00002.safetensors), as a full fine-tune or a merged adapter is: serve it as the base model, without an adapter",
    error=AdapterNotFoundError,
    way_out=SERVE_AS_BASE,
)
def whole_model_in_shards() -> Files:
    shards = {f"model-0000{i}-of-00002__safetensors": WEIGHT for i in (1, 2)}
    return NOTHING.beside(config__json=CONFIG, model__safetensors__index__json={}, **shards)


@refused(
    "whole weights in an adapter's file",
    "save_model of a full fine-tune",
    "It holds 14 whole weights and no LoRA factors (model.layers.0.self_attn.q_proj.weight, model.layers.0.self_attn.k_proj.weight, model.layers.0.self_attn.v_proj.weight, …), as a full fine-tune or a merged adapter does: serve it as the base model, without an adapter.",
    way_out=SERVE_AS_BASE,
)
def full_fine_tune() -> Files:
    weights = {f"{name}.weight": np.zeros((outputs, inputs)) for name, (inputs, outputs) in LINEAR.items()}
    return Files(lora().config, weights)


@refused(
    "a model's own config in an adapter's place",
    "copied by hand",
    "FOLDER/adapter_config.json is a model's own config.json (architectures, model_type), not an adapter's: serve a whole model as the base, or copy the adapter_config.json there that PEFT wrote",
    error=CorruptAdapterError,
    way_out="copy PEFT's config there, or serve the model as the base",
)
def models_config() -> Files:
    return Files(CONFIG, lora().tensors)


@refused(
    "weights without their config",
    "torch.save of a state dict",
    "FOLDER has no adapter_config.json; it has adapter_model.safetensors: copy the adapter_config.json there that its trainer wrote beside it",
    error=AdapterNotFoundError,
    way_out="copy adapter_config.json there",
)
def no_config() -> Files:
    return Files(None, lora().tensors)


@refused(
    "config without weights",
    "an interrupted upload",
    "FOLDER has no adapter_model.safetensors; it has adapter_config.json: was it saved, or downloaded, in part?",
    error=AdapterNotFoundError,
    way_out="copy adapter_model.safetensors there",
)
def no_weights() -> Files:
    return Files(lora().config, None)


@refused(
    "folder of checkpoints",
    "transformers' Trainer",
    "FOLDER has no adapter_config.json; of the 2 adapters inside it the newest is FOLDER/checkpoint-200: name that, or another",
    error=AdapterNotFoundError,
    way_out="name one of the checkpoints",
)
def checkpoints() -> Files:
    files = lora()
    inside = {
        f"checkpoint-{step}/{name}": content
        for step in (100, 200)
        for name, content in (
            ("adapter_config__json", files.config),
            ("adapter_model__safetensors", safetensors(files.tensors or {})),
        )
    }
    return NOTHING.beside(**inside)


@refused(
    "folder without an adapter",
    "any",
    "FOLDER has no adapter_config.json; it has README.md, data.jsonl, notes.txt, …: is it an adapter?",
    error=AdapterNotFoundError,
    way_out="name the adapter's folder",
)
def other_files() -> Files:
    return NOTHING.beside(README__md="# notes", train__py="", data__jsonl="", notes__txt="")


@refused(
    "empty folder",
    "a download that failed",
    "FOLDER has no adapter_config.json; is it an adapter?",
    error=AdapterNotFoundError,
    way_out="download it again",
)
def empty() -> Files:
    return NOTHING


@refused(
    "adapter for llama.cpp",
    "convert_lora_to_gguf.py",
    "FOLDER has no adapter_config.json; lora-f16.gguf is for llama.cpp: name the PEFT adapter that it was converted from",
    error=AdapterNotFoundError,
    way_out="name the PEFT adapter that it was converted from",
)
def gguf() -> Files:
    return NOTHING.beside(**{"lora-f16__gguf": b"GGUF"})


# Files in place of others ------------------------------------------------------------------------------------------


@refused(
    "weights that are a Git LFS pointer",
    "git clone without LFS",
    'FOLDER/adapter_model.safetensors is not a whole safetensors file: it is a Git LFS pointer, not the file itself: run "git lfs pull" in its repository',
    error=CorruptAdapterError,
    way_out="run git lfs pull",
)
def weights_pointer() -> Files:
    return Files(lora().config, None).beside(adapter_model__safetensors=POINTER)


@refused(
    "config that is a Git LFS pointer",
    "git clone without LFS",
    'FOLDER/adapter_config.json is not valid JSON: it is a Git LFS pointer, not the file itself: run "git lfs pull" in its repository',
    error=CorruptAdapterError,
    way_out="run git lfs pull",
)
def config_pointer() -> Files:
    return Files(None, lora().tensors).beside(adapter_config__json=POINTER)


@refused(
    "web page in the weights' place",
    "wget of the page of a file",
    "FOLDER/adapter_model.safetensors is not a whole safetensors file: it is a web page, not the file itself: download the file (the Hub has it at /resolve/, not at /blob/)",
    error=CorruptAdapterError,
    way_out="download the file itself",
)
def web_page() -> Files:
    return Files(lora().config, None).beside(
        adapter_model__safetensors="<!DOCTYPE html>\n<html><head></head></html>" + " " * 99
    )


# Not gathered ------------------------------------------------------------------------------------------------------


@refused(
    "file without tensors",
    "DeepSpeed ZeRO-3",
    "FOLDER/adapter_model.safetensors is not a whole safetensors file: it holds no tensors; did its trainer gather them? With DeepSpeed ZeRO-3 train with stage3_gather_16bit_weights_on_model_save, or run the checkpoint's zero_to_fp32.py",
    error=CorruptAdapterError,
    way_out="gather the weights when saving",
)
def zero_3() -> Files:
    return Files(lora().config, {})


@refused(
    "factors without numbers",
    "DeepSpeed ZeRO-3",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight has the shape [0], which holds no numbers; did its trainer gather them? With DeepSpeed ZeRO-3 train with stage3_gather_16bit_weights_on_model_save, or run the checkpoint's zero_to_fp32.py",
    error=CorruptAdapterError,
    way_out="gather the weights when saving",
)
def zero_3_factors() -> Files:
    files = lora()
    return Files(files.config, {name: np.zeros(0) for name in files.tensors or {}})


@refused(
    "checkpoint that was not gathered",
    "DeepSpeed",
    "FOLDER has no adapter_config.json; it is a checkpoint of DeepSpeed (global_step100) whose weights were not gathered: train with stage3_gather_16bit_weights_on_model_save, or run its zero_to_fp32.py",
    error=AdapterNotFoundError,
    way_out="run its zero_to_fp32.py",
)
def deepspeed() -> Files:
    return NOTHING.beside(
        zero_to_fp32__py="", latest="global_step100", **{"global_step100/mp_rank_00_model_states__pt": b""}
    )


@refused(
    "distributed checkpoint",
    "FSDP",
    "FOLDER has no adapter_config.json; it is a distributed checkpoint (.metadata): merge it with 'accelerate merge-weights', then save with PEFT",
    error=AdapterNotFoundError,
    way_out="merge it, then save with PEFT",
)
def distributed() -> Files:
    return Files(None, None, others={"__0_0.distcp": b"", ".metadata": b""})


# Of image models ---------------------------------------------------------------------------------------------------


@refused(
    "LoRA of an image model",
    "diffusers",
    "FOLDER has no adapter_config.json; pytorch_lora_weights.safetensors is of an image model (diffusers), and this library serves language models",
    error=AdapterNotFoundError,
    way_out="use diffusers",
)
def diffusers_lora() -> Files:
    return NOTHING.beside(pytorch_lora_weights__safetensors=WEIGHT)


@refused(
    "LoRA of an image model",
    "kohya's sd-scripts",
    "FOLDER has no adapter_config.json; its weights are a LoRA of an image model (lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight, lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight, lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.alpha), and this library serves language models",
    error=AdapterNotFoundError,
    way_out="use a program for image models",
)
def kohya() -> Files:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.{part}": np.zeros((4, 4)) for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    return NOTHING.beside(my_style__safetensors=safetensors(tensors, metadata={"ss_network_dim": "4"}))


@refused(
    "kohya's LoRA under PEFT's names of files",
    "conversion scripts",
    "It adapts an image model (modules: lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight, lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight), and this library serves language models.",
    way_out="use a program for image models",
)
def kohya_renamed() -> Files:
    name = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    return Files(lora().config, {f"{name}.{part}.weight": np.zeros((4, 4)) for part in ("lora_down", "lora_up")})


@refused(
    "LoRA of a U-Net",
    "PEFT on diffusers' models",
    "It adapts an image model (UNet2DConditionModel of diffusers.models.unets.unet_2d_condition: down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q, down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v), and this library serves language models.",
    way_out="use diffusers",
)
def unet() -> Files:
    mapping = {"base_model_class": "UNet2DConditionModel", "parent_library": "diffusers.models.unets.unet_2d_condition"}
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    return lora(_factors(f"{block}.to_q", f"{block}.to_v"), task_type=None, auto_mapping=mapping)


@refused(
    "LoRA of Flux",
    "ai-toolkit, diffusers",
    "It adapts an image model (modules: transformer.transformer_blocks.0.attn.to_q, transformer.single_transformer_blocks.0.attn.to_k), and this library serves language models.",
    way_out="use diffusers",
)
def flux() -> Files:
    files = lora(
        _factors("transformer.transformer_blocks.0.attn.to_q", "transformer.single_transformer_blocks.0.attn.to_k")
    )
    return files.renamed(lambda name: name.removeprefix(PREFIX))


@refused(
    "ControlNet",
    "diffusers",
    "FOLDER has no adapter_config.json; diffusion_pytorch_model.safetensors is of an image model (diffusers), and this library serves language models",
    error=AdapterNotFoundError,
    way_out="use diffusers",
)
def controlnet() -> Files:
    return NOTHING.beside(config__json={"_class_name": "ControlNetModel"}, diffusion_pytorch_model__safetensors=WEIGHT)


# Of models that give no text ---------------------------------------------------------------------------------------


@refused(
    "classifier of texts",
    "TRL's RewardTrainer, PEFT with SEQ_CLS",
    "It is a classifier of texts (task_type='SEQ_CLS'), and this engine gives text: run it with PEFT, or write task_type 'CAUSAL_LM' if it was trained to continue text.",
    "It replaces score.weight, which must be compared with the base model's own, and these cannot be had: BASE has no tensor of that name (is that module quantized?).",
    way_out="run it with PEFT",
)
def classifier() -> Files:
    files = lora(task_type="SEQ_CLS", modules_to_save=["classifier", "score"])
    return files.with_tensors(**{f"{PREFIX}score.weight": np.zeros((2, 128))})


@refused(
    "classifier of tokens",
    "PEFT with TOKEN_CLS",
    "It is a classifier of tokens (task_type='TOKEN_CLS'), and this engine gives text: run it with PEFT, or write task_type 'CAUSAL_LM' if it was trained to continue text.",
    "It replaces whole modules (modules_to_save=classifier, score), and its file has none of their weights: save it again with PEFT.",
    way_out="run it with PEFT",
)
def token_classifier() -> Files:
    return lora(task_type="TOKEN_CLS", modules_to_save=["classifier", "score"])


@refused(
    "embeddings of texts",
    "sentence-transformers with PEFT",
    "It makes embeddings, as with sentence-transformers (task_type='FEATURE_EXTRACTION'), and this engine gives text: run it with PEFT, or write task_type 'CAUSAL_LM' if it was trained to continue text.",
    way_out="run it with sentence-transformers",
)
def embedder() -> Files:
    files = lora(
        {name.removeprefix("model."): (128, 256) for name in LINEAR if "q_proj" in name}, task_type="FEATURE_EXTRACTION"
    )
    return files.beside(modules__json=[], config_sentence_transformers__json={})


@refused(
    "sentence-transformers model",
    "sentence-transformers",
    "FOLDER has no adapter_config.json; config_sentence_transformers.json is of a sentence-transformers model, which makes embeddings and no text",
    error=AdapterNotFoundError,
    way_out="run it with sentence-transformers",
)
def sentence_transformers() -> Files:
    return NOTHING.beside(
        modules__json=[], config_sentence_transformers__json={}, config__json={}, model__safetensors=WEIGHT
    )


@refused(
    "LoRA of T5",
    "PEFT with SEQ_2_SEQ_LM",
    "It adapts a model with an encoder and a decoder, as T5 and Whisper are (modules: encoder.block.0.layer.0.SelfAttention.q, encoder.block.0.layer.0.SelfAttention.v, decoder.block.0.layer.0.SelfAttention.q, …), and this library serves models that continue text.",
    way_out="run it with PEFT",
)
def t5() -> Files:
    names = [f"{side}.block.0.layer.0.SelfAttention.{kind}" for side in ("encoder", "decoder") for kind in "qv"]
    return lora(_factors(*names, "decoder.block.0.layer.1.EncDecAttention.q"), task_type="SEQ_2_SEQ_LM")


@refused(
    "LoRA of Whisper",
    "PEFT without a task type",
    "It adapts a model with an encoder and a decoder, as T5 and Whisper are (WhisperForConditionalGeneration of transformers.models.whisper.modeling_whisper: model.encoder.layers.0.self_attn.q_proj, model.decoder.layers.0.self_attn.q_proj, model.decoder.layers.0.encoder_attn.q_proj), and this library serves models that continue text.",
    way_out="run it with PEFT",
)
def whisper() -> Files:
    names = [
        f"model.{side}.layers.0.{part}.q_proj"
        for side, part in (("encoder", "self_attn"), ("decoder", "self_attn"), ("decoder", "encoder_attn"))
    ]
    mapping = {
        "base_model_class": "WhisperForConditionalGeneration",
        "parent_library": "transformers.models.whisper.modeling_whisper",
    }
    return lora(_factors(*names), task_type=None, auto_mapping=mapping)


@refused(
    "LoRA of BERT",
    "PEFT without a task type",
    "It adapts an encoder, as BERT is (modules: bert.encoder.layer.0.attention.self.query, bert.encoder.layer.0.attention.self.value, bert.encoder.layer.1.attention.self.query, …), and this library serves models that continue text.",
    way_out="run it with PEFT",
)
def bert() -> Files:
    names = [f"bert.encoder.layer.{layer}.attention.self.{kind}" for layer in range(2) for kind in ("query", "value")]
    return lora(_factors(*names), task_type=None)


ENTRIES = [value for value in list(globals().values()) if isinstance(value, Entry)]
