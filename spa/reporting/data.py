"""What a report says, as one dictionary of plain data: exact numbers, the model's own names, nothing for the eye.

    format, version   "spa-report", 1
    asked             model, hashes, options, which of them were given, versions
    before, after     parameters, macs, peak_activation_bytes, weight_bytes, and file_bytes where files were written
    proof             what `spa.tables.report.check_data` gives, or None
    latency           a list of what `spa.tables.report.race_data` gives, one a provider
    quality           metric -> {before, after}
    budget            the record that a plan keeps of its budget, or None
    depth             layers that were dropped (name, kind, block, parameters, macs, score), and what was left out; or None
    groups            name, kind, size, kept, the parameters and MACs that lie on it, the reason that it stays
    network           `spa.reporting.network`
    repair            what `spa.tables.report.repair_data` gives, or None
    frozen, notes     causes of freezing; groups that keep more than was asked for

The three writers read this and nothing else.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Collection, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from spa.graph.explain import frozen_causes
from spa.graph.groups import Groups
from spa.plans.plan import Plan, mask_of
from spa.proof.feeds import free_batch
from spa.reporting.network import channels, group_costs, network_data
from spa.tables import report
from spa.tables.depth_report import depth_data
from spa.timing.bench import Race

if TYPE_CHECKING:
    from spa.api import Result

VERSION = 1
PACKAGES = ("spa-prune", "onnx", "onnxruntime", "onnx-graphsurgeon", "numpy")


def report_data(
    result: Result,
    *,
    timing: Race | Sequence[Race] | None = None,
    quality: Mapping[str, Sequence[float]] | None = None,
    options: Mapping[str, Any] | None = None,
    given: Collection[str] = (),
    sizes: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """All that a report says; see this module. For the parameters see `write_report`."""
    groups, plan = result.analysis.groups, result.plan
    gone = mask_of(plan, groups) if result.repaired is None else result.repaired.gone
    batch = free_batch(groups.traced)  # MACs are those of one sample, as in the counts
    before, after = report.counts_data(result.before), report.counts_data(result.after)
    if sizes is not None:
        before["file_bytes"], after["file_bytes"] = sizes
    races = [timing] if isinstance(timing, Race) else list(timing or ())
    budget = plan.options.get("budget")
    figures = (budget or {}).get("quality", {}) if quality is None else quality
    data = {
        "format": "spa-report", "version": VERSION, "asked": _asked(result, options, given), "before": before, "after": after,
        "proof": report.check_data(result.check), "latency": [report.race_data(r) for r in races],
        "quality": {name: {"before": float(old), "after": float(new)} for name, (old, new) in figures.items()}, "budget": budget,
        "depth": depth_data(plan.options["depth"], result.analysis.left_out) if "depth" in plan.options else None,
        "groups": _groups(groups, plan, batch), "repair": None if result.repaired is None else report.repair_data(result.repaired),
        "frozen": [report.cause_data(c) for c in frozen_causes(groups)], "notes": dict(plan.notes),
        "network": network_data(groups, gone, batch),
    }
    plain: dict[str, Any] = report.plain(data)
    return plain


def _asked(result: Result, options: Mapping[str, Any] | None, given: Collection[str]) -> dict[str, Any]:
    source, plan = result.analysis.given, result.plan
    told = {k: v for k, v in {**plan.options, **plan.trace}.items() if k not in ("budget", "depth", "edits")}
    chosen = told if options is None else dict(options)
    chosen.update({k: plan.options[k] for k, v in chosen.items() if v is None and plan.options.get(k) is not None})  # what a None meant
    return {
        "model": "a model in memory" if source.path is None else os.path.basename(source.path),
        "model_sha256": plan.model_sha256, "graph_sha256": plan.graph_sha256, "options": {k: _text(v) for k, v in chosen.items()},
        "given": sorted(given),
        "versions": {**{p: _version(p) for p in PACKAGES}, "python": platform.python_version(), "machine": platform.platform()},
    }


def _text(value: Any) -> Any:
    """A path as its text; everything else as it is."""
    return os.fspath(value) if isinstance(value, os.PathLike) else [_text(v) for v in value] if isinstance(value, list | tuple) else value


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # another build of onnxruntime brings the module under a name of its own
        return "unknown"


def _groups(groups: Groups, plan: Plan, batch: int) -> list[dict[str, Any]]:
    """Groups of channels, those with the most MACs first."""
    parameters, macs = group_costs(groups)
    found = []
    for group in channels(groups):
        entry = plan.groups.get(group.name)
        kept = group.size if entry is None else len(entry["kept"])
        found.append({"name": group.name, "kind": group.kind, "size": group.size, "kept": kept,
                      "parameters": parameters.get(group.index, 0), "macs": macs.get(group.index, 0) // batch, "sites": len(group.sites),
                      "frozen": report.reason_data(group.frozen)})
    return sorted(found, key=lambda g: (-g["macs"], -g["parameters"]))
