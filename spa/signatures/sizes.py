"""Sizes of dims and terms: what a signature says about shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from spa.signatures.table import Dim, One, Product, Signature, Sum, Term

Shape = tuple[int, ...]


def output_shape(signature: Signature, inputs: Sequence[Shape | None], index: int) -> Shape | None:
    """Shape of output `index` from a signature and the inputs' shapes; None if a dim's size is not in them."""
    sizes = dim_sizes(signature, inputs)
    axes = signature.outputs[index] if index < len(signature.outputs) else None
    if axes is None or sizes is None:
        return None
    found = [term_size(t, sizes) for t in axes]
    return None if any(n is None for n in found) else tuple(n for n in found if n is not None)


def term_size(term: Term, sizes: Mapping[str, int]) -> int | None:
    """Number of positions of a term; None if a dim's size is not known."""
    if isinstance(term, One):
        return 1
    if isinstance(term, Dim):
        return sizes.get(term.name)
    if not isinstance(term, Product | Sum):
        return len(term.index)
    parts = [term_size(p, sizes) for p in term.parts]
    if any(p is None for p in parts):
        return None
    known = [p for p in parts if p is not None]
    return int(np.prod(known)) if isinstance(term, Product) else sum(known)


def dim_sizes(signature: Signature, inputs: Sequence[Shape | None], outputs: Sequence[Shape | None] = ()) -> dict[str, int] | None:
    """Size of every dim, from operands' shapes; None if they contradict each other."""
    sizes = dict(signature.sizes)
    pairs = [(t, n) for operands, shapes in ((signature.inputs, inputs), (signature.outputs, outputs))
             for axes, shape in zip(operands, shapes, strict=False) if axes is not None and shape is not None
             for t, n in zip(axes, shape, strict=False)]
    if any(axes is not None and shape is not None and len(axes) != len(shape)
           for operands, shapes in ((signature.inputs, inputs), (signature.outputs, outputs))
           for axes, shape in zip(operands, shapes, strict=False)):
        return None
    for _ in range(3):
        for term, size in pairs:
            if not _solve(term, size, sizes):
                return None
    return sizes


def _solve(term: Term, size: int, sizes: dict[str, int]) -> bool:
    """Learns the size of a term's only unknown dim; False on a contradiction."""
    if isinstance(term, Dim):
        return sizes.setdefault(term.name, size) == size
    if isinstance(term, One) or not isinstance(term, Product | Sum):
        return True
    known = [term_size(p, sizes) for p in term.parts]
    missing = [p for p, n in zip(term.parts, known, strict=True) if n is None]
    have = [n for n in known if n is not None]
    if len(missing) > 1:
        return True
    if not missing:
        total = int(np.prod(have)) if isinstance(term, Product) else sum(have)
        return total == size
    if isinstance(term, Sum):
        return _solve(missing[0], size - sum(have), sizes)
    product = int(np.prod(have)) or 1
    return size % product == 0 and _solve(missing[0], size // product, sizes)
