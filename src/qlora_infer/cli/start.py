"""The command line's options for an engine, and the start of that engine."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from attrs import Attribute, fields

from qlora_infer.config import EngineConfig
from qlora_infer.engine import QuantizedLoRAEngine
from qlora_infer.errors import QLoRAInferError

StartEngine = Callable[..., QuantizedLoRAEngine]


def _number_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def json_object(text: str) -> dict[str, Any]:
    """Parse an option's value that is a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"it is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f"it must be a JSON object, such as '{{\"a\": 1}}', got {text[:80]}")
    return value


def _parse_adapter(text: str) -> tuple[str, str]:
    name, equals, source = text.partition("=")
    if not (name and equals and source):
        raise typer.BadParameter("it is written name=source, such as pirate=me/pirate-lora")
    return name, source


Model = Annotated[str, typer.Argument(help="A Hub id or a local folder with a checkpoint.")]
# typer wants a class for an option's type; what the parser returns is told where it is used.
Adapters = Annotated[
    list[Any] | None,
    typer.Option(
        "--adapter", "-a", metavar="NAME=SOURCE", parser=_parse_adapter, help="An adapter to load; may be repeated."
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
#: Options of the engine that no command has: everybody on the machine could read a token, and the commands themselves
#: bound the requests that wait.
WITHOUT_OPTION = {"model", "token", "max_waiting"}


def engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of ``EngineConfig`` to a command, which gets those that were given as the mapping ``options``."""
    hints = get_type_hints(EngineConfig)
    made = [_option(field, hints[field.name]) for field in fields(EngineConfig) if field.name not in WITHOUT_OPTION]

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        options = {option.name: arguments.pop(option.name) for option in made}
        command(**arguments, options={name: value for name, value in options.items() if value is not None})

    own = inspect.signature(command, eval_str=True).parameters
    parameters = [parameter for name, parameter in own.items() if name != "options"]
    run.__signature__ = inspect.Signature([*parameters, *made])  # type: ignore[attr-defined]  # typer reads it
    return run


def _option(field: Attribute[Any], hint: Any) -> inspect.Parameter:
    """Return the option for a field; its default is ``None``, for which the engine has its own."""
    flag = f"--{field.name.replace('_', '-')}"
    settings: dict[str, Any] = {"rich_help_panel": "Engine", "help": field.metadata["help"]}
    parts = get_args(hint) or (hint,)
    kind: Any = str | None
    if get_origin(hint) is Literal:
        settings["metavar"] = "|".join(parts)
    elif get_origin(hint) is Mapping:
        kind, settings = Any, {**settings, "metavar": "JSON", "parser": json_object}
    elif bool in parts:
        kind, flag = bool | None, f"{flag}/--no-{flag[2:]}"
    elif Literal["auto"] in parts:
        kind, settings = Any, {**settings, "metavar": "N|auto", "parser": _number_or_auto}
    elif int in parts:
        kind = int | None
    annotation = Annotated[kind, typer.Option(flag, **settings)]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


@contextmanager
def start_engine(
    ctx: typer.Context, model: str, adapters: Sequence[tuple[str, str]] | None, options: Mapping[str, Any], **given: Any
) -> Iterator[QuantizedLoRAEngine]:
    """Start the engine with the options that were given, and with its other arguments.

    Raises:
        typer.BadParameter: An option is out of range, or two contradict each other.
        QLoRAInferError: The errors of the engine.
    """
    log_to_stderr(ctx)
    with usage_errors():
        engine = ctx.obj(model, adapters=_by_name(adapters or ()), **given, **options)
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


def log_to_stderr(ctx: typer.Context) -> None:
    """Keep standard output for answers; vLLM would log there."""
    is_debugging = ctx.find_root().params["debug"]
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO" if is_debugging else "WARNING")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("qlora_infer").setLevel(logging.INFO)
