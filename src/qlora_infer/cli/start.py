"""The options that make an engine, and the engine that they make."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from qlora_infer.engine import QuantizedLoRAEngine
from qlora_infer.errors import QLoRAInferError

StartEngine = Callable[..., QuantizedLoRAEngine]


def _number_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def json_object(text: str) -> dict[str, Any]:
    """An option's value that is a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"it is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f"it must be a JSON object, such as '{{\"a\": 1}}', got {text[:80]}")
    return value


def _named_source(text: str) -> tuple[str, str]:
    name, equals, source = text.partition("=")
    if not (name and equals and source):
        raise typer.BadParameter("it is written name=source, such as pirate=me/pirate-lora")
    return name, source


_PANEL = "Engine"

Model = Annotated[str, typer.Argument(help="A Hub id or a local folder with a checkpoint.")]
# typer wants a class for an option's type; what the parser returns is told where it is used.
Adapters = Annotated[
    list[Any] | None,
    typer.Option(
        "--adapter", "-a", metavar="NAME=SOURCE", parser=_named_source, help="An adapter to load; may be repeated."
    ),
]
SamplingParams = Annotated[
    Any,
    typer.Option(
        "--sampling-params",
        metavar="JSON",
        parser=json_object,
        help='Such as \'{"temperature": 0, "max_tokens": 64}\'.',
    ),
]
Quantization = Annotated[
    str | None, typer.Option(rich_help_panel=_PANEL, help='"auto" (what config.json says), or a strategy\'s name.')
]
MaxLoras = Annotated[
    Any,
    typer.Option(
        metavar="N|auto", parser=_number_or_auto, rich_help_panel=_PANEL, help="Adapters that one batch may mix."
    ),
]
MaxSlotBytes = Annotated[
    int | None, typer.Option(rich_help_panel=_PANEL, help="With --max-loras auto: bytes for all slots on the device.")
]
MaxLoraRank = Annotated[
    Any,
    typer.Option(
        metavar="N|auto", parser=_number_or_auto, rich_help_panel=_PANEL, help="The largest rank of an adapter."
    ),
]
MaxCpuLoras = Annotated[
    Any,
    typer.Option(
        metavar="N|auto", parser=_number_or_auto, rich_help_panel=_PANEL, help="Adapters kept in host memory."
    ),
]
MaxCpuBytes = Annotated[int | None, typer.Option(rich_help_panel=_PANEL, help="Bytes of adapters in host memory.")]
MaxDiskBytes = Annotated[int | None, typer.Option(rich_help_panel=_PANEL, help="Bytes of private copies on disk.")]
MaxModelLen = Annotated[int | None, typer.Option(rich_help_panel=_PANEL, help="Tokens of prompt and answer together.")]
EnforceEager = Annotated[
    bool | None,
    typer.Option("--enforce-eager/--no-enforce-eager", rich_help_panel=_PANEL, help="Without CUDA graphs, or with."),
]
Startup = Annotated[str | None, typer.Option(rich_help_panel=_PANEL, help='On a GPU: "fast", or "compiled".')]
LoraKernels = Annotated[
    str | None, typer.Option(rich_help_panel=_PANEL, help='On a GPU: "auto", or "vllm" for vLLM\'s own.')
]
Revision = Annotated[str | None, typer.Option(rich_help_panel=_PANEL, help="The model's branch, tag or commit.")]
EngineArgs = Annotated[
    Any,
    typer.Option(
        metavar="JSON", parser=json_object, rich_help_panel=_PANEL, help="Further arguments of vLLM's EngineArgs."
    ),
]
Policy = Annotated[str | None, typer.Option(rich_help_panel=_PANEL, help='"fair" among adapters, or "fcfs".')]
Restart = Annotated[
    str | None, typer.Option(rich_help_panel=_PANEL, help='"never", or "on-failure": start a core that dies again.')
]


@contextmanager
def started(
    ctx: typer.Context, model: str, adapters: Sequence[tuple[str, str]] | None, **arguments: Any
) -> Iterator[QuantizedLoRAEngine]:
    """The engine that the options ask for; those that are ``None`` are left to its own defaults.

    Raises:
        typer.BadParameter: An option is out of range, or two contradict each other.
        QLoRAInferError: What the engine raises.
    """
    _log_to_stderr(is_debugging=ctx.find_root().params["debug"])
    given = {name: value for name, value in arguments.items() if value is not None}
    with usage_errors():
        engine = ctx.obj(model, adapters=_by_name(adapters or ()), **given)
    with engine:
        yield engine


@contextmanager
def usage_errors() -> Iterator[None]:
    """Tell of an argument that the library refuses as of a wrong option."""
    try:
        yield
    except QLoRAInferError:
        raise
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from error


def _by_name(adapters: Sequence[tuple[str, str]]) -> dict[str, str]:
    named = dict(adapters)
    if len(named) < len(adapters):
        raise ValueError("two adapters have one name")
    return named


def _log_to_stderr(*, is_debugging: bool) -> None:
    """Keep standard output for answers; vLLM would log there."""
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO" if is_debugging else "WARNING")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("qlora_infer").setLevel(logging.INFO)
