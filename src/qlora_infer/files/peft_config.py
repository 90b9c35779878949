"""The reader of ``adapter_config.json``, which checks the fields that vLLM computes with.

What counts as right is what vLLM 0.32.0 reads (``vllm/lora/peft_helper.py``) and what PEFT 0.21 writes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from qlora_infer.errors import CorruptAdapterError
from qlora_infer.files.snapshot import CONFIG_NAME

MAX_CONFIG_BYTES = 1 << 20
MAX_RANK = 1 << 16

#: Real names have some 60 characters; vLLM and this file match patterns against them.
MAX_NAME_LENGTH = 256
#: Objects and lists in one JSON text: a header has three for each of its at most 100,000 tensors.
MAX_JSON_NESTS = 400_000
#: Modules times patterns, and the steps that all of these matches may take together. vLLM matches inside the
#: engine core, where everybody waits: a million matches take it some ten seconds.
MAX_MATCHES = 1_000_000
MAX_MATCH_STEPS = 50_000_000

# What a key of rank_pattern or alpha_pattern may be: names, dots, and a little of regular expressions. A
# quantifier stands after a single character or class only, never after a group: (a+)+ takes for ever.
_PATTERN = re.compile(r"\^?(?:(?:[\w.\-]|\\[.dw\-]|\[[\w.\-]+\])(?:[*+?]\??)?|[()|])+\$?")


def read_config(adapter: str, path: Path) -> dict[str, Any]:
    """Read and check an adapter's config.

    Raises:
        CorruptAdapterError: It is malformed, or a field has a value that vLLM would misread.
    """
    with path.open("rb") as file:
        content = file.read(MAX_CONFIG_BYTES + 1)
    if len(content) > MAX_CONFIG_BYTES:
        raise CorruptAdapterError(
            adapter, f"{path} is too large: an adapter's config has at most {MAX_CONFIG_BYTES} bytes"
        )
    config = parse_json(adapter, path, content)
    if not isinstance(config, dict):
        raise CorruptAdapterError(adapter, f"{path} must hold a JSON object, not a {type(config).__name__}")
    _check_types(adapter, config)
    return config


def parse_json(adapter: str, path: Path, content: bytes, *, any_keys: bool = False) -> Any:
    """Parse JSON that may be hostile: deep, repeating its keys, with numbers that are none.

    Its keys can be shown in messages: they hold no control characters and no broken Unicode.

    Args:
        adapter: The adapter's name, for messages.
        path: Where the JSON is from, for messages.
        content: The JSON.
        any_keys: Keys may hold any characters; those of a vocabulary are tokens, and a token may be a line break.

    Raises:
        CorruptAdapterError: It is not such JSON as an adapter may have.
    """
    if content.count(b"{") + content.count(b"[") > MAX_JSON_NESTS:
        raise CorruptAdapterError(adapter, f"{path} has more than {MAX_JSON_NESTS} objects and lists")
    try:
        hook = partial(_without_repeats, any_keys=any_keys)
        return json.loads(content.decode(), object_pairs_hook=hook, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CorruptAdapterError(adapter, f"{path} is not valid JSON: {error}") from error


def _without_repeats(pairs: list[tuple[str, Any]], *, any_keys: bool) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands in it twice")
    if not any_keys and not all(key.isprintable() for key in result):
        raise ValueError("a key holds characters that cannot be shown")
    _check_metadata(result.get("__metadata__"))
    return result


def _check_metadata(metadata: object) -> None:
    """Check the one key of a safetensors header that is no tensor; vLLM's reader ends on another value."""
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("__metadata__ must map texts to texts")
    for text in metadata.values():
        text.encode()  # half of a surrogate pair is a ValueError, here and there


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _check_types(adapter: str, config: Mapping[str, Any]) -> None:
    """Check the fields that vLLM takes as they come, where another type would be misread without a word."""
    for name, kinds, words in (
        ("peft_type", str, "text"),
        ("use_rslora", (bool, type(None)), "true or false"),  # the text "false" would be true
        ("init_lora_weights", (bool, str, type(None)), "true, false or a name"),
    ):
        value = config.get(name, "" if kinds is str else None)
        if not isinstance(value, kinds) or (isinstance(value, str) and not value.isprintable()):
            raise CorruptAdapterError(adapter, f"{name!r} must be {words}, got {ascii(value)[:40]}")


def largest_rank(adapter: str, config: Mapping[str, Any]) -> int:
    """Return the largest rank that a LoRA config names, and check every field that vLLM computes with.

    Raises:
        CorruptAdapterError: A field is missing or has a value that it may not have.
    """
    # One of bare parameters may name no modules; that it is not served is said in features.py.
    needed = ("r", "lora_alpha") if config.get("target_parameters") else ("r", "lora_alpha", "target_modules")
    for name in needed:
        if config.get(name) is None:
            raise CorruptAdapterError(adapter, f"{CONFIG_NAME} has no {name!r}")
    targets = config.get("target_modules")
    if targets is not None and not isinstance(targets, str) and not _is_list_of(targets, str):
        raise CorruptAdapterError(
            adapter, f"'target_modules' must be a list of names or a pattern, got {str(targets)[:80]}"
        )
    parameters = config.get("target_parameters")
    if parameters is not None and not _is_list_of(parameters, str):
        raise CorruptAdapterError(adapter, f"'target_parameters' must be a list of names, got {str(parameters)[:80]}")
    _check_number(adapter, "lora_alpha", config["lora_alpha"])
    for pattern, alpha in _check_pattern(adapter, config, "alpha_pattern").items():
        _check_number(adapter, f"alpha_pattern[{pattern!r}]", alpha)
    ranks = [_check_rank(adapter, "r", config["r"])]
    for pattern, rank in _check_pattern(adapter, config, "rank_pattern").items():
        ranks.append(_check_rank(adapter, f"rank_pattern[{pattern!r}]", rank))
    return max(ranks)


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _check_rank(adapter: str, name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise CorruptAdapterError(adapter, f"{name!r} must be a whole number of at least 1, got {str(value)[:40]!r}")
    return value


def _check_number(adapter: str, name: str, value: object) -> None:
    # "not <=" is true of NaN, too.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 1e9:
        raise CorruptAdapterError(adapter, f"{name!r} must be a finite number, got {str(value)[:40]!r}")


def _check_pattern(adapter: str, config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise CorruptAdapterError(adapter, f"{name!r} must map patterns to numbers, got {str(patterns)[:40]!r}")
    for pattern in patterns:
        # vLLM matches it as a regular expression inside the engine core, where one that backtracks for ever
        # would stop everybody.
        if not _is_cheap(pattern):
            raise CorruptAdapterError(adapter, f"{name!r} has the pattern {pattern[:80]!r}, which names no modules")
        try:
            re.compile(pattern)
        except re.error as error:
            raise CorruptAdapterError(adapter, f"{name!r} has the pattern {pattern[:80]!r}: {error}") from error
    return patterns


def _is_cheap(pattern: str) -> bool:
    """Return whether a match takes at most the steps that ``check_matches`` counts."""
    return (
        len(pattern) <= MAX_NAME_LENGTH
        and _PATTERN.fullmatch(pattern) is not None
        and pattern.count("(") <= 1
        and _num_quantifiers(pattern) <= 2
    )


def _num_quantifiers(pattern: str) -> int:
    return sum(map(pattern.count, "*+?"))


def check_matches(adapter: str, names: Collection[str], config: Mapping[str, Any]) -> None:
    """Bound the work of matching every module's name with every pattern, here and in vLLM.

    Raises:
        CorruptAdapterError: It would take too long.
    """
    patterns = [*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]
    # vLLM and PEFT match "(.*\.)?(pattern)$": it is tried after each dot, and a quantifier at each length.
    steps = [sum((1 + name.count(".")) * len(name) ** power for name in names) for power in range(3)]
    num_steps = sum((1 + pattern.count("|")) * steps[_num_quantifiers(pattern)] for pattern in patterns)
    if len(names) * len(patterns) > MAX_MATCHES or num_steps > MAX_MATCH_STEPS:
        raise CorruptAdapterError(
            adapter,
            f"{CONFIG_NAME} has {len(patterns)} patterns for {len(names)} modules, too many to match: write "
            "plain names into rank_pattern and alpha_pattern, and only those whose rank or alpha differs",
        )


def holds_experts(config: Mapping[str, Any], module: str) -> bool:
    """Return whether a module's factors are those of 3D parameters, which PEFT names by the module that has them.

    For two parameters of one module, the outer one's factors are under ``experts`` and the inner one's under
    ``experts.base_layer`` (``ParamWrapper`` in PEFT 0.21).
    """
    if not config.get("target_parameters"):
        return False
    return module.removesuffix(".base_layer").endswith(".experts")


def module_rank(config: Mapping[str, Any], module: str) -> int:
    """Return the rank that a config names for a module."""
    rank: int = _first_match(config.get("rank_pattern"), config, module, config["r"])
    return rank


def module_alpha(config: Mapping[str, Any], module: str) -> float:
    """Return the alpha that a config names for a module."""
    alpha: float = _first_match(config.get("alpha_pattern"), config, module, config["lora_alpha"])
    return alpha


def _first_match(patterns: Mapping[str, Any] | None, config: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule for patterns: the first match wins; those of 3D parameters are matched by the parameters' names."""
    name = module
    if holds_experts(config, module):
        layer = module.removesuffix(".base_layer")
        name = f"{layer}.down_proj" if module == layer else f"{layer}.gate_up_proj"
        if len(config["target_parameters"]) == 1:
            name = f"{layer}.{str(config['target_parameters'][0]).rpartition('.')[2]}"
    matching = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", name))
    return next(matching, default)


def scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return what a module's product B A is multiplied with."""
    return module_alpha(config, module) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def base_model(config: Mapping[str, Any]) -> str | None:
    """Return the model that the adapter's config names as its base, if it names one."""
    name = config.get("base_model_name_or_path")
    return name[:256] if isinstance(name, str) and name and name.isprintable() else None
