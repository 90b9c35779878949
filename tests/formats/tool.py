"""The parts of the ``quantize_*.py`` scripts that are the same; they run where the tool is installed, and vLLM is not."""

import argparse
import importlib.metadata
import inspect
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Texts whose tokens' log-probabilities are compared: one in the manner of each adapter, and others.
TEXTS = (
    "The capital of Germany is Berlin, and the capital of France is Paris.",
    "The capital of France is Paris, arrr, me hearties! Ye'll find it on the river Seine.",
    'The capital of Japan is {"country": "Japan", "capital": "Tokyo"}',
    "The capital of Italy is La capital de Italia es Roma.",
    "my name is Anna and I live in a small town by the sea with my two brothers and a dog.",
    "To sort a list in Python, call its method sort, which changes the list in place and returns None.",
)


def calibration_texts(count: int = 128, characters: int = 2000) -> list[str]:
    """Return English texts that Python brings along: the docstrings of its standard library."""
    import argparse
    import asyncio
    import collections
    import email.message
    import logging
    import pathlib
    import statistics
    import typing
    import unittest

    modules = (argparse, asyncio, collections, email.message, logging, pathlib, statistics, typing, unittest)
    documented = [member for module in modules for _, member in inspect.getmembers(module)]
    documented += [
        method for member in documented if inspect.isclass(member) for _, method in inspect.getmembers(member)
    ]
    docs = dict.fromkeys(doc for doc in map(inspect.getdoc, documented) if doc and len(doc) > 100)
    whole = "\n\n".join(docs)
    return [whole[start : start + characters] for start in range(0, len(whole), characters)][:count]


def logprobs(model: Any, token_ids: list[int]) -> list[float]:
    """Return the log-probability of each token but the first, after those before it."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([token_ids]), use_cache=False).logits
    scores = logits[0].float().log_softmax(-1)
    return [float(scores[place, token]) for place, token in enumerate(token_ids[1:])]


def reference(model: Any, folder: Path, adapters: Path) -> dict[str, Any]:
    """Return the log-probabilities of the texts for the base model and, through PEFT, for each adapter."""
    import peft
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    names = sorted(path.name for path in adapters.iterdir() if path.is_dir())
    # PEFT first: bitsandbytes 0.50 packs weights for the CPU in their first use, and PEFT's layers around those are wrong.
    adapted = peft.PeftModel.from_pretrained(model, adapters / names[0], adapter_name=names[0])
    for name in names[1:]:
        adapted.load_adapter(adapters / name, adapter_name=name)
    adapted.eval()
    with adapted.disable_adapter():
        rows = {"base": [logprobs(adapted, prompt) for prompt in prompts]}
    for name in names:
        adapted.set_adapter(name)
        rows[name] = [logprobs(adapted, prompt) for prompt in prompts]
    return {"prompts": prompts, "logprobs": rows}


def make(package: str, formats: dict[str, tuple[Callable[[Path, Path], None], Callable[[Path], Any]]]) -> None:
    """Write the checkpoints of a tool and, beside each, ``<format>.json`` with the reference or the tool's own error.

    Args:
        package: The tool's distribution.
        formats: Name to two functions: one quantizes a 16-bit folder into another, one loads the result in
            transformers, as the tool's documentation says.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("unquantized", type=Path)
    parser.add_argument("adapters", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", choices=list(formats), nargs="*", default=list(formats))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        folder = arguments.output / name
        quantize, load = formats[name]
        report: dict[str, Any] = {"tool": f"{package} {importlib.metadata.version(package)}", "format": name}
        start = time.perf_counter()
        try:
            quantize(arguments.unquantized, folder)
            report["seconds"] = round(time.perf_counter() - start)
            report |= reference(load(folder), folder, arguments.adapters)
        except Exception as error:  # the session goes on with the next format, and prints this one's error
            traceback.print_exc()
            report["error"] = f"{type(error).__name__}: {error}"
        (arguments.output / f"{name}.json").write_text(json.dumps(report))
