"""Layers as tables for people, and as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType

from spa.layers.ablate import Ablation
from spa.layers.sublayers import SubLayer
from spa.tables.report import Name, count_of, table


def dropped(record: Mapping[str, Any]) -> RenderableType:
    """Layers that went, from a plan's record of depth."""
    told = depth_data(record)
    rows = [(Name(x["name"]), x["kind"], str(x["block"]), f"{x['parameters']:,}", f"{x['macs']:,}",
             "" if x["score"] is None else f"{x['score']:.4g}") for x in told["dropped"]]  # fmt: skip
    title = f"Dropped: {count_of(len(rows), 'layer')}" + (f" by {told['method']}" if told["method"] else "")
    return table(title, ("layer", "kind", ">block", ">params", ">MACs", ">score"), rows)


def depth_data(record: Mapping[str, Any], left_out: Sequence[str] = ()) -> dict[str, Any]:
    """Layers that went, each with its score, as JSON. method: None where layers were named."""
    scores = record["scores"]
    gone = [{**x, "score": scores.get(x["name"], scores.get(f"block {x['block']}"))} for x in record["dropped"]]
    return {"method": record["method"] if scores else None, "dropped": gone, "left_out": list(left_out)}


def layers(found: Sequence[SubLayer]) -> RenderableType:
    """Sub-layers of a model."""
    rows = [(Name(s.name), s.kind, str(s.block), f"{s.parameters:,}", f"{s.macs:,}", ", ".join(s.inputs)) for s in found]
    return table(f"Layers: {len(rows)}", ("layer", "kind", ">block", ">params", ">MACs", "states"), rows)


def layer_data(layer: SubLayer) -> dict[str, Any]:
    """A sub-layer as JSON."""
    keys = ("name", "kind", "block", "trunk", "branch", "total", "parameters", "macs", "inputs", "outputs")
    return {k: getattr(layer, k) for k in keys}


def ablation(found: Ablation) -> RenderableType:
    """Units by what is lost without them, most first."""
    ranked = sorted(found.scores, key=lambda s: -s.drop)
    rows = [(Name(s.unit), s.kind, str(s.block), f"{s.value:.4g}", f"{s.drop:+.4g}") for s in ranked]
    title = f"Without each of {count_of(len(rows), 'unit')}, {found.mode}: {found.metric}, {found.dense:.4g} with all"
    return table(title, ("unit", "kind", ">block", f">{found.metric}", ">lost"), rows)
