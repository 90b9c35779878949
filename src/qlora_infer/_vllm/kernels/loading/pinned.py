"""The reader of an adapter's weights into pinned host memory, which a GPU copies without the CPU.

A call of torch gives Python's lock away and waits for it again. Beside a loop that makes steps, which asks for the
lock as often, the hundreds of small tensors of an adapter are slow to read one by one, and slow the steps down. So a
file is read in a few calls, whatever it holds, and straight to where it stays, unless it has to be cast.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch

from qlora_infer.files.safetensors import TensorEntry, read_header

#: Bytes that are pinned at a time. torch's allocator of pinned memory rounds up to powers of two.
PIECE = 1 << 24

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def read_weights(
    path: Path, dtype: torch.dtype, *, pin: bool, kept: Collection[torch.dtype] = ()
) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file; neighbours in the file stay neighbours in memory.

    Args:
        path: The file; its tensors are floating-point numbers of at most 64 bits.
        dtype: The dtype to cast to.
        pin: Whether they are in pinned memory.
        kept: Dtypes that stay as they are in the file.

    Returns:
        The tensors by name, in the order of the file.

    Raises:
        CorruptAdapterError: It is not a whole safetensors file.
    """
    entries = sorted(read_header(str(path.parent), path).items(), key=lambda item: item[1].start)
    weights: dict[str, torch.Tensor] = {}
    with path.open("rb") as file:
        file.seek(-entries[-1][1].stop, os.SEEK_END)
        for run in _runs(entries, PIECE // dtype.itemsize):
            found = _DTYPES[run[0][1].dtype]
            stays = found == dtype or found in kept
            num_bytes = sum(entry.num_bytes for _, entry in run)
            piece = torch.empty(num_bytes // found.itemsize, dtype=found, pin_memory=pin and stays)
            file.readinto(piece.view(torch.uint8).numpy())
            if not stays:
                piece = torch.empty(len(piece), dtype=dtype, pin_memory=pin).copy_(piece)
            tensors = torch._C._nn.unflatten_dense_tensors(piece, [_of_shape(entry.shape) for _, entry in run])
            weights.update(zip((name for name, _ in run), tensors, strict=True))
    return weights


def _runs(entries: Sequence[tuple[str, TensorEntry]], most: int) -> Iterator[list[tuple[str, TensorEntry]]]:
    """Tensors of one dtype in one block, with a limit on their numbers, or a single larger one."""
    run: list[tuple[str, TensorEntry]] = []
    length = 0
    for name, entry in entries:
        size = entry.num_bytes // _DTYPES[entry.dtype].itemsize
        if run and (entry.dtype != run[0][1].dtype or length + size > most):
            yield run
            run, length = [], 0
        run.append((name, entry))
        length += size
    yield run


@lru_cache(maxsize=1024)
def _of_shape(shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor of a shape without memory of its own; ``unflatten_dense_tensors`` needs one as an argument."""
    return torch.empty(()).expand(shape)
