"""An adapter's tensors in pinned host memory, cast and copied a few at a time.

From pinned memory a GPU copies by itself. Hundreds of small tensors are slow to bring there beside a loop that makes
steps: each waits for Python's lock. So tensors that lie next to each other in a file stay next to each other.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping

import torch

#: Bytes that are taken at a time. torch's allocator of pinned memory rounds up to powers of two.
PIECE = 1 << 22


def in_pieces(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, *, pin: bool) -> dict[str, torch.Tensor]:
    """The same tensors of another dtype, neighbours in memory still neighbours, in pieces of ``PIECE`` bytes."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    cast = {name: tensor.to(dtype) for name, tensor in tensors.items() if not tensor.numel()}
    for names in _neighbours(tensors, PIECE // dtype.itemsize):
        lengths = [tensors[name].numel() for name in names]
        piece = torch.empty(sum(lengths), dtype=dtype, pin_memory=pin)
        piece.copy_(_span(tensors[names[0]], len(piece)))
        cast.update(
            (name, part.view(tensors[name].shape)) for name, part in zip(names, piece.split(lengths), strict=True)
        )
    return {name: cast[name] for name in tensors}


def _span(first: torch.Tensor, length: int) -> torch.Tensor:
    """So many numbers from the first of a tensor on: its own, and those of its neighbours."""
    memory = (ctypes.c_char * (length * first.itemsize)).from_address(first.data_ptr())
    return torch.frombuffer(memory, dtype=first.dtype)


def _neighbours(tensors: Mapping[str, torch.Tensor], most: int) -> Iterator[list[str]]:
    """Names of tensors of one dtype, each beginning where the one before ends, with so many numbers in all at most."""
    run: list[str] = []
    length = 0
    for name in sorted(tensors, key=lambda name: tensors[name].data_ptr()):
        tensor = tensors[name]
        if not tensor.numel():
            continue
        if run:
            before = tensors[run[-1]]
            is_next = before.dtype == tensor.dtype and before.data_ptr() + before.nbytes == tensor.data_ptr()
            if not is_next or length + tensor.numel() > most:
                yield run
                run, length = [], 0
        run.append(name)
        length += tensor.numel()
    if run:
        yield run
