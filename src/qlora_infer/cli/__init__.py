"""The command line, ``qlora-infer``: one command a file. Nothing else in this library imports typer."""

from qlora_infer.cli.app import app, main

__all__ = ["app", "main"]
