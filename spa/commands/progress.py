"""Progress of commands that take long, with the time that is left; on stderr, and as a bar only where that is a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from spa.commands.terminal import Terminal
from spa.sweeps.sweep import Progress
from spa.tables.report import printable, shorten

WINDOW = 3600.0  # seconds of the past that the estimate goes by: steps take from milliseconds to minutes


@contextmanager
def progress(term: Terminal) -> Iterator[Callable[[Progress], None]]:
    """A function to be told how far it is. The bar appears when it is called first, as what comes before shows itself in other ways."""
    bar = Bar(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn(),
              TextColumn("{task.description}"), console=term.err, transient=True, speed_estimate_period=WINDOW)  # fmt: skip
    running: list[TaskID] = []

    def tell(step: Progress) -> None:
        what = Text(shorten(step.what, 48)).markup
        if term.err.is_terminal and not running:
            bar.start()
            running.append(bar.add_task(what, total=step.total))
        elif running:
            bar.update(running[0], completed=step.done, description=what)
        if step.what:
            term.log(f"{step.done}/{step.total} {printable(step.what)}")

    try:
        yield tell
    finally:
        if running:
            bar.stop()
