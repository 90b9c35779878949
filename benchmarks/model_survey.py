"""List the modules of each architecture that vLLM adapts: for ``architectures.json`` and ``docs/architectures.md``.

``python benchmarks/model_survey.py`` goes through vLLM's registry. It builds each model that generates text on torch's
meta device, without weights, from transformers' or vLLM's own config class, lets vLLM's ``LoRAModelManager`` wrap its
layers, and describes them as a running engine does. It needs no GPU and takes about a quarter of an hour on one core.

Each model is built in a process of its own, forked from one that has imported vLLM. Read in vLLM 0.32.0.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import model_configs

from qlora_infer._vllm import lora_layers
from qlora_infer._vllm.kernels.routers import hand_on_routers
from qlora_infer.model import architectures
from qlora_infer.model.architectures import kind_of

ROOT = Path(__file__).parents[1]
DATA = ROOT / "src" / "qlora_infer" / "model" / architectures.FILE_NAME
PAGE = ROOT / "docs" / "architectures.md"
#: A model is given up after these seconds.
TIME_LIMIT = 90.0


def main() -> None:
    """Write the file and the table; with names, only print what is found of those architectures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="architectures; all of them where none is named")
    parser.add_argument("--table", action="store_true", help="only write the table, from the file as it is")
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if arguments.table:
        write_table(json.loads(DATA.read_text()))
        return
    served = model_classes()
    started = time.monotonic()
    import_for_all(served)
    found = {}
    for name in arguments.names or served:
        begun = time.monotonic()
        found[name] = in_a_fork(partial(survey, name, served[name]))
        outcome = found[name].get("reason") or f"{len(found[name].get('adapted', ()))} kinds of modules"
        print(f"{name}: {outcome} ({time.monotonic() - begun:.1f} s)", file=sys.stderr, flush=True)
    if arguments.names:
        print(json.dumps(found, indent=1))
        return
    write_data(found)
    write_table(json.loads(DATA.read_text()))
    print(f"{len(found)} architectures in {time.monotonic() - started:.0f} s", file=sys.stderr)


def model_classes() -> dict[str, Any]:
    """Return vLLM's classes for the architectures that generate text; those for drafts and embeddings are left."""
    from vllm.model_executor.models import ModelRegistry, registry

    names = {*registry._TEXT_GENERATION_MODELS, *registry._MULTIMODAL_MODELS, *registry._TRANSFORMERS_SUPPORTED_MODELS}
    return {name: ModelRegistry.models[name] for name in sorted(names)}


def import_for_all(served: Mapping[str, Any]) -> None:
    """Import what each child process would import for itself."""
    for name in (
        *("vllm.engine.arg_utils", "vllm.lora.model_manager", "vllm.model_executor.model_loader.utils", "ray"),
        *("transformers.models.auto.modeling_auto", "transformers.models.auto.processing_auto"),
    ):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for registered in served.values():
        with contextlib.suppress(Exception):  # some need a package or a GPU; the child's error says so
            registered.load_model_cls()


def attributes_of(model: Any) -> dict[str, Any]:
    """Return what a class says about LoRA, without being built; without LoRA only its name."""
    from vllm.model_executor.models.interfaces import supports_lora

    record: dict[str, Any] = {"model": model.__name__}
    if not supports_lora(model):
        return {**record, "lora": False}
    renames = lora_layers.rename_rules(getattr(model, "hf_to_vllm_mapper", None))
    return {
        **record,
        "renames": {key: rules for key, rules in renames.items() if rules not in ([], True)},
        "embeddings": list(getattr(model, "embedding_modules", None) or ()),
        "left_out": [prefix.rstrip(".") + "." for prefix in getattr(model, "lora_skip_prefixes", None) or ()],
    }


def survey(name: str, registered: Any) -> dict[str, Any]:
    """Return the record of an architecture."""
    from vllm.model_executor.models import ModelRegistry

    try:
        model = registered.load_model_cls()
        record = attributes_of(model)
    except Exception as error:
        return {"model": registered.class_name, "reason": first_line(error)}
    if not record.get("lora", True):
        return record
    try:
        # vLLM would look at a class that it has not loaded in another process, which takes ten seconds.
        ModelRegistry.register_model(name, model)
        with tempfile.TemporaryDirectory() as folder:
            model_configs.write(name, Path(folder))
            described = describe(Path(folder))
    except Exception as error:
        if os.environ.get("SURVEY_RAISES"):
            raise
        return {**record, "reason": first_line(error)}
    return {**record, **record_of(described)}


def first_line(error: BaseException) -> str:
    """Return an error in one line without this machine's paths."""
    line = str(error).strip().partition("\n")[0]
    return re.sub(r"(/[\w.+-]+){2,}", "…", f"{type(error).__name__}: {line}")[:160]


def record_of(described: Mapping[str, Any]) -> dict[str, Any]:
    """Return a description in kinds of modules, which do not depend on how many layers a model has."""
    left_out = tuple(described["left_out"])
    sizes, unadapted = described["sizes"], described["unadapted"]
    adapted = {kind_of(name) for name in sizes if not name.startswith(left_out or ("\0",))}
    rest = {kind_of(name): kind for name, kind in unadapted.items() if not name.startswith(left_out or ("\0",))}
    renames = {key: rules for key, rules in described["renames"].items() if rules not in ([], True)}
    record: dict[str, Any] = {
        "renames": renames,
        "left_out": sorted(left_out),
        "adapted": sorted(adapted),
        "unadapted": {kind: rest[kind] for kind in sorted(rest) if kind not in adapted},
    }
    record["fused"] = {
        kind_of(name): [part.rpartition(".")[2] for part in parts]
        for name, parts in sorted(described["fused"].items())
        if not name.startswith(left_out or ("\0",))
    }
    one_expert = [found[2] for found in map(_EXPERT.fullmatch, sizes) if found and found[1] == "0"]
    if one_expert:
        record["experts"] = list(dict.fromkeys(one_expert))  # in vLLM's order: gate, down, up
    elif any(num_experts for _, _, num_experts in sizes.values()):
        record["experts"] = "stacked"
    if described["unlisted"]:
        record["unlisted"] = {kind_of(layer): why for layer, why in described["unlisted"].items()}
    return record


_EXPERT = re.compile(r".+\.experts\.(\d+)\.([^.]+)")


def describe(checkpoint: Path) -> dict[str, Any]:
    """Build the model of a folder's ``config.json`` on the meta device, let vLLM wrap its layers, and describe them."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    build_experts_without_kernels()
    hand_on_routers()
    arguments = EngineArgs(
        model=str(checkpoint),
        skip_tokenizer_init=True,
        load_format="dummy",
        enable_lora=True,
        max_loras=1,
        max_lora_rank=8,
        enforce_eager=True,
        max_model_len=64,
        dtype="bfloat16",
    )
    config = arguments.create_engine_config()
    with set_current_vllm_config(config), tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, backend="gloo")
        initialize_model_parallel(1, 1)
        with torch.device("meta"), set_default_torch_dtype(torch.bfloat16):
            model = initialize_model(config)
            vocabulary = getattr(config.model_config.hf_text_config, "vocab_size", 0)
            manager = LoRAModelManager(model, 1, 8, vocabulary, config.lora_config, torch.device("meta"), config)
        return lora_layers.describe(manager)


def build_experts_without_kernels() -> None:
    """Wrap layers of experts as on a GPU; their kernels, which the CPU has not, are never called here."""
    from vllm.lora.layers import FusedMoE3DWithLoRA, FusedMoEWithLoRA
    from vllm.lora.layers.base import BaseLayerWithLoRA
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

    finish = FusedMoEConfig.__post_init__

    def finish_without_lora(self: Any) -> None:
        self.is_lora_enabled = False
        with contextlib.suppress(NotImplementedError):  # experts without a gate are for GPUs only
            finish(self)

    def wrap(self: Any, base_layer: Any) -> None:
        import torch

        BaseLayerWithLoRA.__init__(self)
        self.base_layer = base_layer
        self.moe_config = base_layer.moe_config
        self._shared_experts = base_layer._shared_experts
        self.tp_size = self.moe_config.moe_parallel_config.tp_size
        self.device = torch.device("meta")
        self._w13_slices = 2 if self.moe_config.is_act_and_mul else 1
        self.enable_moe_shared_loras = False

    FusedMoEConfig.__post_init__ = finish_without_lora
    FusedMoEWithLoRA.__init__ = wrap
    FusedMoEWithLoRA.create_lora_weights = FusedMoE3DWithLoRA.create_lora_weights = create_expert_slots
    FusedMoEWithLoRA.set_mapping = BaseLayerWithLoRA.set_mapping


def create_expert_slots(self: Any, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
    """Build no slots for hundreds of experts; their sizes are those of the layer."""
    self.w13_lora_a_stacked = self.w2_lora_a_stacked = ()


def in_a_fork(ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a function returns in a child process, which may die or hang; then its ``reason``."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        if not os.environ.get("SURVEY_RAISES"):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1)
            os.dup2(nothing, 2)
        signal.alarm(int(TIME_LIMIT))
        with os.fdopen(writing, "w") as pipe:
            pipe.write(json.dumps(ask()))
            pipe.flush()
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    with contextlib.suppress(ValueError):
        found: dict[str, Any] = json.loads(text)
        return found
    return {"model": "", "reason": f"the process ended with status {status}"}


def write_data(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the package's file, an architecture a line."""
    import transformers
    import vllm

    lines = [f" {json.dumps(name)}: {json.dumps(brief(record))}" for name, record in sorted(found.items())]
    head = json.dumps({"vllm": vllm.__version__.partition("+")[0], "transformers": transformers.__version__})
    DATA.write_text(f'{head[:-1]}, "architectures": {{\n' + ",\n".join(lines) + "\n}}\n")


def brief(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record without what is empty."""
    return {key: value for key, value in record.items() if value not in ({}, [], None)}


def write_table(data: Mapping[str, Any]) -> None:
    """Replace the table between its two marks in the page."""
    text = PAGE.read_text()
    begin, end = "<!-- model survey: begin -->\n", "<!-- model survey: end -->"
    head, tail = text.partition(begin)[0], text.partition(end)[2]
    PAGE.write_text(head + begin + "\n".join(table(data)) + "\n" + end + tail)


def table(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the page's tables, architectures of which the same is true in one row."""
    records = data["architectures"]
    built = {name: record for name, record in records.items() if record.get("adapted")}
    failed = {name: record for name, record in records.items() if record.get("reason")}
    without = [name for name, record in records.items() if record.get("lora") is False]
    yield f"vLLM {data['vllm']} has {len(records)} architectures that generate text. {len(built)} of them were built."
    yield ""
    yield "| adapted | not adapted | experts | towers | architectures |"
    yield "| --- | --- | --- | --- | --- |"
    for (beside, unadapted, experts, towers), names in sorted(_grouped(built, _facts).items(), key=_by_size):
        yield f"| linear layers{beside} | {unadapted} | {experts} | {towers} | {_joined(names)} |"
    yield ""
    yield f"{len(failed)} were not built, so only their classes' LoRA attributes are known:"
    yield ""
    yield "| reason | architectures |"
    yield "| --- | --- |"
    for (reason,), names in sorted(_grouped(failed, _reason).items(), key=_by_size):
        yield f"| {reason} | {_joined(names)} |"
    yield ""
    yield f"vLLM has no LoRA for {len(without)}: {_joined(without)}."


def _facts(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Return an architecture's cells: what is adapted beside linear layers, and what is not."""
    ends = {kind.rpartition(".")[2] for kind in record["adapted"]} & set(_EMBEDDINGS)
    unadapted = {
        _EMBEDDINGS.get(kind.rpartition(".")[2], f"`{kind.rpartition('.')[2]}`") for kind in record.get("unadapted", {})
    }
    experts = record.get("experts", "")
    experts = "" if not experts else "as 3D parameters" if experts == "stacked" else "one by one"
    if any(kind.endswith("experts") for kind in record.get("unlisted", {})):
        experts = "not served"
    return (
        "".join(f", {_EMBEDDINGS[end]}" for end in sorted(ends)),
        ", ".join(sorted(unadapted)),
        experts,
        "left out" if record.get("left_out") else "",
    )


def _reason(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Return why an architecture was not built, in a few words."""
    reason = record["reason"]
    if reason.startswith("LookupError"):
        return ("its config is code of the checkpoint",)
    if "CPU" in reason or "CUDA" in reason or "triton" in reason or "fa_utils" in reason or "backend" in reason:
        return ("it needs a GPU",)
    if reason.startswith(("OSError", "ModuleNotFoundError", "ImportError")):
        return ("a package or a file of the checkpoint is missing",)
    return ("vLLM does not start with its class's default config",)


#: What modules are called that are no linear layers.
_EMBEDDINGS = {
    **dict.fromkeys(("lm_head", "output", "output_layer", "embed_out", "proj_out"), "output layer"),
    **dict.fromkeys(
        ("embed_tokens", "embedding", "embed_in", "tok_embeddings", "wte", "word_embeddings"), "embeddings"
    ),
    **dict.fromkeys(("conv1d", "conv", "conv1", "conv2"), "convolution"),
    **dict.fromkeys(("embed_positions", "wpe", "position_embedding"), "positions"),
    "embed_tokens_per_layer": "embeddings",
}


def _grouped(records: Mapping[str, Any], key: Callable[[Any], tuple[str, ...]]) -> dict[tuple[str, ...], list[str]]:
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, record in sorted(records.items()):
        groups.setdefault(key(record), []).append(name)
    return groups


def _by_size(group: tuple[tuple[str, ...], list[str]]) -> tuple[int, tuple[str, ...]]:
    return -len(group[1]), group[0]


def _joined(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    main()
