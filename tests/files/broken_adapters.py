"""Adapters that are broken, each by one fault, for any model: what they are, and the error that must name the fault."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from qlora_infer.adapters.preflight import Fit, check
from qlora_infer.errors import (
    AdapterError,
    AdapterNotFoundError,
    CorruptAdapterError,
    IncompatibleAdapterError,
    UnsafeAdapterError,
)
from qlora_infer.files.manifest import check_file, read_manifest, weights_files
from qlora_infer.files.safetensors import check_finite
from qlora_infer.model.modules import ModelModules, ModuleShape
from qlora_infer.testing import write_adapter

Modules = Mapping[str, tuple[int, int]]


@frozen
class BrokenAdapter:
    """One fault: how it is made from a sound adapter, and the error and words that it must end in."""

    name: str
    break_it: Callable[[Path, Modules], None]
    error: type[AdapterError]
    match: str

    def make(self, folder: Path, modules: Modules) -> Path:
        write_adapter(folder, modules=modules)
        self.break_it(folder, modules)
        return folder


def config_with(**fields: Any) -> Callable[[Path, Modules], None]:
    def break_it(folder: Path, modules: Modules) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return break_it


def config_without(field: str) -> Callable[[Path, Modules], None]:
    def break_it(folder: Path, modules: Modules) -> None:
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        del config[field]
        path.write_text(json.dumps(config))

    return break_it


def config_text(text: str) -> Callable[[Path, Modules], None]:
    return lambda folder, modules: (folder / "adapter_config.json").write_text(text) and None


def without(name: str) -> Callable[[Path, Modules], None]:
    return lambda folder, modules: (folder / name).unlink()


def weights_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path, Modules], None]:
    def break_it(folder: Path, modules: Modules) -> None:
        path = folder / "adapter_model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return break_it


def read_safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_safetensors(header: Any, body: bytes) -> bytes:
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + body


def header_with(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, Modules], None]:
    def rewrite(content: bytes) -> bytes:
        header, body = read_safetensors(content)
        changed = change(header)
        return write_safetensors(header if changed is None else changed, body)

    return weights_bytes(rewrite)


def first(header: dict[str, Any]) -> dict[str, Any]:
    return next(iter(header.values()))


def rename(old: str, new: str, *, every: bool = False) -> Callable[[Path, Modules], None]:
    def change(header: dict[str, Any]) -> dict[str, Any]:
        names = [name for name in header if old in name]
        chosen = names if every else names[:2]  # lora_A and lora_B of one module
        return {name.replace(old, new) if name in chosen else name: entry for name, entry in header.items()}

    return header_with(change)


def number(bits: bytes) -> Callable[[Path, Modules], None]:
    """Put one 32-bit float into the middle of the first tensor."""

    def change(content: bytes) -> bytes:
        start = 8 + struct.unpack("<Q", content[:8])[0] + 64
        return content[:start] + bits + content[start + 4 :]

    return weights_bytes(change)


def wider(part: str, side: int) -> Callable[[Path, Modules], None]:
    """An adapter for a module with 8 more inputs (side 0) or outputs (side 1)."""

    def break_it(folder: Path, modules: Modules) -> None:
        changed = dict(modules)
        name = next(name for name in modules if name.endswith(part))
        shape = list(modules[name])
        shape[side] += 8
        changed[name] = (shape[0], shape[1])
        write_adapter(folder, modules=changed)

    return break_it


def other_rank(factor: str) -> Callable[[Path, Modules], None]:
    """One factor with another rank than its partner; the sizes in bytes stay right."""

    def change(header: dict[str, Any]) -> None:
        name = next(name for name in header if f"lora_{factor}" in name)
        rows, columns = header[name]["shape"]
        header[name]["shape"] = [rows // 2, columns * 2] if factor == "A" else [rows * 2, columns // 2]

    return header_with(change)


def link_out(folder: Path, modules: Modules) -> None:
    path = folder / "adapter_model.safetensors"
    outside = folder.parent / f"{folder.name}-outside.safetensors"
    path.rename(outside)
    path.symlink_to(outside)


def only_pickle(folder: Path, modules: Modules) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"weights": [1.0]}))


def weights_are_a_folder(folder: Path, modules: Modules) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").mkdir()


def sharded(folder: Path, modules: Modules) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors.index.json").write_text("{}")


def foreign_model(folder: Path, modules: Modules) -> None:
    write_adapter(folder, modules={f"transformer.h.{layer}.attn.c_attn": (64, 192) for layer in range(4)})


def set_first(**fields: Any) -> Callable[[Path, Modules], None]:
    return header_with(lambda header: first(header).update(fields))


def drop_b(header: dict[str, Any]) -> dict[str, Any]:
    """Without the last tensor, which is a lora_B; the file is cut by the caller."""
    return dict(list(header.items())[:-1])


def lone_a(folder: Path, modules: Modules) -> None:
    path = folder / "adapter_model.safetensors"
    header, body = read_safetensors(path.read_bytes())
    kept = drop_b(header)
    path.write_bytes(write_safetensors(kept, body[: max(entry["data_offsets"][1] for entry in kept.values())]))


def wrapped_twice(folder: Path, modules: Modules) -> None:
    """A module with and without the name that torch.compile leaves in it: they are one."""
    name, shape = next(iter(modules.items()))
    write_adapter(folder, modules={**modules, f"_orig_mod.{name}": shape})


def with_metadata(value: Any) -> Callable[[Path, Modules], None]:
    return header_with(lambda header: {"__metadata__": value, **header})


def many_patterns(folder: Path, modules: Modules) -> None:
    """So many patterns that compiling them takes too long: vLLM would match each with each module, in its engine core."""
    config_with(rank_pattern={f"m{index}": 8 for index in range(80_000)})(folder, modules)


def other_base_copy(folder: Path, modules: Modules) -> None:
    """Factors of lm_head beside a base weight that is not theirs."""
    write_adapter(folder, modules={**modules, "lm_head": (64, 96)})
    extra_tensor("base_model.model.lm_head.base_layer.weight")(folder, modules)


def inspect(folder: Path, modules: Modules, *, max_lora_rank: int = 64) -> Fit:
    """Everything that is checked before vLLM sees an adapter, in the order in which the cache does it."""
    check_file("broken", folder, "adapter_config.json")
    weights_files("broken", folder, allow_pickle=False)
    manifest = read_manifest("broken", folder)
    check_finite("broken", folder / "adapter_model.safetensors")
    shapes = {name: ModuleShape(*shape) for name, shape in modules.items()}
    return check("broken", manifest, ModelModules(shapes), max_lora_rank=max_lora_rank)


def overlap(header: dict[str, Any]) -> None:
    entries = list(header.values())
    size = entries[0]["data_offsets"][1]
    same_size = next(entry for entry in entries[1:] if entry["data_offsets"][1] - entry["data_offsets"][0] == size)
    same_size["data_offsets"] = [0, size]


def extra_tensor(name: str) -> Callable[[Path, Modules], None]:
    def change(content: bytes) -> bytes:
        header, body = read_safetensors(content)
        header[name] = {"dtype": "F32", "shape": [4], "data_offsets": [len(body), len(body) + 16]}
        return write_safetensors(header, body + bytes(16))

    return weights_bytes(change)


BROKEN: tuple[BrokenAdapter, ...] = (
    BrokenAdapter("config-missing", without("adapter_config.json"), AdapterNotFoundError, "no adapter_config.json"),
    BrokenAdapter("config-no-json", config_text("hello"), CorruptAdapterError, "not valid JSON"),
    BrokenAdapter("config-truncated", config_text('{"r": 8, "lora_al'), CorruptAdapterError, "not valid JSON"),
    BrokenAdapter("config-array", config_text("[1, 2]"), CorruptAdapterError, "must hold a JSON object"),
    BrokenAdapter("config-deep", config_text("[" * 100_000), CorruptAdapterError, "not valid JSON"),
    BrokenAdapter("config-huge", config_text(" " * (2 << 20)), CorruptAdapterError, "at most 1048576"),
    BrokenAdapter("config-not-utf8", lambda f, m: (f / "adapter_config.json").write_bytes(b"\xff{}") and None,
                  CorruptAdapterError, "not valid JSON"),
    BrokenAdapter("no-rank", config_without("r"), CorruptAdapterError, "no 'r'"),
    BrokenAdapter("no-alpha", config_without("lora_alpha"), CorruptAdapterError, "no 'lora_alpha'"),
    BrokenAdapter("targets-are-a-number", config_with(target_modules=3), CorruptAdapterError, "'target_modules' must be"),
    BrokenAdapter("rank-zero", config_with(r=0), CorruptAdapterError, "'r' must be"),
    BrokenAdapter("rank-negative", config_with(r=-4), CorruptAdapterError, "'r' must be"),
    BrokenAdapter("rank-text", config_with(r="eight"), CorruptAdapterError, "'r' must be"),
    BrokenAdapter("rank-bool", config_with(r=True), CorruptAdapterError, "'r' must be"),
    BrokenAdapter("rank-lies", config_with(r=4), CorruptAdapterError, "has rank 8, but adapter_config.json says 4"),
    BrokenAdapter("alpha-nan", config_with(lora_alpha=float("nan")), CorruptAdapterError, "NaN is not a number"),
    BrokenAdapter("alpha-text", config_with(lora_alpha="x"), CorruptAdapterError, "'lora_alpha' must be"),
    BrokenAdapter("pattern-backtracks", config_with(rank_pattern={r"([\w.]+)+-": 8}), CorruptAdapterError, "more than 2 s to match"),
    BrokenAdapter("pattern-unclosed", config_with(rank_pattern={"(a|a": 8}), CorruptAdapterError, "no regular expression"),
    BrokenAdapter("patterns-without-end", many_patterns, CorruptAdapterError, "more than 2 s to match"),
    BrokenAdapter("alpha-huge", config_with(lora_alpha=10**400), CorruptAdapterError, "'lora_alpha' must be"),
    BrokenAdapter("rslora-text", config_with(use_rslora="false"), CorruptAdapterError, "'use_rslora' must be"),
    BrokenAdapter("init-number", config_with(init_lora_weights=3), CorruptAdapterError, "'init_lora_weights' must be"),
    BrokenAdapter("type-list", config_with(peft_type=["LORA"]), CorruptAdapterError, "'peft_type' must be"),
    BrokenAdapter("config-keys-twice", config_text('{"r": 8, "r": 4}'), CorruptAdapterError, "stands in it twice"),
    BrokenAdapter("rank-too-high", lambda f, m: write_adapter(f, modules=m, rank=80) and None,
                  IncompatibleAdapterError, "max_lora_rank=128"),
    BrokenAdapter("rank-over-every-limit", lambda f, m: write_adapter(f, modules=dict(list(m.items())[:1]), rank=600) and None,
                  IncompatibleAdapterError, "ranks up to 512"),
    BrokenAdapter("dora", config_with(use_dora=True), IncompatibleAdapterError, "DoRA"),
    BrokenAdapter("pissa", config_with(init_lora_weights="pissa"), IncompatibleAdapterError, "'pissa'"),
    BrokenAdapter("alora", config_with(alora_invocation_tokens=[1, 2]), IncompatibleAdapterError, "aLoRA"),
    BrokenAdapter("replication", config_with(layer_replication=[[0, 2]]), IncompatibleAdapterError, "layer_replication"),
    BrokenAdapter("modules-to-save", config_with(modules_to_save=["lm_head"]), IncompatibleAdapterError, "modules_to_save"),
    BrokenAdapter("ia3", config_with(peft_type="IA3"), IncompatibleAdapterError, "adapter of type IA3"),
    BrokenAdapter("weights-missing", without("adapter_model.safetensors"), AdapterNotFoundError, "no adapter_model.safetensors"),
    BrokenAdapter("weights-empty", weights_bytes(lambda content: b""), CorruptAdapterError, "header ends at byte 8 of 0"),
    BrokenAdapter("weights-truncated", weights_bytes(lambda content: content[:-100]), CorruptAdapterError, "the file holds"),
    BrokenAdapter("weights-with-a-tail", weights_bytes(lambda content: content + b"x"), CorruptAdapterError, "the file holds"),
    BrokenAdapter("header-cut", weights_bytes(lambda content: content[:40]), CorruptAdapterError, "header ends at byte"),
    BrokenAdapter("header-too-long", weights_bytes(lambda content: b"\xff" * 8 + content[8:]), CorruptAdapterError, "header ends"),
    BrokenAdapter("header-no-json", weights_bytes(lambda content: content[:8] + b"#" + content[9:]),
                  CorruptAdapterError, "not valid JSON"),
    BrokenAdapter("header-empty", weights_bytes(lambda content: write_safetensors({}, b"")), CorruptAdapterError, "no tensors"),
    BrokenAdapter("header-nests", weights_bytes(lambda content: write_safetensors({"a": [[]] * 500_000}, b"")),
                  CorruptAdapterError, "more than 400000 objects and lists"),
    BrokenAdapter("metadata-number", with_metadata(5), CorruptAdapterError, "__metadata__ must map"),
    BrokenAdapter("metadata-half-a-character", with_metadata({"a": "\ud800"}), CorruptAdapterError, "not valid JSON"),
    BrokenAdapter("name-too-long", rename("q_proj", "q." * 200 + "q_proj"), CorruptAdapterError, "name has .* characters"),
    BrokenAdapter("name-moves-the-cursor", rename("q_proj", "q\x1b[2J"), CorruptAdapterError, "cannot be shown"),
    BrokenAdapter("offsets-overlap", header_with(overlap), CorruptAdapterError, "the tensor before it ends"),
    BrokenAdapter("offsets-outside", set_first(data_offsets=[0, 1 << 40]), CorruptAdapterError, "bytes for"),
    BrokenAdapter("offsets-negative", set_first(data_offsets=[-8, 0]), CorruptAdapterError, "data_offsets"),
    BrokenAdapter("shape-huge", set_first(shape=[1 << 40, 1 << 40]), CorruptAdapterError, "shape"),
    BrokenAdapter("dtype-unknown", set_first(dtype="F3"), CorruptAdapterError, "unknown dtype"),
    BrokenAdapter("dtype-integer", set_first(dtype="I32"), CorruptAdapterError, "holds I32"),
    BrokenAdapter("nan", number(b"\x00\x00\xc0\x7f"), CorruptAdapterError, "NaN or infinity"),
    BrokenAdapter("infinity", number(b"\x00\x00\x80\xff"), CorruptAdapterError, "NaN or infinity"),
    BrokenAdapter("too-large-for-float16", number(struct.pack("<f", 1e5)), CorruptAdapterError, "NaN or infinity"),
    BrokenAdapter("a-without-b", lone_a, CorruptAdapterError, "has no lora_B"),
    BrokenAdapter("ranks-differ", other_rank("A"), CorruptAdapterError, "lora_A has rank 4 and lora_B has rank 8"),
    BrokenAdapter("too-many-inputs", wider("q_proj", 0), IncompatibleAdapterError, "q_proj has .* inputs"),
    BrokenAdapter("too-many-outputs", wider("down_proj", 1), IncompatibleAdapterError, "down_proj has .* outputs"),
    BrokenAdapter("layer-too-many", rename("layers.0.", "layers.99."), IncompatibleAdapterError, r"layers\.99\."),
    BrokenAdapter("module-unknown", rename("q_proj", "x_proj"), IncompatibleAdapterError, "x_proj"),
    BrokenAdapter("nothing-matches", rename("model.layers", "decoder.blocks", every=True), IncompatibleAdapterError, "None of its"),
    BrokenAdapter("another-architecture", foreign_model, IncompatibleAdapterError, "another architecture"),
    BrokenAdapter("magnitudes", extra_tensor("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"),
                  IncompatibleAdapterError, "does not set use_dora"),
    BrokenAdapter("whole-weights", extra_tensor("base_model.model.lm_head.weight"), IncompatibleAdapterError, "replaces lm_head.weight"),
    BrokenAdapter("named-factors", rename("lora_A.weight", "lora_A.default.weight"), CorruptAdapterError, "several adapters"),
    BrokenAdapter("compiled-in-part", rename("model.layers.0.self_attn.q_proj", "_orig_mod.model.layers.99.self_attn.q_proj"),
                  IncompatibleAdapterError, r"_orig_mod\.model\.layers\.99"),
    BrokenAdapter("wrapped-and-not", wrapped_twice, IncompatibleAdapterError, "does not have"),
    BrokenAdapter("another-base-weight", other_base_copy, CorruptAdapterError, "its factors say 64 inputs"),
    BrokenAdapter("pickle-only", only_pickle, UnsafeAdapterError, "allow_pickle=True"),
    BrokenAdapter("link-out", link_out, UnsafeAdapterError, "link to a place outside"),
    BrokenAdapter("not-a-file", weights_are_a_folder, UnsafeAdapterError, "not a regular file"),
    BrokenAdapter("sharded", sharded, AdapterNotFoundError, "none of the files that it names"),
)  # fmt: skip
