"""What is shown while a command works, its results, and how it ends.

Progress and logs go to stderr, the spinner only where that is a terminal; results go to stdout.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from onnx_graphsurgeon.logger import G_LOGGER
from rich.console import Console, RenderableType
from rich.text import Text
from typer.core import TyperGroup

from spa.errors import SpaError
from spa.tables.report import plain, printable

WIDTH = 120  # where stdout is no terminal
SLOW = 1.0  # seconds; stages above leave a line on a terminal


class _Out(Console):
    """A console that falls silent when the reader has gone (`spa inspect … | head`)."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        _drop_stdout()


def _drop_stdout() -> None:
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    os.close(devnull)


class Terminal:
    """Where a command talks to: results, and what goes on meanwhile.

    Parameters
    ----------
    as_json
        Whether results are one JSON object.
    verbose
        Whether every stage is logged.
    """

    def __init__(self, as_json: bool, verbose: bool) -> None:
        self.as_json, self.verbose = as_json, verbose
        self.err = Console(stderr=True, highlight=False)
        G_LOGGER.severity = G_LOGGER.CRITICAL  # it prints to stdout
        if verbose:
            logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(name)s: %(message)s")
        else:
            warnings.simplefilter("ignore")

    def show(self, data: dict[str, Any], *tables: RenderableType) -> None:
        """The result: as tables, or as JSON."""
        if self.as_json:
            write_json(data)
            return
        plain_text = not sys.stdout.isatty()
        out = _Out(width=int(os.environ.get("COLUMNS", WIDTH)) if plain_text else None, highlight=False, soft_wrap=False,
                   color_system=None if plain_text else "auto")
        for shown in tables:
            out.print(shown)

    def log(self, text: str, *, always: bool = False) -> None:
        """A line on stderr, with --verbose or always."""
        if self.verbose or always:
            self.err.print(Text(printable(text)))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Shows that a stage goes on, and how long it took where that was long."""
        start = time.perf_counter()
        if self.err.is_terminal:
            with self.err.status(Text(f"{name} …")):
                yield
        else:
            yield
        took = time.perf_counter() - start
        self.log(f"{name}: {took:.2f} s", always=self.err.is_terminal and took >= SLOW)


def write_json(data: dict[str, Any]) -> None:
    """One object on stdout, with exact numbers."""
    try:
        sys.stdout.write(json.dumps(plain(data), indent=2, ensure_ascii=False) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_stdout()


class Guarded(TyperGroup):
    """Commands that end in one sentence and an exit code, whatever happens."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        """Runs a command and exits."""
        words = list(sys.argv[1:] if args is None else args)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # names may hold what the terminal's encoding lacks
        options["standalone_mode"] = False
        try:
            code = super().main(words, *rest, **options)
        except BaseException as error:
            code, sentence = verdict(error)
            complain(error, code, sentence, words)
        else:
            if code == 130 and isinstance(code, int):
                complain(KeyboardInterrupt(), code, "interrupted before it was done", words)
        sys.exit(code if isinstance(code, int) else 0)


def verdict(error: BaseException) -> tuple[int, str]:
    """Exit code and sentence of an error."""
    if isinstance(error, SystemExit):
        return (error.code if isinstance(error.code, int) else 2), ""
    if isinstance(error, SpaError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return 130, "interrupted before it was done"
    if isinstance(error, BrokenPipeError):
        _drop_stdout()
        return 0, ""
    if isinstance(error, MemoryError):
        return 2, "there is not enough memory for this; close other programs or use a larger machine. Nothing was written"
    if hasattr(error, "format_message"):  # typer's own, of whichever version; without a word where it has shown the help
        text = " ".join(error.format_message().split())
        return 2, f"{text}{'' if text.endswith(('.', '?')) else '.'} See --help." if text else ""
    if isinstance(error, OSError):
        return 2, f"{error.filename or 'a file'} can't be read or written: {error.strerror or error}"
    where = traceback.extract_tb(error.__traceback__)
    place = f" at {os.path.basename(where[-1].filename)}:{where[-1].lineno}" if where else ""
    text = " ".join(str(error).split())[:200]
    return 2, f"internal error ({type(error).__name__}: {text}{place}); this is a defect of spa, please report it (-v shows the traceback)"


def complain(error: BaseException, code: int, sentence: str, words: Sequence[str]) -> None:
    """The sentence on stderr, and as JSON where that was asked for."""
    if not sentence:
        return
    if {"-v", "--verbose"} & set(words) and error.__traceback__ is not None:
        traceback.print_exception(error)
    if "--json" in words:
        write_json({"error": {"kind": type(error).__name__, "message": sentence, "exit_code": code}})
    text = printable(sentence)
    sys.stderr.write(f"spa: {text}{'' if text.endswith(('.', '?', '!')) else '.'}\n")
