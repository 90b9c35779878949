"""The tokens that a tokenizer's files add to its vocabulary, in transformers' three formats."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

#: Gemma 3 has 6,415.
MAX_ADDED_TOKENS = 100_000
MAX_TOKEN_LENGTH = 1024
MAX_TOKEN_ID = (1 << 31) - 1
#: Parts of a tokenizer.json looked at: all of Gemma 3's would be some 4 million, and its added tokens come first.
MAX_STEPS = 5_000_000
MAX_PART_BYTES = 16 << 20

# A whole string, an unfinished one, or what gives the text its structure. Nothing in it is tried twice.
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*+"|["{}\[\]:,]', re.DOTALL)


def as_id(value: object) -> int | None:
    """Return the value if it is a number that a token can have."""
    return value if type(value) is int and 0 <= value <= MAX_TOKEN_ID else None


def read_encoder(content: Mapping[str, object]) -> dict[str, int]:
    """Read added_tokens.json, ``{token: id}``.

    Raises:
        ValueError: A token or an id is something else.
    """
    return _check(content.items())


def read_decoder(content: object) -> dict[str, int]:
    """Read ``added_tokens_decoder`` of tokenizer_config.json, ``{"id": {"content": token, ...}}``.

    Raises:
        ValueError: It is something else.
    """
    if not isinstance(content, dict) or not all(isinstance(token, dict) for token in content.values()):
        raise ValueError("'added_tokens_decoder' must map ids to objects")
    return _check((token.get("content"), _parsed(key)) for key, token in content.items())


def read_list(content: object) -> dict[str, int]:
    """Read ``added_tokens`` of tokenizer.json, ``[{"id": id, "content": token, ...}]``.

    Raises:
        ValueError: It is something else.
    """
    if not isinstance(content, list) or not all(isinstance(token, dict) for token in content):
        raise ValueError("'added_tokens' must be a list of objects")
    return _check((token.get("content"), token.get("id")) for token in content)


def _parsed(key: str) -> int | None:
    return int(key) if key.isascii() and key.isdigit() and len(key) <= 10 else None


def _check(pairs: Iterable[tuple[object, object]]) -> dict[str, int]:
    tokens = {}
    for content, index in pairs:
        if not isinstance(content, str) or not 1 <= len(content) <= MAX_TOKEN_LENGTH:
            raise ValueError(f"an added token must be a text of 1 to {MAX_TOKEN_LENGTH} characters")
        if (number := as_id(index)) is None:
            raise ValueError(f"the added token {content[:80]!a} must have an id from 0 to {MAX_TOKEN_ID}")
        tokens[content] = number
        if len(tokens) > MAX_ADDED_TOKENS:
            raise ValueError(f"it adds more than {MAX_ADDED_TOKENS} tokens")
    return tokens


def added_tokens_part(content: bytes) -> bytes:
    """Find the value of ``added_tokens`` in a tokenizer.json, ``[]`` where there is none.

    The rest of the file, a vocabulary and its merges, would take some ten times its size in memory when parsed, and
    nobody needs it. In a file that tokenizers has written it stands behind, and is not even looked at.

    Raises:
        ValueError: The file is no JSON object as far as it was looked at, or too large a one.
    """
    depth, before, start = 0, b"", None
    for step, match in enumerate(_TOKEN.finditer(content)):
        token = match[0]
        depth += (token in (b"{", b"[")) - (token in (b"}", b"]"))
        if step > MAX_STEPS or token == b'"' or (step == 0 and token != b"{"):
            break
        if token == b":" and depth == 1 and before == b'"added_tokens"':
            start = match.end()
        elif start is not None and (depth == 0 or (token == b"," and depth == 1)):
            return _bounded(content[start : match.start()])
        elif depth == 0:
            return b"[]"
        before = token
    raise ValueError("it is no whole JSON object, or has too many parts")


def _bounded(part: bytes) -> bytes:
    if len(part) > MAX_PART_BYTES:
        raise ValueError(f"'added_tokens' has {len(part)} bytes, {MAX_PART_BYTES} are allowed")
    return part
