"""The features of PEFT that vLLM lacks, each with the message for an adapter that needs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

#: Ways to start the training that leave the base model as it is (vLLM 0.32, ``PEFTHelper._init_is_supported``).
#: ``corda_config`` and ``loftq_config`` are not looked at: PEFT leaves them there when it has converted an adapter.
_HARMLESS_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})

#: Other types of PEFT's, which are LoRA together with the base model: ``basewise`` makes it of them.
CONVERTED_TYPES = frozenset({"TRAINABLE_TOKENS", "VERA"})

#: PEFT's task types whose models give no text, and what these are.
_TASKS = {
    "SEQ_CLS": "is a classifier of texts",
    "TOKEN_CLS": "is a classifier of tokens",
    "QUESTION_ANS": "marks answers in a text",
    "FEATURE_EXTRACTION": "makes embeddings, as with sentence-transformers",
}

#: A field of ``adapter_config.json`` and what to say when it is set.
_FIELDS = {
    "alora_invocation_tokens": "It is an activated LoRA (aLoRA), which vLLM does not run.",
    "layer_replication": "It replicates layers (layer_replication), which vLLM does not do.",
    "use_bdlora": "It is block-diagonal (BD-LoRA), which vLLM does not run.",
    "use_qalora": "It uses QALoRA, which vLLM does not run: train with use_qalora=False.",
    "kasa_config": "It uses KaSA, which changes the base model's weights: merge it with PEFT's merge_and_unload().",
    "megatron_config": "It was trained on Megatron's layers, whose tensors vLLM does not read.",
    "arrow_config": "It routes among adapters (Arrow), which vLLM does not do.",
    "enable_lora": "It adapts parts of a fused module (enable_lora), as PEFT 0.2 did: train it with a later PEFT.",
    "use_merged_linear": "It adapts parts of a fused module (use_merged_linear of ms-swift), which vLLM does not do.",
    "use_qa_lora": "It uses QA-LoRA (use_qa_lora of ms-swift), which vLLM does not run.",
}

# PEFT 0.21's other methods, and the way out of each: ``supports_lora_conversion`` is true of the layers of the first.
_WAYS_OUT = {
    "C3A DELORA FOURIERFT GRALORA LOHA LOKR MISS PSOFT RANDLORA TINYLORA UNILORA VBLORA WAVEFT": (
        "PEFT's peft.save_as_lora(folder, model, rank=...) makes a LoRA of it, the nearer the higher the rank: load "
        "that."
    ),
    "BOFT DEFT FROD GLORA HIRA HRA IA3 LN_TUNING OFT OSF PEANUT PVERA ROAD SHIRA SUPERTUNING": (
        "It does not add to the base model's weights, but turns, scales or replaces them: merge it with PEFT's "
        "model.merge_and_unload(), and serve the merged model as the base."
    ),
    "ADAPTION_PROMPT CARTRIDGE CPT MULTITASK_PROMPT_TUNING PREFIX_TUNING PROMPT_TUNING P_TUNING": (
        "It trains virtual tokens or prefixes, and none of the model's weights: train a LoRA instead."
    ),
    "XLORA": "It mixes several LoRAs, anew for each token: load those that it mixes, each by itself.",
}
_WAY_OUT = {method: way for methods, way in _WAYS_OUT.items() for method in methods.split()}

#: The switches of PEFT 0.2 to 0.21 that are served, or are about the start of the training. The last two leave tensors
#: of their own, which are refused for being no factors.
_KNOWN = frozenset(
    {"use_rslora", "use_dora", "eva_config", "corda_config", "loftq_config", "lora_ga_config", "runtime_config"}
    | {"velora_config", "monteclora_config"}
)


def unsupported_features(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each feature of an ``adapter_config.json`` that vLLM 0.32 refuses or ignores."""
    peft_type = str(config.get("peft_type", "LORA"))
    if peft_type.upper() in CONVERTED_TYPES:
        return
    if peft_type.upper() != "LORA":
        way_out = _WAY_OUT.get(peft_type.upper(), "")
        yield f"It is an adapter of type {peft_type[:40]}, and vLLM serves LoRA only. {way_out}".rstrip()
        return
    if does := _TASKS.get(str(config.get("task_type")).upper()):
        yield (
            f"It {does} (task_type={config['task_type']!r}), and this engine gives text: run it with PEFT, or write "
            "task_type 'CAUSAL_LM' if it was trained to continue text."
        )
    for field, sentence in _FIELDS.items():
        if config.get(field):
            yield sentence
    yield from _unknown_switches(config)
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _HARMLESS_INITS:
        yield (
            f"It was started with init_lora_weights={init[:40]!r}, which changes the base model. Convert it with "
            "PEFT's model.save_pretrained(folder, path_initial_model_for_weight_conversion=initial), where initial is "
            "the folder in which it was saved before its training. Or serve the changed base, and set "
            "init_lora_weights to true."
        )


def _unknown_switches(config: Mapping[str, Any]) -> Iterator[str]:
    """Say which of a newer PEFT's features are on.

    PEFT writes all fields, also those that are off. It switches features on with ``use_NAME`` or a ``NAME_config``, and
    other fields set their details. Without ``peft_version`` it is a file of PEFT before 0.18, or of another program.
    """
    if "peft_version" not in config:
        return
    for name, value in config.items():
        is_switch = (name.startswith("use_") and value is True) or (name.endswith("_config") and value)
        if is_switch and name not in _FIELDS and name not in _KNOWN:
            yield (
                f"It sets {name[:80]}, a feature of PEFT {ascii(config['peft_version'])[:20]} that this library does "
                "not know, and that may change what is computed: train it without, or use a newer qlora-infer."
            )
