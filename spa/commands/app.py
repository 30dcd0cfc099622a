"""The application that commands are added to."""

from __future__ import annotations

import typer

from spa.commands.terminal import Guarded

app = typer.Typer(
    name="spa", cls=Guarded, add_completion=False, no_args_is_help=True, rich_markup_mode="rich",
    help="Structured pruning of ONNX graphs: a file and a budget in; a smaller, proven, faster file out.",
)
