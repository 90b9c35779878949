"""What the engine and ``inspect-adapter`` find of one model and its adapters, side by side."""

from __future__ import annotations

import tempfile
from pathlib import Path

from qlora_infer.adapters import preflight
from qlora_infer.adapters.store import AdapterStore
from qlora_infer.errors import IncompatibleAdapterError
from qlora_infer.model.checkpoint import read_checkpoint
from qlora_infer.model.modules import ModelModules
from qlora_infer.model.weights import BaseWeights
from qlora_infer.sources.folder import FolderSource


def differences(running: ModelModules, checkpoint: Path) -> list[str]:
    """Return how the modules of a running model differ from those that its checkpoint's files tell; none where equal.

    Modules of towers, whose factors are left out, are compared by the beginnings of their names.

    Args:
        running: What the engine knows (``engine._loader.model_modules``).
        checkpoint: The folder that it serves.
    """
    read = read_checkpoint(str(checkpoint), device=running.device).modules
    left_out = tuple(running.left_out) or ("\0",)
    theirs = {name: shape for name, shape in running.shapes.items() if not name.startswith(left_out)}
    unadapted = {name for name in running.unadapted if not name.startswith(left_out)}
    found = [
        f"{name}: {read.shapes.get(name)}, {theirs.get(name)} in the engine"
        for name in sorted({*theirs, *read.shapes})
        if read.shapes.get(name) != theirs.get(name)
    ]
    found += [f"{name} is adapted by one of the two" for name in sorted(unadapted ^ set(read.unadapted))]
    if set(read.left_out) != set(running.left_out):
        found.append(f"left out: {read.left_out}, {running.left_out} in the engine")
    if read.model != running.model:
        found.append(f"class: {read.model}, {running.model} in the engine")
    return found


def verdict(adapter: Path, model: ModelModules, base: Path, *, max_lora_rank: int = 64) -> str | tuple[str, ...]:
    """Return how an adapter fits a model, whose checkpoint is ``base``, or every reason why it does not."""
    with tempfile.TemporaryDirectory() as store:
        copies = AdapterStore(Path(store))
        try:
            _, manifest, _ = copies.make(adapter.name, 1, FolderSource(adapter), allow_pickle=False)
            return str(
                preflight.check(adapter.name, manifest, model, max_lora_rank=max_lora_rank, base=BaseWeights(str(base)))
            )
        except IncompatibleAdapterError as error:
            return error.reasons
        finally:
            copies.close()
