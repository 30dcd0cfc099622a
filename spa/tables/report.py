"""Reporting: results as tables for people, and as plain data with exact numbers for JSON. Nothing is computed here.

Every table has a `limit` of rows; what is left out is counted, and listed by --json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.console import Group as Lines
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from spa.graph.count import Counts
from spa.graph.explain import Cause, Explanation, Part, Path, site_name
from spa.graph.explain import printable as printable
from spa.graph.groups import Group, Site
from spa.graph.trace import Reason
from spa.plans.plan import Plan
from spa.proof.check import Check
from spa.repairs.repair import Repaired
from spa.timing.bench import Lap, Race
from spa.timing.ratios import FASTER, SLOWER

LIMIT = 15  # rows of a list
NAME = 52  # characters of a name



class Name(str):
    """A name of the model's: shortened in the middle where it does not fit, never wrapped."""


@dataclass(frozen=True)
class Fitted:
    """A line of fixed text and names; the names share what width there is."""

    pieces: tuple[str, ...]
    widest: int = 1000
    style: str = ""

    def _text(self, width: int) -> Text:
        room = width - sum(len(p) for p in self.pieces if not isinstance(p, Name))
        names = sorted(len(printable(p)) for p in self.pieces if isinstance(p, Name))
        share = room
        for i, length in enumerate(names):  # what a short name leaves goes to the longer ones
            share = max(room // (len(names) - i), 8)
            if length > share:
                break
            room -= length
        return Text("".join(shorten(p, share) if isinstance(p, Name) else printable(p) for p in self.pieces), self.style)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._text(min(options.max_width, self.widest))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(12, options.max_width), min(self._text(self.widest).cell_len, options.max_width))


Row = Sequence[str]


def shorten(text: str, width: int = NAME) -> str:
    """A name that fits, its middle left out: both ends tell names apart."""
    text = printable(text)
    if len(text) <= width:
        return text
    tail = (width - 1) * 3 // 5
    return f"{text[: width - 1 - tail]}…{text[-tail:]}"


def amount(number: float, unit: str = "") -> str:
    """Four digits and a prefix: 11.19 M, 44.9 MB."""
    for power, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= power * 0.9995:
            scaled = number / power
            return f"{scaled:.{2 if scaled < 99.95 else 1}f} {prefix}{unit}"
    return f"{number:.0f} {unit}".rstrip() if number == int(number) else f"{number:.1f} {unit}".rstrip()


def duration(seconds: float) -> str:
    """Three digits and a unit: 12.3 ms."""
    for power, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= power:
            value = seconds / power
            return f"{value:.{max(2 - int(math.log10(value)), 0)}f} {unit}"
    return f"{seconds / 1e-6:.0f} µs"


def percent(part: float, whole: float) -> str:
    """Share of a whole: 25.1 %."""
    return f"{100 * part / whole:.1f} %" if whole else "–"


def table(title: str, columns: Sequence[str], rows: Sequence[Row], *, limit: int | None = LIMIT) -> RenderableType:
    """Rows under a title. Columns of a name that starts with ">" are right-aligned and always whole; texts wrap, names shorten."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="bold", show_edge=False)
    for name in columns:
        number = name.startswith(">") or not name
        made.add_column(Text(name.lstrip(">")), justify="right" if name.startswith(">") else "left", no_wrap=number, overflow="fold")
    shown = rows if limit is None else rows[:limit]
    for row in shown:
        made.add_row(*(Fitted((cell,), NAME) if isinstance(cell, Name) else Text(printable(cell)) for cell in row))
    left = len(rows) - len(shown)
    parts: list[RenderableType] = [Text(title, style="bold cyan"), Padding(made, (0, 0, 0, 2), expand=False)]
    if left:
        parts.append(Text(f"  … and {left} more (--json lists all)", style="dim"))
    return Lines(*parts, Text(""))


def comparison(before: Counts, after: Counts, *, sizes: tuple[int, int] | None = None, race: Race | None = None) -> RenderableType:
    """What the model cost and what it costs now: absolute, absolute, ratio. `sizes`: bytes of the files."""
    rows: list[Row] = []

    def add(name: str, old: float, new: float, show: Any) -> None:
        rows.append((name, show(old), show(new), percent(new, old)))

    add("parameters", before.parameters, after.parameters, amount)
    add("MACs", before.macs, after.macs, amount)
    if sizes:
        add("file size", *sizes, lambda n: amount(n, "B"))
    add("peak activation memory", before.peak_bytes, after.peak_bytes, lambda n: amount(n, "B"))
    if race:
        old, new = race.laps
        what = f"latency on {race.provider}, {'CPU' if race.primary == 'cpu' else 'wall'} time"
        said = "" if new.verdict in ("", FASTER, SLOWER) else f" ({new.verdict})"
        rows.append((what, duration(old.median), duration(new.median), f"{100 * new.ratio:.1f} %{said}"))
    return table("Before and after", ("", ">before", ">after", ">left"), rows)


def pruned(plan: Plan, groups: Mapping[str, Group]) -> RenderableType:
    """Groups that shrink, the largest saving first."""
    def saved(name: str) -> float:
        entry = plan.groups[name]
        return float((entry["size"] - len(entry["kept"])) * (groups[name].parameters if name in groups else 0))

    names = sorted(plan.groups, key=lambda n: -saved(n))
    rows = [
        (Name(n), groups[n].kind if n in groups else "", str(plan.groups[n]["size"]), "→", str(len(plan.groups[n]["kept"])),
         percent(len(plan.groups[n]["kept"]), plan.groups[n]["size"]))
        for n in names
    ]
    return table(f"Pruned: {count_of(len(names), 'group')}", ("group", "kind", ">from", "", ">to", ">left"), rows)


def frozen(causes: Sequence[Cause], totals: Counts, *, limit: int | None = LIMIT) -> RenderableType:
    """What stays and why, most costly first."""
    weighty = [c for c in causes if c.parameters or c.macs]
    rows = [
        (c.cause + (f" ({c.op})" if c.op else ""), str(c.groups), str(c.channels), percent(c.parameters, totals.parameters),
         percent(c.macs, totals.macs), percent(c.stuck, totals.parameters), Name(c.example))
        for c in weighty
    ]
    head = ("cause", ">groups", ">size", ">params", ">MACs", ">stuck", "for example")
    title = f"Frozen: {count_of(sum(c.groups for c in causes), 'group')}"
    legend = "  params, MACs: share that lies on these axes; stuck: share of parameters that no other axis can shrink either\n"
    light = sum(c.groups for c in causes) - sum(c.groups for c in weighty)
    more = f"  {count_of(light, 'group')} of shapes and settings, which cost nothing, not shown\n" if light else ""
    shown = [table(title, head, rows, limit=limit)] if rows else [Text(title, style="bold cyan")]
    return Lines(*shown, Text((legend if rows else "") + more, style="dim"))


def notes(texts: Mapping[str, str]) -> RenderableType:
    """Why groups keep more than was asked for."""
    return table("Kept more than asked", ("group", "why"), [(Name(name), text) for name, text in texts.items()])


def proof(check: Check | None) -> RenderableType:
    """The proof's largest difference."""
    if check is None:
        return Text("Proof: not run (--no-check)\n", style="yellow")
    if not check.differences:
        return Text("Proof: the model has no outputs to compare\n", style="yellow")
    worst = max(check.differences, key=lambda d: d.relative)
    by = f"{worst.relative:.1e}" if worst.relative else "0"
    if check.passed:
        says = f"outputs differ by at most {by} of their scale, {check.tolerance:.0e} is allowed"
        return Text(f"Proof: removing equals masking; {says}\n", style="green")
    name = shorten(worst.output, 40)
    return Text(f"Proof: the models DIFFER, output {name} by {by} of its scale, where {check.tolerance:.0e} is allowed\n", style="bold red")


def repair(repaired: Repaired, *, limit: int | None = LIMIT) -> RenderableType:
    """Layers that were fitted: the error of their output, over its variance, without and with repair; and those that could not be."""
    layers = sorted(repaired.layers, key=lambda r: -r.before)
    rows = [(Name(r.name), f"{r.removed}/{r.columns}", f"{r.before:.3f}", "→", f"{r.after:.3f}") for r in layers]
    title = f"Repaired: {count_of(len(layers), 'layer')}" + (f", {count_of(repaired.norms, 'norm')}" if repaired.norms else "")
    head = ("layer", ">columns gone", ">error before", "", ">after")
    skipped = [(Name(n), why) for n, why in repaired.skipped.items()]
    lines = [table(title, head, rows, limit=limit)]
    if skipped:
        lines.append(table(f"Not repaired: {count_of(len(skipped), 'layer')}", ("layer", "because"), skipped, limit=limit))
    if repaired.thin:
        few = f"{count_of(len(repaired.thin), 'layer')} had fewer rows of data than columns to fit: give more with --samples\n"
        lines.append(Text(few, style="yellow"))
    return Lines(*lines)


def repair_data(repaired: Repaired) -> dict[str, Any]:
    """The repair with exact numbers."""
    layers = [{"name": r.name, "removed": r.removed, "columns": r.columns, "before": r.before, "after": r.after} for r in repaired.layers]
    return {"layers": layers, "skipped": dict(repaired.skipped), "norms": repaired.norms, "too_few_rows": list(repaired.thin)}


def groups_table(groups: Sequence[Group], *, limit: int | None = LIMIT) -> RenderableType:
    """Groups with what one channel costs, the most costly first."""
    rows = [
        (Name(g.name), g.kind, str(g.size), str(len(g.sites)), amount(g.parameters), amount(g.macs))
        for g in sorted(groups, key=lambda g: -g.parameters * g.size)
    ]
    head = ("group", "kind", ">size", ">sites", ">params/channel", ">MACs/channel")
    return table(f"Free: {count_of(len(rows), 'group')}", head, rows, limit=limit)


def totals(counts: Counts) -> RenderableType:
    """One line on the whole model."""
    peak = amount(counts.peak_bytes, "B")
    return Text(f"{amount(counts.parameters)} parameters, {amount(counts.macs)} MACs, {peak} peak activation memory\n")


def group_details(group: Group, *, limit: int = LIMIT) -> RenderableType:
    """One group with its sites."""
    costs = f"  one channel costs {amount(group.parameters)} parameters, {amount(group.macs)} MACs\n"
    state = Fitted(("  stays: ", *because(group.frozen))) if group.frozen else Text("  may shrink")
    sites = [(Name(v), str(a)) for v, a in group.sites]
    head = Fitted((Name(group.name), f": {count_of(group.size, 'channel')}, kind: {group.kind}"), style="bold cyan")
    return Lines(head, state, Text(costs), table(f"On {count_of(len(sites), 'axis', 'axes')}", ("value", ">axis"), sites, limit=limit))


def because(reason: Reason) -> tuple[str, ...]:
    """A reason as pieces of a clause, without what is not known."""
    where = (f"axis {reason.axis} of ", Name(reason.value)) if reason.axis is not None else (reason.value,)
    by = (f", at {reason.op} ", Name(reason.node)) if reason.op else ()
    return (*where, f" {reason.cause.rstrip(',')}", *by)


def explanation(found: Explanation) -> RenderableType:
    """Why an axis may shrink or not."""
    value, axis = found.site
    lines: list[RenderableType] = [Fitted((f"axis {axis} of ", Name(value), f", {count_of(found.length, 'position')}"), style="bold cyan")]
    for part in found.parts:
        lines += _part(part)
    if found.held:
        lines.append(Text(f"  {count_of(found.held, 'position')} of it always stay"))
    return Lines(*lines, Text(""))


def _part(part: Part) -> list[RenderableType]:
    lines: list[RenderableType] = []
    if part.group:
        lines.append(Fitted(("  group ", Name(part.group.name), f" ({count_of(part.group.size, 'channel')})")))
    if part.reason is None:
        lines.append(Text(f"    may shrink, together with {count_of(len(part.coupled), 'axis', 'axes')}:"))
        lines += [Fitted(("      ", Name(v), f":{a}")) for v, a in part.coupled[:LIMIT]]
        left = len(part.coupled) - LIMIT
        return lines + ([Text(f"      … and {left} more (--json lists all)", style="dim")] if left > 0 else [])
    lines.append(Fitted(("    stays: ", *because(part.reason))))
    return lines + (_steps(part.path) if part.path is not None and part.path.steps else [])


def way(found: Path | None, one: Site, other: Site) -> RenderableType:
    """Why two sites are coupled."""
    names = (Name(site_name(one)), " and ", Name(site_name(other)))
    if found is None:
        return Fitted((*names, " are not coupled: no group lies on both"))
    return Lines(Fitted((*names, " are coupled:"), style="bold cyan"), *_steps(found), Text(""))


def _steps(found: Path) -> list[RenderableType]:
    lines: list[RenderableType] = [Fitted(("      ", Name(site_name(found.start))))]
    return lines + [Fitted((f"      —{s.op} ", Name(s.node), f" (dim {s.dim})→ ", Name(site_name(s.site)))) for s in found.steps]


def weights(exact: int, differing: Sequence[str], unknown: Sequence[str]) -> RenderableType:
    """Whether the pruned model's tensors hold exactly the kept elements of the original's."""
    if not differing and not unknown:
        return Text(f"Weights: all {exact} float tensors hold exactly the kept elements of the original\n", style="green")
    head = f"Weights: {exact} float tensors hold exactly the kept elements of the original, {len(differing)} differ, {len(unknown)} are new"
    return table(head, ("tensor", ""), [*((Name(n), "differs") for n in differing), *((Name(n), "new") for n in unknown)])


def unique(name: str, taken: Sequence[str]) -> str:
    """A name for a model in a race; a file may run against itself."""
    return f"{name} #{taken.count(name) + 1}" if name in taken else name


def count_of(number: int, one: str, many: str = "") -> str:
    """A number with its noun."""
    return f"{number} {one if number == 1 else many or one + 's'}"


# ---------------------------------------------------------------------- exact


def plain(value: Any) -> Any:
    """Data that JSON can hold: mappings, lists, texts, numbers; what is not finite becomes a text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    return value


def counts_data(counts: Counts) -> dict[str, Any]:
    """Exact counts."""
    return {"parameters": counts.parameters, "macs": counts.macs, "peak_activation_bytes": counts.peak_bytes,
            "weight_bytes": counts.weight_bytes}


def reason_data(reason: Reason | None) -> dict[str, Any] | None:
    """A reason by its parts."""
    if reason is None:
        return None
    return {"cause": reason.cause.rstrip(","), "op": reason.op, "node": reason.node, "value": reason.value, "axis": reason.axis}


def group_data(group: Group, *, sites: bool = True) -> dict[str, Any]:
    """A group with exact costs of one channel."""
    found = {"name": group.name, "kind": group.kind, "size": group.size,
             "parameters_per_channel": group.parameters, "macs_per_channel": group.macs, "frozen": reason_data(group.frozen)}
    return {**found, "sites": [list(s) for s in group.sites]} if sites else found


def cause_data(cause: Cause) -> dict[str, Any]:
    """A cause of freezing with exact costs."""
    return {"cause": cause.cause, "op": cause.op, "groups": cause.groups, "channels": cause.channels, "example": cause.example,
            "node": cause.node,
            "parameters": cause.parameters, "macs": cause.macs, "stuck_parameters": cause.stuck}


def check_data(check: Check | None) -> dict[str, Any] | None:
    """The proof, output by output."""
    if check is None:
        return None
    outputs = {d.output: {"absolute": d.absolute, "relative": d.relative} for d in check.differences}
    return {"passed": check.passed, "largest_difference": check.worst, "tolerance": check.tolerance, "outputs": outputs}


def race_data(race: Race | None) -> dict[str, Any] | None:
    """A race in seconds."""
    if race is None:
        return None
    itself = race.itself
    check = None if itself is None else {"ratio": itself.middle, "interval": [itself.low, itself.high], "too_noisy": race.noisy}
    return {"provider": race.provider, "kind": race.kind, "version": race.version, "threads": race.threads, "rounds": race.rounds,
            "seed": race.seed, "compared": race.primary, "self_check": check, "laps": [lap_data(x) for x in race.laps]}


def lap_data(lap: Lap) -> dict[str, Any]:
    """One model's times in seconds, memory in bytes."""
    at = lap.placement
    where = None if at is None else {"nodes": dict(at.nodes), "fell_back": dict(at.fell_back), "proven": at.proven}
    return {"model": lap.name, "median_seconds": lap.median, "low_quartile": lap.low, "high_quartile": lap.high,
            "ratio_to_first": lap.ratio, "ratio_interval": [lap.ratio_low, lap.ratio_high], "verdict": lap.verdict or None,
            "cpu_seconds": lap.cpu, "wall_seconds": lap.wall, "wall_ratio": lap.wall_ratio, "load_seconds": lap.load,
            "first_run_seconds": lap.first, "memory_bytes": lap.memory, "placement": where}


def path_data(found: Path | None) -> dict[str, Any] | None:
    """A path, step by step."""
    if found is None:
        return None
    return {"start": list(found.start), "steps": [{"op": s.op, "node": s.node, "dim": s.dim, "site": list(s.site)} for s in found.steps]}


def explanation_data(found: Explanation) -> dict[str, Any]:
    """An explanation by its parts."""
    parts = [
        {"group": p.group.name if p.group else None, "size": p.group.size if p.group else None, "frozen": reason_data(p.reason),
         "path": path_data(p.path), "coupled": [list(s) for s in p.coupled]}
        for p in found.parts
    ]
    return {"value": found.site[0], "axis": found.site[1], "length": found.length, "held": found.held, "groups": parts}
