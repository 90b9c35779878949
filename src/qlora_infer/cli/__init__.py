"""The command line ``qlora-infer``, one command a file; only this folder imports typer."""

from qlora_infer.cli.app import app, main

__all__ = ["app", "main"]
