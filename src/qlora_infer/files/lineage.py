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

# Where caches put a model. The Hub's has org/name as models--org--name/snapshots/COMMIT; ModelScope's writes ___ for a
# dot; Kaggle's has a model's size and version behind its name: qwen2.5/transformers/0.5b-instruct/1.
_HUB_CACHE = re.compile(r"(?:^|/)models--([^/]+)(?=/|$)")
_KAGGLE_MODEL = re.compile(
    r"(?:^|/)(?:kaggle/input|kagglehub/models)/(?:[^/]+/){0,2}?([^/]+)"
    r"/(?:flax|gguf|jax|keras|other|pytorch|safetensors|transformers)/([^/]+)/[0-9]+(?=/|$)",
    re.IGNORECASE,
)


def lineage(trained_on: str | None, served: str) -> Lineage:
    """Compare the name of the model that an adapter was trained on with the name of the one that is served.

    Names are all there is to compare: an adapter holds no trace of its model's weights.

    Args:
        trained_on: ``base_model_name_or_path`` of the adapter: a Hub id, or a folder, also one in a cache.
        served: The Hub id or folder of the model.

    Example:
        >>> lineage("meta-llama/Llama-3.1-8B-Instruct", "hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4")
        'quantized'
        >>> lineage("mistralai/Mistral-7B-v0.3", "meta-llama/Llama-3.1-8B")
        'other'
    """
    if not trained_on:
        return "unknown"
    trained_on, served = _name(trained_on), _name(served)
    if trained_on == served:
        return "same"
    one, other = _stem(trained_on), _stem(served)
    return "quantized" if one == other or one.endswith(f"-{other}") or other.endswith(f"-{one}") else "other"


def _name(model: str) -> str:
    """Return a model's name in lower case: for a folder in a cache, the name that the cache made the folder from."""
    path = model.replace("\\", "/").rstrip("/").lower()
    if cached := _HUB_CACHE.search(path):
        return cached[1].replace("--", "/")
    if uploaded := _KAGGLE_MODEL.search(path):
        name, variation = uploaded.groups()
        return name if variation == "default" else f"{name}-{variation}"
    return path.replace("___", ".")


def _stem(name: str) -> str:
    """Return the last part of a name, without the words that describe its build.

    ``Llama-3.1`` is also written ``Llama3.1``, and ``llama-3-1`` on Kaggle, where names of data sets have no dots.
    """
    stem = PurePosixPath(name).name
    while (shorter := _BUILD.sub("", stem)) != stem:
        stem = shorter
    return re.sub(r"(?<=[a-z])[-_](?=[0-9])", "", stem).replace(".", "-")
