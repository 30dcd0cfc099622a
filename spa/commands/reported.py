"""The option --report of commands that prune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from spa.api import Result
from spa.reporting import check_report, write_report
from spa.timing.bench import Race

HIDDEN = {"report_file", "as_json", "verbose"}  # say where results go, not what they are


def target(report: Path | None) -> dict[str, Path]:
    """The report among the files that will be written, by option. Raises BadOption for a suffix that can't be written."""
    return {} if report is None else {"--report": check_report(report)}


def write(report: Path | None, context: typer.Context, result: Result, timing: Race | None, sizes: tuple[int, int]) -> None:
    """Writes the report of a command, with all options that it ran with."""
    if report is None:
        return
    options: dict[str, Any] = {k: v for k, v in context.params.items() if k not in HIDDEN}
    given = [k for k in options if getattr(context.get_parameter_source(k), "name", "") == "COMMANDLINE"]
    write_report(result, report, timing=timing, options=options, given=given, sizes=sizes)
