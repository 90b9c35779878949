"""Adapters that PEFT itself makes, for types and fields whose tensors only it can write."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corpus.base import CONFIG
from corpus.entry import Deltas, Entry
from qlora_infer.errors import IncompatibleAdapterError

MERGE = "merge it into its base model with PEFT's merge_and_unload, or train a LoRA"
TRAIN = "train a LoRA"


@functools.cache
def network() -> Any:
    """Return the base model in transformers, with random weights."""
    import torch
    import transformers

    torch.manual_seed(29)
    sizes = {name: value for name, value in CONFIG.items() if name not in ("architectures", "model_type")}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()


def _maker(class_name: str, fields: dict[str, Any], *, is_served: bool) -> Callable[[Path], Deltas]:
    def make(folder: Path) -> Deltas:
        import copy

        import peft
        import torch

        config = getattr(peft, class_name)(**{"task_type": "CAUSAL_LM", **fields})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(copy.deepcopy(network()), config)
            torch.manual_seed(31)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.requires_grad and any(part in name for part in ("lora_", "hada_", "vera_")):
                        parameter.normal_(0.0, 0.05)
                deltas = {
                    module_name.removeprefix("base_model.model."): module.get_delta_weight("default").double().numpy()
                    for module_name, module in model.named_modules()
                    if is_served and hasattr(module, "get_delta_weight")
                }
            model.save_pretrained(folder, save_embedding_layers=False)
        return deltas

    return make


def of_peft(
    name: str,
    kind: str,
    origin: str,
    *says: str,
    way_out: str = "",
    class_name: str = "LoraConfig",
    **fields: Any,
) -> Entry:
    """Return an entry of an adapter that PEFT saves with these fields; it is served where nothing is said."""
    make = _maker(class_name, fields, is_served=not says)
    return Entry(
        name,
        kind,
        origin,
        make,
        error=IncompatibleAdapterError if says else None,
        says=says,
        way_out=way_out,
        is_read_by_peft=False,
        needs=("torch", "peft"),
    )


ATTENTION = ["q_proj", "v_proj"]
_lora = functools.partial(of_peft, target_modules=ATTENTION)

ENTRIES = [
    _lora(
        "dora",
        "DoRA, on a CPU",
        "PEFT's use_dora",
        use_dora=True,
    ),
    _lora(
        "lora_bias",
        "trained LoRA biases, on a CPU",
        "PEFT's lora_bias",
        lora_bias=True,
    ),
    _lora(
        "bias_all",
        "LoRA and all biases",
        "PEFT's bias",
        bias="all",
    ),
    _lora(
        "pissa",
        "started from the base's largest directions",
        "PEFT's PiSSA",
        "It was started with init_lora_weights='pissa', which changes the base model. Convert it with PEFT's model.save_pretrained(folder, path_initial_model_for_weight_conversion=initial), where initial is the folder in which it was saved before its training. Or serve the changed base, and set init_lora_weights to true.",
        way_out="convert it with path_initial_model_for_weight_conversion",
        init_lora_weights="pissa",
    ),
    _lora(
        "olora",
        "started from an orthonormal basis of the base",
        "PEFT's OLoRA",
        "It was started with init_lora_weights='olora', which changes the base model. Convert it with PEFT's model.save_pretrained(folder, path_initial_model_for_weight_conversion=initial), where initial is the folder in which it was saved before its training. Or serve the changed base, and set init_lora_weights to true.",
        way_out="convert it with path_initial_model_for_weight_conversion",
        init_lora_weights="olora",
    ),
    of_peft(
        "adalora",
        "AdaLoRA",
        "PEFT",
        class_name="AdaLoraConfig",
        target_modules=ATTENTION,
        init_r=8,
        target_r=4,
        total_step=10,
    ),
    of_peft(
        "vera",
        "VeRA",
        "PEFT",
        class_name="VeraConfig",
        target_modules=["q_proj"],
        r=8,
    ),
    of_peft(
        "ia3",
        "IA³",
        "PEFT",
        "It is an adapter of type IA3, and vLLM serves LoRA only. It does not add to the base model's weights, but turns, scales or replaces them: merge it with PEFT's model.merge_and_unload(), and serve the merged model as the base.",
        way_out=MERGE,
        class_name="IA3Config",
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
    of_peft(
        "loha",
        "LoHa",
        "PEFT, LyCORIS",
        class_name="LoHaConfig",
        target_modules=ATTENTION,
        r=4,
    ),
    of_peft(
        "lokr",
        "LoKr",
        "PEFT, LyCORIS",
        "It is an adapter of type LOKR, and vLLM serves LoRA only. PEFT's peft.save_as_lora(folder, model, rank=...) makes a LoRA of it, the nearer the higher the rank: load that.",
        way_out=MERGE,
        class_name="LoKrConfig",
        target_modules=ATTENTION,
        r=4,
    ),
    of_peft(
        "oft",
        "OFT",
        "PEFT",
        "It is an adapter of type OFT, and vLLM serves LoRA only. It does not add to the base model's weights, but turns, scales or replaces them: merge it with PEFT's model.merge_and_unload(), and serve the merged model as the base.",
        way_out=MERGE,
        class_name="OFTConfig",
        target_modules=ATTENTION,
        oft_block_size=16,
    ),
    of_peft(
        "norms",
        "tuned norms",
        "PEFT's LN Tuning",
        "It is an adapter of type LN_TUNING, and vLLM serves LoRA only. It does not add to the base model's weights, but turns, scales or replaces them: merge it with PEFT's model.merge_and_unload(), and serve the merged model as the base.",
        way_out=MERGE,
        class_name="LNTuningConfig",
        target_modules=["input_layernorm"],
    ),
    of_peft(
        "prompt_tuning",
        "prompt tuning",
        "PEFT",
        "It is an adapter of type PROMPT_TUNING, and vLLM serves LoRA only. It trains virtual tokens or prefixes, and none of the model's weights: train a LoRA instead.",
        way_out=TRAIN,
        class_name="PromptTuningConfig",
        num_virtual_tokens=4,
    ),
    of_peft(
        "prefix_tuning",
        "prefix tuning",
        "PEFT",
        "It is an adapter of type PREFIX_TUNING, and vLLM serves LoRA only. It trains virtual tokens or prefixes, and none of the model's weights: train a LoRA instead.",
        way_out=TRAIN,
        class_name="PrefixTuningConfig",
        num_virtual_tokens=4,
    ),
    of_peft(
        "p_tuning",
        "P-tuning",
        "PEFT",
        "It is an adapter of type P_TUNING, and vLLM serves LoRA only. It trains virtual tokens or prefixes, and none of the model's weights: train a LoRA instead.",
        way_out=TRAIN,
        class_name="PromptEncoderConfig",
        num_virtual_tokens=4,
        encoder_hidden_size=16,
    ),
]
