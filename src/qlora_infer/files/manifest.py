"""The manifest of an adapter: its modules, ranks and sizes, read without torch and without trust.

Every size is bounded before it is read, nothing in the files is executed, and whatever is wrong ends in an
``AdapterError``. What counts as right is what vLLM 0.32.0 reads (``vllm/lora/peft_helper.py``,
``lora_model.py`` and ``utils.py``) and what PEFT 0.21 writes; the file format is
https://github.com/huggingface/safetensors. ``fan_in_fan_out`` is not looked at: it tells how the base model
stores a weight, and A and B are the same either way.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import evolve, field, frozen

from qlora_infer.display import format_names
from qlora_infer.errors import AdapterNotFoundError, AdapterSourceError, CorruptAdapterError, UnsafeAdapterError
from qlora_infer.files.features import CONVERTED_TYPES, unsupported_features
from qlora_infer.files.kinds.folder import MAX_NAMES, next_step
from qlora_infer.files.kinds.tensors import foreign_kind, format_strays
from qlora_infer.files.peft_config import (
    MAX_NAME_LENGTH,
    base_model,
    holds_experts,
    largest_rank,
    module_rank,
    read_config,
    scaling,
    with_plain_names,
)
from qlora_infer.files.safetensors import NOT_GATHERED, TensorEntry, read_header
from qlora_infer.files.snapshot import CONFIG_NAME, INDEX_NAMES, WEIGHTS_NAME, weights_names

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl")

# How vLLM's parse_fine_tuned_lora_name reads a tensor's name: the module, and which of its two factors it is.
# vLLM 0.32.0 takes lora_embedding factors for its models' embedding_modules only, which have these two names.
_LINEAR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_EMBEDDING = re.compile(
    r"(?:base_model\.model\.)?(?P<module>(?:.+\.)?(?:embed_tokens|wte))\.lora_embedding_(?P<factor>[AB])"
)
# PEFT keeps a copy of the base weight beside the factors of these two; vLLM passes over it
# (is_base_embedding_weights).
_BASE_COPY = re.compile(r"(?:base_model\.model\.)?(?P<module>(?:.+\.)?(?:embed_tokens|lm_head))\.base_layer\.weight")
# Tensors beside the factors that stand in the place of the base model's, or are VeRA's; ``basewise`` reads them.
_SAVED = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)(?:\.base_layer|\.token_adapter)?"
    r"\.(?P<kind>weight|bias|trainable_tokens_delta|vera_lambda_[bd]|vera_[AB])"
)
# DoRA's: PEFT writes ``lora_magnitude_vector`` (get_peft_model_state_dict in 0.21.2, utils/save_and_load.py); in a
# model the adapter's name and ``.weight`` stand behind it.
_MAGNITUDE = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_magnitude_vector(?:\.(?!weight$)[^.]+)?(?:\.weight)?"
)
#: The adapter's name in a factor's, as torch saves one without PEFT's save_pretrained; empty where there is none.
ADAPTER_NAME = re.compile(r"(?<=\.lora_[AB])(?:\.[^.]+)?(?=\.weight$)|(?<=\.lora_embedding_[AB])(?:\.[^.]+)?$")


@frozen
class Factor:
    """The module and the factor that a tensor belongs to.

    Attributes:
        module: The module's name.
        factor: ``"A"`` or ``"B"``.
    """

    module: str
    factor: str


def factor_of(tensor: str) -> Factor | None:
    """Return the factor that a tensor's name stands for, or ``None`` for a tensor that is none."""
    plain = ADAPTER_NAME.sub("", tensor)
    match = _LINEAR.fullmatch(plain) or _EMBEDDING.fullmatch(plain)
    return Factor(match["module"], match["factor"]) if match else None


def magnitude_of(tensor: str) -> str | None:
    """Return the module whose magnitude a tensor is, by its name; ``None`` for a tensor that is none."""
    match = _MAGNITUDE.fullmatch(tensor)
    return match["module"] if match else None


@frozen
class LoRAModule:
    """The two factors of one module, as the tensors say.

    Attributes:
        rank: The inner dimension.
        in_features: The module's input size; of an embedding, its vocabulary.
        out_features: The module's output size.
        num_experts: How many experts' factors it holds one behind the other, as PEFT writes those of 3D parameters; 0
            for one pair of factors.
    """

    rank: int
    in_features: int
    out_features: int
    num_experts: int = 0


@frozen
class SavedTensor:
    """A tensor that is no LoRA factor, and may be written as one together with the base model.

    Attributes:
        module: The module's name in the model; of a LoRA bias, with ``.lora_B`` behind it.
        kind: The last part of the tensor's name, such as ``"weight"`` or ``"trainable_tokens_delta"``.
        shape: Its dimensions.
        tokens: The rows of the base model's tensor that its rows stand for; ``None`` where it holds all of them.
    """

    module: str
    kind: str
    shape: tuple[int, ...]
    tokens: tuple[int, ...] | None = None

    @property
    def is_lambda(self) -> bool:
        """True of VeRA's vectors, of which a module has two."""
        return self.kind.startswith("vera_lambda_")


@frozen
class AdapterManifest:
    """The content of an adapter's two files.

    Attributes:
        folder: Where they are.
        base_model: The model that the adapter says it was trained on, if it says so.
        rank: The largest rank of its config and its tensors.
        modules: Its modules by their name in the model, such as ``"model.layers.0.self_attn.q_proj"``. VeRA's have 0
            inputs, because only the model tells how many.
        unsupported: What it asks for that vLLM cannot run, each a sentence.
        foreign: A sentence about the kind of model that it adapts, where its names are those of no language model.
        num_bytes: The size of its tensors.
        scaled_by_pattern: The modules whose scale ``rank_pattern`` or ``alpha_pattern`` changes.
        zero_modules: The modules whose A or B is all zeros, so that they change nothing; they stand in the numbers,
            which ``read_manifest`` does not read.
        name_in_tensors: The name that stands in those of its factors (``lora_A.default.weight``), which vLLM does not
            read; empty where there is none, as PEFT writes them.
        plain_config: Its config with plain names, where it has patterns that vLLM must not match; ``None`` elsewhere.
        config: Its config.
        saved: Its tensors that are no factors, by name.
        zeros: The tensors that hold nothing but zeros.
        magnitudes: The modules with a magnitude of DoRA for each output.
    """

    folder: Path
    base_model: str | None
    rank: int
    modules: Mapping[str, LoRAModule]
    unsupported: tuple[str, ...]
    num_bytes: int
    foreign: str = ""
    scaled_by_pattern: tuple[str, ...] = ()
    zero_modules: frozenset[str] = frozenset()
    name_in_tensors: str = ""
    plain_config: Mapping[str, Any] | None = None
    config: Mapping[str, Any] = field(factory=dict)
    saved: Mapping[str, SavedTensor] = field(factory=dict)
    zeros: frozenset[str] = frozenset()
    magnitudes: frozenset[str] = frozenset()

    @property
    def rank_needed(self) -> int:
        """The rank that an engine has to have room for: each token that it trains takes one."""
        return max([self.rank, *(len(tensor.tokens or ()) for tensor in self.saved.values())])

    @property
    def peft_type(self) -> str:
        """PEFT's name for its kind, in capitals."""
        return str(self.config.get("peft_type", "LORA")).upper()

    def with_zeros(self, tensors: Iterable[str]) -> AdapterManifest:
        """Return this manifest with the modules that have one of these tensors of zeros.

        One with a magnitude is none of them, nor one with a LoRA bias: these change the module by themselves.
        """
        zeros = frozenset(tensors)
        modules = {factor.module for factor in map(factor_of, zeros) if factor is not None}
        modules |= {tensor.module for name, tensor in self.saved.items() if name in zeros and tensor.is_lambda}
        others = {tensor.module.removesuffix(".lora_B") for name, tensor in self.saved.items()
                  if name not in zeros and tensor.module.endswith(".lora_B")}  # fmt: skip
        return evolve(self, zero_modules=frozenset(modules) - self.magnitudes - others, zeros=zeros)


def read_manifest(adapter: str, folder: Path) -> AdapterManifest:
    """Read an adapter's config and the header of its weights.

    Args:
        adapter: The adapter's name, for messages.
        folder: Where ``adapter_config.json`` and ``adapter_model.safetensors`` are.

    Raises:
        AdapterNotFoundError: One of the files is missing.
        AdapterSourceError: One of the files may not be read by this user.
        UnsafeAdapterError: A file is a link that leaves the folder.
        CorruptAdapterError: A file is malformed, or the two contradict each other.
    """
    config = read_config(adapter, check_file(adapter, folder, CONFIG_NAME))
    unsupported = list(unsupported_features(config))
    peft_type = str(config.get("peft_type", "LORA")).upper()
    if peft_type in CONVERTED_TYPES:
        return _read_converted(adapter, folder, config)
    if peft_type != "LORA":
        # Its other fields and its tensors have other names; only this can be said of it.
        return AdapterManifest(folder, base_model(config), 0, {}, tuple(unsupported), 0)
    rank = largest_rank(adapter, config)
    entries = read_header(adapter, check_file(adapter, folder, WEIGHTS_NAME))
    modules: Mapping[str, LoRAModule] = {}
    plain_config: Mapping[str, Any] = config
    name_in_tensors = ""
    saved: Mapping[str, SavedTensor] = {}
    magnitudes: frozenset[str] = frozenset()
    try:
        name_in_tensors = check_one_adapter(adapter, entries)
        factors, leftover = _pair_factors(adapter, entries)
        plain_config = with_plain_names(adapter, config, factors)
        modules = {name: _module(adapter, name, pair, plain_config) for name, pair in factors.items()}
        leftover = [name for name in leftover if not _is_base_copy(adapter, name, entries[name], modules)]
        if config.get("use_dora"):
            magnitudes = _magnitudes(adapter, {name: entries[name] for name in leftover}, modules)
            leftover = [name for name in leftover if magnitude_of(name) not in magnitudes]
            unsupported += _dora_faults(modules, magnitudes)
        saved, leftover = _pick_saved(leftover, entries) if modules else ({}, leftover)
    except CorruptAdapterError:
        # The tensors of other variants have other shapes: what the config says is the better reason.
        if not unsupported:
            raise
        leftover = []
    foreign = foreign_kind(list(modules or leftover), config)
    if modules and leftover and all(map(magnitude_of, leftover)):
        unsupported.append(
            f"It has {len(leftover)} magnitudes of DoRA ({format_names(leftover)}), and its config does not set "
            "use_dora: save it with PEFT, or train without DoRA."
        )
    elif leftover and not (foreign and not modules):
        unsupported.append(format_strays(leftover, num_factors=len(modules)))
    return AdapterManifest(
        folder=folder,
        base_model=base_model(config),
        rank=max([rank, *(module.rank for module in modules.values())]),
        modules=modules,
        unsupported=tuple(unsupported),
        num_bytes=sum(entry.num_bytes for entry in entries.values()),
        foreign=foreign,
        scaled_by_pattern=tuple(_scaled_by_pattern(plain_config, modules)),
        name_in_tensors=name_in_tensors,
        plain_config=None if plain_config is config else plain_config,
        config=plain_config,
        saved=saved,
        magnitudes=magnitudes,
    )


def _read_converted(adapter: str, folder: Path, config: Mapping[str, Any]) -> AdapterManifest:
    """Read an adapter of another type than LoRA; ``basewise`` knows its fields and tensors."""
    entries = read_header(adapter, check_file(adapter, folder, WEIGHTS_NAME))
    saved, leftover = _pick_saved(list(entries), entries)
    return AdapterManifest(
        folder=folder,
        base_model=base_model(config),
        rank=0,
        modules={},
        unsupported=(format_strays(leftover, num_factors=len(saved)),) if leftover else (),
        num_bytes=sum(entry.num_bytes for entry in entries.values()),
        config=config,
        saved=saved,
    )


def _pick_saved(names: Iterable[str], entries: Mapping[str, TensorEntry]) -> tuple[dict[str, SavedTensor], list[str]]:
    """Pick the tensors that stand in the place of the base model's; the names of others come second."""
    saved, leftover = {}, []
    for name in names:
        match = _SAVED.fullmatch(name)
        if match is None or not entries[name].is_floating or len(name) > MAX_NAME_LENGTH:
            leftover.append(name)
        else:
            saved[name] = SavedTensor(match["module"], match["kind"], entries[name].shape)
    return saved, leftover


def check_file(adapter: str, folder: Path, name: str) -> Path:
    """Return an adapter's file, which is a plain file: no pipe or device, and no link that leaves the folder.

    Raises:
        AdapterNotFoundError: There is none.
        AdapterSourceError: It may not be read by this user.
        UnsafeAdapterError: It is something else.
    """
    path = folder / name
    if path.is_symlink() and path.exists() and not _stays_inside(folder, path):
        raise UnsafeAdapterError(adapter, f"{path} is a link to a place outside of the adapter: copy the file there")
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise AdapterNotFoundError(adapter, f"{folder} has no {name}: is it the adapter's own folder?") from error
    if not stat.S_ISREG(mode):
        raise UnsafeAdapterError(adapter, f"{path} is not a regular file")
    if not os.access(path, os.R_OK):
        raise AdapterSourceError(adapter, f"{path} may not be read by this user: change its permissions")
    return path


def _stays_inside(folder: Path, path: Path) -> bool:
    """Return whether a link stays in its folder, or in the Hub's cache.

    There, ``models--org--name/snapshots/<commit>/<file>`` leads to ``models--org--name/blobs/<etag>``, and that one,
    in huggingface_hub 2.4, may lead on to a store that repositories share, ``blobs/<ab>/<hash>``.
    """
    try:
        target, home = path.resolve(strict=True), folder.resolve()
    except (OSError, RuntimeError):
        return False
    if target.is_relative_to(home):
        return True
    parts = home.parts
    if "snapshots" not in parts:
        return False
    repository = Path(*parts[: len(parts) - 1 - parts[::-1].index("snapshots")])
    if not repository.name.startswith("models--"):
        return False
    return target.parent == repository / "blobs" or target.parent.parent == repository.parent / "blobs"


def weights_files(adapter: str, folder: Path, *, allow_pickle: bool = False) -> list[Path]:
    """Return the files with an adapter's weights, each checked by ``check_file``.

    Args:
        adapter: The adapter's name, for messages.
        folder: The folder with the files.
        allow_pickle: Whether they may be a pickle, where they are nothing else.

    Raises:
        AdapterNotFoundError: There is none.
        AdapterSourceError: One may not be read by this user.
        UnsafeAdapterError: One is a pickle, a link that leaves the folder, or no regular file.
    """
    names = [path.name for path in folder.iterdir()]
    found = weights_names(names, allow_pickle=allow_pickle)
    pickled = sorted(name for name in names if name.startswith("adapter_model") and name.endswith(PICKLE_SUFFIXES))
    if not found and pickled and not allow_pickle:
        raise UnsafeAdapterError(
            adapter,
            f"{folder} holds only pickled weights ({pickled[0]}), which can run code when they are read: save the "
            "adapter again with PEFT, which writes safetensors, or pass allow_pickle=True to have it converted",
        )
    if not found and INDEX_NAMES[0] in names:
        raise AdapterNotFoundError(
            adapter, f"{folder} has {INDEX_NAMES[0]} and none of the files that it names: copy them there"
        )
    if not found:
        raise AdapterNotFoundError(adapter, f"{folder} has no {WEIGHTS_NAME}; {next_step([], names[:MAX_NAMES])}")
    return [check_file(adapter, folder, name) for name in found]


def check_one_adapter(adapter: str, tensors: Iterable[str]) -> str:
    """Return the adapter's name that is in those of all factors; empty where none is.

    Raises:
        CorruptAdapterError: Several are, which would be one without their names.
    """
    found = sorted({match.group()[1:] for name in tensors if (match := ADAPTER_NAME.search(name))})
    if len(found) > 1:
        names = format_names(repr(name[:80]) if name else "one without a name" for name in found)
        raise CorruptAdapterError(
            adapter,
            f"the tensors are those of several adapters ({names}): pass those of one, as "
            "peft.get_peft_model_state_dict(model, adapter_name=...) gives them",
        )
    return found[0] if found else ""


def _pair_factors(
    adapter: str, entries: Mapping[str, TensorEntry]
) -> tuple[dict[str, dict[str, TensorEntry]], list[str]]:
    """Put A and B of each module together; the names that are neither come second."""
    factors: dict[str, dict[str, TensorEntry]] = {}
    leftover = []
    for name, entry in entries.items():
        found = factor_of(name)
        if found is None:
            leftover.append(name)
            continue
        _check_factor(adapter, name, entry)
        pair = factors.setdefault(found.module, {})
        if found.factor in pair:
            raise CorruptAdapterError(adapter, f"{found.module} has two tensors lora_{found.factor}")
        pair[found.factor] = entry
    return factors, leftover


def _check_factor(adapter: str, name: str, entry: TensorEntry) -> None:
    if len(name) > MAX_NAME_LENGTH:
        raise CorruptAdapterError(adapter, f"a tensor's name has {len(name)} characters: {name[:80]}…")
    if not entry.is_floating:
        raise CorruptAdapterError(adapter, f"{name} holds {entry.dtype}; a factor holds floating-point numbers")
    if 0 in entry.shape:
        raise CorruptAdapterError(
            adapter, f"{name} has the shape {list(entry.shape)}, which holds no numbers; {NOT_GATHERED}"
        )
    if len(entry.shape) != 2:
        raise CorruptAdapterError(adapter, f"{name} has the shape {list(entry.shape)}; a factor is a matrix")


def _is_base_copy(adapter: str, name: str, entry: TensorEntry, modules: Mapping[str, LoRAModule]) -> bool:
    """Return whether it is the base weight that PEFT saves beside the factors of an embedding or output layer."""
    match = _BASE_COPY.fullmatch(name)
    if match is None or match["module"] not in modules:
        return False
    module = modules[match["module"]]
    # A weight of Linear is [out_features, in_features], that of an embedding [vocabulary, size].
    if entry.shape not in (
        (module.out_features, module.in_features),
        (module.in_features, module.out_features),
    ):
        raise CorruptAdapterError(
            adapter,
            f"{name} has the shape {list(entry.shape)}, its factors say {module.in_features} inputs and "
            f"{module.out_features} outputs",
        )
    return True


def _magnitudes(adapter: str, entries: Mapping[str, TensorEntry], modules: Mapping[str, LoRAModule]) -> frozenset[str]:
    """Return the modules that have a magnitude for each output."""
    found: set[str] = set()
    for name, entry in entries.items():
        module = magnitude_of(name)
        if module is None or module not in modules:
            continue
        if module in found:
            raise CorruptAdapterError(adapter, f"{module} has two tensors lora_magnitude_vector")
        if not entry.is_floating or entry.shape != (modules[module].out_features,):
            raise CorruptAdapterError(
                adapter,
                f"{name[:120]} is {entry.dtype} of the shape {list(entry.shape)}; {module} has "
                f"{modules[module].out_features} outputs, and DoRA one floating-point number for each",
            )
        found.add(module)
    return frozenset(found)


def _dora_faults(modules: Mapping[str, LoRAModule], magnitudes: frozenset[str]) -> Iterator[str]:
    missing = [name for name in modules if name not in magnitudes]
    if missing:
        yield (
            f"It uses DoRA, and its file has no lora_magnitude_vector for {format_names(missing)}: save it again with "
            "PEFT's save_pretrained, or train with use_dora=False."
        )


def _module(adapter: str, name: str, pair: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> LoRAModule:
    missing = [factor for factor in "AB" if factor not in pair]
    if missing:
        raise CorruptAdapterError(adapter, f"{name} has no lora_{missing[0]}: an adapter has both factors of a module")
    (rank, in_features), (out_features, b_rank) = pair["A"].shape, pair["B"].shape
    if rank != b_rank:
        raise CorruptAdapterError(adapter, f"{name}: lora_A has rank {rank} and lora_B has rank {b_rank}")
    expected = module_rank(config, name)
    if holds_experts(config, name, rank=rank):
        return LoRAModule(expected, in_features, out_features, num_experts=rank // expected)
    if rank != expected:
        raise CorruptAdapterError(adapter, f"{name} has rank {rank}, but {CONFIG_NAME} says {expected}")
    return LoRAModule(rank, in_features, out_features)


def _scaled_by_pattern(config: Mapping[str, Any], modules: Mapping[str, LoRAModule]) -> Iterator[str]:
    everywhere = scaling({**config, "alpha_pattern": None}, "", config["r"])
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        for name, module in modules.items():
            if not math.isclose(scaling(config, name, module.rank), everywhere):
                yield name
