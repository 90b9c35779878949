"""The record of an adapter's training: its task, the model's class, and the tools."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from attrs import frozen

#: A model card's beginning, where the Hub has its tags.
MAX_CARD_BYTES = 64 << 10

#: Trainers by the tag or ``library_name`` that they write into a model card.
_TOOLS = {
    "axolotl": "Axolotl",
    "autotrain": "AutoTrain",
    "llama-factory": "LLaMA-Factory",
    "mlx": "MLX",
    "mlx-lm": "MLX",
    "ms-swift": "ms-swift",
    "nemo": "NeMo",
    "sentence-transformers": "sentence-transformers",
    "torchtune": "torchtune",
    "trl": "TRL",
    "unsloth": "Unsloth",
}
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---", re.DOTALL)


@frozen
class Training:
    """The training that an adapter's files tell of; fields are empty where they do not.

    Attributes:
        task: PEFT's task type, such as ``"CAUSAL_LM"``.
        model_class: The class of the model that it was trained on (``auto_mapping``), with its library.
        tools: The trainers that left their names.
        peft_version: The version of PEFT that saved it.
    """

    task: str = ""
    model_class: str = ""
    tools: tuple[str, ...] = ()
    peft_version: str = ""

    @classmethod
    def of(cls, config: Mapping[str, Any], metadata: Mapping[str, str], card: str = "") -> Training:
        """Read an adapter's config, the metadata of its weights, and its model card.

        PEFT 0.21 writes ``task_type``, ``peft_version`` and, without a task type, ``auto_mapping``
        (``PeftModel.save_pretrained``); Unsloth writes ``unsloth_fixed`` there.
        """
        mapping = config.get("auto_mapping")
        mapping = mapping if isinstance(mapping, Mapping) else {}
        library = _text(mapping.get("parent_library"))
        return cls(
            task=_text(config.get("task_type")),
            model_class=" of ".join(filter(None, [_text(mapping.get("base_model_class")), library])),
            tools=tuple(sorted(_tools(config, mapping, metadata, card))),
            peft_version=_text(config.get("peft_version")),
        )


def _tools(config: Mapping[str, Any], mapping: Mapping[str, Any], metadata: Mapping[str, str], card: str) -> set[str]:
    front = _FRONT_MATTER.match(card)
    words = set(re.findall(r"[\w-]+", front[1].lower())) if front else set()
    found = {tool for word, tool in _TOOLS.items() if word in words}
    base = str(config.get("base_model_name_or_path")).lower()
    if "unsloth_fixed" in mapping or base.startswith("unsloth/"):
        found.add("Unsloth")
    if metadata.get("format") == "mlx":
        found.add("MLX")
    if any(key.startswith("ss_") for key in metadata):
        found.add("kohya's sd-scripts")
    return found


def _text(value: object) -> str:
    return value[:120] if isinstance(value, str) and value.isprintable() else ""
