"""The command ``inspect-adapter``, which checks an adapter, and its fit to a base model, without loading either."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from attrs import asdict, evolve, frozen

from qlora_infer.adapters import preflight
from qlora_infer.adapters.store import AdapterStore
from qlora_infer.config import ALLOWED_RANKS
from qlora_infer.errors import AdapterError, IncompatibleAdapterError, QLoRAInferError, UnsafeAdapterError
from qlora_infer.files.extras import Extras
from qlora_infer.files.kinds.training import MAX_CARD_BYTES, Training
from qlora_infer.files.lineage import lineage
from qlora_infer.files.manifest import AdapterManifest, check_file
from qlora_infer.files.peft_config import read_config
from qlora_infer.files.safetensors import read_metadata
from qlora_infer.files.scratch import scratch_folder
from qlora_infer.files.snapshot import CONFIG_NAME, WEIGHTS_NAME
from qlora_infer.model.checkpoint import read_checkpoint
from qlora_infer.model.vocabulary import read_vocabulary
from qlora_infer.model.weights import BaseWeights
from qlora_infer.sources.folder import FolderSource
from qlora_infer.sources.source import Source, parse_source


class BaseDevice(StrEnum):
    """The kind of device that a base is served on."""

    CUDA = "cuda"
    CPU = "cpu"


DOES_NOT_FIT = 1
UNREADABLE = 2


@frozen
class Inspection:
    """The facts that ``inspect`` reports about an adapter.

    Attributes:
        source: The source, without secrets.
        digest: SHA-256 of its files, as in ``LoadedAdapter``.
        rank: The largest rank of its modules.
        alpha: ``lora_alpha``.
        modules: The kinds of modules that it changes, such as ``q_proj``, and how many of each.
        num_zero_modules: The number of them that A or B of zeros leaves as they are.
        num_magnitudes: The number of them that have DoRA's magnitudes.
        num_bytes: The size of its tensors.
        base_model: The base model in its config.
        task: PEFT's task type, such as ``CAUSAL_LM``.
        training_class: The class of the model that it was trained on.
        tools: The trainers that left their names.
        peft_version: The version of PEFT that saved it.
        carries: The files in use beside its weights, in words.
        left_out: The invalid files beside its weights, with the reasons.
        format: The format that it is in: ``"PEFT"``, or one that was converted.
        pickled: Whether its weights are a pickle, which was converted.
        base: The model that it was held against.
        lineage: How that compares with ``base_model``.
        checked: The checked parts of that model.
        fit: The number of that model's modules that it changes, and its parts that are left out.
        changes_nothing: Whether A or B is all zeros in each module that is applied.
        reasons: The reasons why it cannot be served (on ``base``, if given); empty if it can.
    """

    source: str
    digest: str
    rank: int
    alpha: float | None
    modules: dict[str, int]
    num_zero_modules: int
    num_magnitudes: int
    num_bytes: int
    base_model: str | None
    task: str
    training_class: str
    tools: tuple[str, ...]
    peft_version: str
    carries: tuple[str, ...]
    format: str
    pickled: bool
    left_out: dict[str, str]
    base: str | None = None
    lineage: str | None = None
    checked: str | None = None
    fit: str | None = None
    changes_nothing: bool = False
    reasons: tuple[str, ...] = ()


def inspect_adapter(
    ctx: typer.Context,
    source: Annotated[str, typer.Argument(help="A Hub id, a folder or a URL, as load_adapter takes it.")],
    base: Annotated[str | None, typer.Option(help="The base model to compare with: a Hub id or a folder.")] = None,
    base_revision: Annotated[str | None, typer.Option(help="The base model's branch, tag or commit.")] = None,
    device: Annotated[
        BaseDevice, typer.Option(help="The device of the engine: adapters of experts need a GPU, DoRA a CPU.")
    ] = BaseDevice.CUDA,
    max_lora_rank: Annotated[int, typer.Option(help="The max_lora_rank of the engine.")] = ALLOWED_RANKS[-1],
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Convert pickled weights, without running them.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show an adapter, and check whether it fits a base model, without loading a model.

    It makes every check of load_adapter, with the same messages. The exit code is 0 if the adapter works, 1 if it
    cannot be served (on this base, or on any), and 2 if it or the base cannot be read.
    """
    try:
        found = _inspect(
            source,
            base,
            base_revision,
            device=device.value,
            max_lora_rank=max_lora_rank,
            allow_pickle=allow_pickle,
        )
    except (QLoRAInferError, ValueError) as error:
        if ctx.find_root().params["debug"]:
            raise
        typer.echo(f"error: {error}", err=True)
        is_sound = isinstance(error, IncompatibleAdapterError)  # it was read, and no conversion of it is exact
        raise typer.Exit(DOES_NOT_FIT if is_sound else UNREADABLE) from error
    typer.echo(json.dumps(asdict(found), indent=2) if as_json else "\n".join(_lines(found)))
    raise typer.Exit(DOES_NOT_FIT if found.reasons else 0)


def _inspect(
    source: str, base: str | None, base_revision: str | None, *, device: str, max_lora_rank: int, allow_pickle: bool
) -> Inspection:
    parsed = parse_source(source)
    with tempfile.TemporaryDirectory(dir=scratch_folder()) as folder:
        found, manifest, extras = _read(parsed, Path(folder), allow_pickle=allow_pickle)
        if base is None:
            nothing = bool(manifest.modules) and set(manifest.modules) <= manifest.zero_modules
            return evolve(found, changes_nothing=nothing, reasons=preflight.reasons_on_any_model(manifest))
        checkpoint = read_checkpoint(base, revision=base_revision, device=device)
        vocabulary = read_vocabulary(base, revision=base_revision) if extras.file_names else None
        checked = checkpoint.checked
        if extras.file_names:
            checked += (
                f"; {'no tokenizer.json was found' if vocabulary is None else 'the tokens of its tokenizer.json'}"
            )
        found = evolve(found, base=base, lineage=lineage(manifest.base_model, base), checked=checked)
        if checkpoint.refusal:
            return evolve(found, reasons=(checkpoint.refusal,))
        try:
            fit, extras = preflight.check_with_extras(
                source,
                manifest,
                extras,
                checkpoint.modules,
                vocabulary=lambda: vocabulary,
                max_lora_rank=max_lora_rank,
                base=BaseWeights(base, revision=base_revision),
            )
        except IncompatibleAdapterError as error:
            return evolve(found, reasons=error.reasons)
    return evolve(found, fit=str(fit), changes_nothing=fit.changes_nothing(manifest), left_out=dict(extras.left_out))


def _read(source: Source, folder: Path, *, allow_pickle: bool) -> tuple[Inspection, AdapterManifest, Extras]:
    """Everything that an engine would do with it up to the model, on a copy in a folder."""
    name = str(source)
    store = AdapterStore(folder)
    try:
        snapshot, manifest, extras = store.make(name, 1, source, allow_pickle=False)
        pickled = False
    except UnsafeAdapterError:
        if not allow_pickle:
            raise
        snapshot, manifest, extras = store.make(name, 1, source, allow_pickle=True)
        pickled = True
    finally:
        store.close()
    config = read_config(name, snapshot.folder / CONFIG_NAME)
    training = Training.of(config, read_metadata(name, snapshot.folder / WEIGHTS_NAME), _model_card(source))
    found = Inspection(
        source=name,
        digest=snapshot.digest,
        rank=manifest.rank,
        alpha=config.get("lora_alpha"),
        modules=dict(Counter(module.rpartition(".")[2] for module in manifest.modules)),
        num_zero_modules=len(manifest.zero_modules),
        num_magnitudes=len(manifest.magnitudes),
        num_bytes=manifest.num_bytes,
        base_model=manifest.base_model,
        task=training.task,
        training_class=training.model_class,
        tools=training.tools,
        peft_version=training.peft_version,
        carries=tuple(_carries(extras)),
        format=snapshot.format,
        pickled=pickled,
        left_out=dict(extras.left_out),
    )
    return found, manifest, extras


def _model_card(source: Source) -> str:
    """Return the beginning of a local folder's README.md; no engine reads or copies it."""
    if not isinstance(source, FolderSource):
        return ""
    folder = Path(source.path).expanduser()
    try:
        with check_file("README.md", folder, "README.md").open("rb") as file:
            return file.read(MAX_CARD_BYTES).decode(errors="replace")
    except (AdapterError, OSError):
        return ""


def _carries(extras: Extras) -> Iterator[str]:
    if extras.chat_template is not None:
        yield "a chat template"
    if extras.sampling_defaults:
        yield f"generation defaults {json.dumps(dict(extras.sampling_defaults))}"
    if extras.stop_token_ids:
        yield f"stop tokens {', '.join(map(str, extras.stop_token_ids))}"
    if extras.added_tokens:
        yield f"{len(extras.added_tokens)} added tokens"


def _lines(found: Inspection) -> Iterator[str]:
    modules = ", ".join(f"{name} ({count})" for name, count in found.modules.items())
    yield f"adapter     {found.source}"
    yield f"digest      {found.digest[:12]}"
    yield f"format      {found.format}"
    yield f"rank        {found.rank}, alpha {found.alpha if found.alpha is not None else 'not given'}"
    yield f"modules     {sum(found.modules.values())}: {modules or 'none'}"
    if found.num_magnitudes:
        yield f"DoRA        magnitudes of {found.num_magnitudes} modules, which are served on CPUs"
    yield f"size        {found.num_bytes} bytes"
    yield f"trained on  {found.base_model or 'it does not say'}"
    saved_by = [*found.tools, *([f"PEFT {found.peft_version}"] if found.peft_version else [])]
    for title, text in (("task", found.task), ("class", found.training_class), ("saved by", ", ".join(saved_by))):
        if text:
            yield f"{title:<12}{text}"
    if found.changes_nothing:
        yield "changes     nothing: lora_A or lora_B is all zeros in each of its modules"
    elif found.num_zero_modules:
        yield f"changes     nothing in {found.num_zero_modules} modules, where lora_A or lora_B is all zeros"
    yield f"carries     {', '.join(found.carries) or 'nothing beside its weights'}"
    for part, reason in found.left_out.items():
        yield f"left out    {part}: {reason}"
    yield f"weights     {'pickled (converted to be looked at)' if found.pickled else 'safetensors'}"
    if found.base:
        yield f"base        {found.base} (lineage: {found.lineage})"
        yield f"checked     {found.checked}"
        yield f"fits        {f'yes: {found.fit}' if found.fit else 'no'}"
    elif found.reasons:
        yield "served      no, on any base"
    yield from (f"  - {reason}" for reason in found.reasons)
