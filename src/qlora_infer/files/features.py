"""The features of PEFT that vLLM lacks, each with the message for an adapter that needs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

#: Ways to start the training that leave the base model as it is (vLLM 0.32, ``PEFTHelper._init_is_supported``).
#: ``corda_config`` and ``loftq_config`` are not looked at: PEFT leaves them there when it has converted an adapter.
_HARMLESS_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})

#: Other types of PEFT's, which are LoRA together with the base model: ``basewise`` makes it of them.
CONVERTED_TYPES = frozenset({"TRAINABLE_TOKENS", "VERA"})

#: A field of ``adapter_config.json`` and what to say when it is set.
_FIELDS = {
    "use_dora": "It uses DoRA, whose magnitudes vLLM does not apply: train with use_dora=False.",
    "alora_invocation_tokens": "It is an activated LoRA (aLoRA), which vLLM does not run.",
    "layer_replication": "It replicates layers (layer_replication), which vLLM does not do.",
    "use_bdlora": "It is block-diagonal (BD-LoRA), which vLLM does not run.",
    "use_qalora": "It uses QALoRA, which vLLM does not run: train with use_qalora=False.",
    "megatron_config": "It was trained on Megatron's layers, whose tensors vLLM does not read.",
    "arrow_config": "It routes among adapters (Arrow), which vLLM does not do.",
}


def unsupported_features(config: Mapping[str, Any]) -> Iterator[str]:
    """Say, in a sentence each, what an ``adapter_config.json`` asks for that vLLM 0.32 refuses or ignores."""
    peft_type = str(config.get("peft_type", "LORA"))
    if peft_type.upper() in CONVERTED_TYPES:
        return
    if peft_type.upper() != "LORA":
        yield f"It is a {peft_type[:40]} adapter, and vLLM serves LoRA only."
        return
    for field, sentence in _FIELDS.items():
        if config.get(field):
            yield sentence
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _HARMLESS_INITS:
        yield (
            f"It was started with init_lora_weights={init[:40]!r}, which changes the base model: convert it with "
            "PEFT's path_initial_model_for_weight_conversion."
        )
