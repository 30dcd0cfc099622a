"""The picture of the network: what is drawn where, out of the report's dictionary. The template turns it into SVG.

A picture is a tree of *frames*: the whole network, and the inside of every block. A frame holds items (nodes, blocks, inputs and
outputs of the network, and *ends*: what a block's inside is fed by and feeds) and wires between them. A wire carries what an item
gives, with its widths before -> after.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from spa.graph.explain import printable
from spa.reporting.folding import Block, Part, folded
from spa.reporting.layout import arrange
from spa.tables.report import shorten

ROW = 34.0  # between rows, where widths are written
HEAD = 30.0  # of an open block, where its name stands
PAD = 14.0  # around what an open block shows
LETTER = 7.7  # mean width of a letter in a box
LABEL = 6.4  # of one beside a wire


@dataclass(frozen=True)
class Item:
    """A box with its centre and size. lines: what stands in it. inside: number of the frame that it opens, -1 for none."""

    kind: str  # node, block, input, output, end
    lines: tuple[str, ...]
    status: str
    x: float = 0.0
    y: float = 0.0
    width: float = 0.0
    height: float = 0.0
    inside: int = -1
    node: int = -1
    tip: str = ""
    heat: int = 0  # 0 to 4: how much of it went
    begins: bool = False


@dataclass(frozen=True)
class Frame:
    """Items, and bends behind them as (x, row); rows of numbers; links between neighbouring rows; what stands beside items' wires."""

    items: tuple[Item, ...]
    bends: tuple[float, ...]
    rows: tuple[tuple[int, ...], ...]
    links: tuple[tuple[int, int, str], ...]
    labels: Mapping[int, str]
    width: float
    height: float


@dataclass
class Picture:
    """Frames, the whole network's first; and the nodes that are drawn. `left_out`: nodes that compute sizes and constants."""

    frames: list[Frame] = field(default_factory=list)
    nodes: list[Mapping[str, Any]] = field(default_factory=list)
    left_out: int = 0
    blocks: int = 0


def picture(network: Mapping[str, Any]) -> Picture:
    """Lays the network out, folded into blocks where it is long."""
    nodes = [n for n in network["nodes"] if not n["static"]]
    found = Picture(nodes=nodes, left_out=len(network["nodes"]) - len(nodes))
    _Artist(network, nodes, found).frame(folded(nodes), None)
    return found


def width_text(value: Mapping[str, Any]) -> str:
    """Widths of a value's channel axes: "64", "64→32", "8 × 64→32"; nothing where it has no such axis."""
    if value["before"] is None:
        return ""
    pairs = [(value["before"][i], value["after"][i]) for i in value["channels"]]
    return " × ".join(str(a) if a == b else f"{a}→{b}" for a, b in pairs)


def shape_text(value: Mapping[str, Any]) -> str:
    """A whole shape: "? × 64→32 × 56 × 56", with ? for axes that the model leaves open."""
    if value["before"] is None:
        return "unknown shape"
    pairs = zip(value["before"], value["after"], strict=True)
    sizes = ["?" if i in value["free"] else str(a) if a == b else f"{a}→{b}" for i, (a, b) in enumerate(pairs)]
    return " × ".join(sizes) or "a single number"


def share_gone(node: Mapping[str, Any]) -> float | None:
    """Share of a node's MACs that went, or of its parameters where it has no MACs; None where it has neither."""
    for what in ("macs", "parameters"):
        if node[f"{what}_before"]:
            return 1 - float(node[f"{what}_after"]) / float(node[f"{what}_before"])
    return None


class _Artist:
    def __init__(self, network: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]], found: Picture) -> None:
        self.network, self.nodes, self.found = network, nodes, found
        self.made = {v: i for i, node in enumerate(nodes) for v in node["outputs"]}
        self.read: dict[str, list[int]] = {}
        for i, node in enumerate(nodes):
            for value in node["inputs"]:
                self.read.setdefault(value, []).append(i)

    def frame(self, parts: Sequence[Part], block: Block | None) -> int:
        """Number of a new frame that shows parts: the whole network, or a block's inside between its ends."""
        number = len(self.found.frames)
        self.found.frames.append(Frame((), (), (), (), {}, 0, 0))  # keeps the place: frames inside come after
        sources, sinks = self._whole() if block is None else self._ends(block)
        items = [i for i, _ in sources]
        place: dict[int, int] = {}
        for part in parts:
            for node in range(part.start, part.stop) if isinstance(part, Block) else (part,):
                place[node] = len(items)
            items.append(self._node(part) if isinstance(part, int) else self._block(part))
        wires: dict[int, set[int]] = {}
        values: dict[int, list[str]] = {}
        for at, (_, carried) in enumerate(sources):
            for value in carried:
                ends = {place[r] for r in self.read.get(value, ()) if r in place}
                wires.setdefault(at, set()).update(ends)
                values.setdefault(at, []).append(value)
        last = len(items)
        items += [i for i, _ in sinks]
        for node, at in place.items():
            for value in self.nodes[node]["outputs"]:
                ends = {place[r] for r in self.read.get(value, ()) if r in place} - {at}
                ends |= {last + k for k, (_, taken) in enumerate(sinks) if value in taken}
                if ends:
                    wires.setdefault(at, set()).update(ends)
                    values.setdefault(at, []).append(value)
        labels = {at: text for at, carried in values.items() if (text := self._widths(carried))}
        self.found.frames[number] = _framed(items, [(a, sorted(e)) for a, e in wires.items()], labels)
        return number

    def _whole(self) -> tuple[list[tuple[Item, list[str]]], list[tuple[Item, list[str]]]]:
        """Inputs and outputs of the network, with the values that they carry."""
        def item(kind: str, name: str) -> Item:
            value = self.network["values"].get(name)
            shape = "" if value is None else shape_text(value)
            return _sized(Item(kind, (shorten(name, 28), shape), kind, tip=f"{kind} {printable(name)}\n{shape}"))

        return ([(item("input", n), [n]) for n in self.network["inputs"]],
                [(item("output", n), [n]) for n in self.network["outputs"] if n in self.made or n in self.network["inputs"]])

    def _ends(self, block: Block) -> tuple[list[tuple[Item, list[str]]], list[tuple[Item, list[str]]]]:
        """What feeds a block from outside, by the node that gives it, and what reads it outside."""
        inside = range(block.start, block.stop)
        fed: dict[str, list[str]] = {}
        for value in dict.fromkeys(v for i in inside for v in self.nodes[i]["inputs"]):
            maker = self.made.get(value)
            if maker is None and value in self.network["inputs"]:
                fed.setdefault(value, []).append(value)
            elif maker is not None and maker not in inside:
                fed.setdefault(self.nodes[maker]["op"], []).append(value)
        feeds: dict[str, list[str]] = {}
        for value in (v for i in inside for v in self.nodes[i]["outputs"]):
            for reader in self.read.get(value, ()):
                if reader not in inside and value not in feeds.setdefault(self.nodes[reader]["op"], []):
                    feeds[self.nodes[reader]["op"]].append(value)
            if value in self.network["outputs"]:
                feeds.setdefault(value, []).append(value)

        def item(way: str, name: str) -> Item:
            return _sized(Item("end", (f"{way} {shorten(name, 24)}",), "plain", tip=f"{way} {printable(name)}, outside"))

        return [(item("from", n), v) for n, v in fed.items()], [(item("to", n), v) for n, v in feeds.items()]

    def _widths(self, values: Sequence[str]) -> str:
        known = [self.network["values"][v] for v in dict.fromkeys(values) if v in self.network["values"]]
        texts = list(dict.fromkeys(t for v in known if (t := width_text(v))))
        return ", ".join(texts[:2]) + (", …" if len(texts) > 2 else "")

    def _node(self, number: int) -> Item:
        node = self.nodes[number]
        gone = share_gone(node)
        what = "MACs" if node["macs_before"] else "parameters"
        second = {"frozen": "frozen", "whole": "kept whole"}.get(node["status"], "")
        if node["status"] == "pruned" and gone:
            second = f"−{100 * gone:.0f} % {what}"
        lines = (shorten(node["op"], 26), *((second,) if second else ()))
        return _sized(Item("node", lines, node["status"], node=number, tip=self._tip(node), heat=_heat(gone, node["status"]),
                           begins=bool(node["begins"])))

    def _tip(self, node: Mapping[str, Any]) -> str:
        """What a pointer that rests on a node is told, with or without scripts."""
        gives = [f"gives {shape_text(self.network['values'][v])}" for v in node["outputs"] if v in self.network["values"]]
        why = [f"stays: {r}" for r in node["reasons"]] if node["status"] in ("frozen", "plain") else []
        return "\n".join(printable(t) for t in (f"{node['op']} {node['name']}", *gives, *why))

    def _block(self, block: Block) -> Item:
        members = self.nodes[block.start:block.stop]
        total = {k: sum(n[k] for n in members) for k in ("macs_before", "macs_after", "parameters_before", "parameters_after")}
        gone = share_gone(total)
        statuses = {n["status"] for n in members}
        status = next(s for s in ("pruned", "whole", "frozen", "plain") if s in statuses)
        second = f"{block.size} nodes" + (f", −{100 * gone:.0f} % {'MACs' if total['macs_before'] else 'parameters'}" if gone else "")
        begins = sum(bool(n["begins"]) for n in members)
        tip = "\n".join([f"block {printable(block.name)}", second, *([f"channels freeze at {begins} of its nodes"] if begins else [])])
        self.found.blocks += 1
        found = Item("block", (_tail(block.name), second), status, tip=tip, heat=_heat(gone, status),
                     begins=begins > 0, inside=self.frame(block.parts, block))
        return _sized(found)


def _tail(name: str, width: int = 28) -> str:
    """The end of a block's name, cut at a dot: what comes first is the same for its neighbours."""
    text = printable(name)
    parts = text.split(".")
    while len(parts) > 1 and len(".".join(parts)) > width:
        parts = parts[1:]
    short = ".".join(parts)
    return shorten(short if short == text else f"…{short}", width)


def _heat(gone: float | None, status: str) -> int:
    """How strongly a box is coloured: 0 where nothing went, to 4 from three quarters on."""
    if status != "pruned":
        return 0
    return 1 if not gone else min(1 + int(gone * 4), 4)


def _sized(item: Item) -> Item:
    """The item with the size that its lines need."""
    longest = max(len(item.lines[0]) * LETTER, *(len(t) * LETTER * 0.88 for t in item.lines[1:]), 0)
    room = {"block": 50.0, "end": 18.0}.get(item.kind, 24.0)
    height = {1: 22.0 if item.kind == "end" else 28.0, 2: 44.0}[len(item.lines)]
    return replace(item, width=round(max(longest + room, 64.0), 1), height=height)


def _framed(items: Sequence[Item], wires: Sequence[tuple[int, Sequence[int]]], labels: Mapping[int, str]) -> Frame:
    """The frame with everything in its place: rows below each other, boxes in the middle of their rows."""
    found = arrange([max(i.width, 2 * LABEL * len(labels.get(n, ""))) for n, i in enumerate(items)], wires)
    placed = list(items)
    ends: dict[int, tuple[float, float, float]] = {}  # centre, head and foot of boxes and bends
    y = 0.0
    for row in found.rows:
        height = max((items[n].height for n in row if n < len(items)), default=0.0)
        for n in row:
            head, foot = y, y + height
            if n < len(items):
                placed[n] = replace(items[n], x=found.x[n], y=round(y + height / 2, 1))
                head, foot = placed[n].y - items[n].height / 2, placed[n].y + items[n].height / 2
            ends[n] = found.x[n], head, foot
        y += height + ROW
    links = tuple((a, b, curve(ends[a], ends[b], b >= len(items))) for a, b in found.links)
    sides = [i.x + max(i.width / 2, LABEL * len(labels.get(n, "")) + 6) for n, i in enumerate(placed)]
    bends = tuple(found.x[len(items):])
    return Frame(tuple(placed), bends, found.rows, links, labels, math.ceil(max([*sides, *bends], default=0.0)), max(y - ROW, 0.0))


def curve(one: tuple[float, float, float], other: tuple[float, float, float], through: bool) -> str:
    """A line from the foot of one (x, head, foot) to the head of another, and through it if it is a bend."""
    (x1, _, y1), (x2, y2, foot) = one, other
    half = (y2 - y1) / 2
    return f"M{x1:.1f} {y1:.1f}C{x1:.1f} {y1 + half:.1f} {x2:.1f} {y2 - half:.1f} {x2:.1f} {y2:.1f}" + (f"V{foot:.1f}" if through else "")
