"""Normalisations. What they take a mean over is STAT: over the kept positions, once some are gone."""

from __future__ import annotations

from dataclasses import replace

from spa.signatures.elementwise import spread
from spa.signatures.table import (
    FIXED,
    MAP,
    STAT,
    Carry,
    Dim,
    NodeView,
    One,
    Operand,
    Parted,
    Refusal,
    Signature,
    axis_of,
    ints,
    make,
    signature,
)

CENTRED = frozenset({"LayerNormalization", "SkipLayerNormalization"})  # these take the mean off, and have a bias


@signature("BatchNormalization", "SpatialBN")
def batch_normalization(node: NodeView) -> Signature | Refusal:
    """Stored statistics, one a channel: each channel alone. In training mode, statistics of the batch and of space."""
    shape = node.inputs[0]
    if node.attrs.get("training_mode"):
        return make(node, "n c *s, c, c, c, c -> n c *s, c, c", c=MAP, n=STAT, s=STAT)
    if any(s is not None for s in node.outputs[1:]):
        return Refusal("it gives running statistics, as in training")
    if shape is not None and len(shape) == 1:
        return make(node, "c, c, c, c, c -> c")
    made = make(node, "n c *s, c, c, c, c -> n c *s", c=MAP, moments=(3, 4))
    return made if isinstance(made, Refusal) else replace(made, straight=(0,))


@signature("InstanceNormalization")
def instance_normalization(node: NodeView) -> Signature | Refusal:
    """Mean over space, each channel alone."""
    return make(node, "n c *s, c, c -> n c *s", c=MAP, s=STAT)


@signature("GroupNormalization")
def group_normalization(node: NodeView) -> Signature | Refusal:
    """Mean over the channels of a group; scale and bias per group until opset 20, per channel from 21 on."""
    scale = "(g c)" if node.opset >= 21 else "g"
    groups = int(node.attrs["num_groups"])
    return make(
        node,
        f"n (g c) *s, {scale}, {scale} -> n (g c) *s",
        sizes={"g": groups},
        carries=[Carry("num_groups", Dim("g"))],
        c=STAT,
        s=STAT,
    )


@signature("LRN")
def local_response(node: NodeView) -> Signature | Refusal:
    """Divides by a sum over neighbouring channels: the neighbours are those that are kept."""
    return make(node, "n c *s -> n c *s", c=STAT, s=MAP)


@signature("MeanVarianceNormalization")
def mean_variance(node: NodeView) -> Signature | Refusal:
    """Mean over the listed axes."""
    shape = node.inputs[0]
    if shape is None:
        return Refusal("its shape is unknown")
    default = (0, 1, 2, 3) if node.attrs.get("across_channels") else (0, 2, 3)
    axes = {a % len(shape) for a in ints(node.attrs.get("axes", default)) or ()}
    terms = tuple(Dim(f"r.{i}" if i in axes else f"a.{i}") for i in range(len(shape)))
    return Signature((terms,), (terms,), {"r": STAT, "a": MAP})


def _layer(node: NodeView, data: int, skips: tuple[int, ...], scales: tuple[int, ...], sums: tuple[int, ...]) -> Signature | Refusal:
    shape = node.inputs[0]
    if shape is None:
        return Refusal("its shape is unknown")
    rank = len(shape)
    axis = axis_of(node, -1, rank)
    names = [f"r.{i}" if i >= axis else f"a.{i}" for i in range(rank)]
    whole: Operand = tuple(map(Dim, names))
    inputs = tuple(
        (whole if i == data or (i in skips and s == shape) else spread(s, shape, names)) for i, s in enumerate(node.inputs)
    )
    reduced: Operand = tuple(One() if i >= axis else Dim(n) for i, n in enumerate(names))
    outputs = tuple(whole if i == 0 or i in sums else reduced for i in range(len(node.outputs)))
    scale = scales[0] if len(node.inputs) > scales[0] and node.present[scales[0]] else None
    bias = scales[1] if len(node.inputs) > scales[1] and node.present[scales[1]] and node.op in CENTRED else None
    adds = (data, *skips) if skips else ()
    return Signature(inputs, outputs, {"r": STAT, "a": MAP}, affine=None if scale is None else (scale, bias), adds=adds)


@signature("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
def layer_normalization(node: NodeView) -> Signature | Refusal:
    """Mean over the axes from `axis` on; scale and bias are spread over them."""
    return _layer(node, 0, (), (1, 2), ())


@signature("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain="com.microsoft")
def skip_layer_normalization(node: NodeView) -> Signature | Refusal:
    """LayerNormalization of a sum; the fourth output is the sum."""
    made = _layer(node, 0, (1,), (2, 3, 4), (3,))
    if isinstance(made, Refusal) or node.inputs[0] != node.inputs[1]:
        return made
    centred = node.op in CENTRED
    op, stored, rest = ("LayerNormalization", (4,), (2, 3)) if centred else ("SimplifiedLayerNormalization", (3,), (2,))
    return replace(made, parted=Parted(op, "", (0, 1), stored, rest, 3, {"epsilon": 1e-12 if centred else 1e-5, "axis": -1}))


@signature("EmbedLayerNormalization", domain="com.microsoft")
def embed_layer_normalization(node: NodeView) -> Signature | Refusal:
    """LayerNormalization of the sum of three embeddings (row, h); the third output is the sum. Positions count from 0 if none are given."""
    rows = {"row": 0, "segment": 1} | ({"place": 8} if len(node.inputs) > 8 and node.present[8] else {})
    return make(
        node, "b s, b s, row h, place h, segment h, h, h, -, c s -> b s h, b, b s h", picked=rows, affine=(5, 6), h=STAT,
        causes={**dict.fromkeys(("row", "place", "segment"), "is looked up by data"), **dict.fromkeys("bsc", "holds positions")},
        kinds=dict.fromkeys(("row", "place", "segment", "b", "s", "c"), FIXED),
    )


signature("SimplifiedLayerNormalization", domain="com.microsoft")(layer_normalization)
signature("LayerNormalization", domain="com.microsoft")(layer_normalization)
