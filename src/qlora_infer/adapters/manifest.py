"""What an adapter's files say of themselves, read without torch and without trust.

Every size is bounded before it is read, nothing in the files is executed, and whatever is wrong ends in an
``AdapterError``. What counts as right is what vLLM 0.32 reads (``vllm/lora/peft_helper.py`` and ``lora_model.py``) and
what PEFT writes; the file format is that of https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from qlora_infer.adapters.features import unsupported_features
from qlora_infer.adapters.snapshot import CONFIG_NAME, WEIGHTS_NAME
from qlora_infer.adapters.tensors import TensorEntry, read_header
from qlora_infer.errors import AdapterNotFoundError, CorruptAdapterError, UnsafeAdapterError

MAX_CONFIG_BYTES = 1 << 20
MAX_RANK = 1 << 16

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl")

# How vLLM's parse_fine_tuned_lora_name reads a tensor's name: the module, and which of its two factors it is.
_FACTOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.(?:lora_(?P<linear>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))"
)

#: What a key of rank_pattern or alpha_pattern may be: names, dots, and a little of regular expressions.
_PATTERN = re.compile(r"[\w.\-^$*\\()|\[\]+?]{1,256}")


@frozen
class LoRAModule:
    """The two factors of one module, as the tensors say.

    Attributes:
        rank: The inner dimension.
        in_features: The module's input size; of an embedding, its vocabulary.
        out_features: The module's output size.
    """

    rank: int
    in_features: int
    out_features: int


@frozen
class AdapterManifest:
    """What an adapter's two files say.

    Attributes:
        folder: Where they are.
        base_model: The model that the adapter says it was trained on, if it says so.
        rank: The largest rank of its config and its tensors.
        modules: Its modules by their name in the model, such as ``"model.layers.0.self_attn.q_proj"``.
        unsupported: What it asks for that vLLM cannot run, each a sentence.
        num_bytes: The size of its tensors.
    """

    folder: Path
    base_model: str | None
    rank: int
    modules: Mapping[str, LoRAModule]
    unsupported: tuple[str, ...]
    num_bytes: int


def read_manifest(adapter: str, folder: Path) -> AdapterManifest:
    """Read an adapter's config and the header of its weights.

    Args:
        adapter: The adapter's name, for messages.
        folder: Where ``adapter_config.json`` and ``adapter_model.safetensors`` are.

    Raises:
        AdapterNotFoundError: One of the files is missing.
        UnsafeAdapterError: The weights are pickled, or a file is a link that leaves the folder.
        CorruptAdapterError: A file is malformed, or the two contradict each other.
    """
    config = _read_config(adapter, _checked_file(adapter, folder, CONFIG_NAME))
    unsupported = list(unsupported_features(config))
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        # Its other fields and its tensors have other names; only this can be said of it.
        return AdapterManifest(folder, _base_model(config), 0, {}, tuple(unsupported), 0)
    rank = _rank(adapter, config)
    entries = read_header(adapter, _checked_weights(adapter, folder))
    modules, leftover = _pair_factors(adapter, entries, config)
    if leftover:
        unsupported.append(_say_leftover(leftover))
    return AdapterManifest(
        folder=folder,
        base_model=_base_model(config),
        rank=max([rank, *(module.rank for module in modules.values())]),
        modules=modules,
        unsupported=tuple(unsupported),
        num_bytes=sum(entry.num_bytes for entry in entries.values()),
    )


def _checked_file(adapter: str, folder: Path, name: str) -> Path:
    path = folder / name
    if path.is_symlink() and not _stays_inside(folder, path):
        raise UnsafeAdapterError(adapter, f"{path} is a link to a place outside of the adapter: copy the file there")
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise AdapterNotFoundError(adapter, f"{folder} has no {name}: is it the adapter's own folder?") from error
    if not stat.S_ISREG(mode):
        raise UnsafeAdapterError(adapter, f"{path} is not a regular file")
    return path


def _stays_inside(folder: Path, path: Path) -> bool:
    """Whether a link stays in its folder, or in the Hub's cache: ``snapshots/<commit>/…`` -> ``blobs/<hash>``."""
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
    return repository.name.startswith("models--") and target.parent == repository / "blobs"


def _checked_weights(adapter: str, folder: Path) -> Path:
    if not (folder / WEIGHTS_NAME).exists() and not (folder / WEIGHTS_NAME).is_symlink():
        if (folder / f"{WEIGHTS_NAME}.index.json").exists():
            raise CorruptAdapterError(
                adapter,
                f"the weights in {folder} are split over several files, which vLLM does not read: save them as one",
            )
        pickled = sorted(path.name for path in folder.glob("adapter_model*") if path.suffix in PICKLE_SUFFIXES)
        if pickled:
            raise UnsafeAdapterError(
                adapter,
                f"{folder} holds only pickled weights ({pickled[0]}), which can run code when they are read: save the "
                "adapter again with PEFT, which writes safetensors, or pass allow_pickle=True to have it converted",
            )
    return _checked_file(adapter, folder, WEIGHTS_NAME)


def _read_config(adapter: str, path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > MAX_CONFIG_BYTES:
        raise CorruptAdapterError(
            adapter, f"{path} has {size} bytes; an adapter's config has at most {MAX_CONFIG_BYTES}"
        )
    config = parse_json(adapter, path, path.read_bytes())
    if not isinstance(config, dict):
        raise CorruptAdapterError(adapter, f"{path} must hold a JSON object, not a {type(config).__name__}")
    return config


def parse_json(adapter: str, path: Path, content: bytes) -> Any:
    """Parse JSON that may be hostile: deep, repeating its keys, with numbers that are none.

    Raises:
        CorruptAdapterError: It is not such JSON as an adapter may have.
    """
    try:
        return json.loads(content.decode(), object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CorruptAdapterError(adapter, f"{path} is not valid JSON: {error}") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands in it twice")
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _rank(adapter: str, config: Mapping[str, Any]) -> int:
    """The largest rank that the config names, with every field that vLLM computes with checked on the way."""
    for name in ("r", "lora_alpha", "target_modules"):
        if config.get(name) is None:
            raise CorruptAdapterError(adapter, f"{CONFIG_NAME} has no {name!r}")
    targets = config["target_modules"]
    if not isinstance(targets, str) and not _is_list_of(targets, str):
        raise CorruptAdapterError(
            adapter, f"'target_modules' must be a list of names or a pattern, got {str(targets)[:80]}"
        )
    _checked_number(adapter, "lora_alpha", config["lora_alpha"])
    for pattern, alpha in _checked_pattern(adapter, config, "alpha_pattern").items():
        _checked_number(adapter, f"alpha_pattern[{pattern!r}]", alpha)
    ranks = [_checked_rank(adapter, "r", config["r"])]
    for pattern, rank in _checked_pattern(adapter, config, "rank_pattern").items():
        ranks.append(_checked_rank(adapter, f"rank_pattern[{pattern!r}]", rank))
    return max(ranks)


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _checked_rank(adapter: str, name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise CorruptAdapterError(adapter, f"{name!r} must be a whole number of at least 1, got {str(value)[:40]!r}")
    return value


def _checked_number(adapter: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or abs(value) > 1e9:
        raise CorruptAdapterError(adapter, f"{name!r} must be a finite number, got {str(value)[:40]!r}")


def _checked_pattern(adapter: str, config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise CorruptAdapterError(adapter, f"{name!r} must map patterns to numbers, got {str(patterns)[:40]!r}")
    for pattern in patterns:
        # vLLM matches it as a regular expression inside the engine core, where one that backtracks for ever would
        # stop everybody. PEFT writes names; two quantifiers in a short pattern are cheap on names.
        if not _PATTERN.fullmatch(pattern) or sum(map(pattern.count, "*+?")) > 2:
            raise CorruptAdapterError(adapter, f"{name!r} has the pattern {pattern[:80]!r}, which names no modules")
        try:
            re.compile(pattern)
        except re.error as error:
            raise CorruptAdapterError(adapter, f"{name!r} has the pattern {pattern[:80]!r}: {error}") from error
    return patterns


def _base_model(config: Mapping[str, Any]) -> str | None:
    name = config.get("base_model_name_or_path")
    return name[:256] if isinstance(name, str) and name else None


def _pair_factors(
    adapter: str, entries: Mapping[str, TensorEntry], config: Mapping[str, Any]
) -> tuple[dict[str, LoRAModule], list[str]]:
    """Put A and B of each module together; the names that are neither come second."""
    factors: dict[str, dict[str, TensorEntry]] = {}
    leftover = []
    for name, entry in entries.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            leftover.append(name)
            continue
        factor = match["linear"] or match["embedding"]
        pair = factors.setdefault(match["module"], {})
        if factor in pair:
            raise CorruptAdapterError(adapter, f"{match['module']} has two tensors lora_{factor}")
        if not entry.is_floating:
            raise CorruptAdapterError(adapter, f"{name} holds {entry.dtype}; a factor holds floating-point numbers")
        if len(entry.shape) != 2 or 0 in entry.shape:
            raise CorruptAdapterError(adapter, f"{name} has the shape {list(entry.shape)}; a factor is a matrix")
        pair[factor] = entry
    return {module: _module(adapter, module, pair, config) for module, pair in factors.items()}, leftover


def _module(adapter: str, name: str, pair: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> LoRAModule:
    missing = [factor for factor in "AB" if factor not in pair]
    if missing:
        raise CorruptAdapterError(adapter, f"{name} has no lora_{missing[0]}: an adapter has both factors of a module")
    (rank, in_features), (out_features, b_rank) = pair["A"].shape, pair["B"].shape
    if rank != b_rank:
        raise CorruptAdapterError(adapter, f"{name}: lora_A has rank {rank} and lora_B has rank {b_rank}")
    expected = config["r"]
    for pattern, pattern_rank in (config.get("rank_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):  # PEFT's rule: the first match wins
            expected = pattern_rank
            break
    if rank != expected:
        raise CorruptAdapterError(adapter, f"{name} has rank {rank}, but {CONFIG_NAME} says {expected}")
    return LoRAModule(rank, in_features, out_features)


def _say_leftover(names: list[str]) -> str:
    shown = ", ".join(name[:120] for name in names[:3]) + (", …" if len(names) > 3 else "")
    return f"It has {len(names)} tensors that are no LoRA factors and that vLLM would lose: {shown}."
