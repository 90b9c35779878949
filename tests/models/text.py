"""The configs of text models, by transformers' names."""

from typing import Any

import transformers

from models.tiny import HEADS_OF_64, SIZES


def llama(**changes: Any) -> Any:
    return transformers.LlamaConfig(**{**SIZES, **HEADS_OF_64, **changes})


def qwen2(**changes: Any) -> Any:
    """Return a config with heads of 32, because vLLM computes their size from the hidden one; tied."""
    return transformers.Qwen2Config(**{**SIZES, "tie_word_embeddings": True, **changes})


def qwen3(**changes: Any) -> Any:
    return transformers.Qwen3Config(**{**SIZES, **HEADS_OF_64, "tie_word_embeddings": True, **changes})


def mistral(**changes: Any) -> Any:
    return transformers.MistralConfig(**{**SIZES, **HEADS_OF_64, "sliding_window": None, **changes})


def gemma2() -> Any:
    return transformers.Gemma2Config(
        **{**SIZES, **HEADS_OF_64, "tie_word_embeddings": True}, query_pre_attn_scalar=64, sliding_window=32
    )


def gemma3_text(**changes: Any) -> Any:
    return transformers.Gemma3TextConfig(
        **{**SIZES, **HEADS_OF_64, "tie_word_embeddings": True, **changes},
        query_pre_attn_scalar=64,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
    )


def phi3() -> Any:
    return transformers.Phi3Config(**SIZES, sliding_window=None)


def glm4() -> Any:
    return transformers.Glm4Config(**SIZES, **HEADS_OF_64)


def gpt_neox() -> Any:
    """Return a config without grouped keys, which this class has not, and which vLLM would take over from the config."""
    return transformers.GPTNeoXConfig(**{name: size for name, size in SIZES.items() if name != "num_key_value_heads"})


def falcon() -> Any:
    """Return a config with the feed-forward size that vLLM assumes."""
    return transformers.FalconConfig(
        **{**SIZES, "num_kv_heads": 2, "ffn_hidden_size": 512}, new_decoder_architecture=True, bias=False
    )


def internlm2() -> Any:
    """Return a Llama's config with heads of 32, because vLLM computes InternLM2's from the hidden size."""
    return transformers.LlamaConfig(**SIZES)


def cohere2() -> Any:
    return transformers.Cohere2Config(
        **{**SIZES, **HEADS_OF_64, "tie_word_embeddings": True},
        logit_scale=1.0,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
    )


def olmo2() -> Any:
    return transformers.Olmo2Config(**SIZES)


def granite() -> Any:
    return transformers.GraniteConfig(
        **SIZES, embedding_multiplier=2.0, residual_multiplier=0.8, logits_scaling=0.5, attention_multiplier=0.2
    )


def starcoder2() -> Any:
    return transformers.Starcoder2Config(**{**SIZES, "tie_word_embeddings": True}, sliding_window=None)


def lfm2() -> Any:
    return transformers.Lfm2Config(
        **{**SIZES, "tie_word_embeddings": True},
        block_auto_adjust_ff_dim=False,
        conv_dim=128,  # vLLM reads these, which checkpoints have and transformers' config has no default for
        conv_dim_out=128,
        block_dim=128,
        layer_types=["conv", "full_attention"],
    )


def mamba2() -> Any:
    return transformers.Mamba2Config(
        vocab_size=SIZES["vocab_size"],
        hidden_size=128,
        num_hidden_layers=2,
        expand=2,
        head_dim=64,
        num_heads=4,
        n_groups=1,
        state_size=64,
        chunk_size=32,
        initializer_range=SIZES["initializer_range"],
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def nemotron_h() -> Any:
    return transformers.NemotronHConfig(
        **{**SIZES, **HEADS_OF_64, "num_hidden_layers": 4},
        layers_block_type=["linear_attention", "mlp", "full_attention", "mlp"],
        mamba_num_heads=4,
        mamba_head_dim=64,
        n_groups=1,
        ssm_state_size=64,
        chunk_size=32,
        use_mamba_kernels=False,
    )


def qwen3_5_text(**changes: Any) -> Any:
    return transformers.Qwen3_5TextConfig(
        **{**SIZES, **HEADS_OF_64, **changes},
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        layer_types=["linear_attention", "full_attention"],
    )


def qwen3_moe(**changes: Any) -> Any:
    return transformers.Qwen3MoeConfig(
        **{**SIZES, **HEADS_OF_64, "num_experts_per_tok": 2, "moe_intermediate_size": 192, **changes},
        num_experts=4,
        norm_topk_prob=True,
    )


def mixtral(**changes: Any) -> Any:
    return transformers.MixtralConfig(
        **{**SIZES, **HEADS_OF_64, "num_experts_per_tok": 2, **changes}, num_local_experts=4, sliding_window=None
    )


def gpt_oss(**changes: Any) -> Any:
    return transformers.GptOssConfig(
        **{**SIZES, **HEADS_OF_64, "num_experts_per_tok": 2, **changes},
        num_local_experts=4,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
    )


def deepseek_v3(**changes: Any) -> Any:
    """Return a config with the sizes of DeepSeek's own attention, the only ones that GPU kernels are written for."""
    return transformers.DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4, "num_experts_per_tok": 4, **changes},
        moe_intermediate_size=192,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=64,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        num_nextn_predict_layers=0,
        topk_method="noaux_tc",  # vLLM then reads the gate's correction, which transformers' class always has
        scoring_func="sigmoid",
    )


def llama4_text() -> Any:
    return transformers.Llama4TextConfig(
        **SIZES,
        **HEADS_OF_64,
        intermediate_size_mlp=192,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        attention_chunk_size=128,
        no_rope_layer_interval=2,
    )
