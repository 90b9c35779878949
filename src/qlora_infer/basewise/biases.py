"""Biases that an adapter adds or replaces, as what they add to the outputs of a layer.

PEFT 0.21.2 saves two kinds: ``lora_bias`` gives B a bias, which is scaled as B is (``Linear.forward`` in
``tuners/lora/layer.py``); ``bias="all"`` and ``"lora_only"`` train the base model's own
(``_mark_only_adapters_as_trainable`` in ``tuners/tuners_utils.py``), which are in the adapter's file whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from attrs import frozen

from qlora_infer.files.manifest import LoRAModule
from qlora_infer.files.safetensors import Computed, as_floats

if TYPE_CHECKING:
    import numpy as np


@frozen
class AddedBias:
    """A bias of an adapter that changes the outputs of a module.

    Attributes:
        tensor: The adapter's tensor.
        scale: The factor that it is applied with.
        base: The base model's bias, whose place it takes; ``None`` for one that comes on top.
    """

    tensor: str
    scale: float = 1.0
    base: np.ndarray | None = None

    def shift(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return what it adds to each output, in float32."""
        own = as_floats(tensors[self.tensor]).astype("<f4")
        shift: np.ndarray = own * self.scale if self.base is None else own - as_floats(self.base).astype("<f4")
        return shift.astype("<f4")


def no_factors(module: LoRAModule) -> tuple[Computed, Computed]:
    """Return an A and a B of zeros, for a module of which only the bias was trained."""
    import numpy as np

    shapes = (module.rank, module.in_features), (module.out_features, module.rank)
    a, b = (Computed(shape, partial(np.zeros, shape, "<f4")) for shape in shapes)
    return a, b
