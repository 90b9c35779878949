"""Adapters of language models that are refused: variants of LoRA, other models' sizes and names, broken factors."""

from __future__ import annotations

import numpy as np

from corpus.base import ATTENTION, EMBEDDING, LINEAR
from corpus.entry import PREFIX, Entry, Files, lora, refused, safetensors
from qlora_infer.errors import CorruptAdapterError, UnsafeAdapterError

Q = f"{PREFIX}model.layers.0.self_attn.q_proj"

# Variants ----------------------------------------------------------------------------------------------------------


@refused(
    "activated LoRA",
    "PEFT's aLoRA",
    "It is an activated LoRA (aLoRA), which vLLM does not run.",
    way_out="train a LoRA without alora_invocation_tokens",
)
def alora() -> Files:
    return lora(alora_invocation_tokens=[1, 2])


@refused(
    "DoRA without a word of it in its config",
    "torchtune's DoRA",
    "It has 4 magnitudes of DoRA (base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector, base_model.model.model.layers.0.self_attn.v_proj.lora_magnitude_vector, base_model.model.model.layers.1.self_attn.q_proj.lora_magnitude_vector, …), and its config does not set use_dora: save it with PEFT, or train without DoRA.",
    way_out="train with PEFT, or without DoRA",
)
def torchtune_dora() -> Files:
    # ``tune_to_peft_adapter_weights`` in torchtune/models/convert_weights.py of pytorch/torchtune. It does not bring
    # the magnitudes of queries and keys into PEFT's order, as it does with B.
    files = lora()
    magnitudes = {f"{PREFIX}{name}.lora_magnitude_vector": np.ones(shape[1]) for name, shape in ATTENTION.items()}
    return files.with_tensors(**magnitudes)


@refused(
    "replicated layers",
    "PEFT's layer_replication",
    "It replicates layers (layer_replication), which vLLM does not do.",
    way_out="merge it into its base model",
)
def replicated() -> Files:
    return lora(layer_replication=[[0, 2], [1, 2]])


@refused(
    "block-diagonal LoRA",
    "PEFT's BD-LoRA",
    "It is block-diagonal (BD-LoRA), which vLLM does not run.",
    way_out="train a plain LoRA",
)
def block_diagonal() -> Files:
    return lora(use_bdlora={"nblocks": 2})


@refused(
    "QALoRA",
    "PEFT's use_qalora",
    "It uses QALoRA, which vLLM does not run: train with use_qalora=False.",
    way_out="train with use_qalora=False",
)
def qalora() -> Files:
    return lora(use_qalora=True, qalora_group_size=16)


@refused(
    "router among adapters",
    "PEFT's Arrow",
    "It routes among adapters (Arrow), which vLLM does not do.",
    way_out="serve the adapters that it routes among one by one",
)
def arrow() -> Files:
    return lora(arrow_config={"top_k": 3})


@refused(
    "LoRA on Megatron's layers",
    "Megatron-LM",
    "It was trained on Megatron's layers, whose tensors vLLM does not read.",
    way_out="export it to PEFT's names",
)
def megatron() -> Files:
    return lora(megatron_config={"tensor_model_parallel_size": 2})


@refused(
    "started from the base's own directions",
    "PEFT's CorDA",
    "It was started with init_lora_weights='corda', which changes the base model. Convert it with PEFT's model.save_pretrained(folder, path_initial_model_for_weight_conversion=initial), where initial is the folder in which it was saved before its training. Or serve the changed base, and set init_lora_weights to true.",
    way_out="convert it with path_initial_model_for_weight_conversion",
)
def corda() -> Files:
    return lora(init_lora_weights="corda")


@refused(
    "started from the error of quantization",
    "PEFT's LoftQ",
    "It was started with init_lora_weights='loftq', which changes the base model. Convert it with PEFT's model.save_pretrained(folder, path_initial_model_for_weight_conversion=initial), where initial is the folder in which it was saved before its training. Or serve the changed base, and set init_lora_weights to true.",
    way_out="convert it with path_initial_model_for_weight_conversion",
)
def loftq() -> Files:
    return lora(init_lora_weights="loftq")


@refused(
    "rank 1000",
    "any",
    "It has rank 1000, and vLLM serves ranks up to 512.",
    way_out="train with a rank of at most 512, or merge it into its base model",
)
def rank_1000() -> Files:
    return lora({name: shape for name, shape in ATTENTION.items() if "0.self_attn.q" in name}, rank=1000)


@refused(
    "rank above the engine's",
    "any",
    "It has rank 128, and this engine has room for 64: start it with QuantizedLoRAEngine(max_lora_rank=128).",
    way_out="start the engine with a larger max_lora_rank",
    is_refused_alone=False,
)
def rank_128() -> Files:
    return lora(rank=128)


@refused(
    "a feature that a later PEFT adds",
    "a later PEFT",
    "It sets quantum_config, a feature of PEFT '0.99.0' that this library does not know, and that may change what is computed: train it without, or use a newer qlora-infer.",
    way_out="train without it, or use a newer qlora-infer",
)
def later_switch() -> Files:
    return lora(peft_version="0.99.0", quantum_config={"qubits": [1, 2]})


@refused(
    "LoRA and whole embeddings",
    "PEFT's modules_to_save",
    "model.embed_tokens differs from the base model's in 512 rows, each of which takes a rank, and this engine has room for 64: start it with QuantizedLoRAEngine(max_lora_rank=512).",
    "lm_head differs from the base model's in 512 rows, each of which takes a rank, and this engine has room for 64: start it with QuantizedLoRAEngine(max_lora_rank=512).",
    way_out="merge it into its base model",
    is_refused_alone=False,
    is_about_zeros=True,
)
def modules_to_save() -> Files:
    files = lora(modules_to_save=["embed_tokens", "lm_head"])
    whole = {f"{PREFIX}{name}.weight": np.ones((512, 128)) for name in ("model.embed_tokens", "lm_head")}
    return files.with_tensors(**whole)


# Other models ------------------------------------------------------------------------------------------------------


@refused(
    "adapter of a model of another size",
    "any",
    "q_proj has 256 inputs and 256 outputs in it, 128 and 256 in the model (2 modules): it was trained on a model of another size.",
    "v_proj has 256 inputs and 128 outputs in it, 128 and 128 in the model (2 modules): it was trained on a model of another size.",
    way_out="serve it on the model that it was trained on",
    is_refused_alone=False,
)
def other_size() -> Files:
    return lora({name: (256, shape[1]) for name, shape in ATTENTION.items()})


@refused(
    "adapter of a model with more layers",
    "any",
    "It has 1 modules that this model does not have: model.layers.2.self_attn.q_proj (its layers are 0 to 1).",
    way_out="serve it on the model that it was trained on",
    is_refused_alone=False,
)
def more_layers() -> Files:
    return lora({**ATTENTION, "model.layers.2.self_attn.q_proj": (128, 256)})


@refused(
    "adapter of another architecture",
    "GPT-2",
    "None of its 2 modules is in this model: it has transformer.h.0.attn.c_attn, transformer.h.1.attn.c_attn; the model has model.layers.0.self_attn.v_proj, model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj, …. Their sizes differ, too: it was trained on another architecture.",
    way_out="serve it on the model that it was trained on",
    is_refused_alone=False,
)
def gpt_2() -> Files:
    return lora({f"transformer.h.{layer}.attn.c_attn": (768, 2304) for layer in range(2)}, fan_in_fan_out=True)


@refused(
    "adapter of another architecture of the same sizes",
    "Phi-3 and others",
    "None of its 2 modules is in this model: it has transformer.blocks.0.attn.q, transformer.blocks.1.attn.q; the model has model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj, ….",
    way_out="serve it on the model that it was trained on",
    is_refused_alone=False,
)
def other_names() -> Files:
    return lora({f"transformer.blocks.{layer}.attn.q": (128, 256) for layer in range(2)})


@refused(
    "adapter of a larger model of this architecture, under a wrapper's name",
    "trainers with classes of their own",
    "None of its 2 modules is in this model: it has policy.inner.layers.0.self_attn.q_proj, policy.inner.layers.1.self_attn.q_proj; the model has model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj, …. Their sizes differ, too: it was trained on another model.",
    way_out="serve it on the model that it was trained on",
    is_refused_alone=False,
)
def other_size_wrapped() -> Files:
    return lora({f"policy.inner.layers.{layer}.self_attn.q_proj": (64, 64) for layer in range(2)})


@refused(
    "embedding of a resized vocabulary",
    "new tokens, then LoRA on embed_tokens",
    "embed_tokens has 520 inputs and 128 outputs in it, 512 and 128 in the model (1 modules): its vocabulary was resized, or is another model's: train it without new tokens.",
    way_out="train it without new tokens, or merge it into its base model",
    is_refused_alone=False,
)
def resized_vocabulary() -> Files:
    return lora({**ATTENTION, **dict.fromkeys(EMBEDDING, (520, 128))})


@refused(
    "modules under two names",
    "a state dict saved twice",
    "It has 4 modules that this model does not have: _orig_mod.model.layers.0.self_attn.q_proj, _orig_mod.model.layers.0.self_attn.v_proj, _orig_mod.model.layers.1.self_attn.q_proj, … (its layers are 0 to 1).",
    way_out="keep one of the two",
    is_refused_alone=False,
)
def doubled() -> Files:
    files = lora()
    twice = {name.replace(PREFIX, f"{PREFIX}_orig_mod."): tensor for name, tensor in (files.tensors or {}).items()}
    return files.with_tensors(**twice)


@refused(
    "LoRA of a vision tower alone",
    "training of a multimodal model's vision",
    "All of its modules (model.visual.blocks.0.attn.qkv) are of vision or audio, which text does not pass.",
    way_out="train the language model's layers",
    is_refused_alone=False,
)
def vision_only() -> Files:
    return lora({"model.visual.blocks.0.attn.qkv": (64, 192)})


# Broken ------------------------------------------------------------------------------------------------------------


@refused(
    "two adapters in one file",
    "torch.save of a model with two",
    "the tensors are those of several adapters (one without a name, 'critic'): pass those of one, as peft.get_peft_model_state_dict(model, adapter_name=...) gives them",
    error=CorruptAdapterError,
    way_out="save one of them with PEFT's save_pretrained",
)
def two_adapters() -> Files:
    files = lora()
    named = {name.replace(".weight", ".critic.weight"): tensor for name, tensor in (files.tensors or {}).items()}
    return files.with_tensors(**named)


@refused(
    "factors of NaN",
    "a training that diverged",
    "1 tensors hold NaN or infinity: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight (or more than float16 holds); did its training diverge?",
    error=CorruptAdapterError,
    way_out="use an earlier checkpoint",
)
def diverged() -> Files:
    files = lora()
    return files.with_tensors(**{f"{Q}.lora_A.weight": np.full((8, 128), np.nan)})


@refused(
    "factors of 8-bit integers",
    "conversion scripts",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight holds I8; a factor holds floating-point numbers",
    error=CorruptAdapterError,
    way_out="save it in 16 bits",
)
def integers() -> Files:
    files = lora()
    return files.with_tensors(**{f"{Q}.lora_A.weight": np.ones((8, 128), np.int8)})


@refused(
    "factors A without B",
    "a save that was cut off",
    "model.layers.0.self_attn.q_proj has no lora_B: an adapter has both factors of a module",
    error=CorruptAdapterError,
    way_out="save it again",
)
def only_a() -> Files:
    files = lora()
    return Files(files.config, {name: tensor for name, tensor in (files.tensors or {}).items() if "lora_A" in name})


@refused(
    "config of another rank than its factors",
    "a config that was edited",
    "model.layers.0.self_attn.q_proj has rank 8, but adapter_config.json says 16",
    error=CorruptAdapterError,
    way_out="write the factors' rank into the config",
)
def other_rank() -> Files:
    return lora(rank=8).with_config(r=16)


@refused(
    "rank pattern that backtracks for ever",
    "untrusted",
    "'rank_pattern' has 1 patterns, such as '([\\\\w.]+)+-', which take more than 2 s to match with 4 modules: write plain names",
    error=CorruptAdapterError,
    way_out="write plain names",
)
def hostile_rank_pattern() -> Files:
    return lora(rank_pattern={r"([\w.]+)+-": 8})


@refused(
    "config with a comment",
    "by hand",
    "FOLDER/adapter_config.json is not valid JSON: Expecting property name enclosed in double quotes: line 1 column 10 (char 9)",
    error=CorruptAdapterError,
    way_out="write JSON",
)
def no_json() -> Files:
    files = lora()
    return Files(None, files.tensors).beside(adapter_config__json='{"r": 8, // rank\n "lora_alpha": 16}')


@refused(
    "config without a rank",
    "other tools' configs",
    "adapter_config.json has no 'r'",
    error=CorruptAdapterError,
    way_out="use the config that PEFT wrote",
)
def no_rank() -> Files:
    return lora().without_fields("r")


@refused(
    "pickled weights",
    "PEFT before 0.6",
    "FOLDER holds only pickled weights (adapter_model.bin), which can run code when they are read: save the adapter again with PEFT, which writes safetensors, or pass allow_pickle=True to have it converted",
    error=UnsafeAdapterError,
    way_out="save it again with PEFT, or pass allow_pickle=True",
)
def pickled() -> Files:
    files = lora()
    return Files(files.config, None).beside(adapter_model__bin=b"PK\3\4")


@refused(
    "one of several weight files",
    "FSDP, and PEFT of very large adapters",
    "FOLDER has 1 of the 2 files that its weights are in (without 00002): copy all of them there",
    error=CorruptAdapterError,
    way_out="copy all of them there, or save them as one file",
)
def sharded() -> Files:
    files = lora(LINEAR)
    return Files(files.config, None).beside(
        adapter_model__safetensors__index__json={"weight_map": {}},
        **{"adapter_model-00001-of-00002__safetensors": safetensors(files.tensors or {})},
    )


@refused(
    "experts as 3D parameters",
    "PEFT's target_parameters, on a model without experts",
    "None of its 2 modules is in this model: it has model.layers.0.mlp.experts, model.layers.1.mlp.experts; the model has model.layers.0.mlp.up_proj, model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj, …. Their sizes differ, too: it was trained on another architecture.",
    way_out="serve it on the model that it was trained on",
    is_refused_alone=False,
)
def experts() -> Files:
    modules = {f"model.layers.{layer}.mlp.experts": (192, 4 * 128) for layer in range(2)}
    return lora(modules, target_parameters=["mlp.experts.down_proj"], target_modules=[])


ENTRIES = [value for value in list(globals().values()) if isinstance(value, Entry)]
