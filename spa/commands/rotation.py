"""`spa prune --rotate`: the residual stream turned onto its principal directions, and its last positions cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from spa import api
from spa.commands.terminal import Terminal
from spa.data.evidence import Evidence
from spa.errors import BadOption
from spa.exact.rotation import rotated
from spa.graph.analysis import Analysis, moved
from spa.proof.feeds import Feeds

CRITERION = "position"  # positions are in falling order of energy then
NO_PLAN = "note: no plan was written, as it would be one of the turned model: `spa rewrite --rotate` writes that, and `spa prune` its plan"


def check(rotate: bool, calibration: str | None, asks: bool, others: Mapping[str, bool]) -> None:
    """Raises BadOption for what does not go with --rotate. asks: whether there is a ratio or a limit. others: option -> whether given."""
    if not rotate:
        return
    if calibration is None:
        raise BadOption("--rotate and --calibration go together: the principal directions of the residual stream are those of data.")
    if not asks:
        raise BadOption("--rotate cuts the residual width: say by how much with --ratio or --target.")
    wrong = [option for option, given in others.items() if given]
    if wrong:
        raise BadOption(f"--rotate cuts the residual width by position and nothing else: leave out {wrong[0]}, or turn the model with "
                        "spa rewrite --rotate first, and prune its result.")  # fmt: skip


def turned(
    term: Terminal, analysis: Analysis, evidence: Evidence | None, wishes: Mapping[str, Any], *, check: bool, feeds: Feeds | None,
    tolerance: float, seed: int,
) -> tuple[Analysis, Evidence | None, dict[str, Any]]:  # fmt: skip
    """The turned model, which is proven to compute the same, the data for it, and the wishes that cut its stream."""
    found = rotated(analysis, evidence, check=check, feeds=feeds, tolerance=tolerance, seed=seed, stage=term.stage)
    again = api.analyze(found.model, **analysis.options, stage=term.stage)
    return again, moved(evidence, again), {**wishes, "criterion": CRITERION, "include": (found.group,)}


def told(rotate: bool) -> list[Any]:
    """What there is to say of the plan."""
    return [Text(NO_PLAN)] if rotate else []
