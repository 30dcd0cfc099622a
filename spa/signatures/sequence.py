"""Recurrent layers."""

from __future__ import annotations

from spa.signatures.table import (
    FIXED,
    MAP,
    SUM,
    Carry,
    Dim,
    Linear,
    NodeView,
    Product,
    Refusal,
    Signature,
    make,
    signature,
)

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@signature("LSTM", "GRU", "RNN")
def recurrent(node: NodeView) -> Signature | Refusal:
    """Hidden units go one by one, in both directions alike.

    In the masked form a unit has no parameters, and its column of the recurrent weight is zero: no other unit sees it.
    """
    gates = GATES[node.op]
    time = "b t" if node.attrs.get("layout") else "t b"
    state = "b r h" if node.attrs.get("layout") else "r b h"
    out = "b t r h" if node.attrs.get("layout") else "t r b h"
    both = (Dim("r"), Product((Dim("both"), Dim("gate"), Dim("h"))))  # biases of the input first, of the hidden state second
    return make(
        node,
        f"{time} i, r (gate h) i, r (gate h) h, r ({2 * gates} h), b, {state}, {state}, r (3 h) -> {out}, {state}, {state}",
        sizes={"gate": gates},
        carries=[Carry("hidden_size", Dim("h"))],
        causes={"t": "is time", "r": "counts directions", "gate": "counts parts that the operator always has"},
        macs=(("t", "b", "r", gates, "h", "i"), ("t", "b", "r", gates, "h", "h")),
        linear=(Linear(0, 1, 3, spread=both),),
        t=FIXED, r=FIXED, gate=FIXED, b=MAP, i=SUM, h=SUM,
    )
