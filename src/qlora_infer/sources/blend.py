"""A weighted blend of several adapters, written as an ordinary LoRA adapter."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from attrs import evolve, field, frozen

from qlora_infer._packages import require
from qlora_infer.config import ALLOWED_RANKS
from qlora_infer.errors import IncompatibleAdapterError
from qlora_infer.files.manifest import ADAPTER_NAME, AdapterManifest
from qlora_infer.files.peft_config import plain_patterns, read_config, scaling
from qlora_infer.files.snapshot import CONFIG_NAME, WEIGHTS_NAME
from qlora_infer.sources.ties import keep_largest, keep_random, mean_of_majority

if TYPE_CHECKING:
    import torch

BlendMethod = Literal["linear", "ties", "dare_ties"]

_PREFIX = "base_model.model."
#: How PEFT names the factors of a linear layer and those of an embedding.
_SUFFIXES = (".lora_{}.weight", ".lora_embedding_{}")


@frozen
class AdapterPart:
    """One adapter of a blend.

    Attributes:
        name: What messages call it.
        manifest: What its files say, which are in the manifest's folder and have been checked.
        weight: How much of it goes into the blend; a negative weight takes it away.
    """

    name: str
    manifest: AdapterManifest
    weight: float


def _check_adapters(source: BlendSource, attribute: Any, adapters: Any) -> None:
    if not isinstance(adapters, Mapping):
        raise TypeError(f"adapters must be a mapping of names to numbers, got {type(adapters).__name__}")


@frozen(eq=False)
class BlendSource:
    """A new adapter made of loaded ones; the base model is not changed.

    ``"linear"`` adds the adapters' weight changes exactly; its rank is the sum of their ranks. ``"ties"`` (Yadav et al.
    2023) and ``"dare_ties"`` (Yu et al. 2023) prune the factors and let the adapters vote on each sign. They return the
    same bits as PEFT's ``add_weighted_adapter``, and need adapters of one rank.

    Attributes:
        adapters: Loaded adapters (``"name"``, or ``"name@2"``) and their weights; a negative weight subtracts an
            adapter. Later versions of them do not change the blend.
        method: ``"linear"``, ``"ties"`` or ``"dare_ties"``.
        density: With ``"ties"`` and ``"dare_ties"``, the share of numbers to keep, above 0 and at most 1.
        seed: With ``"dare_ties"``, the seed of the random choice.

    Raises:
        TypeError: ``adapters`` is not a mapping. ``load_adapter`` raises other errors.

    Example:
        >>> from qlora_infer.testing import fake_engine, write_adapter
        >>> with fake_engine() as engine:
        ...     for name in ("pirate", "poet"):
        ...         _ = engine.load_adapter(name, write_adapter(name, rank=8))
        ...     engine.load_adapter("both", BlendSource({"pirate": 0.7, "poet": 0.3})).rank
        16
    """

    adapters: Mapping[str, float] = field(validator=_check_adapters)
    method: BlendMethod = field(default="linear", kw_only=True)
    density: float = field(default=0.5, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    _parts: tuple[AdapterPart, ...] | None = field(default=None, kw_only=True, repr=False)

    @property
    def refetch_cost(self) -> None:
        """``None``, because its adapters may be unloaded by then."""
        return None

    def of(self, versions: Mapping[str, tuple[str, AdapterManifest]]) -> BlendSource:
        """Return the blend of certain versions.

        Args:
            versions: By the keys of ``adapters``, each version's own name and its manifest, whose files have been
                checked and stay until the blend is fetched.
        """
        parts = (AdapterPart(*versions[name], weight) for name, weight in self.adapters.items())
        return evolve(self, parts=tuple(parts))

    def fetch(self, adapter: str, into: Path, *, token: str | None, allow_pickle: bool) -> None:
        """Write the blend's files into a new folder; ``Source`` describes the arguments, ``write_blend`` the errors.

        Raises:
            ValueError: No engine has given it adapters yet.
        """
        if self._parts is None:
            raise ValueError(f"{self} is made of loaded adapters: load them first, then the blend with load_adapter")
        write_blend(adapter, self._parts, into, method=self.method, density=self.density, seed=self.seed)

    def __str__(self) -> str:
        parts = [(part.weight, part.name) for part in self._parts or ()]
        shares = parts or [(weight, name) for name, weight in self.adapters.items()]
        return f"{self.method} blend of " + ", ".join(f"{weight:g} {name}" for weight, name in shares)


@frozen
class _Factors:
    """A part's share of one module: the factors, their names in PEFT, and the part's weight times its scaling."""

    names: tuple[str, str]
    a: torch.Tensor
    b: torch.Tensor
    weight: float


def write_blend(
    name: str,
    parts: Sequence[AdapterPart],
    folder: Path,
    *,
    method: BlendMethod,
    density: float = 0.5,
    seed: int = 0,
) -> Path:
    """Write the blend of several adapters as a new LoRA adapter, which PEFT and vLLM load like any other.

    ``"linear"`` is exact: the weighted sum of what the adapters add to the base model. Its rank is the sum of their
    ranks. ``"ties"`` keeps the largest numbers of each factor, lets the adapters vote on the sign of each number and
    averages those that agree (Yadav et al. 2023, "TIES-Merging", https://arxiv.org/abs/2306.01708). ``"dare_ties"``
    keeps random numbers, enlarged by what was dropped, in place of the largest (Yu et al. 2023, "Language Models are
    Super Mario", https://arxiv.org/abs/2311.03099). These two keep the rank and do as PEFT's ``add_weighted_adapter``
    does: they work on A and on B, not on their product, and a single adapter is only scaled.

    Args:
        name: The blend's name, for messages.
        parts: The adapters, in any order.
        folder: The new folder for ``adapter_config.json`` and ``adapter_model.safetensors``.
        method: ``"linear"``, ``"ties"`` or ``"dare_ties"``.
        density: The share of numbers that ``"ties"`` and ``"dare_ties"`` keep.
        seed: What ``"dare_ties"`` draws from: the same seed gives the same blend.

    Returns:
        The folder.

    Raises:
        ValueError: An argument is wrong, or the adapters cannot be blended this way; nothing is written.
        IncompatibleAdapterError: An adapter is more than plain LoRA factors, which are all that is blended.
        MissingDependencyError: torch or safetensors is not installed.
    """
    require("adapters are blended", "torch", "safetensors")
    import torch
    from safetensors.torch import save_file

    _check_arguments(name, parts, method, density)
    # The names' order, so that dare_ties draws the same however the caller's mapping is ordered.
    parts = sorted(parts, key=lambda part: part.name)
    if len(parts) == 1:
        method = "linear"
    modules = {module for part in parts for module in part.manifest.modules}
    ranks = {module: _rank(name, module, parts, method) for module in sorted(modules)}
    generator = torch.Generator().manual_seed(seed)
    factors = [_read_factors(part) for part in parts]
    tensors: dict[str, torch.Tensor] = {}
    for module in ranks:
        shares = [share[module] for share in factors if module in share]
        blended = _add(shares) if method == "linear" else _merge(shares, method, density, generator)
        tensors.update(zip(shares[0].names, blended, strict=True))
    _check_numbers(name, tensors)
    folder.mkdir(parents=True)
    (folder / CONFIG_NAME).write_text(json.dumps(_config(parts, ranks), indent=2, sort_keys=True))
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    return folder


def _check_arguments(name: str, parts: Sequence[AdapterPart], method: str, density: float) -> None:
    if method not in get_args(BlendMethod):
        raise ValueError(f"method must be one of {get_args(BlendMethod)}, got {method!r}")
    if not parts:
        raise ValueError(f"the blend {name!r} needs at least one adapter: name each with its weight, as {{'a': 0.7}}")
    if not _is_finite(density) or not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1, got {density!r}: 1 keeps every number, 0.5 half")
    for part in parts:
        if not _is_finite(part.weight):
            raise ValueError(f"the weight of {part.name!r} must be a finite number such as 0.5, got {part.weight!r}")
        if part.manifest.saved:
            why = "It holds more than LoRA factors, such as biases, which no sum of factors can hold: leave it out."
            raise IncompatibleAdapterError(part.name, [why])
        if part.manifest.unsupported:
            raise IncompatibleAdapterError(part.name, part.manifest.unsupported)
        if part.manifest.magnitudes:
            raise IncompatibleAdapterError(
                part.name, ["It uses DoRA, whose magnitudes no sum of factors can hold: blend plain LoRA adapters."]
            )


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _check_numbers(name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    for tensor_name, tensor in tensors.items():
        if not bool((tensor.abs() <= 65504).all()):  # false of NaN, too
            raise ValueError(
                f"the blend {name!r} has numbers in {tensor_name} beyond 65504, the largest of float16: use smaller "
                "weights, or a density nearer to 1"
            )


def _rank(name: str, module: str, parts: Sequence[AdapterPart], method: str) -> int:
    """Return a module's rank in the blend."""
    shapes = [(part.name, part.manifest.modules[module]) for part in parts if module in part.manifest.modules]
    if len({(shape.in_features, shape.out_features) for _, shape in shapes}) > 1:
        sizes = ", ".join(f"{part!r} {shape.in_features} and {shape.out_features}" for part, shape in shapes)
        raise ValueError(
            f"the blend {name!r} needs adapters of one base model, and {module} has other inputs and outputs in some "
            f"({sizes}): leave out those of the other model"
        )
    if any(shape.num_experts for _, shape in shapes):
        raise ValueError(f"{module} holds the factors of all experts of a layer, which cannot be blended")
    ranks = [shape.rank for _, shape in shapes]
    place = f"{module} ({', '.join(f'{part!r} {shape.rank}' for part, shape in shapes)})"
    if method != "linear" and len(set(ranks)) > 1:
        raise ValueError(f"{method!r} needs one rank, which differs in {place}: use 'linear', which takes any ranks")
    rank = sum(ranks) if method == "linear" else ranks[0]
    if rank > ALLOWED_RANKS[-1]:
        raise ValueError(
            f"the blend {name!r} would have rank {rank} in {place}, and vLLM serves ranks up to {ALLOWED_RANKS[-1]}: "
            "blend fewer adapters, or use 'ties' or 'dare_ties', which do not add the ranks up"
        )
    return rank


def _read_factors(part: AdapterPart) -> dict[str, _Factors]:
    from safetensors.torch import load_file

    folder = part.manifest.folder
    config = read_config(part.name, folder / CONFIG_NAME)
    tensors = {
        _PREFIX + ADAPTER_NAME.sub("", key).removeprefix(_PREFIX): value
        for key, value in load_file(folder / WEIGHTS_NAME).items()
    }
    factors = {}
    for module, shape in part.manifest.modules.items():
        pairs = [tuple(_PREFIX + module + suffix.format(factor) for factor in "AB") for suffix in _SUFFIXES]
        a, b = next(pair for pair in pairs if pair[0] in tensors)
        weight = part.weight * scaling(config, module, shape.rank)
        factors[module] = _Factors((a, b), tensors[a], tensors[b], weight)
    return factors


def _add(shares: Sequence[_Factors]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the exact sum: [B1 B2] times [w1 A1; w2 A2] is w1 B1 A1 + w2 B2 A2. PEFT's "cat"."""
    import torch

    a = torch.cat([share.a.double() * share.weight for share in shares])
    return a.float(), torch.cat([share.b.float() for share in shares], dim=1)


def _merge(
    shares: Sequence[_Factors], method: str, density: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge A and B separately, with half of the weight in each; its sign is in A only, where B cannot cancel it."""

    def prune(tensor: torch.Tensor) -> torch.Tensor:
        return keep_largest(tensor, density) if method == "ties" else keep_random(tensor, density, generator)

    roots = [math.sqrt(abs(share.weight)) for share in shares]
    signed = [math.copysign(root, share.weight) for root, share in zip(roots, shares, strict=True)]
    pruned_a = [prune(share.a.float()) for share in shares]
    pruned_b = [prune(share.b.float()) for share in shares]
    return mean_of_majority(pruned_a, signed), mean_of_majority(pruned_b, roots)


def _config(parts: Sequence[AdapterPart], ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return an ``adapter_config.json`` whose scaling is 1 in every module, because alpha is the rank."""
    first = read_config(parts[0].name, parts[0].manifest.folder / CONFIG_NAME)
    rank = Counter(ranks.values()).most_common(1)[0][0]
    pattern = plain_patterns(ranks, rank)
    return {
        "peft_type": "LORA",
        "task_type": first.get("task_type"),
        "fan_in_fan_out": first.get("fan_in_fan_out", False),  # how the base model stores its weights
        "base_model_name_or_path": next((p.manifest.base_model for p in parts if p.manifest.base_model), None),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        # Whole names: the last part alone could also name a layer that PEFT cannot adapt.
        "target_modules": list(ranks),
    }
