"""Old adapters whose weights are pickled, converted where the user allows it."""

from __future__ import annotations

import shutil
from pathlib import Path

from qlora_infer.adapters.snapshot import CONFIG_NAME, WEIGHTS_NAME
from qlora_infer.errors import AdapterNotFoundError, CorruptAdapterError

PICKLE_NAMES = ("adapter_model.bin", "adapter_model.pt")


def convert_pickle(adapter: str, source: Path, folder: Path) -> Path:
    """Write an adapter's pickled weights as safetensors into the new folder ``folder``.

    torch reads the pickle with ``weights_only=True``, which builds tensors and plain containers and calls nothing
    else that the pickle names.

    Raises:
        AdapterNotFoundError: There is no such file.
        CorruptAdapterError: The file holds anything but tensors by name.
    """
    import torch
    from safetensors.torch import save_file

    pickled = next((source / name for name in PICKLE_NAMES if (source / name).is_file()), None)
    if pickled is None:
        raise AdapterNotFoundError(adapter, f"{source} holds neither {WEIGHTS_NAME} nor {PICKLE_NAMES[0]}")
    try:
        tensors = torch.load(pickled, map_location="cpu", weights_only=True)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        folder.mkdir(parents=True)
        save_file(contiguous, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    except Exception as error:
        raise CorruptAdapterError(adapter, f"{pickled} is not a pickle of tensors by name: {error}") from error
    shutil.copyfile(source / CONFIG_NAME, folder / CONFIG_NAME)
    return folder
