"""A model's ``config.json`` and the shapes of its tensors, read from a folder or the Hub without trust."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from qlora_infer.errors import CorruptAdapterError, ModelNotFoundError
from qlora_infer.files.safetensors import MAX_DIMENSION, read_header
from qlora_infer.model.packed import Shape
from qlora_infer.quantization.checkpoint import QUANTIZATION_FILES, complete, quantization_config
from qlora_infer.sources.repository import Repository

#: A ``config.json`` has some kilobytes, or a few megabytes where it lists every expert; the largest index, 10 MB.
MAX_JSON_BYTES, MAX_INDEX_BYTES = 16 << 20, 64 << 20
MAX_JSON_DEPTH = 100

#: Which file holds which tensor, of a checkpoint of several files.
INDEX_NAME = "model.safetensors.index.json"


def read_model_config(
    model: str, *, revision: str | None, token: str | None, config_source: str | None = None
) -> dict[str, Any]:
    """Read a model's ``config.json``, from its folder or the Hub, completed by the files beside it on quantization.

    Args:
        model: A folder, ``"org/model"``, or a GGUF file (``"org/model-GGUF:Q4_K_M"``).
        revision: A branch, tag or commit on the Hub; a folder has none, and it is not looked at.
        token: The Hub's access token; ``None`` for the one that ``HF_TOKEN`` or ``hf auth login`` left.
        config_source: The model whose ``config.json`` a GGUF file is read with; by default that beside the file.

    Raises:
        ModelNotFoundError: There is no such model, it has no readable ``config.json``, or the token does not open it.
        QuantizationError: The weights are packed, and no file says how, or a field is not what its tool writes.
    """
    _check_name(model)
    if home := _home_of_gguf(model):
        config = read_model_config(config_source or home, revision=None if config_source else revision, token=token)
        return {**config, "quantization_config": {"quant_method": "gguf", "file": model}}
    folder = Path(os.path.expanduser(model))  # noqa: PTH111  # Path's own raises where there is no such user
    if not folder.is_dir() and (model.startswith(("/", ".", "~")) or model.count("/") != 1):
        raise ModelNotFoundError(f"there is no folder {model}, and a Hub id is written 'org/model'")
    repository = Repository(model, revision, token)
    path = folder / "config.json" if folder.is_dir() else _download(repository)
    found = _read_json(path)
    if found is None:
        raise ModelNotFoundError(f"{model} has no config.json: is it a model's folder?")
    if not folder.is_dir() and not quantization_config(found):
        path = _download(repository, *QUANTIZATION_FILES, INDEX_NAME)

    def tensor_names() -> Iterable[str]:
        return read_weight_map(path.parent) or read_tensor_shapes(model, revision=revision, token=token)

    return complete(model, found, lambda name: _read_json(path.parent / name), tensor_names)


def _check_name(model: str) -> None:
    """Raise ``ModelNotFoundError`` for text that the file system cannot look up: too long, or with a NUL in it."""
    try:
        Path(os.path.expanduser(model)).stat()  # noqa: PTH111
    except (FileNotFoundError, NotADirectoryError):
        pass  # it may be on the Hub
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelNotFoundError(f"{model[:80]!a} cannot be the name of a model: {reason}") from error


def _home_of_gguf(model: str) -> str | None:
    """Return the folder or the repository of a GGUF file, named as ``vllm-gguf-plugin`` does; else ``None``."""
    if model.endswith(".gguf"):
        path = Path(os.path.expanduser(model))  # noqa: PTH111
        if not path.is_file() and (model.startswith(("/", ".", "~")) or model.count("/") != 2):
            raise ModelNotFoundError(f"there is no file {model}; one on the Hub is written 'org/model/file.gguf'")
        return str(path.parent) if path.is_file() else model.rpartition("/")[0]
    home, _, kind = model.rpartition(":")
    is_home = home.count("/") == 1 or Path(home).is_dir()
    return home if re.fullmatch(r"[\w+-]+", kind) and is_home and not Path(model).is_dir() else None


def _read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any] | None:
    """Read a JSON file of a model, whose author may be a stranger; ``None`` where there is none."""
    try:
        fault = _fault_of_file(path, max_bytes)
        content = None if fault else json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError, RecursionError) as error:
        raise ModelNotFoundError(f"{path} cannot be read: {error}") from error
    if fault:
        raise ModelNotFoundError(f"{path} {fault}")
    if not isinstance(content, dict):
        raise ModelNotFoundError(f"{path} holds no JSON object")
    if not _is_shallow(content):
        raise ModelNotFoundError(f"{path} has more than {MAX_JSON_DEPTH} objects and lists inside each other")
    return content


def _fault_of_file(path: Path, max_bytes: int) -> str:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opened, a pipe would wait for a writer
        return "is not a regular file"
    return f"is too large: it has at most {max_bytes} bytes in a model" if status.st_size > max_bytes else ""


def _is_shallow(content: object) -> bool:
    level = [content]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            inner
            for value in level
            if isinstance(value, (dict, list))
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return True
    return False


def read_weight_map(folder: Path) -> Mapping[str, Any] | None:
    """Return which file holds which tensor; ``None`` where there is no index."""
    index = _read_json(folder / INDEX_NAME, MAX_INDEX_BYTES)
    if index is None:
        return None
    found = index.get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise ModelNotFoundError(f"{folder / INDEX_NAME} has no weight_map of names")
    return found


def read_tensor_shapes(model: str, *, revision: str | None, token: str | None) -> dict[str, Shape]:
    """Return the shapes of a model's tensors, from the headers of its safetensors files; nothing else is fetched.

    Empty where they cannot be had: the model has no such files, one is broken, or the Hub is out of reach.

    Args:
        model: A folder, or ``"org/model"``, whose config could be read.
        revision: A branch, tag or commit; ``None`` for the default branch.
        token: The Hub's access token; ``None`` for the one that ``HF_TOKEN`` or ``hf auth login`` left.
    """
    folder = Path(os.path.expanduser(model))  # noqa: PTH111
    shapes = _shapes_in(folder) if folder.is_dir() else Repository(model, revision, token).read_tensor_shapes()
    return shapes if all(_is_shape(shape) for shape in shapes.values()) else {}


def _is_shape(shape: Shape) -> bool:
    return all(type(size) is int and 0 <= size <= MAX_DIMENSION for size in shape)


def _shapes_in(folder: Path) -> dict[str, Shape]:
    """Return the shapes of a folder's tensors; none where a file is missing or broken."""
    shapes: dict[str, Shape] = {}
    try:
        for name in _file_names(folder):
            entries = read_header(str(folder), folder / name)
            shapes.update((tensor, entry.shape) for tensor, entry in entries.items())
    except (CorruptAdapterError, ModelNotFoundError, OSError, ValueError):
        return {}
    return shapes


def _file_names(folder: Path) -> Iterable[str]:
    index = read_weight_map(folder)
    if index is None:
        return sorted(path.name for path in folder.glob("*.safetensors"))
    names = sorted(set(index.values()))
    if outside := next((name for name in names if Path(name).name != name), None):
        raise ModelNotFoundError(f"{folder / INDEX_NAME} names a file outside of its folder: {outside[:80]!r}")
    return names


def _download(repository: Repository, *extras: str) -> Path:
    """Fetch a model's ``config.json``, and those of ``extras`` that the repository has."""

    def choose(paths: list[str]) -> list[str]:
        if "config.json" not in paths:
            raise ModelNotFoundError(f"{repository} has no config.json: is it an adapter, or GGUF files, and no model?")
        return [*(name for name in extras if name in paths), "config.json"]

    return repository.fetch(
        cached=partial(repository.cached, "config.json"),
        choose=choose,
        fail=lambda _, message: ModelNotFoundError(f"model {repository.repo_id}: {message}"),
        is_one_file=not extras,
    )
