"""The models of the matrix, with the adapters that each must serve, and where it is run."""

import functools
from typing import Any

import attrs

from models import internlm2, multimodal, text
from models.comparison import PROMPTS
from models.multimodal import before_transformers_4_52, of_idefics3_text_class, of_the_text_class
from models.peft_adapters import Recipe
from models.tiny import TinyModel

ALL = Recipe("all")
#: Its magnitudes are applied on CPUs.
DORA = Recipe("dora", options={"use_dora": True})


def attention(*names: str) -> Recipe:
    """Return an adapter of attention only, scaled by rsLoRA, whose modules differ in rank and alpha."""
    first, last = names[0], names[-1]
    return Recipe(
        "attention",
        targets=names,
        options={
            "r": 8,
            "lora_alpha": 8,
            "use_rslora": True,
            "rank_pattern": {first: 16, f"layers.1.{last}" if "." in last else last: 4},
            "alpha_pattern": {first: 24},
        },
    )


ATTENTION = attention("q_proj", "k_proj", "v_proj", "o_proj")
FUSED_ATTENTION = attention("qkv_proj", "o_proj")
HEADS = Recipe("heads", targets=("lm_head", "embed_tokens", "q_proj"))
EMBEDDINGS = Recipe("embeddings", targets=("embed_tokens", "q_proj"))
#: As many of the tokens of the prompts as there are ranks.
TOKENS = sorted({token for prompt in PROMPTS for token in prompt})[:32]
TRAINED_TOKENS = Recipe(
    "tokens", targets=("q_proj", "v_proj"), options={"trainable_token_indices": TOKENS, "use_rslora": True}
)
WHOLE_EMBEDDINGS = Recipe(
    "whole-embeddings", targets=("q_proj",), options={"modules_to_save": ["embed_tokens"]}, rows=tuple(TOKENS)
)
WHOLE_HEAD = Recipe("whole-head", targets=("q_proj",), options={"modules_to_save": ["lm_head"]}, rows=tuple(TOKENS))
VERA = Recipe("vera", kind="VeraConfig", options={"r": 16, "save_projection": False})
#: Of which none was trained.
BIASES = Recipe("biases", targets=("q_proj", "v_proj"), options={"bias": "all", "lora_bias": True})
#: Served on CPUs.
TRAINED_BIASES = Recipe("trained-biases", options={"bias": "lora_only", "lora_bias": True}, has_biases=True)
REPLACED = (TRAINED_TOKENS, WHOLE_EMBEDDINGS, WHOLE_HEAD)
#: PEFT takes "all-linear" of a mixture of experts to mean the experts, too.
DENSE = Recipe("dense", targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
DENSE_DORA = attrs.evolve(DENSE, name="dense-dora", options={"use_dora": True})
#: The weight that chooses experts, which is a bare parameter in transformers 5.
ROUTER = Recipe("router", targets=("q_proj", "v_proj"), parameters=("mlp.gate.weight",))
EXPERTS = Recipe(
    "experts", targets=("q_proj", "v_proj"), parameters=("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
)
EXPERTS_BY_NAME = Recipe("experts-by-name", experts=("gate_proj", "up_proj", "down_proj"))
MIXTRALS_EXPERTS_BY_NAME = Recipe("experts-by-name", experts=("w1", "w3", "w2"))
LANGUAGE = (
    r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|in_proj_qkv|in_proj_z|out_proj)"
)


def forms(targets: str = LANGUAGE, text_class: Any = of_the_text_class) -> tuple[Recipe, ...]:
    """Return one adapter of the language model under the three forms of names that its modules have."""
    return (
        Recipe("language", targets=targets),
        Recipe("language-old-names", targets=targets, rename=before_transformers_4_52, made_as="language"),
        Recipe("language-text-names", targets=targets, rename=text_class, made_as="language"),
    )


#: "all-linear" of a multimodal model holds modules of its towers.
MULTIMODAL = (ALL, *forms())


MODELS = [
    TinyModel("llama", "LlamaForCausalLM", text.llama, adapters=(ALL, ATTENTION, HEADS)),
    TinyModel(
        "llama-awq", "LlamaForCausalLM", text.llama, "awq", adapters=(ALL, DORA, ATTENTION, HEADS, *REPLACED, VERA)
    ),
    TinyModel("llama-w4a16", "LlamaForCausalLM", text.llama, "w4a16", adapters=(ALL, ATTENTION, HEADS)),
    TinyModel("llama-w4a16-channel", "LlamaForCausalLM", text.llama, "w4a16-channel", adapters=(ALL, ATTENTION)),
    TinyModel("llama-auto-round-gptq", "LlamaForCausalLM", text.llama, "auto-round-gptq", adapters=(ALL, ATTENTION)),
    TinyModel("qwen2", "Qwen2ForCausalLM", text.qwen2, adapters=(ALL, ATTENTION), refused=(HEADS,)),
    TinyModel(
        "qwen2-gptq",
        "Qwen2ForCausalLM",
        text.qwen2,
        "gptq",
        adapters=(ALL, DORA, ATTENTION, BIASES, TRAINED_BIASES),
        refused=(HEADS, TRAINED_TOKENS),
    ),
    TinyModel("qwen3", "Qwen3ForCausalLM", text.qwen3, adapters=(ALL, DORA, ATTENTION, HEADS, *REPLACED, VERA)),
    TinyModel(
        "qwen3-w4a16-asymmetric", "Qwen3ForCausalLM", text.qwen3, "w4a16-asymmetric", adapters=(ALL, ATTENTION, HEADS)
    ),
    TinyModel("qwen3-auto-round-awq", "Qwen3ForCausalLM", text.qwen3, "auto-round-awq", adapters=(ALL, ATTENTION)),
    TinyModel("qwen3-bitsandbytes", "Qwen3ForCausalLM", text.qwen3, "bitsandbytes", adapters=(ALL, ATTENTION, HEADS)),
    TinyModel("mistral", "MistralForCausalLM", text.mistral, adapters=(ALL, ATTENTION), refused=(HEADS,)),
    TinyModel("gemma2", "Gemma2ForCausalLM", text.gemma2, adapters=(ALL, ATTENTION)),
    TinyModel("gemma2-bitsandbytes", "Gemma2ForCausalLM", text.gemma2, "bitsandbytes", adapters=(ALL, DORA, ATTENTION)),
    TinyModel("gemma3-text", "Gemma3ForCausalLM", text.gemma3_text, adapters=(ALL, ATTENTION)),
    TinyModel("phi3", "Phi3ForCausalLM", text.phi3, adapters=(ALL, FUSED_ATTENTION)),
    TinyModel("phi3-awq", "Phi3ForCausalLM", text.phi3, "awq", adapters=(ALL, DORA, FUSED_ATTENTION)),
    TinyModel("phi3-w4a16", "Phi3ForCausalLM", text.phi3, "w4a16", adapters=(ALL, FUSED_ATTENTION)),
    TinyModel("glm4", "Glm4ForCausalLM", text.glm4, adapters=(ALL, DORA, ATTENTION)),
    TinyModel(
        "gpt-neox",
        "GPTNeoXForCausalLM",
        text.gpt_neox,
        adapters=(ALL, DORA, attention("query_key_value", "attention.dense")),
    ),
    TinyModel("gpt-neox-gptq", "GPTNeoXForCausalLM", text.gpt_neox, "gptq", adapters=(ALL,)),
    TinyModel("falcon", "FalconForCausalLM", text.falcon, refused=(ALL,)),
    TinyModel(
        "internlm2",
        "LlamaForCausalLM",
        text.internlm2,
        adapters=(ALL,),
        rewrite=internlm2.rewrite_checkpoint,
        rewrite_adapter=internlm2.rewrite_adapter,
    ),
    TinyModel(
        "cohere2",
        "Cohere2ForCausalLM",
        text.cohere2,
        adapters=(ALL, ATTENTION, EMBEDDINGS, WHOLE_EMBEDDINGS),
        refused=(TRAINED_TOKENS,),
    ),
    TinyModel("olmo2", "Olmo2ForCausalLM", text.olmo2, adapters=(ALL, ATTENTION)),
    TinyModel("granite", "GraniteForCausalLM", text.granite, adapters=(ALL, ATTENTION, HEADS, *REPLACED)),
    TinyModel("starcoder2", "Starcoder2ForCausalLM", text.starcoder2, adapters=(ALL, ATTENTION)),
    TinyModel("lfm2", "Lfm2ForCausalLM", text.lfm2, adapters=(ALL, attention("q_proj", "k_proj", "v_proj"))),
    TinyModel("mamba2", "Mamba2ForCausalLM", text.mamba2, refused=(Recipe("in", targets=("in_proj",)),)),
    TinyModel(
        "nemotron-h",
        "NemotronHForCausalLM",
        text.nemotron_h,
        adapters=(
            Recipe("dense", targets=("in_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")),
            ATTENTION,
        ),
    ),
    # "CPU GDN attention requires BF16."
    TinyModel("qwen3.5-text", "Qwen3_5ForCausalLM", text.qwen3_5_text, dtype="bfloat16", adapters=(ALL, ATTENTION)),
    TinyModel(
        "qwen3-moe",
        "Qwen3MoeForCausalLM",
        text.qwen3_moe,
        adapters=(ATTENTION, HEADS, ROUTER),
        refused_on_cpu=(EXPERTS, EXPERTS_BY_NAME, ALL),
    ),
    TinyModel(
        "mixtral",
        "MixtralForCausalLM",
        text.mixtral,
        adapters=(ATTENTION,),
        refused_on_cpu=(EXPERTS, MIXTRALS_EXPERTS_BY_NAME),
    ),
    TinyModel("gpt-oss", "GptOssForCausalLM", text.gpt_oss, adapters=(ATTENTION,), refused_on_cpu=(EXPERTS,)),
    # "expect weight to be bfloat16, float16, int8, fp8_e4m3 or uint8(mxfp4 or int4)."
    TinyModel(
        "deepseek-v3",
        "DeepseekV3ForCausalLM",
        text.deepseek_v3,
        dtype="bfloat16",
        adapters=(Recipe("attention", targets=("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")),),
        refused=(Recipe("kv-b", targets=("kv_b_proj",)),),
        # PEFT takes "gate_proj" to mean that of the experts, too.
        refused_on_cpu=(
            Recipe("dense", targets=r".*(layers\.0\.mlp|shared_experts)\.(gate|up|down)_proj|.*(q_b_proj|o_proj)"),
            EXPERTS,
            EXPERTS_BY_NAME,
        ),
    ),
    TinyModel("llama4", "Llama4ForCausalLM", text.llama4_text, adapters=(DENSE, DENSE_DORA, ATTENTION)),
    TinyModel(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        multimodal.gemma3,
        adapters=MULTIMODAL,
        save_processor=multimodal.save_gemma3_processor,
        rewrite=multimodal.rewrite_tower,
    ),
    TinyModel(
        "qwen2.5-vl",
        "Qwen2_5_VLForConditionalGeneration",
        multimodal.qwen2_5_vl,
        adapters=MULTIMODAL,
        save_processor=multimodal.save_qwen2_5_vl_processor,
    ),
    TinyModel(
        "qwen3-vl",
        "Qwen3VLForConditionalGeneration",
        multimodal.qwen3_vl,
        adapters=MULTIMODAL,
        save_processor=multimodal.save_qwen3_vl_processor,
    ),
    TinyModel(
        "qwen3.5",
        "Qwen3_5ForConditionalGeneration",
        multimodal.qwen3_5,
        dtype="bfloat16",
        adapters=MULTIMODAL,
        save_processor=multimodal.save_qwen3_vl_processor,
    ),
    TinyModel(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        multimodal.mistral3,
        adapters=MULTIMODAL,
        save_processor=multimodal.save_pixtral_processor,
    ),
    TinyModel(
        "llava",
        "LlavaForConditionalGeneration",
        multimodal.llava,
        adapters=MULTIMODAL,
        save_processor=multimodal.save_llava_processor,
        rewrite=multimodal.rewrite_tower,
    ),
    TinyModel(
        "idefics3",
        "Idefics3ForConditionalGeneration",
        multimodal.idefics3,
        adapters=(
            ALL,
            Recipe("language", targets=r".*text_model.*_proj"),
            Recipe(
                "language-text-names",
                targets=r".*text_model.*_proj",
                rename=of_idefics3_text_class,
                made_as="language",
            ),
        ),
        save_processor=multimodal.save_idefics3_processor,
    ),
    TinyModel(
        "smolvlm",
        "SmolVLMForConditionalGeneration",
        multimodal.smolvlm,
        adapters=(ALL, Recipe("language", targets=r".*text_model.*_proj")),
        save_processor=multimodal.save_smolvlm_processor,
    ),
]
BY_NAME = {model.name: model for model in MODELS}

#: Those that vLLM's CPU build does not run, with its reason; tests/gpu runs them.
NOT_ON_CPU: dict[str, str] = {}

#: One of each kind, within 12 minutes on two cores.
IN_CI = {
    name: BY_NAME[name]
    for name in (
        *(
            "llama-awq",
            "llama-w4a16",
            "llama-auto-round-gptq",
            "qwen2-gptq",
            "qwen3",
            "gemma2-bitsandbytes",
            "phi3-awq",
            "glm4",
            "gpt-neox",
            "internlm2",
            "lfm2",
        ),
        *("qwen3.5", "qwen3-moe", "llama4", "gemma3", "qwen3-vl", "falcon"),
    )
}
#: ``nox -s models``.
OUT_OF_CI = {name: model for name, model in BY_NAME.items() if name not in IN_CI and name not in NOT_ON_CPU}


#: Sizes that a GPU's kernels take: multiples of 128, the sides of FP8's blocks.
OF_KERNELS = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 8}
#: The same of experts, of which every token is given to all: a choice may fall otherwise in 16 bits.
OF_EXPERTS = {**OF_KERNELS, "num_experts_per_tok": 4}


def of_format(form: str) -> TinyModel:
    """Return a Llama in one of today's formats."""
    config = functools.partial(text.llama, **OF_KERNELS)
    return TinyModel(f"llama-{form}", "LlamaForCausalLM", config, form, dtype="bfloat16", adapters=(ALL, ATTENTION))


def experts_of_format(form: str) -> TinyModel:
    """Return a mixture of experts in one of today's formats, with adapters of the experts."""
    config = functools.partial(text.qwen3_moe, **OF_EXPERTS, moe_intermediate_size=384)
    adapters = (ATTENTION, EXPERTS, ALL)
    return TinyModel(f"qwen3-moe-{form}", "Qwen3MoeForCausalLM", config, form, dtype="bfloat16", adapters=adapters)


def for_gpu(model: TinyModel) -> TinyModel:
    """Return the model as a GPU serves it: with its experts' adapters, in 16 bits."""
    config = functools.partial(model.config, num_experts_per_tok=4) if model.refused_on_cpu else model.config
    return attrs.evolve(
        model, config=config, dtype="bfloat16", adapters=(*model.adapters, *model.refused_on_cpu), refused_on_cpu=()
    )


#: Today's formats.
FORMATS_ON_GPU = {
    model.name: model
    for model in (
        *map(of_format, ("none", "w4a16", "w4a16-asymmetric", "w4a16-channel", "w8a16", "w8a8-int8", "w8a8-fp8")),
        *map(of_format, ("fp8", "fp8-static", "fp8-block", "fp8-in-flight", "modelopt-fp8")),
        *map(of_format, ("nvfp4a16", "modelopt-nvfp4", "auto-round-gptq", "auto-round-awq")),
        TinyModel(
            "gpt-oss-mxfp4",
            "GptOssForCausalLM",
            # vLLM makes the sizes of MXFP4's experts multiples of 256 and of 128.
            functools.partial(text.gpt_oss, **{**OF_EXPERTS, "hidden_size": 512}),
            "mxfp4",
            adapters=(ATTENTION, EXPERTS),
        ),
        *map(experts_of_format, ("w4a16", "fp8-block")),
    )
}
#: Those of which a GPU serves more than the CPU does.
ON_GPU = {name: for_gpu(model) for name, model in BY_NAME.items() if model.refused_on_cpu or name in NOT_ON_CPU}
