"""Report files: which kind is written goes by the suffix, and a file is whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spa.errors import BadOption
from spa.reporting.data import report_data
from spa.reporting.html import as_html
from spa.reporting.markdown import as_json, as_markdown
from spa.storage.files import write_files
from spa.timing.bench import Race

if TYPE_CHECKING:
    from spa.api import Result

WRITERS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    ".html": as_html, ".htm": as_html, ".md": as_markdown, ".json": as_json,
}


def check_report(path: str | os.PathLike[str]) -> Path:
    """The path of a report, if its suffix is one that can be written. Raises BadOption."""
    found = Path(path)
    if found.suffix.lower() not in WRITERS:
        raise BadOption(f"--report {found} names no kind of report that can be written: give it the suffix .html, .md or .json.")
    return found


def write_report(
    result: Result,
    path: str | os.PathLike[str],
    *,
    timing: Race | Sequence[Race] | None = None,
    quality: Mapping[str, Sequence[float]] | None = None,
    options: Mapping[str, Any] | None = None,
    given: Collection[str] = (),
    sizes: tuple[int, int] | None = None,
) -> None:
    """Writes what was asked, what came out, the proof, the groups and a picture of the network, for people.

    Parameters
    ----------
    result
        What `prune` or `apply` gave.
    path
        The file; .html is one self-contained page, .md and .json hold the same.
    timing
        What `race` gave for the model before and after, in this order; several where several providers were timed.
    quality
        Metric -> (before, after), in whatever unit the metric has.
    options
        What was asked for; by default what the plan remembers.
    given
        Names among the options that somebody chose; the others are shown as defaults.
    sizes
        Bytes of the files before and after.

    Raises
    ------
    BadOption
        For another suffix, or a path that is no ordinary file.
    BadFile
        If the file can't be written; nothing is left of it then.

    The same result gives the same bytes, whatever the time of day.
    """
    target = check_report(path)
    data = report_data(result, timing=timing, quality=quality, options=options, given=given, sizes=sizes)
    text = WRITERS[target.suffix.lower()](data)
    write_files([(target, [text.encode("utf-8", "backslashreplace")])])
