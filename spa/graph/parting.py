"""Fused sums taken apart, so that what they add can be dropped: SkipLayerNormalization(x, F(x)) hides a residual sum.

analysis --parted--> analysis of the same function, in which sub-layers are found, scored and gated
edits_for(…)         what leads from the model as given to the one without layers: only sums that lose a branch are taken apart
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from spa.graph.analysis import Analysis, analyze
from spa.graph.trace import NodeTrace
from spa.layers.sublayers import SubLayer, SubLayers
from spa.plans.edits import Edit
from spa.stages import Stage, quiet

KIND = "part_sums"


def parted(analysis: Analysis, *, stage: Stage = quiet) -> Analysis:
    """The analysis with all fused sums apart; the same one where there are none."""
    makers = {t.name: i for i, n in enumerate(analysis.groups.traced.nodes) for t in n.node.outputs if t.name}
    nodes = {n.node.outputs[0].name: _told(n, makers) for n in analysis.groups.traced.nodes if n.signature and n.signature.parted}
    if not nodes:
        return analysis
    edit = Edit(KIND, {"nodes": nodes})
    return analyze(analysis.given, **{**analysis.settings, "edits": (*analysis.edits, edit)}, stage=stage)


def _told(node: NodeTrace, makers: dict[str, int]) -> dict[str, Any]:
    """What the pass is told. The operand that is made first is the trunk; stored ones go with the branch."""
    assert node.signature is not None
    how = node.signature.parted
    assert how is not None
    inputs = node.node.inputs
    terms = sorted(how.terms, key=lambda i: makers.get(inputs[i].name, -1))
    stored = [i for i in how.stored if i < len(inputs) and inputs[i].name]
    attributes = {**how.attributes, **{k: v for k, v in node.node.attrs.items() if k in how.attributes}}
    told = {"op": how.op, "domain": how.domain, "attributes": attributes}
    return {**told, "terms": [*terms, *stored], "rest": list(how.rest), "sum": how.sum}


def edits_for(analysis: Analysis, found: SubLayers, dropped: Iterable[SubLayer], *, whole: bool = False) -> tuple[Edit, ...]:
    """Edits that drop layers of a parted analysis from the model as it was before. whole: leave all sums apart."""
    drop = found.edit(dropped)
    last = analysis.edits[-1] if analysis.edits else None
    if last is None or last.kind != KIND:
        return (drop,)
    apart = {n.node.outputs[0].name for n in analysis.groups.traced.nodes if n.node.outputs and n.node.inputs
             and n.node.inputs[0].name in drop.arguments["replace"]}  # fmt: skip
    nodes = {name: how for name, how in last.arguments["nodes"].items() if whole or name in apart}
    return (Edit(KIND, {"nodes": nodes}), drop) if nodes else (drop,)
