"""The vocabulary of a base model, read from its ``tokenizer.json`` without transformers.

The format is tokenizers 0.22: ``model.vocab`` maps tokens to ids, or lists them with their scores (Unigram), and
``added_tokens`` has the others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from qlora_infer.errors import ModelNotFoundError
from qlora_infer.sources.repository import Repository

TOKENIZER_NAME = "tokenizer.json"
MAX_TOKENIZER_BYTES = 64 << 20


def read_vocabulary(model: str, *, revision: str | None = None, token: str | None = None) -> Mapping[str, int] | None:
    """Return the tokens of a model's tokenizer and their ids; ``None`` where its files do not tell.

    Args:
        model: A folder, or ``"org/model"``, whose config could be read.
        revision: A branch, tag or commit; ``None`` for the default branch.
        token: The Hub's access token; ``None`` for the one that ``HF_TOKEN`` or ``hf auth login`` left.
    """
    folder = Path(os.path.expanduser(model))  # noqa: PTH111
    try:
        path = folder / TOKENIZER_NAME if folder.is_dir() else _download(Repository(model, revision, token))
        if not path.is_file() or path.stat().st_size > MAX_TOKENIZER_BYTES:
            return None
        return _tokens(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return None


def _tokens(content: Mapping[str, Any]) -> dict[str, int]:
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    return {str(token): int(index) for token, index in (vocabulary | added).items()}


def _download(repository: Repository) -> Path:
    def choose(paths: list[str]) -> list[str]:
        if TOKENIZER_NAME not in paths:
            raise ModelNotFoundError(f"{repository} has no {TOKENIZER_NAME}")
        return [TOKENIZER_NAME]

    return repository.fetch(
        cached=partial(repository.cached, TOKENIZER_NAME),
        choose=choose,
        fail=lambda _, message: ModelNotFoundError(f"model {repository.repo_id}: {message}"),
        is_one_file=True,
    )
