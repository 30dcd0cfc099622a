"""`spa inspect`: the groups of a model, what one channel of each costs, what is frozen, and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import networkx as nx
import typer

from spa.commands import options as given
from spa.commands import reading
from spa.commands.app import app
from spa.commands.common import analysis_of
from spa.commands.terminal import Terminal
from spa.errors import BadOption
from spa.graph.count import count
from spa.graph.explain import dependency_graph, dot_text, explain, frozen_causes, near, path, printable_graph, sites_of
from spa.graph.groups import Group, Groups
from spa.graph.parting import parted
from spa.layers.sublayers import sub_layers
from spa.plans.choose import matches
from spa.storage.files import replace_all
from spa.tables import report
from spa.tables.depth_report import layer_data
from spa.tables.depth_report import layers as layers_table
from spa.tables.state_report import states, states_data


@app.command()
def inspect(
    model: given.ModelFile,
    group: Annotated[str | None, typer.Option("--group", metavar="NAME", help="Show one group (or a glob) with its sites.")] = None,
    explain_: Annotated[list[str] | None, typer.Option(
        "--explain", metavar="VALUE[:AXIS]", help="Why it can or can't shrink; given twice: why the two are coupled.")] = None,
    inputs: given.Inputs = None,
    protect_outputs: given.Protect = True,
    no_stat: given.NoStat = False,
    keep_state: given.KeepState = False,
    layers: Annotated[bool, typer.Option("--layers", help="List the layers that --drop-layers can drop.")] = False,
    graphml: Annotated[Path | None, typer.Option("--graphml", metavar="FILE", help="Write the dependency graph as GraphML.")] = None,
    dot: Annotated[Path | None, typer.Option("--dot", metavar="FILE", help="Write the dependency graph as DOT, for Graphviz.")] = None,
    as_json: given.Json = False,
    verbose: given.Verbose = False,
) -> int:
    """Show the groups of a model, what one channel of each costs, what is frozen, and why."""
    term = Terminal(as_json, verbose)
    reading.check_outputs({"--graphml": graphml, "--dot": dot}, [model])
    if len(explain_ or ()) > 2:
        raise BadOption("--explain takes one value, or two to say why they are coupled.")
    analysis = analysis_of(term, model, inputs, protect_outputs, not no_stat, keep_state)
    groups = analysis.groups
    _export(groups, graphml, dot)
    if layers:
        found = sub_layers(parted(analysis).groups).layers
        term.show({"layers": [layer_data(s) for s in found]}, layers_table(found))
    elif explain_:
        _explain(term, groups, explain_)
    elif group is not None:
        chosen = _named(groups, group)
        term.show({"groups": [report.group_data(g) for g in chosen]}, *(report.group_details(g) for g in chosen))
    else:
        totals, causes = count(groups), frozen_causes(groups)
        carried = states_data(groups)
        named = {"sha256": analysis.given.sha256} if term.as_json else {}  # which takes as long as reading the file
        data = {"model": str(model), **named, "totals": report.counts_data(totals),
                "groups": [report.group_data(g) for g in groups.groups], "frozen": [report.cause_data(c) for c in causes],
                "states": carried}
        term.show(data, report.totals(totals), report.groups_table(groups.free()), *states(carried), report.frozen(causes, totals))
    return 0


def _explain(term: Terminal, groups: Groups, texts: Sequence[str]) -> None:
    if len(texts) == 1:
        found = [explain(groups, site) for site in sites_of(groups, texts[0])]
        term.show({"explanations": [report.explanation_data(e) for e in found]}, *map(report.explanation, found))
        return
    pairs = [(one, other) for one in sites_of(groups, texts[0]) for other in sites_of(groups, texts[1])]
    ways = [(one, other, path(groups, one, other)) for one, other in pairs]
    ways = [w for w in ways if w[2] is not None] or ways[:1]
    data = [{"one": list(a), "other": list(b), "coupled": p is not None, "path": report.path_data(p)} for a, b, p in ways]
    term.show({"couplings": data}, *(report.way(p, a, b) for a, b, p in ways))


def _named(groups: Groups, name: str) -> list[Group]:
    chosen = [g for g in groups.groups if g.name == name] or [g for g in groups.groups if matches([name], [g.name])]
    if not chosen:
        raise BadOption(f"--group: there is no group {name!r}{near(name, groups.by_name)}; `spa inspect` lists them.")
    return chosen


def _export(groups: Groups, graphml: Path | None, dot: Path | None) -> None:
    if graphml is None and dot is None:
        return
    graph = dependency_graph(groups)
    writes = []
    if graphml is not None:
        writes.append((graphml, ["\n".join(nx.generate_graphml(printable_graph(graph))).encode()]))
    if dot is not None:
        writes.append((dot, [dot_text(graph).encode()]))
    replace_all(writes)
