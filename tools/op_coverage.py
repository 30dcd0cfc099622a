"""Which operators have a signature: `python -m tools.op_coverage [MODEL ...]`, for some models or for all of onnx.

Three answers: `signature` (its axes can shrink), `frozen` (it is known, nothing may be removed, with the cause) and
`unknown` (spa leaves it alone because nobody told it what the operator does).
"""

from __future__ import annotations

import argparse
import lzma
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import ModelProto

from spa.signatures import Refusal, operators, rule_of

DOMAINS = ("", "ai.onnx.ml", "ai.onnx.preview", "ai.onnx.preview.training")


@dataclass(frozen=True)
class Unseen:
    """A node of which nothing is known: only a rule that always refuses answers with the cause that it always has."""

    op: str
    domain: str
    opset: int = 0

    @property
    def attrs(self) -> dict[str, object]:
        """Asking for anything means that the answer depends on the node."""
        raise LookupError

    inputs = outputs = present = attrs

    def value(self, index: int) -> None:
        """As `attrs`."""
        raise LookupError

    constant = value


@dataclass(frozen=True)
class Coverage:
    """One operator: how often it occurs, and `signature`, `frozen` or `unknown`, with the cause of being frozen."""

    domain: str
    op: str
    count: int
    state: str
    cause: str = ""


def coverage_of(domain: str, op: str, count: int = 0) -> Coverage:
    """What the table says of one operator."""
    rule = rule_of(domain, op)
    if rule is None:
        return Coverage(domain, op, count, "unknown")
    try:
        answer = rule(Unseen(op, domain))  # type: ignore[arg-type]
    except LookupError:
        return Coverage(domain, op, count, "signature")
    return Coverage(domain, op, count, "frozen", answer.cause if isinstance(answer, Refusal) else "")


def in_onnx() -> Counter[tuple[str, str]]:
    """All operators of onnx and of the table."""
    known = {("" if s.domain == "ai.onnx" else s.domain, s.name) for s in onnx.defs.get_all_schemas() if s.domain in DOMAINS}
    return Counter(dict.fromkeys(known | set(operators()), 0))


def in_models(paths: Iterable[Path]) -> Counter[tuple[str, str]]:
    """Operators of models, with those of bodies and local functions."""
    found: Counter[tuple[str, str]] = Counter()
    for path in paths:
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        model = onnx.load_model_from_string(data)
        own = {(f.domain, f.name) for f in model.functions}
        found.update(k for k in _nodes(model) if k not in own)
    return found


def _nodes(model: ModelProto) -> Iterable[tuple[str, str]]:
    waiting = list(model.graph.node) + [n for f in model.functions for n in f.node]
    while waiting:
        node = waiting.pop()
        yield "" if node.domain == "ai.onnx" else node.domain, node.op_type
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                waiting += graph.node


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 1 if an operator is unknown."""
    parser = argparse.ArgumentParser(prog="python -m tools.op_coverage", description=__doc__)
    parser.add_argument("models", nargs="*", type=Path, help=".onnx or .onnx.xz files; without any, all operators of onnx")
    given = parser.parse_args(arguments)
    counts = in_models(given.models) if given.models else in_onnx()
    rows = [coverage_of(*key, n) for key, n in sorted(counts.items())]
    for row in rows:
        print(f"{row.domain or 'ai.onnx':26}{row.op:36}{row.count or '':>6}  {row.state:10}{row.cause}")
    states = Counter(row.state for row in rows)
    print(f"{len(rows)} operators: " + ", ".join(f"{states[s]} {s}" for s in ("signature", "frozen", "unknown")))
    return int(states["unknown"] > 0)


if __name__ == "__main__":
    sys.exit(main())
