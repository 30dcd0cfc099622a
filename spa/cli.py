"""The command line: each command is a piece of the straight line of `spa.api`, with tables or JSON at its end.

Results go to stdout, everything else to stderr. Exit codes: 0 done; 1 compared and differed, or nothing to prune; 2 can't.
"""

from __future__ import annotations

import importlib

from spa.commands.app import app

for _module in ("inspect", "prune", "convert", "rewrite", "sweep", "ablate", "finetune", "check", "weights", "bench"):
    # each adds its commands, in the order that --help lists them
    importlib.import_module(f"spa.commands.{_module}")


def main() -> None:
    """The entry point `spa`."""
    app(prog_name="spa")


__all__ = ["app", "main"]
