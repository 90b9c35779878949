"""Tiles of a step's rows: groups of rows of one adapter that a kernel computes together."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

#: Numbers that a tile begins with: slot (-1: none), number of rows, and two that are the kernel's own.
TILE_HEAD = 4


def tiles_of(slots: npt.NDArray[np.integer], block_m: int) -> npt.NDArray[np.int32]:
    """Cut a step's rows into tiles.

    Args:
        slots: The slot of each row, ``[num_rows]``; -1 for rows without an adapter.
        block_m: The most rows of a tile.

    Returns:
        ``[number of tiles, TILE_HEAD + block_m]``: slot, number of rows, 0, 0, and the rows, in their order, then 0.
    """
    order = np.argsort(slots, kind="stable").astype(np.int32)
    order = order[int(np.count_nonzero(slots < 0)) :]
    values, starts, counts = np.unique(slots[order], return_index=True, return_counts=True)
    per_slot = -(-counts // block_m)
    slot_of = np.repeat(np.arange(len(values)), per_slot)
    nth = np.arange(len(slot_of)) - np.repeat(np.cumsum(per_slot) - per_slot, per_slot)
    tiles = np.zeros((len(slot_of), TILE_HEAD + block_m), np.int32)
    tiles[:, 0] = values[slot_of]
    tiles[:, 1] = np.minimum(counts[slot_of] - nth * block_m, block_m)
    at = (starts[slot_of] + nth * block_m)[:, None] + np.arange(block_m)
    is_row = np.arange(block_m) < tiles[:, 1, None]
    tiles[:, TILE_HEAD:] = np.where(is_row, order[np.minimum(at, max(len(order) - 1, 0))], 0) if len(order) else 0
    return tiles
