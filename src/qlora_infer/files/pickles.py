"""The conversion of pickled weights to safetensors, where the user allows it."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_infer._packages import require
from qlora_infer.errors import CorruptAdapterError
from qlora_infer.files.manifest import weights_files
from qlora_infer.files.snapshot import PICKLE_NAMES, WEIGHTS_NAME

if TYPE_CHECKING:
    import torch

_NEXT_STEP = "save the adapter again with PEFT, which writes safetensors"


def convert_pickle(adapter: str, folder: Path) -> None:
    """Write the pickled weights in a private folder as safetensors, in the pickle's place.

    torch reads the pickle with ``weights_only=True``, which builds tensors and plain containers and calls nothing
    else that the pickle names.

    Raises:
        UnsafeAdapterError: The file is a link that leaves the folder, or no regular file.
        CorruptAdapterError: The file holds anything but tensors by name, or would take more memory than it has bytes.
        MissingDependencyError: torch or safetensors is not installed.
    """
    pickled = weights_files(adapter, folder, allow_pickle=True)[-1]
    if pickled.name not in PICKLE_NAMES:
        return
    require("pickled weights are converted", "torch", "safetensors")
    from safetensors.torch import save_file

    try:
        contiguous = {name: tensor.contiguous() for name, tensor in _read(pickled).items()}
        save_file(contiguous, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    except Exception as error:
        raise CorruptAdapterError(adapter, f"{pickled} is not a pickle of tensors by name: {error}") from error
    pickled.unlink()


def _read(path: Path) -> Mapping[str, torch.Tensor]:
    """Read the tensors and check that none is larger than the file, so that copying them is safe."""
    import torch

    num_bytes = path.stat().st_size
    if _unpacked_size(path) > num_bytes:
        raise ValueError(f"it is compressed: {_NEXT_STEP}")
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(tensors, Mapping):
        raise TypeError(f"it holds a {type(tensors).__name__}: {_NEXT_STEP}")
    for name, tensor in tensors.items():
        _check_tensor(name, tensor)
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > num_bytes:
        raise ValueError(f"its tensors have {total} bytes, and the whole file {num_bytes}: {_NEXT_STEP}")
    return tensors


def _unpacked_size(path: Path) -> int:
    """Return the file's size in memory.

    Torch writes an archive without compression, but also reads a compressed one.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":  # torch's own rule; before torch 1.6 it was no archive
            return path.stat().st_size
        with zipfile.ZipFile(file) as archive:
            return sum(entry.file_size for entry in archive.infolist())


def _check_tensor(name: object, tensor: object) -> None:
    import torch

    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.is_quantized:
        raise TypeError(f"{str(name)[:80]!r} is no tensor of numbers: {_NEXT_STEP}")
    stored = tensor.untyped_storage().nbytes()
    if tensor.nbytes > stored:
        raise ValueError(
            f"{str(name)[:80]!r} has {tensor.nbytes} bytes, of which the file holds {stored}: {_NEXT_STEP}"
        )
