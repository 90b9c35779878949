"""The tensors of modules, by the parts that their names tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def parts_of_modules(
    pattern: re.Pattern[str], tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, dict[str, np.ndarray]], list[tuple[str, np.ndarray]]]:
    """Return each module's tensors by part, and those that are no part or that stand there twice.

    Args:
        pattern: Matches the names of parts; its groups ``module`` and ``part`` are their two names.
        tensors: All of an adapter's tensors.
    """
    modules: dict[str, dict[str, np.ndarray]] = {}
    others = []
    for name, tensor in tensors.items():
        match = pattern.fullmatch(name)
        if match is None or match["part"] in modules.get(match["module"], {}):
            others.append((name, tensor))
        else:
            modules.setdefault(match["module"], {})[match["part"]] = tensor
    return modules, others
