"""VeRA adapters as LoRA factors.

VeRA (Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454) has one pair of random matrices for all modules, and two
vectors for each: the module's product is diag(lambda_b) B diag(lambda_d) A, of as many rows and columns of B and A as
it has outputs and inputs. Read in PEFT 0.21.2, ``tuners/vera/model.py`` and ``layer.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from attrs import evolve, frozen

from qlora_infer._packages import require
from qlora_infer.errors import CorruptAdapterError
from qlora_infer.files.manifest import AdapterManifest, LoRAModule, SavedTensor
from qlora_infer.files.peft_config import MAX_RANK
from qlora_infer.files.safetensors import Computed, as_floats
from qlora_infer.model.modules import ModelModules

if TYPE_CHECKING:
    import numpy as np

_NO_SIZE = (
    "It is a VeRA adapter without its projections (save_projection=False), which are drawn by the sizes of all of its "
    "modules, and this model does not tell the inputs of {}: save it with save_projection=True."
)


@frozen
class Vera:
    """The projections of a VeRA adapter.

    Attributes:
        rank: Their rank.
        inputs: The columns of A, or the most inputs of a module where they are drawn.
        outputs: The rows of B, or the most outputs.
        tensors: The adapter's tensors of A and B; ``None`` where they are drawn.
        seed: The seed that they are drawn with.
        lambdas: The tensors of lambda_b and lambda_d of each module.
    """

    rank: int
    inputs: int
    outputs: int
    tensors: tuple[str, str] | None
    seed: int
    lambdas: Mapping[str, tuple[str, str]]

    def factors(
        self, tensors: Mapping[str, np.ndarray], modules: Mapping[str, LoRAModule]
    ) -> Iterator[tuple[str, tuple[Computed, Computed]]]:
        """Yield each module's A, with lambda_d in it, and its B, with lambda_b, computed when they are written.

        Args:
            tensors: The adapter's tensors.
            modules: The sizes of its modules.
        """
        a, b = self._projections(tensors)
        for name, (lambda_b, lambda_d) in self.lambdas.items():
            module = modules[name]
            yield (
                name,
                (
                    _scaled(tensors[lambda_d], a[:, : module.in_features]),
                    _scaled(tensors[lambda_b], b[: module.out_features]),
                ),
            )

    def _projections(self, tensors: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return A and B in float32, from the adapter's tensors or as PEFT draws them."""
        if self.tensors is None:
            return draw(self.rank, self.inputs, self.outputs, self.seed)
        a, b = (as_floats(tensors[name]).astype("<f4") for name in self.tensors)
        return a, b


def read_vera(adapter: str, manifest: AdapterManifest) -> AdapterManifest:
    """Read the rank and the modules of a VeRA adapter, whose inputs only the model tells.

    Raises:
        CorruptAdapterError: A tensor is missing or has another size than the others.
    """
    rank, seed = manifest.config.get("r"), manifest.config.get("projection_prng_key", 0)
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise CorruptAdapterError(adapter, f"'r' must be a whole number of at least 1, got {str(rank)[:40]!r}")
    if type(seed) is not int or not 0 <= seed < 1 << 63:
        raise CorruptAdapterError(adapter, f"'projection_prng_key' must be a whole number, got {str(seed)[:40]!r}")
    lambdas: dict[str, dict[str, SavedTensor]] = {}
    for tensor in manifest.saved.values():
        if tensor.is_lambda:
            lambdas.setdefault(tensor.module, {})[tensor.kind] = tensor
    modules = {name: _module(adapter, name, pair, rank) for name, pair in lambdas.items()}
    read = evolve(manifest, rank=rank, modules=modules)
    if manifest.config.get("save_projection", True):
        _check_projections(adapter, read)
    return read


def _module(adapter: str, name: str, pair: Mapping[str, SavedTensor], rank: int) -> LoRAModule:
    missing = [kind for kind in ("vera_lambda_b", "vera_lambda_d") if kind not in pair]
    if missing:
        raise CorruptAdapterError(adapter, f"{name} has no {missing[0]}: a VeRA adapter has both vectors of a module")
    b, d = pair["vera_lambda_b"].shape, pair["vera_lambda_d"].shape
    if d != (rank,) or len(b) != 1 or not b[0]:
        raise CorruptAdapterError(
            adapter,
            f"{name} has vectors of the shapes {list(b)} and {list(d)}; they hold its outputs and {rank} numbers",
        )
    return LoRAModule(rank, 0, b[0])


def _check_projections(adapter: str, manifest: AdapterManifest) -> None:
    found = {tensor.kind: tensor.shape for tensor in manifest.saved.values() if tensor.kind in ("vera_A", "vera_B")}
    most = max((module.out_features for module in manifest.modules.values()), default=0)
    a, b = found.get("vera_A", ()), found.get("vera_B", ())
    if len(a) != 2 or len(b) != 2 or a[0] != manifest.rank or b[1] != manifest.rank or b[0] < most:
        raise CorruptAdapterError(
            adapter,
            f"its projections have the shapes {list(a)} and {list(b)}; with save_projection they are a matrix of "
            f"{manifest.rank} rows, and one of {manifest.rank} columns and at least {most} rows",
        )


def with_inputs(manifest: AdapterManifest, model: ModelModules) -> tuple[Vera, Mapping[str, LoRAModule], list[str]]:
    """Return the projections, the modules with the inputs that the model has, and why it cannot be served.

    A module that the model does not have keeps its place, so that the check of the others names it.
    """
    by_place = {(tensor.module, tensor.kind): name for name, tensor in manifest.saved.items()}
    lambdas = {name: (by_place[name, "vera_lambda_b"], by_place[name, "vera_lambda_d"]) for name in manifest.modules}
    projections = {tensor.kind: name for name, tensor in manifest.saved.items() if tensor.kind in ("vera_A", "vera_B")}
    sizes = {name: model.num_inputs(name) for name in manifest.modules}
    unknown = [name for name, size in sizes.items() if size is None]
    modules = {name: evolve(module, in_features=sizes[name] or 0) for name, module in manifest.modules.items()}
    seed = manifest.config.get("projection_prng_key", 0)
    most_in = max((module.in_features for module in modules.values()), default=0)
    most_out = max((module.out_features for module in modules.values()), default=0)
    if not manifest.config.get("save_projection", True):
        reasons = [_NO_SIZE.format(unknown[0][:120])] if unknown else []
        return Vera(manifest.rank, most_in, most_out, None, seed, lambdas), modules, reasons
    names = projections["vera_A"], projections["vera_B"]
    inputs, outputs = manifest.saved[names[0]].shape[1], manifest.saved[names[1]].shape[0]
    reasons = []
    if most_in > inputs:
        reasons.append(
            f"Its projection is for modules of at most {inputs} inputs, and this model has one of {most_in} among "
            "those that it changes: it was trained on a model of another size."
        )
    return Vera(manifest.rank, inputs, outputs, names, seed, lambdas), modules, reasons


def draw(rank: int, inputs: int, outputs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw A and B as PEFT does when it loads an adapter without them.

    These are the calls of ``VeraModel._init_vera_A_vera_B`` and ``_kaiming_init`` in PEFT 0.21.2. Other versions of
    torch may draw other numbers, which PEFT warns of.

    Raises:
        MissingDependencyError: torch is not installed.
    """
    require("the projections of a VeRA adapter are drawn", "torch")
    import torch

    generator = torch.Generator(device="cpu").manual_seed(seed)

    def uniform(*shape: int) -> np.ndarray:
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
        drawn: np.ndarray = torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator).numpy()
        return drawn

    return uniform(rank, inputs), uniform(outputs, rank)


def _scaled(scale: np.ndarray, matrix: np.ndarray) -> Computed:
    """Return a matrix with each row multiplied by a number."""

    def product() -> np.ndarray:
        scaled: np.ndarray = as_floats(scale).astype("<f4")[:, None] * matrix
        return scaled

    return Computed(matrix.shape, product)
