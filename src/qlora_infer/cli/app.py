"""The program ``qlora-infer``: its commands and the exit status and text of its errors."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typing_extensions import override

from qlora_infer import QuantizedLoRAEngine, __version__
from qlora_infer.cli.bench import bench
from qlora_infer.cli.doctor import doctor
from qlora_infer.cli.generate import generate
from qlora_infer.cli.inspect_adapter import inspect_adapter
from qlora_infer.cli.serve import serve
from qlora_infer.cli.start import StartEngine
from qlora_infer.errors import QLoRAInferError

FAILED = 1
INTERRUPTED = 130  # as shells have it: 128, and the number of SIGINT


class _Commands(TyperGroup):
    """Commands whose errors are one message, or a traceback with ``--debug``."""

    @override
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except QLoRAInferError as error:
            if ctx.params["debug"]:
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(FAILED) from error
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    name="qlora-infer",
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",  # paragraphs are filled anew
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(doctor)
app.command("inspect-adapter")(inspect_adapter)
app.command()(generate)
app.command()(bench)
app.command()(serve)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and vLLM's log.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Serve one quantized base model on vLLM with many LoRA adapters."""


def main(start_engine: StartEngine = QuantizedLoRAEngine) -> None:
    """Run the program on ``sys.argv``.

    Args:
        start_engine: The function that makes the engine; tests pass ``qlora_infer.testing.fake_engine``.
    """
    app(prog_name="qlora-infer", obj=start_engine)
