"""A proxy for latency that is the same on every run: what widths cost, counted instead of timed.

*Padded MACs*: kernels work on whole blocks of channels (16 on the CPU provider with AVX-512), so each width is counted rounded up to the
block. *Blocks of channels*: on x86-64 ONNX Runtime's CPU provider keeps activations in such blocks (NCHWc) between the layers that can
take them; a convolution whose input width 4 does not divide leaves the layout and gets slower than a wider one (docs/widths.md). How many
nodes of the optimised graph are in it is read off that graph.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from spa.graph.count import macs_terms
from spa.graph.groups import Groups, Kept
from spa.graph.trace import NodeTrace
from spa.proof.check import session
from spa.proof.feeds import free_batch
from spa.signatures import FIXED
from spa.signatures.table import Dim, dims_of, kind_of
from spa.storage.store import Model

# Names in ONNX Runtime's own graph, made after ours from what it was given: nothing is pruned there, so no rule of the table is about them.
BLOCKED = "com.microsoft.nchwc"
_REORDERS = {"ReorderInput", "ReorderOutput"}
_CONVOLUTIONS = {"Conv", "FusedConv"}


@dataclass(frozen=True)
class Layout:
    """Nodes of the graph that ONNX Runtime's CPU provider runs, after its own optimisation on this machine.

    blocked: those that work on blocks of channels. reorders: those that only change the layout. convolutions, and how many of them
    are blocked.
    """

    nodes: int
    blocked: int
    reorders: int
    convolutions: int
    blocked_convolutions: int


@dataclass(frozen=True)
class Proxy:
    """MACs of one sample, the same with every width rounded up to `block`, and the layout (None where it was not asked for)."""

    macs: int
    padded_macs: int
    block: int
    layout: Layout | None = None


def layout_of(model: Model) -> Layout:
    """How much of a model is in blocks of channels. Raises UnsupportedModel if ONNX Runtime does not load it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        session(model, threads=1, optimized=path)  # weights go to a file beside it, which is not read
        nodes = ModelProto.FromString(path.read_bytes()).graph.node
    inside = [n for n in nodes if n.domain == BLOCKED]
    convolutions = [n for n in nodes if n.op_type in _CONVOLUTIONS]
    return Layout(
        len(nodes),
        sum(n.op_type not in _REORDERS for n in inside),
        sum(n.op_type in _REORDERS for n in inside),
        len(convolutions),
        sum(n.domain == BLOCKED for n in convolutions),
    )


def padded_macs(groups: Groups, block: int, removed: NDArray[np.bool_] | None = None) -> tuple[int, int]:
    """MACs of one sample, exact and with widths rounded up to the block. `removed` is a mask over all coordinates.

    Widths are the channel axes of layers with stored weights: (c) and (o) of a convolution, (g c) and (g o) of one in groups, where a
    depthwise one's are the same; (k) and (n) of a matrix product. What the graph is given has the width that it has, and products of two
    activations count as they are.
    """
    kept = Kept(groups, np.zeros(groups.total, bool) if removed is None else removed)
    exact, padded = 0, Fraction(0)
    for node in groups.traced.nodes:
        sizes = {n: _length(kept, node, n) for n in node.dims}
        widths = _widths(groups, node, sizes)
        for times, dims in macs_terms(node):
            product = math.prod((sizes[d] for d in dims if d in sizes), start=times)
            exact += product
            padded += product * _padding(widths, dims, sizes, block)
    batch = free_batch(groups.traced)
    return exact // batch, math.ceil(padded / batch)


def proxy(model: Model, groups: Groups, block: int, *, layout: bool = True) -> Proxy:
    """All that is counted of a model. `layout`: whether the CPU provider's layout matters where it will run."""
    exact, padded = padded_macs(groups, block)
    return Proxy(exact, padded, block, layout_of(model) if layout else None)


def _length(kept: Kept, node: NodeTrace, dim: str) -> int:
    keep = kept.dim(node.dims[dim])
    return node.dims[dim].length if keep is None else int(np.count_nonzero(keep))


def _padding(widths: set[frozenset[str]], dims: Sequence[str], sizes: Mapping[str, int], block: int) -> Fraction:
    """By how much rounding widths up multiplies a product of dims; one that stands in it twice (a recurrent unit) counts twice."""
    found = Fraction(1)
    for width in widths:
        length = math.prod(sizes[d] for d in width)
        if length:
            found *= Fraction(-(-length // block) * block, length) ** min(dims.count(d) for d in width)
    return found


def _widths(groups: Groups, node: NodeTrace, sizes: Mapping[str, int]) -> set[frozenset[str]]:
    """The node's channel axes, each as the dims (longer than 1) that it is a product of; parts of another one are left out.

    Dims that all operands and the result have as they are (`batch`) count separate products, they are no width of one.
    """
    signature = node.signature
    if signature is None or not signature.macs:
        return set()
    operands = [(t.name, o) for t, o in zip(node.node.inputs, signature.inputs, strict=False) if o is not None]
    given = {t.name for t in groups.traced.graph.inputs}
    stored = {d for name, o in operands if name in groups.traced.constants and len(o) > 1 for term in o for d in dims_of(term)}
    results = [o for o in signature.outputs[:1] if o is not None]
    batch = set.intersection(*({t.name for t in o if isinstance(t, Dim)} for o in (*(o for _, o in operands if len(o) > 1), *results)))
    outside = {d for name, o in operands if name in given for term in o for d in dims_of(term)}
    ours = {d for d in stored - batch - outside if kind_of(signature, d) is not FIXED and sizes.get(d, 1) > 1}
    found = set()
    for operand in (*(o for _, o in operands), *results):
        for term in operand:
            dims = {d for d in dims_of(term) if sizes.get(d, 1) > 1}
            if dims and dims <= ours:
                found.add(frozenset(dims))
    return {width for width in found if not any(width < other for other in found)}
