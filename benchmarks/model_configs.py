"""A ``config.json`` for each architecture of vLLM's registry, from transformers' or vLLM's own config classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LFM2 = {
    "block_dim": 2560,
    "block_ff_dim": 12288,
    "block_multiple_of": 256,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "conv_dim": 2560,
    "conv_dim_out": 2560,
    "layer_types": ["conv", "full_attention"] * 16,
}

#: Config classes of transformers or vLLM, and what else vLLM reads, where an architecture's own default does not do.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "AfmoeForCausalLM": (
        "AfmoeConfig",
        {"score_func": "sigmoid", "route_norm": True, "route_scale": 1.0, "n_group": 1, "topk_group": 1},
    ),
    "BagelForConditionalGeneration": ("BagelConfig", {}),
    "ChatGLMForConditionalGeneration": ("ChatGLMConfig", {"original_rope": True, "tie_word_embeddings": False}),
    "ChatGLMModel": ("ChatGLMConfig", {"original_rope": True, "tie_word_embeddings": False}),
    "DeepseekForCausalLM": ("DeepseekV2Config", {"use_mla": False}),
    "DotsOCRForCausalLM": ("DotsOCRConfig", {}),
    "ExaoneMoEForCausalLM": ("ExaoneMoeConfig", {}),
    "Gemma4ForConditionalGeneration": ("Gemma4Config", {"vision_config": {"model_type": "gemma4_vision"}}),
    "Glm4MoeForCausalLM": ("Glm4MoeConfig", {"head_dim": 128, "use_qk_norm": False}),
    "Glm4MoeLiteForCausalLM": ("Glm4MoeLiteConfig", {"first_k_dense_replace": 1}),
    "Glm4vMoeForConditionalGeneration": ("Glm4vMoeConfig", {"text_config": {"head_dim": 128, "use_qk_norm": False}}),
    "HunYuanDenseV1ForCausalLM": ("HunYuanDenseV1Config", {"head_dim": 128}),
    "HunYuanMoEV1ForCausalLM": ("HunYuanMoEV1Config", {"head_dim": 128}),
    "HYV3ForCausalLM": ("HYV3Config", {"first_k_dense_replace": 1, "expert_hidden_dim": 1536}),
    "HyperCLOVAXForCausalLM": ("HyperCLOVAXConfig", {}),
    "IQuestCoderForCausalLM": ("LlamaConfig", {}),
    "InternLM2ForCausalLM": ("LlamaConfig", {"bias": False}),
    "InternLM3ForCausalLM": ("LlamaConfig", {"bias": False, "qkv_bias": False}),
    "InternS1ForConditionalGeneration": ("InternVLConfig", {}),
    "IsaacForConditionalGeneration": ("IsaacConfig", {}),
    "Lfm2ForCausalLM": ("Lfm2Config", LFM2),
    "Lfm2MoeForCausalLM": ("Lfm2MoeConfig", {"layer_types": ["conv", "full_attention"] * 16}),
    "Lfm2VlForConditionalGeneration": ("Lfm2VlConfig", {"text_config": LFM2}),
    "LongcatFlashForCausalLM": (
        "LongcatFlashConfig",
        {"mla_scale_q_lora": True, "mla_scale_kv_lora": True, "zero_expert_type": "identity"},
    ),
    "MiniMaxM2ForCausalLM": ("MiniMaxM2Config", {"rotary_dim": 64, "scoring_func": "sigmoid"}),
    "LLaMAForCausalLM": ("LlamaConfig", {}),
    "LightOnOCRForConditionalGeneration": ("Mistral3Config", {}),
    "MiMoForCausalLM": ("Qwen2Config", {}),
    "MiniCPMForCausalLM": (
        "LlamaConfig",
        {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256, "num_experts": 0, "hidden_act_param": 0.0},
    ),
    "MistralLarge3ForCausalLM": ("DeepseekV3Config", {}),
    "Ministral3ForCausalLM": ("Ministral3Config", {}),
    "MuseGlimmerForCausalLM": ("MuseGlimmerTextConfig", {}),
    "MuseGlimmerForConditionalGeneration": ("MuseGlimmerConfig", {}),
    "NemotronHPuzzleForCausalLM": ("NemotronHConfig", {}),
    "PhiMoEForCausalLM": ("PhimoeConfig", {}),
    "QianfanOCRForConditionalGeneration": ("QianfanOCRConfig", {}),
    "Qwen2_5OmniForConditionalGeneration": ("Qwen2_5OmniConfig", {}),
    "Qwen2_5OmniModel": ("Qwen2_5OmniConfig", {}),
    "Qwen3ASRForConditionalGeneration": ("Qwen3ASRConfig", {}),
    "Qwen3ASRRealtimeGeneration": ("Qwen3ASRConfig", {}),
    "Qwen3VLMoeForConditionalGeneration": ("Qwen3VLMoeConfig", {"text_config": {"norm_topk_prob": True}}),
    "Rnj1ForCausalLM": ("Gemma3TextConfig", {}),
    "SolarForCausalLM": (
        "LlamaConfig",
        {"bskcn_1": [], "bskcn_2": [], "bskcn_3": [], "bskcn_4": [], "bskcn_tv": [0, 0]},
    ),
    "TeleChat2ForCausalLM": ("LlamaConfig", {}),
    "TeleChat3ForCausalLM": ("LlamaConfig", {}),
    "TeleFLMForCausalLM": ("LlamaConfig", {"use_mup": False}),
    "UltravoxModel": ("UltravoxConfig", {}),
    "UnlimitedOCRForCausalLM": ("UnlimitedOCRConfig", {}),
    "VoxtralRealtimeGeneration": ("VoxtralRealtimeConfig", {}),
}

#: Layers of every kind that a model has are among the first; the rest only takes time.
FEW_LAYERS = 8


def write(architecture: str, folder: Path) -> None:
    """Write an architecture's ``config.json`` with the sizes that its class has by default.

    Raises:
        LookupError: Neither transformers nor vLLM has a config class for it.
    """
    config = of(architecture)
    config.architectures = [architecture]
    config.save_pretrained(folder)
    path = folder / "config.json"
    written = json.loads(path.read_text())
    for key, value in CONFIGS.get(architecture, ("", {}))[1].items():
        old = written.get(key)
        if key != "layer_types":
            written[key] = {**old, **value} if isinstance(old, dict) else value
    path.write_text(json.dumps({**written, "architectures": [architecture]}))


def of(architecture: str) -> Any:
    """Return an architecture's config with the sizes that its class has by default."""
    import transformers
    import vllm.transformers_utils.configs as vllm_configs

    name, extra = CONFIGS.get(architecture, ("", {}))
    if name:
        config_class = getattr(transformers, name, None) or getattr(vllm_configs, name)
    elif hasattr(transformers, architecture):
        config_class = getattr(transformers, architecture).config_class
    else:
        raise LookupError("its config is the checkpoint's own code")
    whole = config_class(**extra)
    for fewer in ({"num_hidden_layers": FEW_LAYERS}, {"text_config": {"num_hidden_layers": FEW_LAYERS}}):
        try:
            config = config_class(**extra, **fewer)
            config.validate()
        except Exception:  # it has its layers elsewhere, or names each of them
            continue
        if 0 < _num_layers(config) < _num_layers(whole) and type(config.get_text_config()) is type(
            whole.get_text_config()
        ):
            return config
    return whole


def _num_layers(config: Any) -> int:
    return getattr(config.get_text_config(), "num_hidden_layers", 0) or 0
