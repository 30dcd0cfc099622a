"""Reporting races and profiles: tables for people, and plain data with exact numbers for JSON. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.text import Text

from spa.budgets.layout_proxy import Proxy
from spa.tables.report import LIMIT, Fitted, Name, Row, amount, count_of, duration, table
from spa.tables.report import race_data as race_data
from spa.timing.bench import Lap, Race
from spa.timing.profiling import Profile

CLOCKS = {"cpu": "CPU time", "wall": "wall time"}


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.1f} %"


def _span(low: float, high: float) -> str:
    return f"{100 * low:.1f} – {100 * high:.1f}"


def laps(race: Race, proxies: Mapping[str, Proxy] | None = None) -> RenderableType:
    """A race: times with ratios to the first and what may be said of them, then what goes with the clock, then the self-check."""
    clock = CLOCKS[race.primary]
    rows: list[Row] = [
        (Name(x.name), duration(x.median), duration(x.low), duration(x.wall if race.primary == "cpu" else x.high), _percent(x.ratio),
         _span(x.ratio_low, x.ratio_high) if x.verdict else "–", x.verdict)
        for x in race.laps
    ]
    threads = count_of(race.threads, "thread") if race.threads else "default threads"
    title = f"One run on {race.kind} {race.provider} ({race.version}), {threads}: median of {count_of(race.rounds, 'round')}"
    beside = ">wall time" if race.primary == "cpu" else ">upper quartile"
    head = ("model", f">{clock}", ">lower quartile", beside, ">to the first", ">95 % interval", "")
    shown = table(title, head, rows, limit=None)
    return Lines(shown, _beside(race.laps, proxies or {}), *map(_elsewhere, race.laps), _itself(race), Text(""))


def _beside(found: Sequence[Lap], proxies: Mapping[str, Proxy]) -> RenderableType:
    head, rows = ["model", ">load", ">first run", ">memory"], [
        [Name(x.name), duration(x.load), duration(x.first), "–" if x.memory is None else amount(x.memory, "B")] for x in found
    ]
    if proxies:
        blocks = sorted({p.block for p in proxies.values()})
        head += [">MACs", f">padded to {'/'.join(map(str, blocks))}"]
        layout = any(p.layout for p in proxies.values())
        head += [">Conv in blocks", ">nodes in blocks"] if layout else []
        for row, lap in zip(rows, found, strict=True):
            proxy = proxies.get(lap.name)
            row += [amount(proxy.macs), amount(proxy.padded_macs)] if proxy else ["–", "–"]
            if layout:
                row += _blocks(proxy)
    return table("Beside the clock", head, rows, limit=None)


def _blocks(proxy: Proxy | None) -> list[str]:
    if proxy is None or proxy.layout is None:
        return ["–", "–"]
    layout = proxy.layout
    return [f"{layout.blocked_convolutions} of {layout.convolutions}", f"{layout.blocked} of {layout.nodes}"]


def _elsewhere(lap: Lap) -> RenderableType:
    """Where a model's nodes ran, if not all on one provider; nothing else is worth a line."""
    placement = lap.placement
    if placement is None or (len(placement.nodes) <= 1 and not placement.fell_back and placement.proven):
        return Lines()
    where = ", ".join(f"{count_of(n, 'node')} on {name}" for name, n in placement.nodes.items())
    said = Fitted((Name(lap.name), f": {where or 'it does not say where nodes ran'}"), style="yellow")
    if not placement.fell_back:
        return said
    rows = [(Name(node), why) for node, why in placement.fell_back.items()]
    return Lines(said, table(f"Elsewhere than asked: {count_of(len(rows), 'node')}", ("node", "because"), rows))


def _itself(race: Race) -> RenderableType:
    if race.itself is None:
        return Lines()
    itself = race.itself
    says = f"the first model against itself, loaded twice: {_percent(itself.middle)} ({_span(itself.low, itself.high)})"
    if race.noisy:
        more = f"differences below {_percent(itself.offset)} say nothing"
        return Text(f"  The machine is too noisy: {says}, so {more}", style="yellow")
    return Text(f"  self-check: {says}", style="dim")


def profile_tables(profiles: Sequence[Profile]) -> RenderableType:
    """Where the time went, by operator and by node, before and after."""
    first = profiles[0]
    ops = {p.name: p.by_op() for p in profiles}
    rows: list[Row] = []
    names = sorted({op for found in ops.values() for op in found}, key=lambda op: -max(found.get(op, 0.0) for found in ops.values()))
    for op in names:
        cells = [duration(ops[p.name][op]) if op in ops[p.name] else "–" for p in profiles]
        rows.append((op, *cells, *(_left(ops[first.name].get(op), ops[p.name].get(op)) for p in profiles[1:])))
    rows.append(("all", *(duration(p.total) for p in profiles), *(_left(first.total, p.total) for p in profiles[1:])))
    heads = [f">{i + 1}" for i in range(len(profiles))]
    runs = min(p.runs for p in profiles)
    legend = Lines(*(Fitted((f"  {i + 1}: ", Name(p.name)), style="dim") for i, p in enumerate(profiles)), Text(""))
    head = ("operator", *heads, *(f">{h[1:]} / 1" for h in heads[1:]))
    title = f"Where the time goes: median of {count_of(runs, 'run')} each, which the profiler slows down"
    by_op = table(title, head, [*rows[: LIMIT - 1], rows[-1]] if len(rows) > LIMIT else rows, limit=None)
    return Lines(by_op, legend, *(_changes(first, p, i + 2) for i, p in enumerate(profiles[1:])))


def _left(old: float | None, new: float | None) -> str:
    return _percent(new / old) if old and new is not None else "–"


def _changes(first: Profile, other: Profile, number: int) -> RenderableType:
    """Nodes by how much their time changed."""
    rows = []
    for change in changes(first, other)[:LIMIT]:
        old, new = change["before"], change["after"]
        rows.append((Name(change["node"]), " → ".join(dict.fromkeys(o for o in change["ops"] if o)),
                     "–" if old is None else duration(old), "–" if new is None else duration(new), _signed(change["change"])))  # fmt: skip
    return table(f"Nodes that changed most, 1 to {number}", ("node", "ran as", ">1", f">{number}", ">change"), rows)


def _signed(seconds: float) -> str:
    return f"{'-' if seconds < 0 else '+'}{duration(abs(seconds))}"


def changes(first: Profile, other: Profile) -> list[dict[str, Any]]:
    """Nodes of two profiles, by how much their time changed; None where there is none such."""
    old, new = first.by_key(), other.by_key()
    found = []
    for key in dict.fromkeys((*old, *new)):
        pair = old.get(key), new.get(key)
        either = pair[0] or pair[1]
        assert either is not None
        times = [None if n is None else n.seconds for n in pair]
        ops = ["" if n is None else f"{n.op} in blocks" if n.blocked else n.op for n in pair]
        found.append({"node": either.node, "ops": ops, "before": times[0], "after": times[1],
                      "change": (times[1] or 0.0) - (times[0] or 0.0)})  # fmt: skip
    return sorted(found, key=lambda c: -abs(c["change"]))


# ---------------------------------------------------------------------- exact


def bench_data(race: Race, proxies: Mapping[str, Proxy], profiles: Sequence[Profile]) -> dict[str, Any]:
    """A race, what is counted beside it, and profiles."""
    data = {**(race_data(race) or {}), "proxies": {n: proxy_data(p) for n, p in proxies.items()}}
    if profiles:
        data["profiles"] = [profile_data(p) for p in profiles]
        data["changes"] = {p.name: changes(profiles[0], p) for p in profiles[1:]}
    return data


def proxy_data(proxy: Proxy) -> dict[str, Any]:
    """What is counted of a model."""
    layout = proxy.layout
    blocks = None if layout is None else {
        "nodes": layout.nodes, "blocked_nodes": layout.blocked, "reorders": layout.reorders, "convolutions": layout.convolutions,
        "blocked_convolutions": layout.blocked_convolutions,
    }
    return {"macs": proxy.macs, "padded_macs": proxy.padded_macs, "block": proxy.block, "layout": blocks}


def profile_data(profile: Profile) -> dict[str, Any]:
    """A profile in seconds a run."""
    nodes = [{"node": n.node, "value": n.key, "op": n.op, "provider": n.provider, "seconds": n.seconds, "blocked": n.blocked}
             for n in profile.nodes]  # fmt: skip
    return {"model": profile.name, "runs": profile.runs, "seconds": profile.total, "operators": profile.by_op(), "nodes": nodes}

