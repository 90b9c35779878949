"""The generation defaults in ``generation_config.json``, as vLLM takes them from a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qlora_infer.files.added_tokens import as_id

#: vLLM 0.32.0 has room for 128 of one request (MAX_NUM_STOP_TOKEN_IDS), and its caller may name some, too.
MAX_STOP_TOKEN_IDS = 64


def _is_number(value: object, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _is_whole(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < 1 << 31


# The fields, the values that SamplingParams allows for each, and how to say so. vLLM computes in float32, in which a
# smaller or larger repetition_penalty could become zero or infinity.
_FIELDS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "repetition_penalty": (lambda value: _is_number(value, 1e-6, 1e6), "a number above 0"),
    "presence_penalty": (lambda value: _is_number(value, -2, 2), "a number from -2 to 2"),
    "frequency_penalty": (lambda value: _is_number(value, -2, 2), "a number from -2 to 2"),
    "temperature": (lambda value: _is_number(value, 0, 2), "a number from 0 to 2"),
    "top_k": (lambda value: _is_whole(value, -1), "a whole number of at least 1, or 0 for all tokens"),
    "top_p": (lambda value: _is_number(value, 0, 1) and value != 0, "a number above 0 and at most 1"),
    "min_p": (lambda value: _is_number(value, 0, 1), "a number from 0 to 1"),
    "max_new_tokens": (lambda value: _is_whole(value, 1), "a whole number of at least 1"),
}


def sampling_defaults(config: Mapping[str, Any]) -> dict[str, float]:
    """Return the fields of ``SamplingParams`` that a generation config sets.

    As in vLLM ``do_sample`` plays no part: with ``do_sample=false`` and ``temperature=0.6`` vLLM samples at 0.6.

    Raises:
        ValueError: A field has a value that vLLM does not allow.
    """
    defaults = {}
    for name, (is_allowed, words) in _FIELDS.items():
        value = config.get(name)
        if value is None:
            continue
        if not is_allowed(value):
            raise ValueError(f"{name!r} must be {words}, got {format_value(value)}")
        defaults["max_tokens" if name == "max_new_tokens" else name] = value
    return defaults


def stop_token_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the ids of ``eos_token_id``, a number or a list, each once.

    Raises:
        ValueError: It holds something else, or too many.
    """
    value = config.get("eos_token_id")
    ids: list[Any] = [] if value is None else value if isinstance(value, list) else [value]
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise ValueError(f"'eos_token_id' has {len(ids)} ids, {MAX_STOP_TOKEN_IDS} are allowed")
    for item in ids:
        if as_id(item) is None:
            raise ValueError(f"'eos_token_id' must be a token's id or a list of such, got {format_value(item)}")
    return tuple(dict.fromkeys(ids))


def format_value(value: object) -> str:
    """Format a value for a message; a list or object, which may be large, only by its type."""
    return ascii(value)[:40] if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"
