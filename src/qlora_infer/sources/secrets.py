"""The removal of secrets from texts and from other libraries' errors."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from urllib.parse import unquote

#: The Hub's tokens look so, wherever they come from, and the environment may have another kind.
HUB_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def redacted(text: str, secrets: Iterable[str | None] = ()) -> str:
    """Return the text with asterisks for secrets: the given ones, the environment's, and the Hub's tokens."""
    for secret in (*secrets, *map(os.environ.get, TOKEN_VARIABLES)):
        if secret:
            text = text.replace(secret, "***")
    return HUB_TOKEN.sub("***", text)


def without_secrets(error: BaseException, secrets: Iterable[str]) -> BaseException | None:
    """Return the error to raise from, or ``None`` if it or an error that led to it contains a secret.

    A library may show a header, or the URL that it asked for, in its own way of quoting.
    """
    secrets = [secret for secret in secrets if secret]
    chain, seen = [error], set[int]()
    while chain:
        link = chain.pop()
        text = f"{link} {link!r}"
        if any(secret in text or unquote(secret) in unquote(text) for secret in secrets):
            return None
        seen.add(id(link))
        chain += [e for e in (link.__cause__, link.__context__) if e is not None and id(e) not in seen]
    return error
