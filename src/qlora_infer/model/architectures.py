"""The survey of the modules that vLLM adapts in each architecture (``architectures.json``)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from attrs import field, frozen

from qlora_infer.model.modules import Renames

FILE_NAME = "architectures.json"


@frozen
class Architecture:
    """The modules that vLLM adapts in the models of an architecture.

    Attributes:
        model: vLLM's class.
        lora: Whether vLLM has LoRA for it at all.
        renames: From a checkpoint's names to the running model's.
        embeddings: Embeddings and heads that are adapted, by the last part of their names.
        left_out: Beginnings of names, in the running model, of parts whose factors are not applied.
        adapted: Kinds of modules that are adapted (``kind_of``); empty where the class was not built for the survey.
        unadapted: Kinds that are not, and their layers' classes.
        experts: ``"stacked"`` where vLLM holds a layer's experts as PEFT names 3D parameters; the names of the
            projections of one expert, in vLLM's order, where it holds them one by one; empty without experts.
        fused: Kinds that vLLM holds in one, by the one's kind, where an adapter may have either.
        reason: Why the class was not built; empty where it was.
        unlisted: Kinds whose LoRA layers do not tell their sizes, and why.
    """

    model: str
    lora: bool = True
    renames: Renames = field(factory=Renames)
    embeddings: Sequence[str] = ()
    left_out: Sequence[str] = ()
    adapted: Sequence[str] = ()
    unadapted: Mapping[str, str] = field(factory=dict)
    experts: str | Sequence[str] = ()
    fused: Mapping[str, Sequence[str]] = field(factory=dict)
    reason: str = ""
    unlisted: Mapping[str, str] = field(factory=dict)

    @property
    def kinds(self) -> set[str]:
        """All kinds of modules that were found."""
        return {*self.adapted, *self.unadapted}


def find(name: str) -> Architecture | None:
    """Return the entry of an architecture, or ``None``."""
    record = _read()["architectures"].get(name)
    if record is None:
        return None
    return Architecture(**{**record, "renames": Renames(**record.get("renames", {}))})


def vllm_version() -> str:
    """Return the version of vLLM that the file is about."""
    return str(_read()["vllm"])


def kind_of(module: str) -> str:
    """Return a module's name without its place: the last two parts that are no numbers, behind no wrapper.

    Example:
        >>> kind_of("model.layers.3.self_attn.q_proj"), kind_of("language_model.lm_head")
        ('self_attn.q_proj', 'lm_head')
    """
    *_, last = parts = [part for part in module.split(".") if not part.isdigit() and part != "base_layer"] or [module]
    if len(parts) == 1 or parts[-2] in _PLACES:
        return last
    return f"{parts[-2]}.{last}"


#: Where modules stand in a model of several parts, which differs from class to class.
_PLACES = frozenset({"model", "language_model", "text_model", "transformer", "thinker", "llm", "layers", "backbone"})


@cache
def _read() -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(files("qlora_infer.model").joinpath(FILE_NAME).read_text())
    return found
