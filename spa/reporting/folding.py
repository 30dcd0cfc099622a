"""Folding a long network into blocks that open: by the scopes in its names, or into pieces of even length cut where it is narrow.

A block is always a run of neighbours in the graph's order, so blocks lead to one another without a circle, whatever their names say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias

MOST = 150  # nodes that are drawn without folding
SHOWN = 48  # blocks and nodes that are aimed at beyond that
DEPTH = 16  # scopes within each other that are told apart
LARGE = 64  # nodes of a block that is opened further even so
PIECE = 32  # nodes of a piece of a network without scopes


@dataclass(frozen=True)
class Block:
    """A run of nodes, start … stop - 1 among those that are drawn, under one name; `parts` are what it shows when it opens."""

    name: str
    start: int
    stop: int
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """Nodes in it."""
        return self.stop - self.start


Part: TypeAlias = "Block | int"


def folded(nodes: Sequence[Mapping[str, Any]]) -> tuple[Part, ...]:
    """What is shown of nodes (of `spa.reporting.network`) before anything is opened: all of them, or blocks."""
    if len(nodes) <= MOST:
        return tuple(range(len(nodes)))
    return _shown(tuple(_tree(scopes(nodes), 0, len(nodes), 0)), nodes)


def scopes(nodes: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Where each node stands in the modules of the program that the graph came from, as far as names tell.

    "/layer1/layer1.0/Conv" stands in layer1, layer1.0; a node without such a name where its first weight does, "layer1.0.weight" in
    layer1, 0; one without either where the node before it does.
    """
    found: list[tuple[str, ...]] = []
    for node in nodes:
        parts = tuple(p for p in str(node["name"]).split("/") if p)
        if "/" not in node["name"] and node["weights"]:
            parts = tuple(str(node["weights"][0]["name"]).split("."))
        known = "/" in node["name"] or len(parts) > 1
        found.append(parts[:-1][:DEPTH] if known else found[-1] if found else ())
    return found


def _tree(places: Sequence[tuple[str, ...]], start: int, stop: int, depth: int) -> Iterator[Part]:
    def scope(i: int) -> str:
        return places[i][depth] if len(places[i]) > depth else ""

    for name, run in groupby(range(start, stop), scope):
        members = list(run)
        if not name or len(members) == 1:
            yield from members
            continue
        parts = tuple(_tree(places, members[0], members[-1] + 1, depth + 1))
        if len(parts) == 1 and isinstance(parts[0], Block):
            inner = parts[0]
            yield Block(_joined(name, inner.name), inner.start, inner.stop, inner.parts)
        else:
            yield Block(name, members[0], members[-1] + 1, parts)


def _joined(outer: str, inner: str) -> str:
    """One name for what is in a block: "blocks" and "blocks.1" say it twice, "stem" and "conv" do not."""
    if inner.startswith(f"{outer}."):
        return inner
    first = inner.partition(".")[0]
    return outer + inner[len(first) :] if outer.rpartition(".")[2] == first and first != inner else f"{outer}.{inner}"


def _shown(parts: tuple[Part, ...], nodes: Sequence[Mapping[str, Any]]) -> tuple[Part, ...]:
    """Opens blocks until about SHOWN are seen, cuts what is too long into pieces, and prepares what each block shows when opened."""
    while True:
        opened = _opened(parts, 2)
        if opened == parts or len(opened) > SHOWN:
            opened = _opened(parts, LARGE)
        if opened == parts or len(opened) > 2 * SHOWN:
            break
        parts = opened
    if len(parts) > MOST:
        parts = _pieces(parts, nodes)
    return tuple(p if isinstance(p, int) else _inside(p, nodes) for p in parts)


def _opened(parts: Sequence[Part], least: int) -> tuple[Part, ...]:
    """The parts, with blocks of at least so many nodes replaced by what they hold; its names tell where that came from."""
    found: list[Part] = []
    for part in parts:
        if isinstance(part, int) or part.size < least:
            found.append(part)
        else:
            found += [p if isinstance(p, int) else Block(_joined(part.name, p.name), p.start, p.stop, p.parts) for p in part.parts]
    return tuple(found)


def _inside(block: Block, nodes: Sequence[Mapping[str, Any]]) -> Block:
    flat = block.size <= MOST
    parts = tuple(range(block.start, block.stop)) if flat else _shown(block.parts, nodes)
    return Block(block.name, block.start, block.stop, parts)


def _pieces(parts: Sequence[Part], nodes: Sequence[Mapping[str, Any]]) -> tuple[Part, ...]:
    """Runs of parts as blocks, each cut where the fewest values pass, near an even length."""
    even = max(PIECE, -(-len(parts) // SHOWN))
    first = [p if isinstance(p, int) else p.start for p in parts] + [_end(parts[-1])]
    passing = _passing(nodes)
    found: list[Part] = []
    start = 0
    while start < len(parts):
        ends = range(start + even * 3 // 4, min(start + even * 5 // 4, len(parts)) + 1)
        near = len(parts) - start <= even * 5 // 4
        stop = len(parts) if near else min(ends, key=lambda e: (passing[first[e]], abs(e - start - even)))
        here = tuple(parts[start:stop])
        name = f"nodes {first[start] + 1} to {first[stop]}"
        found.append(here[0] if len(here) == 1 else Block(name, first[start], first[stop], here))
        start = stop
    return tuple(found)


def _end(part: Part) -> int:
    return part + 1 if isinstance(part, int) else part.stop


def _passing(nodes: Sequence[Mapping[str, Any]]) -> list[int]:
    """How many values pass between node i - 1 and node i."""
    made = {v: i for i, node in enumerate(nodes) for v in node["outputs"]}
    last: dict[str, int] = {}
    for i, node in enumerate(nodes):
        last.update({v: i for v in node["inputs"] if v in made})
    change = [0] * (len(nodes) + 2)
    for value, end in last.items():
        change[made[value] + 1] += 1
        change[max(end, made[value]) + 1] -= 1
    found, now = [], 0
    for step in change:
        now += step
        found.append(now)
    return found
