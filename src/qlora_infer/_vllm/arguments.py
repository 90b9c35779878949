"""The names of vLLM's own arguments, read without importing vLLM, and the message for an unknown one."""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from attrs import fields

from qlora_infer.config import OWN_ENGINE_ARGS, EngineConfig


def format_unknown(arguments: Mapping[str, Any]) -> str:
    """Return the message for arguments that ``QuantizedLoRAEngine`` does not have."""
    own = {"adapters", "backend", *(option.name for option in fields(EngineConfig))}
    vllms = engine_arg_names() - own
    return "; ".join(_format_unknown(name, value, own, vllms) for name, value in arguments.items())


def _format_unknown(name: str, value: object, own: Collection[str], vllms: Collection[str]) -> str:
    message = f"QuantizedLoRAEngine has no argument {name!r}"
    if name in OWN_ENGINE_ARGS:
        return f"{message}: it is set by {OWN_ENGINE_ARGS[name]}"
    shown = value if isinstance(value, int | float) else "..."  # a text may be a secret
    if name in vllms:
        return f"{message}, which is vLLM's: write engine_args={{{name!r}: {shown}}}"
    for known in difflib.get_close_matches(name, [*own, *vllms], n=1):
        return f"{message}: did you mean {known if known in own else f'engine_args={{{known!r}: ...}}'}?"
    return f"{message}: if it is an argument of vLLM, write engine_args={{{name!r}: {shown}}}"


def engine_arg_names() -> frozenset[str]:
    """Return the fields of ``EngineArgs``, read from the source of ``vllm/engine/arg_utils.py``; none without vLLM.

    To import it takes seconds. The fields are annotated in the class's body, as in any dataclass (read in vLLM 0.32.0).
    """
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return frozenset()
    try:
        source = Path(found.submodule_search_locations[0], "engine", "arg_utils.py").read_text(encoding="utf-8")
        classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    except (OSError, SyntaxError):
        return frozenset()
    bodies = [node.body for node in classes if node.name == "EngineArgs"]
    return frozenset(
        statement.target.id
        for body in bodies
        for statement in body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    )
