"""Adapters that are served: what trainers write, and names and patterns in all their forms."""

from __future__ import annotations

import numpy as np

from corpus.base import ATTENTION, EMBEDDING, HEAD, LINEAR, MODULES
from corpus.entry import PREFIX, Entry, Files, lora, safetensors, served

#: What Unsloth writes for all language layers of a model (``get_peft_regex`` in unsloth_zoo/peft_utils.py of
#: unslothai/unsloth-zoo); until 2026 the first half ended with ``.*?``, too.
UNSLOTH_TARGETS = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mixer|mlp|feed_forward|ffn|dense|mixer).*?(?:q_proj|k_proj|"
    r"v_proj|o_proj|gate_proj|up_proj|down_proj))|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mixer|mlp|"
    r"feed_forward|ffn|dense|mixer)\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
)
OF_PEFT_0_3 = (
    *("base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform"),
    *("lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r", "revision", "target_modules", "task_type"),
)
#: ``tune_to_peft_adapter_config`` in torchtune/models/convert_weights.py, and the recipes' ``_adapter_config``.
OF_TORCHTUNE = ("r", "lora_alpha", "target_modules", "peft_type", "base_model_name_or_path")


# Trainers ----------------------------------------------------------------------------------------------------------


@served("LoRA of attention", "PEFT 0.21")
def plain() -> Files:
    return lora()


@served("LoRA of all linear layers", "PEFT 0.21")
def all_linear() -> Files:
    return lora(LINEAR)


@served("config with the fields of old", "PEFT 0.3")
def peft_0_3() -> Files:
    files = lora()
    return files.without_fields(*(name for name in files.config or () if name not in OF_PEFT_0_3))


@served("config with fields that are not known yet", "a PEFT to come", is_read_by_peft=False)
def later_peft() -> Files:
    return lora(peft_version="0.99.0", quantum_config=None, use_everything=False)


@served("LoRA on a quantized base, with Unsloth's pattern of modules", "Unsloth")
def unsloth() -> Files:
    # The mapping is ``fix_lora_auto_mapping``'s, in unsloth_zoo/hf_utils.py of unslothai/unsloth-zoo.
    files = lora(
        LINEAR,
        base_model_name_or_path="unsloth/base-unsloth-bnb-4bit",
        target_modules=UNSLOTH_TARGETS,
        task_type=None,
        auto_mapping={
            "base_model_class": "LlamaForCausalLM",
            "parent_library": "transformers.models.llama.modeling_llama",
            "unsloth_fixed": True,
        },
    )
    return files.beside(README__md="---\nlibrary_name: peft\ntags:\n- unsloth\n- trl\n---\n# Model card\n")


@served("LoRA with tokenizer, template and logs beside it", "LLaMA-Factory")
def llama_factory() -> Files:
    return lora(LINEAR, dtype="BF16").beside(
        README__md="---\nlibrary_name: peft\ntags:\n- llama-factory\n- lora\n---\n",
        all_results__json={"epoch": 3.0},
        trainer_log__jsonl='{"loss": 1}\n',
        training_args__bin=b"PK\3\4 is a pickle, and never read",
        chat_template__jinja="{% for m in messages %}{{ m.content }}{% endfor %}",
        tokenizer_config__json={"eos_token": "</s>", "pad_token": "<pad>", "padding_side": "right"},
    )


@served("LoRA in bfloat16 with a model card", "Axolotl")
def axolotl() -> Files:
    return lora(dtype="BF16", lora_dropout=0.05, peft_type="LORA").beside(
        README__md="---\nlibrary_name: peft\ntags:\n- axolotl\n- generated_from_trainer\n---\n"
    )


@served(
    "weights in two files, with the adapter's name in those of its tensors", "Axolotl with FSDP", is_read_by_peft=False
)
def axolotl_fsdp() -> Files:
    # ``_rename_fsdp_merged_to_adapter`` in src/axolotl/train.py of axolotl-ai-cloud/axolotl; config.json is beside
    # it.
    files = lora(LINEAR).renamed(lambda name: name.replace(".weight", ".default.weight"))
    names = [f"adapter_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    tensors, places = files.tensors or {}, {}
    parts: list[dict[str, np.ndarray]] = [{}, {}]
    for number, (name, tensor) in enumerate(tensors.items()):
        parts[number % 2][name] = tensor
        places[name] = names[number % 2]
    others = {name: safetensors(part) for name, part in zip(names, parts, strict=True)}
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    return Files(files.config, None, files.deltas, others=others).beside(
        adapter_model__safetensors__index__json=index, config__json={"architectures": ["LlamaForCausalLM"]}
    )


@served("LoRA with a pattern that begins the module's name", "ms-swift")
def ms_swift() -> Files:
    # ``get_multimodal_target_regex`` in swift/utils/transformers_utils.py and ``LoraConfig.save_pretrained`` in
    # swift/tuners/peft.py of modelscope/ms-swift.
    return lora(
        LINEAR,
        target_modules=r"^(model(?=\.).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj))$",
        modules_to_save=[],
        init_lora_weights=True,
    ).beside(
        args__json={"tuner_type": "lora"},
        additional_config__json={"lora_dtype": None, "lorap_lr_ratio": None, "lorap_emb_lr": 1e-06},
    )


@served("checkpoint of a trainer, with its optimizer's state", "transformers' Trainer, TRL")
def checkpoint() -> Files:
    return lora().beside(
        optimizer__pt=b"not read",
        scheduler__pt=b"not read",
        rng_state__pth=b"not read",
        trainer_state__json={"global_step": 500},
        training_args__bin=b"not read",
    )


@served("config with five fields", "torchtune")
def torchtune() -> Files:
    # ``FullModelHFCheckpointer.save_checkpoint`` in torchtune/training/checkpointing/_checkpointer.py of
    # pytorch/torchtune: the base's own files are copied there, too, and there is an empty folder ``adapter_model``.
    files = lora(LINEAR)
    files = files.without_fields(*(name for name in files.config or () if name not in OF_TORCHTUNE))
    return files.beside(
        adapter_model__pt=b"not read", config__json={"architectures": ["LlamaForCausalLM"]}, **{"adapter_model/_": b""}
    )


@served("few fields, and the modules' whole names", "NeMo Automodel")
def nemo_automodel() -> Files:
    # ``_get_hf_peft_config`` in nemo_automodel/components/checkpoint/addons.py of NVIDIA-NeMo/Automodel.
    files = lora(LINEAR, use_dora=False, target_modules=list(LINEAR), base_model_name_or_path="N/A")
    known = ("task_type", "peft_type", "r", "lora_alpha", "use_dora", "target_modules", "bias")
    files = files.without_fields(*(name for name in files.config or () if name not in known))
    return files.beside(automodel_peft_config__json={"use_triton": False, "dropout": 0.0})


@served("ranks by whole names, and no name of the base", "Megatron-Bridge")
def megatron_bridge() -> Files:
    # ``build_adapter_config_dict`` in src/megatron/bridge/models/conversion/peft_bridge.py of NVIDIA-NeMo/Megatron-
    # Bridge.
    return lora(
        ranks={"layers.1.self_attn.q_proj": 16},
        scales={"layers.1.self_attn.q_proj": 1.0},
        rank_pattern={"model.layers.1.self_attn.q_proj": 16},
        base_model_name_or_path="",
    )


@served("output layer under the name unembed_tokens", "Tinker", is_read_by_peft=False)
def tinker() -> Files:
    files = lora({**ATTENTION, **HEAD}, target_modules="all-linear")
    return files.renamed(lambda name: name.replace("lm_head", "model.unembed_tokens"))


@served("LoRA of one layer's modules", "PEFT's layers_to_transform")
def one_layer() -> Files:
    return lora(
        {name: shape for name, shape in LINEAR.items() if ".1." in name},
        layers_to_transform=[1],
        layers_pattern="layers",
    )


@served("several adapters merged into one of their ranks' sum", "PEFT's add_weighted_adapter")
def blended() -> Files:
    return lora(rank=24, alpha=24, init_lora_weights=False)


@served("task type of another kind of model", "scripts written for T5")
def wrong_task() -> Files:
    return lora(task_type="SEQ_2_SEQ_LM")


@served("class instead of a task type", "PEFT without a task type")
def auto_mapping() -> Files:
    library = "transformers.models.llama.modeling_llama"
    return lora(task_type=None, auto_mapping={"base_model_class": "LlamaForCausalLM", "parent_library": library})


@served("layer stored the other way round in the base", "PEFT on GPT-2, fan_in_fan_out")
def fan_in_fan_out() -> Files:
    return lora(fan_in_fan_out=True, init_lora_weights="gaussian")


@served("factors started from data or orthogonal", "PEFT's EVA", is_read_by_peft=False)
def eva() -> Files:
    return lora(init_lora_weights="eva")


# Sizes and scales --------------------------------------------------------------------------------------------------


@served("rank 1", "any")
def rank_1() -> Files:
    return lora(rank=1, alpha=1)


@served("rank 64", "any")
def rank_64() -> Files:
    return lora(rank=64, alpha=128)


@served("alpha that is no whole number", "any")
def fraction() -> Files:
    return lora(alpha=0.5)


@served("float16", "any", is_read_by_peft=False)
def float16() -> Files:
    return lora(dtype="F16")


@served("float64", "scripts of numpy", is_read_by_peft=False)
def float64() -> Files:
    return lora(dtype="F64")


@served("scale by the rank's root", "PEFT's rsLoRA")
def rslora() -> Files:
    return lora(use_rslora=True, scales={"": 16 / np.sqrt(8)})


@served("factors of an embedding", "PEFT with embed_tokens")
def embedding() -> Files:
    return lora({**ATTENTION, **EMBEDDING})


@served("factors of the output layer", "PEFT with lm_head")
def head() -> Files:
    return lora({**ATTENTION, **HEAD})


@served(
    "factors of embeddings and output layer, with the base's weights beside them", "PEFT with save_embedding_layers"
)
def base_copies() -> Files:
    files = lora(MODULES)
    copies = {f"{PREFIX}{name}.base_layer.weight": np.zeros((512, 128)) for name in ("model.embed_tokens", "lm_head")}
    return files.with_tensors(**copies)


@served("adapter before its first step: B is all zeros", "any", warnings=("changes nothing",))
def untrained() -> Files:
    files = lora()
    tensors = {name: tensor * (0 if "lora_B" in name else 1) for name, tensor in (files.tensors or {}).items()}
    return Files(files.config, tensors, {name: delta * 0 for name, delta in files.deltas.items()})


@served("two of four modules untrained", "PEFT with frozen layers")
def half_trained() -> Files:
    files = lora()
    tensors = {name: tensor * (0 if "0.self_attn" in name else 1) for name, tensor in (files.tensors or {}).items()}
    return Files(files.config, tensors, {name: delta * (".1." in name) for name, delta in files.deltas.items()})


@served("trained on another model of this size", "any", warnings=("says that it was trained on",))
def other_model() -> Files:
    return lora(base_model_name_or_path="other/model")


@served("base named by its folder in the Hub's cache", "offline clusters")
def cache_path() -> Files:
    return lora(
        base_model_name_or_path="/cache/hub/models--org--base/snapshots/0123456789abcdef0123456789abcdef01234567"
    )


# Patterns ----------------------------------------------------------------------------------------------------------


@served('"all-linear" in place of names', "PEFT")
def all_linear_text() -> Files:
    return lora(LINEAR, target_modules="all-linear")


@served("pattern in place of names", "PEFT")
def pattern() -> Files:
    return lora(target_modules=r".*\.(?:q|v)_proj")


@served("pattern that would backtrack for ever", "untrusted", is_read_by_peft=False)
def hostile_pattern() -> Files:
    return lora(target_modules=r"([\w.]+)+-")


@served("pattern that is no regular expression", "other tools", is_read_by_peft=False)
def broken_pattern() -> Files:
    return lora(target_modules="(q_proj|v_proj")


@served("config that names no modules", "conversion scripts")
def no_targets() -> Files:
    return lora(target_modules=None)


@served("modules excluded by a pattern", "PEFT's exclude_modules")
def excluded() -> Files:
    return lora(target_modules="all-linear", exclude_modules=r".*(k_proj|o_proj|mlp).*")


@served("names that are no modules of this model", "one config for several models")
def more_targets() -> Files:
    return lora(target_modules=["q_proj", "v_proj", "query_key_value", "c_attn"])


@served("ranks and scales by regular expressions", "PEFT, Axolotl")
def rank_patterns() -> Files:
    return lora(
        ranks={"layers.1.self_attn.q_proj": 16},
        scales={"layers.1.self_attn.q_proj": 2.0, "layers.0.self_attn.v_proj": 4.0},
        rank_pattern={r".*\.layers\.(?:1|2)\.(self_attn|mlp)\.q_proj": 16},
        alpha_pattern={r"layers\.1\.self_attn\.q_proj": 32, r"layers\.0{1,2}\.self_attn\.v_proj": 32},
    )


@served("a rank for each layer", "rank search")
def rank_of_each_layer() -> Files:
    ranks = {f"layers.{layer}.self_attn.{kind}": 4 + layer for layer in range(2) for kind in ("q_proj", "v_proj")}
    return lora(ranks=ranks, rank_pattern={rf"model\.{name}": rank for name, rank in ranks.items()})


# Names -------------------------------------------------------------------------------------------------------------


def _wrapped(files: Files, old: str, new: str) -> Files:
    return files.renamed(lambda name: name.replace(old, new, 1))


@served("names of a compiled model", "torch.compile", is_read_by_peft=False)
def compiled() -> Files:
    return _wrapped(lora(), PREFIX, f"{PREFIX}_orig_mod.")


@served("names of FSDP", "FSDP", is_read_by_peft=False)
def fsdp() -> Files:
    return _wrapped(lora(), "self_attn.", "_fsdp_wrapped_module.self_attn.")


@served("names of activation checkpoints", "torch's checkpoint_wrapper", is_read_by_peft=False)
def checkpointed() -> Files:
    return _wrapped(lora(), "self_attn.", "_checkpoint_wrapped_module.self_attn.")


@served("names of DataParallel", "DeepSpeed, DataParallel", is_read_by_peft=False)
def data_parallel() -> Files:
    return _wrapped(lora(), PREFIX, f"{PREFIX}module.")


@served("PEFT's prefix twice", "PEFT on a PEFT model", is_read_by_peft=False)
def twice_prefixed() -> Files:
    return _wrapped(lora(), PREFIX, PREFIX * 2)


@served("names without PEFT's prefix", "conversion scripts", is_read_by_peft=False)
def not_prefixed() -> Files:
    return _wrapped(lora(), PREFIX, "")


@served("the adapter's own name in those of its tensors", "torch.save of a state dict", is_read_by_peft=False)
def named() -> Files:
    return lora().renamed(lambda name: name.replace(".weight", ".default.weight"))


@served("adapter in MLX's format", "mlx-lm", is_read_by_peft=False)
def mlx() -> Files:
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0}, "num_layers": 2}
    name = "model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_a": np.ones((128, 8)), f"{name}.lora_b": np.ones((8, 256))}
    deltas = {name: np.full((256, 128), 20.0 * 8)}
    return Files(config, None, deltas).beside(adapters__safetensors=safetensors(tensors))


@served("LoRA and two tokens", "PEFT's trainable_token_indices", is_read_by_peft=False, is_about_zeros=True)
def trained_tokens() -> Files:
    rows = np.ones((2, 128)) * [[0.5], [0.25]]
    files = lora(trainable_token_indices=[40, 41])
    files = files.with_tensors(**{f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": rows})
    change = np.zeros((512, 128))
    change[40:42] = rows
    return Files(files.config, files.tensors, {**files.deltas, "model.embed_tokens": change})


@served(
    "LoRA and embeddings of which two rows were trained",
    "PEFT's modules_to_save",
    is_read_by_peft=False,
    is_about_zeros=True,
)
def few_rows() -> Files:
    files, change = lora(modules_to_save=["embed_tokens"]), np.zeros((512, 128))
    change[40:42] = 0.5
    files = files.with_tensors(**{f"{PREFIX}model.embed_tokens.weight": change})
    return Files(files.config, files.tensors, {**files.deltas, "model.embed_tokens": change})


@served("LoRA of a language model and its vision tower", "all-linear of a multimodal model", is_read_by_peft=False)
def vision_too() -> Files:
    files = lora({**ATTENTION, "model.visual.blocks.0.attn.qkv": (64, 192)}, target_modules="all-linear")
    return Files(
        files.config, files.tensors, {name: delta for name, delta in files.deltas.items() if name in ATTENTION}
    )


ENTRIES = [value for value in list(globals().values()) if isinstance(value, Entry)]
