"""What operators do to vectors that are turned: the table that `spa.exact.stream` reads.

A turned vector u stands for v = Q u, Q orthogonal. Sums of such vectors, and their products with one number, are turned alike; lengths
are the same; whatever looks at single elements is not.
"""

from __future__ import annotations

from spa.signatures.arithmetic import KEEPS_VALUES, READS_SHAPE

_ROLES = {
    "size": READS_SHAPE,
    "same": {"Identity", "Cast", "CastLike", "Dropout"} | KEEPS_VALUES,
    "sum": {"Add", "Sum"},
    "difference": {"Sub"},
    "product": {"Mul"},
    "quotient": {"Div"},
    "power": {"Pow"},
    "mean": {"ReduceMean"},
    "total": {"ReduceSum"},
    "length": {"ReduceL2", "ReduceSumSquare"},
    "centred norm": {"LayerNormalization"},
    "norm": {"RMSNormalization", "SimplifiedLayerNormalization"},
}
_BY_OPERATOR = {op: role for role, ops in _ROLES.items() for op in ops}
_EPSILON = 1e-5
_DOMAINS = ("", "ai.onnx", "com.microsoft")


def role_of(domain: str | None, op: str) -> str | None:
    """What an operator does to turned vectors, in one word; None if it is nothing that keeps them turned."""
    return _BY_OPERATOR.get(op) if (domain or "") in _DOMAINS else None


def epsilon_of(attributes: dict[str, object]) -> float:
    """What a norm adds to the mean square."""
    return float(attributes.get("epsilon", _EPSILON))  # type: ignore[arg-type]
