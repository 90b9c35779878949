"""The reader of ``adapter_config.json``, which checks the fields that vLLM computes with.

What counts as right is what vLLM 0.32.0 reads (``vllm/lora/peft_helper.py``) and what PEFT 0.21 writes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qlora_infer.display import format_names
from qlora_infer.errors import CorruptAdapterError
from qlora_infer.files.kinds.pointer import in_place_of
from qlora_infer.files.snapshot import CONFIG_NAME
from qlora_infer.sandbox.patterns import MATCH_SECONDS, first_matches, suffix_match

MAX_CONFIG_BYTES = 1 << 20
MAX_RANK = 1 << 16

# Fields of every model's config.json in transformers, and of every adapter's in PEFT.
_OF_MODEL = frozenset({"architectures", "model_type", "transformers_version"})
_OF_PEFT = frozenset({"peft_type", "r", "lora_alpha", "target_modules", "base_model_name_or_path", "task_type"})

#: Real names have some 60 characters; vLLM and this file match patterns against them.
MAX_NAME_LENGTH = 256
#: Objects and lists in one JSON text: a header has three for each of its at most 100,000 tensors.
MAX_JSON_NESTS = 400_000
#: The names that wrappers leave in those of modules: of torch.compile, FSDP and activation checkpointing.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

#: Modules times patterns, and the steps that all of these matches may take together. vLLM matches inside the
#: engine core, where everybody waits: a million matches take it some ten seconds.
MAX_MATCHES = 1_000_000
MAX_MATCH_STEPS = 50_000_000

# A key of rank_pattern or alpha_pattern that is matched in this process, and by vLLM: names, dots, and a little of
# regular expressions. A quantifier stands after a single character or class only, never after a group: (a+)+ takes for
# ever. Other keys are matched once, in a process of their own, and plain names are written in their place.
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
    if _OF_MODEL & set(config) and not _OF_PEFT & set(config):
        raise CorruptAdapterError(
            adapter,
            f"{path} is a model's own config.json ({format_names(sorted(_OF_MODEL & set(config)))}), not an adapter's: "
            "serve a whole model as the base, or copy the adapter_config.json there that PEFT wrote",
        )
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
    if other := in_place_of(content):
        raise CorruptAdapterError(adapter, f"{path} is not valid JSON: {other}")
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
    for name in ("r", "lora_alpha"):
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
    return patterns


def with_plain_names(adapter: str, config: Mapping[str, Any], modules: Collection[str]) -> Mapping[str, Any]:
    """Return a config whose patterns are cheap to match with an adapter's modules, here and in vLLM's engine core.

    It is the same one where they are so already. Other patterns are resolved as PEFT resolves them, and the plain names
    of the modules that they matched take their place. An expression in ``target_modules`` is not matched at all: the
    tensors have the modules that it matched in training, and vLLM 0.32.0 needs the field and reads no more of it.

    Raises:
        CorruptAdapterError: A pattern is no regular expression, or they would take too long.
    """
    plain = dict(config)
    if not isinstance(config.get("target_modules"), list):
        plain["target_modules"] = sorted({_last_name(module) for module in modules})
    if len(modules) * len(config.get("target_parameters") or ()) > MAX_MATCHES:
        raise CorruptAdapterError(
            adapter, f"'target_parameters' has too many names for {len(modules)} modules: write the ends of names"
        )
    names = [pattern_name(config, module) for module in modules]
    for field, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        patterns: Mapping[str, Any] = config.get(field) or {}
        if not _are_cheap(patterns, names):
            values = list(patterns.values())
            found = _first_matches(adapter, field, patterns, names)
            own = {name: config[default] if i is None else values[i] for name, i in zip(names, found, strict=True)}
            plain[field] = plain_patterns(own, config[default])
    num_patterns = len(plain.get("rank_pattern") or ()) + len(plain.get("alpha_pattern") or ())
    if len(names) * num_patterns > MAX_MATCHES:
        raise CorruptAdapterError(
            adapter,
            f"{CONFIG_NAME} has {num_patterns} patterns for {len(names)} modules, too many to match: write the rank "
            "and alpha of most modules into r and lora_alpha, and only the others into rank_pattern and alpha_pattern",
        )
    return config if plain == config else plain


def plain_patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Return patterns for the modules whose value is not the default, by their last name where that is enough.

    One key for all layers keeps a large model's patterns few, and vLLM matches each with every module.

    Args:
        values: The value of every module.
        default: The value of modules that no pattern matches.
    """
    by_last: dict[str, set[Any]] = {}
    for module, value in values.items():
        by_last.setdefault(_last_name(module), set()).add(value)

    def key(module: str) -> str:
        last = _last_name(module)
        return re.escape(last) if len(by_last[last]) == 1 else f"^{re.escape(module)}"

    return {key(module): value for module, value in values.items() if value != default}


def _last_name(module: str) -> str:
    return module.rpartition(".")[2]


def _first_matches(adapter: str, field: str, patterns: Collection[str], names: Sequence[str]) -> list[int | None]:
    try:
        return first_matches(list(patterns), names)
    except ValueError as error:
        raise CorruptAdapterError(adapter, f"{field!r} has a pattern that is no regular expression: {error}") from error
    except TimeoutError as error:
        raise CorruptAdapterError(
            adapter,
            f"{field!r} has {len(patterns)} patterns, such as {next(iter(patterns))[:80]!r}, which take more than "
            f"{MATCH_SECONDS} s to match with {len(names)} modules: write plain names",
        ) from error


def _are_cheap(patterns: Collection[str], names: Collection[str]) -> bool:
    """Return whether matching all patterns with all names takes at most ``MAX_MATCHES`` and ``MAX_MATCH_STEPS``."""
    if len(names) * len(patterns) > MAX_MATCHES or not all(map(_is_cheap, patterns)):
        return False
    # "(.*\.)?(pattern)$" is tried after each dot, and a quantifier at each length.
    steps = [sum((1 + name.count(".")) * len(name) ** power for name in names) for power in range(3)]
    num_steps = sum((1 + pattern.count("|")) * steps[_num_quantifiers(pattern)] for pattern in patterns)
    return bool(num_steps <= MAX_MATCH_STEPS)


def _is_cheap(pattern: str) -> bool:
    """Return whether a match takes at most the steps that ``_are_cheap`` counts."""
    return (
        len(pattern) <= MAX_NAME_LENGTH
        and _PATTERN.fullmatch(pattern) is not None
        and pattern.count("(") <= 1
        and _num_quantifiers(pattern) <= 2
        and _is_expression(pattern)
    )


def _is_expression(pattern: str) -> bool:
    try:
        suffix_match(pattern)
    except re.error:
        return False
    return True


def _num_quantifiers(pattern: str) -> int:
    return sum(map(pattern.count, "*+?"))


def holds_experts(config: Mapping[str, Any], module: str, *, rank: int) -> bool:
    """Return whether a module's factors are those of 3D parameters, which PEFT names by the module that has them.

    For two parameters of one module, the outer one's factors are under ``experts`` and the inner one's under
    ``experts.base_layer`` (``ParamWrapper`` in PEFT 0.21). Those of a matrix have the rank that the config names.

    Args:
        config: The adapter's config.
        module: The module.
        rank: The rank of its factors.
    """
    if not config.get("target_parameters"):
        return False
    expected = module_rank(config, module)
    is_expert = module.removesuffix(".base_layer").endswith(".experts")
    return rank % expected == 0 and (is_expert or (rank > expected and bool(_parameters(config, module))))


def module_rank(config: Mapping[str, Any], module: str) -> int:
    """Return the rank that a config names for a module."""
    rank: int = _first_match(config.get("rank_pattern"), config, module, config["r"])
    return rank


def module_alpha(config: Mapping[str, Any], module: str) -> float:
    """Return the alpha that a config names for a module."""
    alpha: float = _first_match(config.get("alpha_pattern"), config, module, config["lora_alpha"])
    return alpha


def _first_match(patterns: Mapping[str, Any] | None, config: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule for patterns: the first match wins."""
    name = pattern_name(config, module)
    matching = (value for pattern, value in (patterns or {}).items() if suffix_match(pattern).match(name))
    return next(matching, default)


def pattern_name(config: Mapping[str, Any], module: str) -> str:
    """Return the name that PEFT matches patterns with: a module's own, for bare parameters the parameter's."""
    module = ".".join(part for part in module.split(".") if part not in WRAPPERS)  # it is wrapped after PEFT named it
    if not config.get("target_parameters"):
        return module
    layer = module.removesuffix(".base_layer")
    parameters = _parameters(config, module)
    if len(parameters) == 1:
        return f"{layer}.{parameters[0]}"
    return vllms_pattern_name(module)


def _parameters(config: Mapping[str, Any], module: str) -> list[str]:
    """Return the parameters of a module that ``target_parameters`` names (``_inject_parameters`` in PEFT 0.21)."""
    layer = module.removesuffix(".base_layer")
    targets: Sequence[str] = config["target_parameters"]
    named = (target for target in targets if f".{layer}.{_last_name(target)}".endswith(f".{target}"))
    return list(dict.fromkeys(map(_last_name, named)))


def vllms_pattern_name(module: str) -> str:
    """Return the name that vLLM matches patterns with (``PEFTHelper.get_rank_and_scaling`` in 0.32.0).

    It is PEFT's where a layer of experts has both of its parameters adapted: gate and up are the inner one.
    """
    layer = module.removesuffix(".base_layer")
    if not layer.endswith(".experts"):
        return module
    return f"{layer}.down_proj" if module == layer else f"{layer}.gate_up_proj"


def scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return the scale of a module's product B A."""
    return module_alpha(config, module) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def base_model(config: Mapping[str, Any]) -> str | None:
    """Return the model that the adapter's config names as its base, if it names one."""
    name = config.get("base_model_name_or_path")
    return name[:256] if isinstance(name, str) and name and name.isprintable() else None
