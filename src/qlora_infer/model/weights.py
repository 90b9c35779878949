"""The tensors of a base model, read from its checkpoint where that lies on this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_infer.errors import CorruptAdapterError, ModelNotFoundError
from qlora_infer.files.safetensors import map_tensors, read_header
from qlora_infer.model.config import INDEX_NAME, read_model_config, read_weight_map
from qlora_infer.model.modules import tail_of
from qlora_infer.sources.repository import Repository

if TYPE_CHECKING:
    import numpy as np

#: Where the Hub's cache has a checkpoint of one file.
_ONE_FILE = "model.safetensors"

#: The names of input embeddings, behind the wrappers.
_EMBEDDINGS = frozenset({"embed_tokens", "wte", "tok_embeddings", "decoder.embed_tokens"})


def is_embedding(module: str) -> bool:
    """Return whether a module is a language model's input embeddings."""
    return tail_of(module) in _EMBEDDINGS


def is_head(module: str) -> bool:
    """Return whether a module is a language model's output layer."""
    return tail_of(module) in ("lm_head", "output")


class BaseWeights:
    """The tensors of a base model, mapped into memory one by one, when an adapter is held against them.

    Nothing is downloaded: where an engine runs the model, vLLM has fetched it.

    Args:
        model: A folder, or ``"org/model"``.
        revision: A branch, tag or commit on the Hub.
        token: The Hub's access token, for ``config.json`` only.
    """

    def __init__(self, model: str, *, revision: str | None = None, token: str | None = None) -> None:
        self._model = model
        self._revision = revision
        self._token = token
        self._mapped: dict[Path, Mapping[str, np.ndarray]] = {}

    def tensor(self, module: str, parameter: str) -> np.ndarray:
        """Return a module's parameter; bfloat16 as 16-bit integers.

        Args:
            module: The module's name, as an adapter has it.
            parameter: ``"weight"`` or ``"bias"``.

        Raises:
            ModelNotFoundError: The files are not here, have no such tensor, or hold packed numbers in it.
        """
        is_tied_head = parameter == "weight" and is_head(module) and self.ties_embeddings
        tails = _EMBEDDINGS if is_tied_head else {tail_of(module)}
        names = [name for tail in tails for name in self._names.get(f"{tail}.{parameter}", ())]
        if len(names) != 1:
            how_many = "several tensors" if names else "no tensor"
            raise ModelNotFoundError(f"{self._model} has {how_many} of that name (is that module quantized?)")
        tensors = self._map(self._files[names[0]])
        if names[0] not in tensors:
            raise ModelNotFoundError(f"{self._model} holds them quantized")
        return tensors[names[0]]

    def _map(self, file: Path) -> Mapping[str, np.ndarray]:
        """Map a file's tensors into memory; those of integers are left out."""
        if file not in self._mapped:
            try:
                self._mapped[file] = map_tensors(self._model, file)
            except (CorruptAdapterError, OSError, ValueError) as error:
                raise ModelNotFoundError(f"{file} cannot be read: {error}") from error
        return self._mapped[file]

    @cached_property
    def ties_embeddings(self) -> bool:
        """True if the output layer has the embeddings' weights; as transformers decides it.

        Raises:
            ModelNotFoundError: The files are not here.
        """
        config = read_model_config(self._model, revision=self._revision, token=self._token)
        for part in (config, config.get("text_config")):
            said = part.get("tie_word_embeddings") if isinstance(part, Mapping) else None
            if isinstance(said, bool):
                return said
        # A class has a default of its own; an output layer that is not tied has a tensor.
        return not any(is_head(name.removesuffix(".weight")) for name in self._files)

    @cached_property
    def _names(self) -> Mapping[str, Sequence[str]]:
        """The tensors by their names behind the wrappers."""
        names: dict[str, list[str]] = {}
        for name in self._files:
            module, _, parameter = name.rpartition(".")
            names.setdefault(f"{tail_of(module)}.{parameter}", []).append(name)
        return names

    @cached_property
    def _files(self) -> Mapping[str, Path]:
        """The file of each tensor.

        Raises:
            ModelNotFoundError: They are not on this machine, or are no safetensors files.
        """
        folder = self._folder()
        try:
            index = read_weight_map(folder)
            if index is not None:
                return {name: folder / Path(file).name for name, file in index.items()}
            paths = sorted(folder.glob("*.safetensors"))
            found = {name: path for path in paths for name in read_header(self._model, path)}
        except (CorruptAdapterError, OSError, ValueError) as error:
            raise ModelNotFoundError(f"the weights of {self._model} cannot be read: {error}") from error
        if not found:
            raise ModelNotFoundError(f"{folder} has no safetensors files")
        return found

    def _folder(self) -> Path:
        folder = Path(os.path.expanduser(self._model))  # noqa: PTH111
        if folder.is_dir():
            return folder
        if self._model.endswith(".gguf") or ":" in self._model:
            raise ModelNotFoundError(f"{self._model} is a GGUF file, whose numbers are quantized")
        if self._model.count("/") == 1 and not self._model.startswith(("/", ".", "~")):
            repository = Repository(self._model, self._revision, self._token)
            found = next(filter(None, map(repository.cached, (INDEX_NAME, _ONE_FILE))), None)
            if found is not None:
                return found.parent
        revision = f" --revision {self._revision}" if self._revision else ""
        raise ModelNotFoundError(
            f"the weights of {self._model} are not on this machine: `hf download {self._model}{revision}` fetches them"
        )
