"""The relation of the model that an adapter was trained on to the one that is served."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Literal

#: ``"same"`` name, another ``"quantized"`` build of the same model, some ``"other"`` model, or ``"unknown"``.
Lineage = Literal["same", "quantized", "other", "unknown"]

# What people put into a repository's name for a quantized or converted build of a model.
_BUILD = re.compile(
    r"""[-_.](?:
        awq | gptq | gguf | ggml | exl2 | hqq | eetq | aqlm | marlin | bnb | bitsandbytes | nf4 | fp4 | fp8
        | fp16 | bf16 | quantized | unsloth | dynamic | int[48] | [48]-?bits? | w[48]a(?:8|16)
        | q[2-8](?:_[0-9a-z]+)* | g(?:32|64|128) | hf | none
    )(?=$|[-_.])""",
    re.IGNORECASE | re.VERBOSE,
)


def lineage(trained_on: str | None, served: str) -> Lineage:
    """Compare the name of the model that an adapter was trained on with the name of the one that is served.

    Names are all there is to compare: an adapter holds no trace of its model's weights.

    Args:
        trained_on: ``base_model_name_or_path`` of the adapter.
        served: The Hub id or folder of the model.

    Example:
        >>> lineage("meta-llama/Llama-3.1-8B-Instruct", "hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4")
        'quantized'
        >>> lineage("mistralai/Mistral-7B-v0.3", "meta-llama/Llama-3.1-8B")
        'other'
    """
    if not trained_on:
        return "unknown"
    if trained_on.rstrip("/").lower() == served.rstrip("/").lower():
        return "same"
    one, other = _stem(trained_on), _stem(served)
    return "quantized" if one == other or one.endswith(f"-{other}") or other.endswith(f"-{one}") else "other"


def _stem(name: str) -> str:
    """Return the last part of a name, without the words that describe its build."""
    stem = PurePosixPath(name.replace("\\", "/").rstrip("/")).name.lower()
    while (shorter := _BUILD.sub("", stem)) != stem:
        stem = shorter
    return stem
