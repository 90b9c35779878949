"""DoRA's gains and the biases of adapters, computed once from their tensors and the weights that are served.

A DoRA module computes ``y = g (W x + s B A x) + bias`` with the gains ``g = m / |W + s B A|``, one for each output: m
is the magnitude that was trained, and the norms are those of rows (Liu et al., "DoRA: Weight-Decomposed Low-Rank
Adaptation", 2024; ``peft/tuners/lora/dora.py`` in PEFT 0.21.2). W is the base's weight as it is served, quantized in
any format. Only products with it are needed, and the base's own layer makes them::

    |W + s B A|^2 = |W|^2 + 2 s (B * (W A^T)) 1 + s^2 (B * (B A A^T)) 1

``|W|^2`` is the base's alone. It takes a product with each input, so it is made for a layer's first adapter and kept.

A bias of an adapter goes the same way, as a shift: PEFT's ``lora_bias`` gives ``y = W x + bias + s (B A x + b)``
(``Linear.forward`` in ``peft/tuners/lora/layer.py``), and ``bias="all"`` another bias in place of the base's, which
magnitudes do not scale.

vLLM's products on the CPU write to memory that all threads share, so they are made on the thread of the steps, some
milliseconds between two of them. Read in vLLM 0.32.0, ``vllm/lora/layers``, ``vllm/model_executor/layers/linear.py``
and ``csrc/cpu`` (``ScratchPadManager``, ``DNNLScratchPadManager``).
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qlora_infer._vllm.lora_layers import join_slices

Vector = npt.NDArray[np.floating]

#: The share of time that loads may take from steps, and their least and most seconds between two of them. One product
#: may last longer.
SHARE, LEAST_SECONDS, MOST_SECONDS = 0.2, 0.01, 0.05
#: The rows of a product for the squares. Most of its time goes into the weight's numbers, which each product
#: dequantizes: on a 4-bit weight, 256 rows last some 1.7 times as long as 32.
MOST_ROWS = 256
#: Multiplications of other products: more rows are more efficient, and last longer.
PRODUCT_UP_TO = 2**29


def why_not(manager: Any) -> str:
    """Return why this engine cannot apply DoRA and biases, for an adapter's error; empty where it can."""
    if not all(hasattr(wrapper, "use_gains") for wrapper in manager.punica_wrapper_mapping.values()):
        return "this library's LoRA kernels for CPUs apply that, and this engine uses others"
    if any(getattr(layer, "tp_size", 1) > 1 for layer in manager.modules.values()):
        return "that needs whole layers, and this engine splits them with tensor parallelism"
    return ""


class DoRA:
    """The gains of the adapters of a model.

    Args:
        manager: vLLM's ``LoRAModelManager``; from now on it puts gains into the kernels beside an adapter's weights.
    """

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._squares: dict[str, Vector] = {}
        self._begun: dict[int, Iterator[None]] = {}
        self._last_turn = 0.0
        self._activate = manager.activate_adapter
        manager.activate_adapter = self._activate_with_gains

    def compile(self, adapter: Any) -> None:
        """Compile what steps with an adapter need, if it has magnitudes or biases; on any thread."""
        for wrapper in set(self._manager.punica_wrapper_mapping.values()) if _changed(adapter) else ():
            wrapper.compile_gains(self._manager.lora_config.lora_dtype)

    def end_of_turn(self) -> float:
        """Return until when loads may go on between two steps, as a time of ``time.monotonic()``."""
        now = time.monotonic()
        seconds = min(max(SHARE * (now - self._last_turn), LEAST_SECONDS), MOST_SECONDS)
        self._last_turn = now
        return now + seconds

    def advance(self, adapter: Any, until: float) -> bool:
        """Go on with an adapter's gains until the turn ends; return whether it has them all.

        Raises:
            ValueError: A row of a weight and its adapter has no direction, because it is 0, or DoRA is not applied to
                such a layer.
        """
        if not _changed(adapter):
            return True
        work = self._begun.setdefault(adapter.id, self._find_gains(adapter))
        try:
            for _ in work:
                if time.monotonic() > until:
                    return False
        except BaseException:
            self.drop(adapter.id)
            raise
        self.drop(adapter.id)
        return True

    def drop(self, int_id: int) -> None:
        """Forget what was begun for an adapter."""
        self._begun.pop(int_id, None)

    def _activate_with_gains(self, lora_id: int) -> bool:
        is_new = bool(self._activate(lora_id))
        if is_new:
            self._put_gains(self._manager.lora_index_to_id.index(lora_id), self._manager._registered_adapters[lora_id])
        return is_new

    def _put_gains(self, slot: int, adapter: Any) -> None:
        """Use an adapter's gains for a slot, none where it has none."""
        if _changed(adapter) and not adapter.gains:  # vLLM has read it by itself
            list(self._find_gains(adapter))
        layers = {name: self._manager.modules[name] for name in getattr(adapter, "gains", ())}
        for wrapper in set(self._manager.punica_wrapper_mapping.values()):
            own = {name: layer for name, layer in layers.items() if layer.punica_wrapper is wrapper}
            wrapper.use_gains(slot, {id(layer.lora_a_stacked[0]): adapter.gains[name] for name, layer in own.items()})

    def _find_gains(self, adapter: Any) -> Iterator[None]:
        gains = {}
        left = _changed(adapter)
        for name, layer in self._manager.modules.items():
            parts = self._manager.packed_modules.get(name, [name])
            if not left.isdisjoint(parts):
                gains[name] = yield from self._gains_of(name, layer, parts, adapter)
                left.difference_update(parts)
        if left:
            raise ValueError(f"the model has no {min(left)}, for which there is a magnitude or a bias")
        adapter.gains = gains

    def _gains_of(self, name: str, layer: Any, parts: list[str], adapter: Any) -> Generator[None, None, Vector]:
        """Compute the gains of a layer's outputs and their shifts, 1 and 0 for a part without magnitudes and biases."""
        if not _is_plain(layer):
            kind = type(layer.base_layer).__name__
            raise ValueError(f"DoRA and biases are not applied to {name}, which is a {kind}")
        if name not in self._squares and not adapter.magnitudes.keys().isdisjoint(parts):
            self._squares[name] = yield from _squares_of(layer)
        slices = [b.shape[-2] for b in layer.lora_b_stacked]
        ends = np.cumsum(join_slices(slices, len(parts))).tolist()
        gains = np.zeros((2, ends[-1]), np.float32)
        gains[0] = 1
        lora = adapter.loras[name]  # whose B has its scaling already
        of_parts = zip(*((lora.lora_a, lora.lora_b) if len(parts) > 1 else ([lora.lora_a], [lora.lora_b])), strict=True)
        for part, begin, end, (a, b) in zip(parts, [0, *ends], ends, of_parts, strict=False):
            if part in adapter.magnitudes:
                products = yield from _products(layer, a)
                norms = _norms(self._squares[name][begin:end], products[:, begin:end], a, b)
                if not (np.isfinite(norms) & (norms > 0)).all():
                    raise ValueError(f"a row of {part} has the norm 0 with this adapter, or an infinite one")
                gains[0, begin:end] = adapter.magnitudes[part].numpy() / norms
        bias = None if layer.base_layer.skip_bias_add else layer.base_layer.bias
        if bias is not None:  # y has it already, and DoRA does not scale it
            gains[1] = (1 - gains[0]) * bias.float().numpy()
        for part, begin, end in zip(parts, [0, *ends], ends, strict=False):
            if part in adapter.biases:
                gains[1, begin:end] += adapter.biases[part].numpy()
        return gains


def _changed(adapter: Any) -> set[str]:
    """Return the modules of an adapter that have magnitudes or biases; vLLM's own kind of adapter has none."""
    return {*getattr(adapter, "magnitudes", ()), *getattr(adapter, "biases", ())}


def _is_plain(layer: Any) -> bool:
    """Return whether a layer's outputs are those of its quantization's ``apply``, plus a bias."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear

    forwards = {kind.forward for kind in (ColumnParallelLinear, ReplicatedLinear, RowParallelLinear)}
    return isinstance(layer, BaseLinearLayerWithLoRA) and type(layer.base_layer).forward in forwards


def _norms(squares: Vector, products: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Vector:
    """Return the norms of the rows of W + B A, where products are A W^T."""
    a, b = a.double(), b.double()
    added = (b * (2 * products.double().T + b @ (a @ a.T))).sum(dim=1)
    norms: Vector = np.sqrt(np.maximum(squares + added.numpy(), 0))
    return norms


def _squares_of(layer: Any) -> Generator[None, None, Vector]:
    """Compute the squared norms of the rows of a layer's weight, from its products with each input."""
    squares = torch.zeros(sum(b.shape[-2] for b in layer.lora_b_stacked), dtype=torch.float64)
    num_inputs, dtype = layer.lora_a_stacked[0].shape[-1], layer.lora_a_stacked[0].dtype
    for begin in range(0, num_inputs, MOST_ROWS):
        inputs = torch.arange(begin, min(begin + MOST_ROWS, num_inputs))
        one_hot = torch.zeros(len(inputs), num_inputs, dtype=dtype)
        one_hot[torch.arange(len(inputs)), inputs] = 1
        squares += _multiply(layer, one_hot).float().square().sum(dim=0)
        yield
    found: Vector = squares.numpy()
    return found


def _products(layer: Any, rows: torch.Tensor) -> Generator[None, None, torch.Tensor]:
    """Multiply a layer's weight with rows, some at a time."""
    num_rows = _num_rows(rows.shape[1], sum(b.shape[-2] for b in layer.lora_b_stacked))
    products = []
    for some in rows.split(num_rows):
        products.append(_multiply(layer, some))
        yield
    return torch.cat(products)


def _num_rows(num_inputs: int, num_outputs: int) -> int:
    return max(16, min(MOST_ROWS, PRODUCT_UP_TO // (num_inputs * num_outputs)))


def _multiply(layer: Any, rows: torch.Tensor) -> torch.Tensor:
    """Multiply rows with a layer's weight as a step does, without its bias."""
    base = layer.base_layer
    with torch.no_grad():
        products: torch.Tensor = base.quant_method.apply(base, rows.contiguous(), None)
    return products
